"""Replay: tokens that are in a cache run once more, as queries that look at all of it and leave nothing but a column.

A hook on the decoder notes what comes in. When a prompt has ended, all that no replay has seen runs through the decoder
again, chunk by chunk, each over the full cache; what is found goes into the tables when the last chunk is through, and
then the policy decides. The hook does nothing but for a `PrunedCache` whose policy wants a replay.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from kvprune.attention.backends import Sdpa
from kvprune.attention.mass import RowWeights, Scoring
from kvprune.attention.maxima import attention_maxima, attention_with_maxima, maxima_by_kernels
from kvprune.attention.operations import of as of_table
from kvprune.attention.outputs import output_norms, output_projection
from kvprune.attention.queries import Queries
from kvprune.attention.softmax import causal_attention
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import CACHE_ARGUMENT
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.unread import Unread
from kvprune.errors import CacheError, UnsupportedModelError
from kvprune.passes.positions import most_positions
from kvprune.passes.scratch import ScratchPass
from kvprune.policy.replaying import Replay
from kvprune.table.rows import EMPTY, take_rows, true_rows
from kvprune.table.token_table import TokenTable

_installing = threading.Lock()


def attach(cache: PrunedCache, model: Any) -> None:
    """Let prompts of this cache be replayed. Raises UnsupportedModelError for a model where that could not work."""
    decoder = model.get_decoder()
    known = inspect.signature(decoder.forward).parameters
    if "position_ids" not in known or CACHE_ARGUMENT not in known:
        raise UnsupportedModelError(
            f"the decoder of {type(model).__name__}, {type(decoder).__name__}, takes no position_ids, so tokens could "
            "not be run again behind a prompt. Use a policy that needs no replay, such as SnapKV."
        )
    most = most_positions(model)
    for part in cache.policy.parts():
        if most is not None and part.replay is not None and (said := _said(part.replay)) >= most:
            raise UnsupportedModelError(
                f"{type(model).__name__} has {most} positions, and the instruction of the replay takes {said} of them: "
                "give a shorter one, or none."
            )
    with _installing:
        if _note not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(_note, with_kwargs=True)
    if cache.pruned_layers:
        cache.replay = run
    if any(part.replay is not None and part.replay.values for part in cache.policy.parts()):
        for module in decoder.modules():
            if isinstance(getattr(module, "layer_idx", None), int) and getattr(module, "is_causal", False):
                output_projection(module)
                with _installing:
                    if _measure not in module._forward_pre_hooks.values():
                        module.register_forward_pre_hook(_measure, with_kwargs=True)


def _said(replay: Replay) -> int:
    """Tokens of a chunk that are not the chunk's own."""
    return max(len(replay.first), len(replay.later) + replay.repeated) + len(replay.before)


