"""`attention_maxima`: the most that any query gives to a key.

    maximum[b, h, k] = max over queries q, and query heads g of h, of  w[q] * P[b, g, q, k] * c[b, g, k]

What `attention_mass` is with a maximum in the place of the sum: exact, over blocks of rows, and no n x n matrix. Where
the log-sum-exp of every row is known, it is one matrix product and a running maximum of logits: no row is read twice,
and a single exponential is taken of every key. Kernels that find the output of attention on the way need no product
more than attention does: `attention_with_maxima`.

Shapes: `B` batch, `Hq` query heads, `Hkv` KV heads, `G = Hq / Hkv`, `L` queries, `S` keys, `D` head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvprune.attention import operations, packed
from kvprune.attention.backends import SDPA, Sdpa
from kvprune.attention.mass import RowWeights, Scoring, hidden_keys, row_blocks, row_logits, weighed_rows
from kvprune.attention.queries import Queries
from kvprune.table.ragged import RaggedTable
from kvprune.table.token_table import TokenTable


def attention_maxima(
    queries: Tensor,
    keys: Tensor,
    row_weights: RowWeights,
    scoring: Scoring,
    *,
    group: str = "max",
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    columns: int | None = None,
    lse: Tensor | None = None,
    key_weights: Tensor | None = None,
    block_bytes: int | None = None,
) -> Tensor:
    """The largest weighed attention probability of every key, `[B, Hkv, columns]` float32; 0 where no query sees it.

    Without positions the queries are the newest tokens of the keys, in order: query `i` sees keys `0 .. S - L + i`.
    With positions, a query sees the keys whose position is at most its own; -1 marks an empty slot, and a query at
    position -1 counts nothing.

    Args:
        queries: `[B, Hq, L, D]`. keys: `[B, Hkv, S, D]`.
        row_weights: w, which of the L rows to look at, and what to multiply their probabilities by.
        scoring: the scale, soft cap and sinks of the model's softmax.
        group: how the probabilities of the query heads of a KV head are reduced, "mean" or "max", row by row.
        query_positions: `[B or 1, L]`. key_positions: `[B, Hkv, S]`; both or neither.
        columns: of the first so many keys alone, which all queries see but for their positions; None for all keys.
        lse: log-sum-exp of the logits of every query over all keys, `[B, Hq, L]` float32, if it is known.
        key_weights: c, `[B, Hkv, G, columns]` float32; None for ones.
        block_bytes: size of a block of logits; the result depends on it by float32 rounding alone.
    """
    batch, query_heads, length, _ = queries.shape
    kv_heads, keys_length = keys.shape[1:3]
    in_order, device = query_positions is None, queries.device
    if in_order:
        query_positions = torch.arange(keys_length - length, keys_length, device=device)[None]
    queries, weights, query_positions, _ = weighed_rows(queries, row_weights, query_positions)
    if lse is not None and row_weights.rows is not None:
        lse = lse.gather(2, row_weights.rows.to(device).expand(batch, -1)[:, None].expand(-1, query_heads, -1))
    elif lse is not None:
        lse = lse[:, :, length - queries.shape[2] :]

    columns = keys_length if columns is None else columns
    read = columns if lse is not None else keys_length
    places = torch.arange(read, device=device)[None, None] if key_positions is None else key_positions[:, :, :read]
    unhidden = in_order and read <= keys_length - length  # then every query sees them all
    running = _Running(batch, kv_heads, query_heads // kv_heads, columns, group, key_weights, device)
    if unhidden and lse is not None and group == "max" and scoring.softcap is None and queries.dtype == torch.float32:
        shift = lse.float().unflatten(1, (kv_heads, -1)) - weights.log()[:, None, None]
        return running.result_of(_shifted_maxima(queries, keys[:, :, :read], scoring.scale, shift, block_bytes))
    for block in row_blocks(queries.shape[2], batch * query_heads * read, device, block_bytes):
        logits = row_logits(queries[:, :, block], keys[:, :, :read], scoring)
        if not unhidden:
            logits.masked_fill_(hidden_keys(query_positions[:, block], places), -math.inf)
        total = scoring.log_sum_exp(logits) if lse is None else lse[:, :, block].float().unflatten(1, (kv_heads, -1))
        running.add(logits[..., :columns], total, weights[:, block])
    return running.result()


def packed_maxima(
    states: Tensor,
    positions: Tensor,
    table: TokenTable,
    row_weights: RowWeights,
    scoring: Scoring,
    *,
    group: str = "max",
    key_weights: Tensor | None = None,
) -> Tensor:
    """The same over a table with packed rows, `[B, Hkv, rows]` float32, by blocks of decoded keys; see `packed.py`.

    states: `[B, Hq, L, D]`. positions: `[B or 1, L]`, -1 for padding.
    """
    states, weights, positions, _ = weighed_rows(states, row_weights, positions)
    logits = packed.RowLogits(states, positions, table, scoring)
    total = packed.log_sum_exp(logits)
    found = torch.zeros(table.positions.shape, dtype=torch.float32, device=states.device)
    for keys in packed.key_blocks(table):
        count = keys.slots.stop - keys.slots.start
        scale = None if key_weights is None else key_weights[..., keys.slots]
        batch, kv_heads = table.positions.shape[:2]
        running = _Running(batch, kv_heads, total.shape[2], count, group, scale, states.device)
        for rows in logits.blocks(keys):
            running.add(logits.of(rows, keys), total[:, :, :, rows, 0], weights[:, rows])
        found[:, :, keys.slots] = running.result()
    return found


def _shifted_maxima(queries: Tensor, keys: Tensor, scale: float, shift: Tensor, block_bytes: int | None) -> Tensor:
    """The largest `scale * q . k - shift` of any query, `[B, Hkv, G, S]`: a product of vectors that are one longer.

    queries: `[B, Hq, R, D]`, all of which see all keys `[B, Hkv, S, D]`. shift: `[B, Hkv, G, R]`.
    """
    batch, kv_heads, length, _ = keys.shape
    longer = torch.cat([queries.unflatten(1, (kv_heads, -1)) * scale, -shift.unsqueeze(-1)], dim=-1)
    rows = longer.transpose(3, 4)
    columns = torch.cat([keys, keys.new_ones(batch, kv_heads, length, 1)], dim=-1).unsqueeze(2)
    best = torch.empty((*shift.shape[:3], length), dtype=torch.float32, device=keys.device)
    # Keys by blocks: all queries of one lie side by side, and the maximum is taken along them.
    for block in row_blocks(length, shift.numel(), keys.device, block_bytes):
        best[..., block] = torch.matmul(columns[:, :, :, block], rows).amax(-1)
    return best


class _Running:
    """A maximum over blocks of rows, `[B, Hkv, G, columns]`; in logarithms where the group is reduced by a maximum."""

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        group_size: int,
        columns: int,
        group: str,
        key_weights: Tensor | None,
        device: torch.device,
    ) -> None:
        self.group, self.key_weights = group, key_weights
        shape = (batch, kv_heads, group_size, columns) if group == "max" else (batch, kv_heads, 1, columns)
        self.best = torch.full(shape, -math.inf if group == "max" else 0.0, dtype=torch.float32, device=device)

    def add(self, logits: Tensor, total: Tensor, weights: Tensor) -> None:
        """logits: `[B, Hkv, G, l, columns]`, overwritten. total: of their rows, `[B, Hkv, G, l]`. weights: `[B, l]`."""
        # A row that sees nothing has -inf in all of its logits, and so in their sum: -inf - inf is no number.
        shift = total.masked_fill(total == -math.inf, math.inf)
        weights = weights[:, None, None]
        if self.group == "max":
            logits = logits.sub_((shift - weights.log()).unsqueeze(-1))
            self.best = torch.maximum(self.best, logits.amax(3))
            return
        probabilities = logits.sub_(shift.unsqueeze(-1)).exp_()
        if self.key_weights is not None:
            probabilities *= self.key_weights.unsqueeze(3)
        by_head = probabilities.mean(2, keepdim=True) * weights.unsqueeze(-1)
        self.best = torch.maximum(self.best, by_head.amax(3))

    def result_of(self, best: Tensor) -> Tensor:
        """The result for a maximum in logarithms that was found in another way, `[B, Hkv, G, columns]`."""
        self.best = best
        return self.result()

    def result(self) -> Tensor:
        if self.group != "max":
            return self.best.squeeze(2)
        found = self.best.exp()
        return (found if self.key_weights is None else found * self.key_weights).amax(2)


def attention_with_maxima(
    asked: Queries,
    table: TokenTable,
    scoring: Scoring,
    row_weights: RowWeights,
    *,
    group: str,
    columns: int,
    key_weights: Tensor | None = None,
    backend: Sdpa = SDPA,
    outputs: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Attention over a table whose newest rows are the queries' own, and what they give to its first `columns` slots.

    Returns the output `[B, Hq, L, Dv]`, None unless `outputs` are wanted, and maxima `[B, Hkv, columns]`.
    """
    if group == "max" and not table.packed:
        found = maxima_by_kernels(
            operations.of(table), asked, table.keys, table.values if outputs else None, row_weights, scoring,
            table.positions, columns=columns, key_weights=key_weights,
        )  # fmt: skip
        if found is not None:
            return found
    attended = asked.attend(table, scoring, backend=backend)
    best = maxima_of(
        asked, table, scoring, row_weights, group=group, columns=columns, lse=attended.lse, key_weights=key_weights
    )
    return attended.output if outputs else None, best


