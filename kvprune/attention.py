"""Attention over a pruned cache, and its registration with transformers.

Outputs are those of the model's own softmax attention, exact. Shapes: queries `[B, Hq, L, D]`, keys `[B, Hkv, S, D]`,
values `[B, Hkv, S, Dv]`, outputs `[B, Hq, L, Dv]`.

One registered name per base attention (`kvprune_sdpa`, `kvprune_eager`, ...) keeps the model's own attention in the
name, so no state is kept anywhere: every cache that is not a `PrunedCache`, and every layer that is not pruned, goes to
that attention with that attention's own mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kvprune.errors import CacheError, UnsupportedModelError
from kvprune.mass import Scoring, grouped, hidden_keys, row_blocks, row_probabilities

if TYPE_CHECKING:
    from kvprune.cache import PrunedCache

PREFIX = "kvprune_"
# "flash" in a name makes transformers look for the flash-attn package under that very name (5.23).
_ALIASES = {"flash": "fa"}


class CacheLength(int):
    """The key length that a `PrunedCache` reports to transformers: an int that says whose it is.

    A mask function is not told which cache its mask is for; this length is all that reaches it.
    """


class PendingKeys(Tensor):
    """The keys that `PrunedCache.update` returns: a claim ticket for the kvprune attention, and of no use elsewhere.

    An attention that does not know kvprune would attend to the step's own tokens alone, and nobody would notice; and a
    model that transforms its keys after caching them would not attend to what is cached. Any use raises CacheError.
    """

    cache: PrunedCache

    @classmethod
    def of(cls, keys: Tensor, cache: PrunedCache) -> PendingKeys:
        pending = keys.detach().as_subclass(cls)
        pending.cache = cache
        return pending

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ == "__get__":  # shape, dtype, device
                return func(*args, **(kwargs or {}))
            keys = args[0]
            if func is Tensor.to and isinstance(keys, cls) and func(*args, **(kwargs or {})) is keys:
                return keys  # a cast that casts nothing
        caches = [item.cache for arg in args for item in (arg if isinstance(arg, list | tuple) else (arg,))
                  if isinstance(item, cls)]  # fmt: skip
        raise caches[0].bypassed() if caches else CacheError("the keys of a PrunedCache met another attention.")


# -- backends ----------------------------------------------------------------------------------------------------------


def fused_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None, causal: bool = False
) -> Tensor:
    """torch's scaled_dot_product_attention over grouped heads. visible: bool `[B or 1, Hq or 1, L, S]`."""
    group = queries.shape[1] // keys.shape[1]
    if visible is not None and queries.is_cuda and group > 1:  # masked GQA would fall back to the slow math kernel
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        group = 1
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=group > 1
    )


@cache
def _tells_lse(group: int) -> bool:
    """Whether the flash attention that PyTorch runs on a CPU can be called for its log-sum-exp, too."""
    try:
        one = torch.zeros(1, 1, 1, 16)
        queries = one.expand(1, group, 1, 16)
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, one, one, 0.0, False)
    except (AttributeError, RuntimeError):  # of no promised interface, and not for groups in every version
        return False
    return True


