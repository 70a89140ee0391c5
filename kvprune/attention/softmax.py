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
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kvprune.attention.backends import SDPA, Sdpa, fused_attention
from kvprune.attention.mass import Scoring, grouped, hidden_keys, row_blocks, row_probabilities
from kvprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from kvprune.cache.pruned_cache import PrunedCache
    from kvprune.passes.filter_pass import FilterPass

PREFIX = "kvprune_"
# "flash" in a name makes transformers look for the flash-attn package under that very name (5.23).
_ALIASES = {"flash": "fa"}


class CacheLength(int):
    """The key length that a `PrunedCache` reports to transformers: an int that says whose it is.

    A mask function is not told which cache its mask is for; this length is all that reaches it.
    """


SOME_LENGTH = CacheLength()
"""In its place where nobody can count: masks of a pruned cache do not depend on it."""
NO_MASK = CacheLength()
"""In its place for a step that needs no mask, and must not be given one whose shape grows with every token."""


class PendingKeys:
    """The keys that `PrunedCache.update` returns: a claim ticket for the kvprune attention, and of no use elsewhere.

    An attention that does not know kvprune would attend to the step's own tokens alone, and nobody would notice; and a
    model that transforms its keys after caching them would not attend to what is cached. Any use raises CacheError.
    It is no Tensor, because torch.compile traces objects and cannot trace tensors that refuse to be looked at.
    """

    def __init__(self, keys: Tensor, cache: PrunedCache | FilterPass) -> None:
        self.keys, self.cache = keys, cache

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ndim"):
            return getattr(self.keys, name)
        raise self.cache.bypassed()

    def to(self, *args: Any, **kwargs: Any) -> PendingKeys:
        """A cast that casts nothing is allowed."""
        if self.keys.to(*args, **kwargs) is not self.keys:
            raise self.cache.bypassed()
        return self

    def _refuse(self, *_: Any) -> NoReturn:
        raise self.cache.bypassed()

    # Operators are looked up on the class, past __getattr__.
    __getitem__ = __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __neg__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        given = (*args, *(kwargs or {}).values())
        flat = (item for arg in given for item in (arg if isinstance(arg, list | tuple) else (arg,)))
        raise next(item for item in flat if isinstance(item, cls)).cache.bypassed()


# -- outputs -----------------------------------------------------------------------------------------------------------


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, backend: Sdpa = SDPA
) -> tuple[Tensor, Tensor | None]:
    """The queries are the newest `L` of the `S` keys, in order; query `i` sees keys `0 .. S - L + i`.

    Returns the output and, where the backend tells it, the log-sum-exp of every query's logits `[B, Hq, L]`.
    """
    rows, length = queries.shape[2], keys.shape[2]
    if scoring.plain and backend.takes(queries, keys, values):
        return backend.causal(queries, keys, values, scoring.scale)
    output = queries.new_empty(*queries.shape[:3], values.shape[3])
    for block in row_blocks(rows, queries.shape[0] * queries.shape[1] * length, queries.device):
        seen = length - rows + block.stop
        size = block.stop - block.start
        visible = torch.ones(size, seen, dtype=torch.bool, device=queries.device).tril_(seen - size)
        output[:, :, block] = _block(
            queries[:, :, block], keys[:, :, :seen], values[:, :, :seen], scoring, visible[None, None]
        )
    return output, None


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
        if kv_length is NO_MASK:
            return None
        return attention_mask  # two-dimensional; every layer makes what it needs of it and its own positions

    return kvprune_mask