def maxima_by_kernels(
    kernels: operations.AttentionOperations,
    asked: Queries,
    keys: Tensor,
    values: Tensor | None,
    row_weights: RowWeights,
    scoring: Scoring,
    key_positions: Tensor,
    *,
    columns: int,
    key_weights: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor | None, Tensor] | None:
    """Output and maxima, of groups reduced by "max", where kernels find these; None where they do not.

    lse: of every query over all keys, `[B, Hq, L]`, if it is known.
    """
    rows, given = row_weights.chosen(len(asked), keys.device)
    batch = keys.shape[0]
    weights = torch.zeros(batch, len(asked), dtype=torch.float32, device=keys.device)
    weights.scatter_(1, rows.expand(batch, -1), given.expand(batch, -1))
    states = asked.states.to(keys.dtype)
    found = kernels.attention_maxima(states, keys, values, weights, scoring, asked.positions, key_positions, lse=lse)
    if found is None:
        return None
    output, by_head = found
    by_head = by_head[..., :columns]
    return output, (by_head if key_weights is None else by_head * key_weights).amax(2)


def maxima_of(
    asked: Queries,
    table: TokenTable,
    scoring: Scoring,
    row_weights: RowWeights,
    *,
    group: str,
    columns: int,
    lse: Tensor | None = None,
    key_weights: Tensor | None = None,
) -> Tensor:
    """What queries give to the first `columns` slots of a table, `[B, Hkv, columns]`; their own rows are its newest."""
    apart = isinstance(table, RaggedTable)  # whose heads have packed rows in different slots
    if table.packed and not apart:
        if key_weights is not None:
            key_weights = torch.nn.functional.pad(key_weights, (0, table.length - columns))
        return packed_maxima(
            asked.states, asked.positions, table, row_weights, scoring, group=group, key_weights=key_weights
        )[:, :, :columns]
    keys = table.all_keys() if apart else table.keys
    if group == "max":
        found = maxima_by_kernels(
            operations.of(table), asked, keys, None, row_weights, scoring, table.positions, columns=columns,
            key_weights=key_weights, lse=lse,
        )  # fmt: skip
        if found is not None:
            return found[1]
    return attention_maxima(
        asked.states, keys, row_weights, scoring, group=group, columns=columns, lse=lse, key_weights=key_weights,
        query_positions=None if table.dense else asked.positions,
        key_positions=None if table.dense else table.positions,
    )  # fmt: skip