def whole_attention(queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Every query sees the keys up to its own: output, and log-sum-exp of the logits `[B, Hq, L]` where it is told."""
    same_dims = queries.shape[3] == values.shape[3]
    if scoring.plain and queries.device.type == "cpu" and same_dims and _tells_lse(queries.shape[1] // keys.shape[1]):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, True, scale=scoring.scale
        )
    return causal_attention(queries, keys, values, scoring), None


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    """The queries are the newest `L` of the `S` keys, in order; query `i` sees keys `0 .. S - L + i`."""
    rows, length = queries.shape[2], keys.shape[2]
    if scoring.plain and rows == length:
        return fused_attention(queries, keys, values, scoring.scale, causal=rows > 1)
    output = queries.new_empty(*queries.shape[:3], values.shape[3])
    for block in row_blocks(rows, queries.shape[0] * queries.shape[1] * length, queries.device):
        seen = length - rows + block.stop
        size = block.stop - block.start
        visible = torch.ones(size, seen, dtype=torch.bool, device=queries.device).tril_(seen - size)
        output[:, :, block] = _block(
            queries[:, :, block], keys[:, :, :seen], values[:, :, :seen], scoring, visible[None, None]
        )
    return output


def positional_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    query_positions: Tensor,
    key_positions: Tensor,
) -> Tensor:
    """A query sees the keys at its position or before; keys at position -1 are empty, queries at -1 are padding.

    query_positions: `[B or 1, L]`. key_positions: `[B, Hkv, S]`. What padding queries return means nothing, but it is
    finite, as later layers multiply it by zero.
    """
    group = queries.shape[1] // keys.shape[1]
    output = queries.new_empty(*queries.shape[:3], values.shape[3])
    for block in row_blocks(queries.shape[2], queries.shape[0] * queries.shape[1] * keys.shape[2], queries.device):
        visible = ~hidden_keys(query_positions[:, block], key_positions).squeeze(2)
        visible |= ~visible.any(-1, keepdim=True)
        visible = visible.repeat_interleave(group, dim=1)
        output[:, :, block] = _block(queries[:, :, block], keys, values, scoring, visible)
    return output


def _block(queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, visible: Tensor) -> Tensor:
    if scoring.plain:
        return fused_attention(queries, keys, values, scoring.scale, visible)
    kv_heads = keys.shape[1]
    hidden = ~visible.unflatten(1, (kv_heads, -1) if visible.shape[1] > 1 else (1, 1))
    return _weighted_values(row_probabilities(queries, keys, scoring, hidden), values)


def _weighted_values(probabilities: Tensor, values: Tensor) -> Tensor:
    """`[B, Hkv, G, L, S] x [B, Hkv, S, Dv] -> [B, Hq, L, Dv]`."""
    batch, kv_heads, group, rows, length = probabilities.shape
    flat = probabilities.to(values.dtype).view(batch * kv_heads, group * rows, length)
    output = torch.bmm(flat, values.reshape(batch * kv_heads, length, -1))
    return output.view(batch, kv_heads * group, rows, -1)


def single_query_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    empty: Tensor | None,
    with_probabilities: bool,
) -> tuple[Tensor, Tensor | None]:
    """One query per sequence that sees every row but the empty ones.

    empty: bool `[B, Hkv, S]`, None if no slot is empty. Returns the output `[B, Hq, 1, Dv]` and, where they were asked
    for, the probabilities `[B, Hkv, G, S]` float32.
    """
    output = None
    if scoring.plain and (not with_probabilities or queries.dtype != torch.float32):
        # The queries of a group become rows of their KV head: no key is repeated, and one mask serves them all.
        folded = grouped(queries, keys.shape[1]).unflatten(0, keys.shape[:2])
        visible = None if empty is None else ~empty[:, :, None]
        output = fused_attention(folded, keys, values, scoring.scale, visible).flatten(1, 2).unsqueeze(2)
        if not with_probabilities:
            return output, None
    hidden = None if empty is None else empty[:, :, None, None]
    probabilities = row_probabilities(queries, keys, scoring, hidden)
    if output is None:
        output = _weighted_values(probabilities, values)
    return output, probabilities.squeeze(3)


# -- registration ------------------------------------------------------------------------------------------------------


def register(base: str) -> str:
    """Register the kvprune attention over a base attention, e.g. "sdpa"; returns its name, e.g. "kvprune_sdpa"."""
    name = PREFIX + base
    for word, alias in _ALIASES.items():
        name = name.replace(word, alias)
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention(base))
        AttentionMaskInterface.register(name, _mask(base))
    return name


def _attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def kvprune_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(key, PendingKeys):
            return base_attention(base, module)(module, query, key, value, attention_mask, **kwargs)
        return key.cache.attend(module, query, attention_mask, **kwargs), None

    return kvprune_attention


def base_attention(base: str, module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention that the module would have run. Each modeling file has an eager attention of its own."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _mask(base: str) -> Callable[..., Tensor | None]:
    def kvprune_mask(
        *args: Any,
        kv_length: int,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        if not isinstance(kv_length, CacheLength):
            return ALL_MASK_ATTENTION_FUNCTIONS[base](
                *args, kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs
            )
        if mask_function is not causal_mask_function:
            raise UnsupportedModelError(
                "this forward pass asks for a mask that is not causal (bidirectional image tokens, packed sequences, "
                "or a model with a mask of its own). A pruned cache can only attend causally: use DynamicCache here."
            )
        return attention_mask  # two-dimensional; every layer makes what it needs of it and its own positions

    return kvprune_mask
