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

from kvprune.errors import KVPruneError, UnsupportedModelError

PREFIX = "kvprune_"
# "flash" in a name makes transformers look for the flash-attn package under that very name (5.23).
_ALIASES = {"flash": "fa"}


class Attending(Protocol):
    """A cache that attends to its keys itself."""

    def attend(self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **settings: Any) -> Tensor:
        """Output `[B, L, Hq, Dv]` of queries `[B, Hq, L, D]`; settings: of the module's attention."""

    def bypassed(self) -> KVPruneError:
        """The error to raise where another attention than kvprune's was given the keys."""


class CacheLength(int):
    """The key length that a `PrunedCache` reports to transformers: an int that says whose it is.

    A mask function is not told which cache its mask is for; this length is all that reaches it.
    """


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
