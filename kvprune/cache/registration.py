"""The kvprune attention, as transformers knows it.

One registered name per base attention (`kvprune_sdpa`, `kvprune_eager`, ...) keeps the model's own attention in the
name, so no state is kept anywhere: every cache that does not attend itself, and every layer that is not pruned, goes to
that attention with that attention's own mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils.output_capturing import _active_collector

from kvprune.errors import CacheError, KVPruneError, UnsupportedModelError

PREFIX = "kvprune_"
_NO_ROWS = (
    "output_attentions=True asks for rows of attention, which a pruned cache does not hand out: leave it out, or use a "
    "DynamicCache to look at attention"
)
# "flash" in a name makes transformers look for the flash-attn package under that very name (5.23).
_ALIASES = {"flash": "fa"}


_NOT_CAUSAL = (
    "this forward pass asks for a mask that is not causal (bidirectional image tokens, packed sequences, or a model "
    "with a mask of its own). A pruned cache can only attend causally: use DynamicCache here"
)


class Attending(Protocol):
    """A cache that attends to its keys itself."""

    def attend(self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **settings: Any) -> Tensor:
        """Output `[B, L, Hq, Dv]` of queries `[B, Hq, L, D]`; settings: of the module's attention."""

    def bypassed(self, use: str = "") -> KVPruneError:
        """The error to raise where another attention than kvprune's was given the keys. use: it made of them."""

    def misused(self, reason: str, error: type[KVPruneError] = CacheError) -> KVPruneError:
        """The error to raise for a forward pass that the cache cannot serve."""


class CacheLength(int):
    """The key length that a `PrunedCache` reports to transformers: an int that says whose it is.

    A mask function is not told which cache its mask is for; this length is all that reaches it.
    """

    cache: Any = None


SOME_LENGTH = CacheLength()
"""In its place where nobody can count: masks of a pruned cache do not depend on it."""
NO_MASK = CacheLength()
"""In its place for a step that needs no mask, and must not be given one whose shape grows with every token."""


class PendingKeys:
    """What `update` of a cache returns in place of keys: it tells the kvprune attention which cache to attend to.

    An attention that does not know kvprune would attend to the step's own tokens alone, and nobody would notice; and a
    model that transforms its keys after caching them would not attend to what is cached. Any use raises CacheError.
    It is no Tensor, because torch.compile traces objects and cannot trace tensors that refuse to be looked at.
    """

    def __init__(self, keys: Tensor, cache: Attending) -> None:
        self.keys, self.cache = keys, cache

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ndim"):
            return getattr(self.keys, name)
        raise self.cache.bypassed(f"by .{name}")

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


class PendingMask:
    """What a pruned layer is given as its mask: word of which tokens are padding, and of what else was asked for.

    Every layer makes what it needs of it and its own positions. It is no Tensor, so that a mask which no pruned layer
    is given may be whatever it likes, and a model that makes a mask of its own out of this one is noticed.
    """

    ndim = 2

    def __init__(self, padding: Tensor | None, cache: Any, stock: Callable[[], Any] | None, causal: bool) -> None:
        """padding: bool `[B, tokens]`, None if nobody gave one. stock: makes the mask of the attention below."""
        self.padding, self.cache, self.stock, self.causal = padding, cache, stock, causal
        self.reading: Any = None
        """What the cache makes of the padding, once for all layers."""

    def to(self, *args: Any, **kwargs: Any) -> PendingMask:
        """It moves with the layers of a model."""
        moved = PendingMask(self.padding, self.cache, self.stock, self.causal)
        moved.reading = self.reading  # which is on the host
        return moved

    def __getattr__(self, name: str) -> Any:
        raise _own_mask(f".{name}")

    def _refuse(self, *_: Any) -> NoReturn:
        raise _own_mask("indices or arithmetic")

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __or__ = __invert__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise _own_mask(getattr(func, "__name__", str(func)))


def _own_mask(use: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this model makes a mask of its own out of the one that it is given ({use}), and a pruned cache can only "
        "attend causally: use DynamicCache with it."
    )


def register(base: str) -> str:
    """Register the kvprune attention over a base attention, e.g. "sdpa"; returns its name, e.g. "kvprune_sdpa"."""
    name = PREFIX + base
    for word, alias in _ALIASES.items():
        name = name.replace(word, alias)
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention(base))
        AttentionMaskInterface.register(name, _mask(base))
    return name


def base_name(name: str) -> str:
    """The base attention of a name that `register` returned."""
    base: str = ALL_ATTENTION_FUNCTIONS[name].base
    return base


def _attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def kvprune_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(key, PendingKeys):
            if isinstance(attention_mask, PendingMask) and not attention_mask.causal:
                raise key.cache.misused(_NOT_CAUSAL, UnsupportedModelError)
            if "attentions" in (_active_collector.get() or ()):
                raise key.cache.misused(_NO_ROWS)
            return key.cache.attend(module, query, attention_mask, **kwargs), None
        if isinstance(attention_mask, PendingMask):
            attention_mask = _stock_mask(attention_mask, module)
        return base_attention(base, module)(module, query, key, value, attention_mask, **kwargs)

    kvprune_attention.base = base  # type: ignore[attr-defined]
    return kvprune_attention


def _stock_mask(mask: PendingMask, module: torch.nn.Module) -> Tensor | None:
    """The mask for a layer that is not pruned; raises where the layer is, and its keys never came to the cache."""
    index = getattr(module, "layer_idx", None)
    if index is not None and mask.cache is not None and mask.stock and index not in mask.cache.pruned_layers:
        return mask.stock()
    raise CacheError(
        f"layer {'?' if index is None else index} was given no cache, though the model was called with a PrunedCache: "
        "gradient checkpointing takes the cache from the layers of a model in training. Call model.eval(), or "
        "model.gradient_checkpointing_disable(), or use torch.no_grad(), before generating."
    )


def base_attention(base: str, module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention that the module would have run. Each modeling file has an eager attention of its own."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _mask(base: str) -> Callable[..., Any]:
    def kvprune_mask(
        *args: Any,
        kv_length: int,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(kv_length, CacheLength):
            return ALL_MASK_ATTENTION_FUNCTIONS[base](
                *args, kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs
            )
        if kwargs.get("q_length") == 0:
            raise CacheError(
                "the model was called with a PrunedCache and no new tokens: the cache has seen as many as were given. "
                "Give generate() the whole conversation, with at least one token more than the cache has seen, or "
                "crop(-1) the cache to ask again after its last token. A prompt that does not begin with what was "
                "seen, as where a chat template leaves out earlier thinking, needs a new PrunedCache or an old fork()."
            )
        causal = mask_function is causal_mask_function
        if not causal and "local_size" not in kwargs:  # for full attention, so that pruned layers would be given it
            raise UnsupportedModelError(f"{_NOT_CAUSAL}.")
        if kv_length is NO_MASK and causal and attention_mask is None:
            return None
        if torch.compiler.is_dynamo_compiling():  # which traces no closure into an object
            if isinstance(attention_mask, PendingMask):
                return attention_mask
            return PendingMask(attention_mask, None, None, causal)

        if isinstance(attention_mask, PendingMask):  # generate() made it, before it called what was compiled
            return attention_mask

        def stock() -> Tensor | None:
            plain = {"kv_length": int(kv_length), "mask_function": mask_function, "attention_mask": attention_mask}
            return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **plain, **kwargs)

        mask = PendingMask(attention_mask, kv_length.cache, stock, causal)
        if mask.cache is None or not causal:
            return mask
        return mask.cache.read(mask, kwargs.get("q_length"), kwargs.get("batch_size"))

    return kvprune_mask