def _replaying(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PrunedCache | None:
    caches = (each for each in (*args, *kwargs.values()) if isinstance(each, Cache))
    return next((each for each in caches if getattr(each, "replay", None)), None)


def _note(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass: what comes in has been seen by no replay."""
    cache = _replaying(args, kwargs)
    if cache is None:
        return
    given = dict(kwargs)
    if args:
        given |= dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False))
    inputs = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if inputs is None:
        return  # the model has an error for this
    layer, length = cache.layers[cache.pruned_layers[0]], inputs.shape[1]
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is not None and positions.ndim != 2:
        raise cache.misused(
            f"its position_ids have the shape {tuple(positions.shape)}; a replay takes [batch, tokens]",
            UnsupportedModelError,
        )
    valid = columns = None
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        columns = mask.long() if cache.is_hybrid else None
        if length > 1 or not layer.tokens or min(layer.tokens) == 0:
            new = mask[:, mask.shape[1] - length :].bool()
            valid = None if bool(new.all()) else new
    ends = None if positions is None else positions.amax(-1)
    cache.note(length, Unread(inputs.detach(), valid, ends, columns))


def _measure(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention module in a replay: how large the hidden states are that it makes queries of."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, ReplayPass):
            states = args[0] if args else kwargs["hidden_states"]
            each.norms = states.norm(dim=-1)


# -- one replay --------------------------------------------------------------------------------------------------------


Found = dict[tuple[int, str], Tensor]
"""What a replay gives to the rows of a layer, `[B, Hkv, rows]`, by layer and link of a chain."""


def run(cache: PrunedCache) -> None:
    """Replay what no replay has seen, and write what it finds into the tables: all of it, or nothing."""
    unread = cache.layers[cache.pruned_layers[0]].unread
    if unread is not None:
        _write(cache, _found(cache, unread))


class Once:
    """`run` for caches that were given the same prompts: what the first of them finds holds for all that hold them."""

    def __init__(self) -> None:
        self._read: Unread | None = None
        self._found: dict[Any, Found] = {}

    def __call__(self, cache: PrunedCache) -> None:
        layers = [cache.layers[index] for index in cache.pruned_layers]
        unread = layers[0].unread
        whole = all(layer.table.length == layer.seen and not layer.table.packed for layer in layers)
        if unread is None or not whole:
            run(cache)
            return
        if unread is not self._read:
            self._read, self._found = unread, {}
        asked = tuple((scope, replay.as_run()) for scope, replay in layers[0].planner.replays)
        if asked not in self._found:
            self._found[asked] = _found(cache, unread)
        _write(cache, self._found[asked])


def _found(cache: PrunedCache, unread: Unread) -> Found:
    first, model = cache.layers[cache.pruned_layers[0]], cache.model
    if model is None:
        raise CacheError("the model of this cache is gone, and a replay runs through it: keep it as long as the cache.")
    found: Found = {}
    for scope, replay in first.planner.replays:
        for chunk in _chunks(cache, unread, replay, model):
            chunk.run(found, scope)
    return found


def _write(cache: PrunedCache, found: Found) -> None:
    first = cache.layers[cache.pruned_layers[0]]
    for (index, scope), best in found.items():
        for target, replay in first.planner.replays:
            if target == scope:
                column = cache.layers[index].table.scoped(scope)[replay.column]
                column.copy_(torch.maximum(column, best.to(column.device)))
    first.unread = None


class _Chunk:
    """One chunk of a replay."""

    def __init__(self, cache: PrunedCache, replay: Replay, model: Any, inputs: Tensor, valid: Tensor | None,
                 mask: Tensor | None, positions: Tensor, span: tuple[Tensor, Tensor]) -> None:  # fmt: skip
        """inputs: ids or embeddings. valid: bool `[B, L]`. mask: what the model is given. positions: position ids.

        span: of each sequence, the positions in it where its tokens of this chunk begin and end, `[B, 1, 1]`.
        """
        self.cache, self.replay, self.model = cache, replay, model
        self.inputs, self.valid, self.mask, self.positions, self.span = inputs, valid, mask, positions, span

    def run(self, found: Found, scope: str) -> None:
        decoder = self.model.get_decoder()
        arguments: dict[str, Any] = {
            "input_ids" if self.inputs.ndim == 2 else "inputs_embeds": self.inputs,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "use_cache": True,
            CACHE_ARGUMENT: ReplayPass(self.cache, self.replay, self.valid, self.span, found, scope),
        }
        try:
            with torch.no_grad():
                decoder.forward(**arguments)
        except _Seen:
            return


class _Seen(Exception):  # noqa: N818 - it ends a forward pass, and is no error
    """Raised by the attention of the last layer that is looked at: nobody needs its output."""


def _chunks(cache: PrunedCache, unread: Unread, replay: Replay, model: Any) -> Iterator[_Chunk]:
    device, batch = unread.inputs.device, len(unread.inputs)
    tokens = cache.layers[cache.pruned_layers[0]].tokens
    if unread.valid is None:
        places = [torch.arange(len(unread), device=device)] * batch
    else:
        places = [row.nonzero().squeeze(1) for row in unread.valid]
    begin = torch.tensor([count - len(own) for count, own in zip(tokens, places, strict=True)], device=device)
    ends = torch.tensor([cache.get_seq_length() - 1], device=device) if unread.ends is None else unread.ends.to(device)
    embed = model.get_input_embeddings()
    most = most_positions(model)
    size = replay.chunk if most is None else min(replay.chunk, most - _said(replay))
    for start in range(0, max(map(len, places)), size):
        said = torch.tensor(replay.later if start else replay.first, dtype=torch.int64, device=device)
        before = torch.tensor(replay.before, dtype=torch.int64, device=device)
        rows = []
        for row, own in enumerate(places):
            some = own[start : start + size]
            if not len(some):
                rows.append(unread.inputs[row, :0])
                continue
            again = own[max(0, start - replay.repeated) : start] if replay.repeated else own[:0]
            parts = [said, unread.inputs[row, again], before, unread.inputs[row, some]]
            rows.append(torch.cat([embed(part) if part.ndim < unread.inputs.ndim - 1 else part for part in parts]))
        inputs, valid = _right_padded(rows)
        mask = valid
        if unread.columns is not None:
            all_valid = torch.ones(inputs.shape[:2], dtype=torch.bool, device=device) if valid is None else valid
            mask = torch.cat([unread.columns.to(device), all_valid.long()], dim=1)
        ranks = torch.arange(inputs.shape[1], device=device)[None] if valid is None else valid.cumsum(1) - 1
        first = ends + 1
        if most is not None:  # not behind the context, where there is no room, but over the end of it
            first = torch.minimum(first, most - 1 - ranks.amax(1))
        positions = (first[:, None] + ranks.clamp(min=0)).expand(batch, -1)
        span = (begin + start).view(-1, 1, 1), (begin + start + size).view(-1, 1, 1)
        yield _Chunk(cache, replay, model, inputs, valid, None if mask is None else mask.long(), positions, span)


def _right_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows `[n]` or `[n, H]` as one tensor, and which of it are no padding, bool `[B, L]`; None if all are.

    Sliding windows count columns: padding in front would take the place of what is in the cache.
    """
    width = max(map(len, rows))
    if min(map(len, rows)) == width:
        return torch.stack(rows), None
    padded = torch.stack([F.pad(row, (0, 0) * (row.ndim - 1) + (0, width - len(row))) for row in rows])
    counts = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(width, device=padded.device) < counts[:, None]


class ReplayPass(ScratchPass):
    """The cache of a chunk's forward pass: what its queries give to the rows of each layer goes into `found`."""

    def __init__(self, cache: PrunedCache, replay: Replay, valid: Tensor | None, span: tuple[Tensor, Tensor],
                 found: Found, scope: str) -> None:  # fmt: skip
        super().__init__(cache, valid)
        self._replay, self._span, self._found, self._scope = replay, span, found, scope
        self.norms: Tensor | None = None
        """Of the hidden states that the layer at hand makes queries of, `[B, L]`, where somebody asks for them."""

    def look(self, module: torch.nn.Module, layer: PrunedLayer, query: Tensor, keys: Tensor, values: Tensor,
             scoring: Scoring) -> Tensor:  # fmt: skip
        table = layer.table
        assert table is not None  # a replay comes after a forward pass
        queries, seen, keys, scoring = self.over(layer, query, keys, values, scoring)
        last = layer.index == self._cache.pruned_layers[-1]  # nobody needs its output
        rows, sizes = self._weights(module, queries, table)
        if self._replay.softmax == "cache" or self._covers(table):
            output, best = attention_with_maxima(
                queries, seen, scoring, rows, group=self._replay.group, columns=table.length, key_weights=sizes,
                backend=layer.backend, outputs=not last,
            )  # fmt: skip
        else:
            output = None if last else queries.attend(seen, scoring, backend=layer.backend).output
            best = self._of_chunk(table, queries, keys, scoring, rows, sizes, layer.backend)
        best = best.masked_fill(table.positions < 0, 0.0)
        key = layer.index, self._scope
        self._found[key] = torch.maximum(self._found[key], best) if key in self._found else best
        if output is None:
            raise _Seen
        return output.transpose(1, 2).contiguous().to(query.device)

    def _weights(
        self, module: torch.nn.Module, queries: Queries, table: TokenTable
    ) -> tuple[RowWeights, Tensor | None]:
        """What to multiply probabilities by, for every query, and for every key and query head, `[B, Hkv, G, rows]`."""
        if not self._replay.values:
            return RowWeights.uniform(len(queries)), None
        if self.norms is None:  # a hook of the attention module notes them, but some are not called as others are
            raise self.misused("its attention modules are not given the cache by name or place")
        norms = self.norms.to(queries.states.device).float().clamp(min=torch.finfo(torch.float32).tiny)
        batch, length = norms.shape
        every = torch.arange(length, device=norms.device).expand(batch, -1)
        sizes = output_norms(module, table.all_values(), queries.states.shape[1])
        return RowWeights.explicit(every, norms.reciprocal()), sizes

    def _in_softmax(self, table: TokenTable) -> Tensor:
        """Rows of the table that are in the softmax over a chunk: its own and the sinks, bool `[B, Hkv, rows]`."""
        positions = table.positions
        begin, end = (bound.to(positions.device) for bound in self._span)
        return (positions >= begin) & (positions < end) | (positions >= 0) & (positions < self._replay.sinks)

    def _covers(self, table: TokenTable) -> bool:
        """Whether those are all."""
        return bool((self._in_softmax(table) | (table.positions < 0)).all())

    def _of_chunk(
        self,
        table: TokenTable,
        queries: Queries,
        own: Tensor,
        scoring: Scoring,
        rows: RowWeights,
        sizes: Tensor | None,
        backend: Sdpa,
    ) -> Tensor:
        """With the softmax over sinks, the rows of the chunk, and the replay's own keys."""
        positions = table.positions
        slots = true_rows(self._in_softmax(table))
        index = slots.clamp(min=0)
        every = table.all_keys()
        keys = torch.cat([take_rows(every, index), own.to(every.dtype)], dim=2)
        count, own_positions = slots.shape[2], queries.positions[:, None].expand(*slots.shape[:2], -1)
        whole = queries.valid is None and bool((slots >= 0).all())
        places = torch.cat([positions.gather(2, index).masked_fill(slots < 0, EMPTY), own_positions], dim=2)
        if sizes is not None:
            sizes = sizes.gather(3, index.unsqueeze(2).expand(-1, -1, sizes.shape[2], -1))
        best = self._maxima(table, queries, keys, scoring, rows, sizes, places, count, whole, backend)
        found = best.new_zeros(*positions.shape[:2], table.length + 1)
        return found.scatter_(2, torch.where(slots < 0, table.length, slots), best)[:, :, : table.length]

    def _maxima(
        self,
        table: TokenTable,
        queries: Queries,
        keys: Tensor,
        scoring: Scoring,
        rows: RowWeights,
        sizes: Tensor | None,
        places: Tensor,
        count: int,
        whole: bool,
        backend: Sdpa,
    ) -> Tensor:
        """Of the first `count` of these keys at `places`. whole: they are in order, and nothing of them is padding."""
        if self._replay.group == "max":
            found = maxima_by_kernels(
                of_table(table), queries, keys, None, rows, scoring, places, columns=count, key_weights=sizes
            )
            if found is not None:
                return found[1]
        # Of the output of attention over these keys, only the log-sum-exp is of use: any values do.
        lse = causal_attention(queries.states, keys, keys, scoring, backend)[1] if whole and not table.packed else None
        return attention_maxima(
            queries.states.to(keys.dtype), keys, rows, scoring, group=self._replay.group, columns=count, lse=lse,
            key_weights=sizes,
            query_positions=None if whole else queries.positions, key_positions=None if whole else places,
        )  # fmt: skip
