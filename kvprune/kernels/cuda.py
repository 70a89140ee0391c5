"""`TritonKernels`: Triton's in `kvprune.kernels.gpu`, for a CUDA device; what they do not cover is left to PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.attention.backends import FLASH
from kvprune.attention.mass import RowWeights, Scoring, lse_of_weighed
from kvprune.kernels import gpu
from kvprune.kernels.reference import Kernels
from kvprune.table.packed_rows import PackedRows
from kvprune.table.ragged import RaggedTable
from kvprune.table.rotated_rows import RotatedRows
from kvprune.table.token_table import TokenTable


class TritonKernels(Kernels):
    """Decode attention that yields its probabilities in the same pass, and attention mass without any of them."""

    name = "triton"

    def single_query(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scoring: Scoring,
        empty: Tensor | None,
        with_probabilities: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if not _fits(queries, keys, values):
            return super().single_query(queries, keys, values, scoring, empty, with_probabilities)
        bare = empty is None and scoring.plain and not with_probabilities
        if bare and queries.is_cuda and FLASH.takes_single(queries, keys, values):  # one launch, by torch's own hand
            return FLASH.single(queries, keys, values, scoring.scale), None
        return gpu.decode_attention(queries, keys, values, scoring, empty=empty, scores=_scores(with_probabilities))

    def flat_single_query(
        self, queries: Tensor, table: RaggedTable, scoring: Scoring, with_probabilities: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        flat = table.flat
        if flat is None or not _fits(queries, flat.tensors["keys"], flat.tensors["values"]):
            return super().flat_single_query(queries, table, scoring, with_probabilities)
        output, found = gpu.varlen_decode_attention(
            queries, flat.tensors["keys"], flat.tensors["values"], scoring, flat.starts,
            max(head.capacity for head in table.heads), lengths=flat.lengths, scores=_scores(with_probabilities),
        )  # fmt: skip
        if found is None:
            return output, None
        by_head = self.spread(found.t(), flat.starts, flat.lengths, table.length, 0).transpose(1, 2)
        return output, by_head.unflatten(0, (-1, table.kv_heads))

    def packed_single_query(
        self, queries: Tensor, table: TokenTable, scoring: Scoring, with_probabilities: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        if not all(map(_holds_codes, table.packed)) or not _fits(queries, table.keys, table.values):
            return super().packed_single_query(queries, table, scoring, with_probabilities)
        return gpu.packed_decode_attention(
            queries, table.packed, table.keys, table.values, scoring,
            empty=None if table.dense else table.positions, scores=_scores(with_probabilities),
        )  # fmt: skip

    def attention_mass(
        self,
        queries: Tensor,
        keys: Tensor,
        row_weights: RowWeights,
        scoring: Scoring,
        *,
        lse: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        if not _fits(queries, keys, keys):
            return super().attention_mass(queries, keys, row_weights, scoring, lse=lse, **settings)
        known = lse is not None and row_weights.noise is None and scoring.sinks is None
        of_weighed = lse_of_weighed(lse, row_weights) if known and lse is not None else None
        return gpu.attention_mass(queries, keys, row_weights, scoring, lse=of_weighed, **settings)

    def attention_maxima(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor | None,
        weights: Tensor,
        scoring: Scoring,
        query_positions: Tensor,
        key_positions: Tensor,
        *,
        lse: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor] | None:
        if values is not None or not _fits(queries, keys, keys):  # torch's attention is faster, and may tell the lse
            return None
        return None, gpu.attention_maxima(queries, keys, weights, scoring, query_positions, key_positions, lse=lse)


TRITON = TritonKernels()


def _scores(with_probabilities: bool) -> str | None:
    return "probabilities" if with_probabilities else None


def _holds_codes(tier: PackedRows) -> bool:
    """Whether the kernels know where the codes of a tier are; others may hold them in another way."""
    return gpu.takes_rotated(tier) if type(tier) is RotatedRows else type(tier) is PackedRows


def _fits(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    needs_gradients = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    return gpu.supported(queries, keys, values) and not needs_gradients
