"""`Contents`: what a cache holds, in tokens and bytes, and what people are told of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvprune.cache import stock
from kvprune.cache.forward_pass import ForwardPass
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.report import CacheReport, LayerReport, kind_of
from kvprune.errors import CacheError
from kvprune.policy.base import Policy
from kvprune.table.split_rows import SplitRows


class Contents(ForwardPass):
    """The part of a `PrunedCache` that only looks. Nothing here changes what the cache holds."""

    policy: Policy
    attention: str

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has seen tokens."""
        return bool(self.seen_tokens)

    @property
    def seen_tokens(self) -> int:
        """Logical length: tokens the cache has seen, kept or not, padding included."""
        return self.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that this process holds now: keys, values, positions, scores, spare slots.

        Those of the storages behind them, as they were allocated.
        """
        self.end_prompt()
        return sum(layer.nbytes if isinstance(layer, PrunedLayer) else stock.nbytes(layer) for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the keys and values that a DynamicCache would hold for the same tokens, in this process.

        Those of the tensors alone: transformers keeps the keys of a sliding window as a view of the whole prompt.
        """
        return sum(
            layer.dense_nbytes
            if isinstance(layer, PrunedLayer) and layer.table is not None
            else stock.dense_nbytes(layer)
            for layer in self.layers
        )

    def kept_positions(self, layer: int) -> Tensor:
        """Positions of the tokens that a layer keeps, LongTensor `[B, Hkv, rows]`, ascending; Hkv of this process.

        Positions count the tokens of each sequence from 0, padding left out. Where a sequence keeps fewer rows than
        another, the row begins with -1. Raises CacheError for a layer that is not pruned.
        """
        self.end_prompt()
        return self._pruned(layer).kept_positions()

    @property
    def selected_positions(self) -> list[Tensor] | None:
        """For each sequence, the positions that a prompt filter chose, LongTensor `[k]`; None if nothing was filtered.

        Positions count the tokens of each sequence from 0, padding left out; those of all filtered prompts, ascending.
        """
        selection = self.layers[self.pruned_layers[0]].selection if self.prompt_filter else None
        return None if selection is None else [torch.tensor(each, dtype=torch.int64) for each in selection.positions]

    def _pruned(self, layer: int) -> PrunedLayer:
        if layer not in self.pruned_layers:
            raise CacheError(
                f"layer {layer} is not pruned (its attention is not full, or there is no such layer); "
                f"the pruned layers are {list(self.pruned_layers)}."
            )
        return self.layers[layer]

    def report(self) -> CacheReport:
        """Measured bytes and kept tokens, layer by layer. `str()` of it is a table, `.plot("kept.png")` a picture."""
        self.end_prompt()
        layers, pruned = [], kind_of(self.policy)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PrunedLayer) and layer.table is not None:
                table, dense = layer.table, layer.dense_nbytes
                code_nbytes, half_nbytes = None, None
                if table.packed:
                    code_nbytes, half_nbytes = table.code_nbytes, dense * 2 // table.keys.itemsize
                layers.append(
                    LayerReport(
                        index, pruned, layer.nbytes, table.kv_nbytes, dense, self.kept_positions(index),
                        code_nbytes, half_nbytes,
                    )
                )  # fmt: skip
            else:
                held, dense = stock.nbytes(layer), stock.dense_nbytes(layer)
                kind = pruned if isinstance(layer, PrunedLayer) else type(layer).__name__
                layers.append(LayerReport(index, kind, held, held, dense, None))
        tables = (self.layers[index].table for index in self.pruned_layers)
        kernels = ", ".join(sorted({table.kernels.name for table in tables if table is not None})) or None
        return CacheReport(
            str(self.policy), self.seen_tokens, tuple(layers), self.selected_positions, self.filter_layer, kernels,
            self.attention, self._key_reads(), tuple(self._notes()),
        )  # fmt: skip

    def _key_reads(self) -> tuple[int, int] | None:
        tables = (self.layers[index].table for index in self.pruned_layers)
        tiers = [tier for table in tables if table is not None for tier in table.packed if isinstance(tier, SplitRows)]
        return (sum(tier.bytes_read for tier in tiers), sum(tier.bytes_held for tier in tiers)) if tiers else None

    def _notes(self) -> Iterator[str]:
        for layer in (self.layers[index] for index in self.pruned_layers[:1]):
            if layer.table is None:
                continue
            costs = layer.planner.costs(layer.table)
            for policy in self.policy.parts():
                note = policy.note(layer.prompt_tokens, **costs)
                if note is not None:
                    yield f"{type(policy).__name__}: {note}"

    def __repr__(self) -> str:
        held = f"nbytes={self.nbytes:,} of {self.dense_nbytes:,}"
        return f"PrunedCache({self.policy}, seen_tokens={self.seen_tokens}, {held})"
