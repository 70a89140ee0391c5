"""`Rotations`: what turns keys and values of each layer of a model, measured once on a text, and kept in a file."""

from __future__ import annotations

import base64
import inspect
import math
import os
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kvprune.cache.models import cache_argument, head_dim, heads_of, layer_config, text_config
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.errors import CacheError, PolicyError
from kvprune.policy.base import Policy
from kvprune.policy.step import Step
from kvprune.saving import measured
from kvprune.saving.fingerprint import differences, fingerprint
from kvprune.saving.weights import as_bytes
from kvprune.table.basis import Basis, in_8_bits
from kvprune.table.spreading import spread, weighed_values
from kvprune.table.token_table import TokenTable

_FORMAT = "kvprune.rotations"
_MOST_TURNED = 0.1  # that R^T R is off from one, in any number; 8 bits leave it 0.02 off


class Rotations(tuple[tuple[str, str], ...]):
    """R_K `[D, D]` and R_V `[Dv, Dv]` of every pruned layer, for all of its heads. It is a value, and a setting.

        rotations = Rotations.measure(model, tokenizer(text, return_tensors="pt").input_ids)
        rotations.save("rotations.json")
        PrunedCache(model, OSCAR(2, rotations=Rotations.load("rotations.json", model)))

    A pair of orthogonal tensors for each layer, measured elsewhere, makes rotations too. They are held as caches hold
    them, in 8 bits a number and a float32 for each column, and written as text (base64, the columns' numbers first).

    model: what tells whose they are, see `save`; None where nobody has said.
    """

    model: dict[str, Any] | None
    trusted = False  # whether somebody has said that the weights are those of then

    def __new__(cls, layers: Any = (), model: dict[str, Any] | None = None) -> Self:
        """Raises PolicyError for what is no rotations."""
        try:
            texts = tuple((_written(keys), _written(values)) for keys, values in layers)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PolicyError(
                "rotations are what Rotations.measure or Rotations.load returns, the path of its file, or of every "
                f"pruned layer a pair of orthogonal matrices, of keys and of values; here, {error}."
            ) from None
        if not texts:
            raise PolicyError("rotations of no layer: give those of every pruned layer, as Rotations.measure does.")
        rotations = super().__new__(cls, texts)
        rotations.model = model
        return rotations

    def __repr__(self) -> str:
        return f"Rotations({len(self)} layers)"

    @property
    def dims(self) -> list[tuple[int, int]]:
        """Of every layer D and Dv."""
        return [(len(_read(keys)[1]), len(_read(values)[1])) for keys, values in self]

    def basis(self, layer: int, heads: tuple[int, ...], device: torch.device) -> Basis:
        """For the tables of a layer, by its number among the pruned ones. heads: `(B, Hkv)`."""
        keys, values = (_read(text, device) for text in self[layer])
        return Basis.shared(keys, values, heads)

    @classmethod
    @torch.no_grad()
    def measure(cls, model: Any, ids: Tensor, *, length: int = 2048) -> Self:
        """Let a model read a text once, and take the rotations of OSCAR from its queries, keys and values.

        Of every KV head h, over all tokens of the text, and over its query heads,

            C_Q^h = E[q q^T],    w_i = k_i^T C_Q^h k_i / mean,    C_V^h = E[w v v^T]

        and R = U P H, as `OSCAR` has them, of their means over h. The paper takes some 30,000 tokens. All keys and
        values of the text are held until the rotations are made.

        Args:
            ids: of the text, LongTensor `[1, n]`. length: tokens of a piece; each is read by itself.

        Raises CacheError for a text of fewer than 2 D tokens, D the largest key of the model, for pieces of no token,
        for a model that no layer is pruned of, and for one whose keys, queries or values are not all finite.
        """
        caches = [PrunedCache(model, _Asked())]
        pruned = caches[0].pruned_layers
        if not pruned:
            raise CacheError(f"{type(model).__name__} has no layer with full attention, so there is nothing to turn.")
        least = 2 * max(map(max, _dims_of(model, pruned)))
        if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] < least:
            raise CacheError(f"give the ids of one text of at least {least} tokens, [1, n], not {list(ids.shape)}.")
        if length < 1:
            raise CacheError(f"length={length} tokens are no piece of a text: give 1 or more.")
        pieces = ids.to(model.device).split(length, dim=1)
        caches += [PrunedCache(model, _Asked()) for _ in pieces[1:]]
        # What comes out is not looked at, and takes more memory than all else.
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        for piece, cache in zip(pieces, caches, strict=True):
            model(piece, **cache_argument(cache), **last)
        return cls([_of_layer(model, caches, index) for index in pruned], _whose(model))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a file, JSON. Raises CacheError where that cannot be, or nobody knows of which model."""
        if self.model is None:
            raise CacheError("nobody has said of which model these rotations are: save what Rotations.measure returns.")
        measured.write(path, "rotations", _FORMAT, {"layers": self, "model": self.model})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None, *, trust_model: bool = False) -> Self:
        """Read what `save` wrote. model: that they are for; without one, only their form is looked at.

        trust_model: as of `PrunedCache.load`. Say so where tensor parallelism splits the model: one file serves all
        processes, but the weights of a process are not those of the whole.

        Raises CacheError for a file that is none or of another model.
        """
        read = measured.read(path, "rotations", _FORMAT)
        try:
            rotations = cls(read.get("layers"), read["model"])
        except PolicyError as error:
            raise CacheError(f"{path} cannot be loaded: its rotations are damaged ({error})") from error
        if model is not None:
            rotations._check_whose(model, trust_model)
        rotations.trusted = trust_model
        return rotations

    def check(self, model: Any, layers: Sequence[int]) -> None:
        """Raise PolicyError unless they fit these layers of a model, the pruned ones.

        Raise CacheError unless they are of this model, where it is known of which they are.
        """
        if self.dims != (wanted := _dims_of(model, layers)):
            raise PolicyError(
                f"these rotations are of {_told(self.dims)}, and {type(model).__name__} has {_told(wanted)} to prune: "
                "measure this model, Rotations.measure(model, ids)."
            )
        self._check_whose(model, self.trusted)

    def _check_whose(self, model: Any, trust_model: bool) -> None:
        if self.model is None:
            return
        if told := differences(self.model, _whose(model), trust_model=trust_model):
            raise CacheError(
                f"these rotations are of another model than this {type(model).__name__}: {'; '.join(told)}."
            )


# -- measured ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked(Policy):
    """Keeps everything, and the sum of q q^T over the queries of every KV head."""

    def tallies(self, query_heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        return {"queries": (kv_heads, head_dim, head_dim)}

    def observe(self, table: TokenTable, step: Step) -> None:
        states = step.source.states.float().unflatten(1, (table.kv_heads, -1)).flatten(2, 3)  # type: ignore[union-attr]
        step.tallies["queries"] += states.mT @ states


def _of_layer(model: Any, caches: list[PrunedCache], index: int) -> tuple[Tensor, Tensor]:
    """R_K and R_V of what every cache holds of one layer. A sum of q q^T serves as well as its mean."""
    layers = [cache.layers[index] for cache in caches]
    of_queries = torch.stack([layer.tallies["queries"][0] for layer in layers]).sum(0)
    keys, values = (
        torch.cat([tensor[0] for tensor in parts], dim=1).float()
        for parts in zip(*((layer.table.keys, layer.table.values) for layer in layers), strict=True)
    )
    of_values = weighed_values(keys, values, of_queries)
    heads = heads_of(model, index).present(len(keys))
    every = [heads.sum(each.sum(0)).cpu() for each in (of_queries, of_values)]
    if not all(bool(each.isfinite().all()) for each in every):
        raise CacheError(
            f"layer {index} of {type(model).__name__} made queries, keys or values of this text that are not finite: "
            "measure it on another text, or load the model in bfloat16 or float32."
        )
    of_keys, of_values = map(spread, every)
    return of_keys, of_values


# -- of a model --------------------------------------------------------------------------------------------------------


def _whose(model: Any) -> dict[str, Any]:
    """Its fingerprint, but for which share of its heads is here: all heads have the same rotation."""
    return {name: fact for name, fact in fingerprint(model).items() if name != "process"}


def _dims_of(model: Any, layers: Sequence[int]) -> list[tuple[int, int]]:
    configs = [layer_config(text_config(model), index) for index in layers]
    return [(head_dim(each), getattr(each, "v_head_dim", None) or head_dim(each)) for each in configs]


def _told(dims: list[tuple[int, int]]) -> str:
    """`30 layers of keys and values of 64 numbers`"""
    kinds = [
        f"{count} layer{'s' * (count > 1)} of keys "
        + (f"and values of {dim} numbers" if dim == value_dim else f"of {dim} and values of {value_dim} numbers")
        for (dim, value_dim), count in Counter(dims).items()
    ]
    return " and ".join(kinds) or "no layers"


# -- as text -----------------------------------------------------------------------------------------------------------


def _written(given: Any) -> str:
    """A rotation as text: of a tensor, or the text itself. Raises ValueError or TypeError for what is none."""
    if isinstance(given, Tensor):
        if given.ndim != 2 or not 0 < given.shape[0] == given.shape[1] or not given.is_floating_point():
            raise ValueError(f"one is {given.dtype} {list(given.shape)}")
        codes, span = in_8_bits(given.detach().to("cpu", torch.float32))
        given = base64.b64encode(bytes(as_bytes(span)) + bytes(as_bytes(codes))).decode("ascii")
    codes, span = _read(given)
    turning = codes * span
    off = (turning.T @ turning - torch.eye(len(span), dtype=torch.float32, device="cpu")).abs().max()
    if not off <= _MOST_TURNED:  # nor where that is no number
        raise ValueError("one is not orthogonal")
    return given


def _read(text: Any, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """`[D, D]` int8 and `[D]` float32, see `in_8_bits`."""
    if not isinstance(text, str):
        raise TypeError(f"one is {reprlib.repr(text)}")
    packed = bytearray(base64.b64decode(text, validate=True))
    dim = math.isqrt(len(packed) + 4) - 2  # D^2 codes and 4 D bytes of columns
    if dim < 1 or dim * (dim + 4) != len(packed):
        raise ValueError(f"one is text of {len(packed)} bytes")
    span = torch.frombuffer(packed, dtype=torch.float32, count=dim)
    codes = torch.frombuffer(packed, dtype=torch.int8, offset=4 * dim).view(dim, dim)
    return codes.to(device), span.to(device)
