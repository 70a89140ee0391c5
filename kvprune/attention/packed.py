"""Attention over a table with packed rows: keys and values are decoded a few rows at a time, never as a whole.

The same arithmetic that `attention.py` and `mass.py` do on dense rows, with the loops the other way round: blocks of
keys outside, so that each is decoded once, and a running softmax. Exact for what the codes stand for, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights, Scoring, grouped, hidden_keys, row_blocks, weighed_rows
from kvprune.attention.noise import Gumbel
from kvprune.table.split_rows import SplitRows
from kvprune.table.token_table import TokenTable


def single_query(states: Tensor, table: TokenTable, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """One query per sequence that sees every row: output `[B, Hq, 1, Dv]`, probabilities `[B, Hkv, G, rows]` float32.

    Of a single query all logits fit in memory, so that one softmax does. Of rows with keys in two halves, the high bits
    make a first one; a query head whose largest probability is then below theta reads the low bits of its KV head, and
    its softmax is made again, of all bits.
    """
    batch, query_heads, _, dim = states.shape
    queries = states.float().view(batch, table.kv_heads, -1, dim) * scoring.scale
    loose_keys, loose_values = table.keys.float(), table.values.float()
    logits = torch.cat(
        [
            *(
                tier.dot_high(queries) if isinstance(tier, SplitRows) else tier.dot_keys(queries)
                for tier in table.packed
            ),
            torch.matmul(queries, loose_keys.transpose(2, 3)),
        ],
        dim=-1,
    )
    probabilities = _softmax(logits, table, scoring)
    if any(isinstance(tier, SplitRows) for tier in table.packed) and _add_low_bits(
        logits, queries, probabilities, table
    ):
        probabilities = _softmax(logits, table, scoring)
    *packed, loose = probabilities.split([*map(len, table.packed), loose_keys.shape[2]], dim=-1)
    output = torch.matmul(loose, loose_values)
    for tier, weights in zip(table.packed, packed, strict=True):
        output += tier.sum_values(weights)
    return output.view(batch, query_heads, 1, -1).to(states.dtype), probabilities


def _softmax(logits: Tensor, table: TokenTable, scoring: Scoring) -> Tensor:
    """Probabilities `[B, Hkv, G, rows]` of logits that are not capped."""
    capped = scoring.capped(logits)
    if not table.dense:
        capped = capped.masked_fill(table.positions[:, :, None] < 0, -math.inf)
    return scoring.softmax(capped[:, :, :, None]).squeeze(3)


def _add_low_bits(logits: Tensor, queries: Tensor, probabilities: Tensor, table: TokenTable) -> bool:
    """Bring what the low bits of keys add into logits, where probabilities ask for it; whether any do."""
    first, added, largest = 0, False, probabilities.amax(-1)
    for tier in table.packed:
        rows = slice(first, first + len(tier))
        first = rows.stop
        if not isinstance(tier, SplitRows):
            continue
        flat = largest < tier.codec.theta
        sequence, head = flat.any(-1).nonzero(as_tuple=True)
        if len(head):
            low = tier.dot_low(queries[sequence, head], sequence, head)
            logits[sequence, head, :, rows] += low.masked_fill_(~flat[sequence, head][..., None], 0.0)
            added = True
    return added


@dataclass(frozen=True)
class KeyBlock:
    """Some rows of a table. keys: `[B, Hkv, c, D]` float32. values: likewise, decoded when called for."""

    slots: slice
    keys: Tensor
    values: Callable[[], Tensor]


def key_blocks(table: TokenTable) -> Iterator[KeyBlock]:
    """All rows of a table: packed ones, decoded, and then those in full precision."""
    first = 0
    for tier in table.packed:
        for some in tier.stretches():
            slots = slice(first + some.rows.start, first + some.rows.stop)
            yield KeyBlock(slots, tier.keys(some), partial(tier.values, some))
        first += len(tier)
    if table.length > first:
        yield KeyBlock(slice(first, table.length), table.keys.float(), table.values.float)


@dataclass(frozen=True)
class RowLogits:
    """Logits of query rows, a block of rows and of keys at a time.

    states: `[B, Hq, L, D]`. positions: `[B or 1, L]`, -1 for padding, which sees nothing.
    """

    states: Tensor
    positions: Tensor
    table: TokenTable
    scoring: Scoring
    noise: Gumbel | None = None

    def blocks(self, keys: KeyBlock) -> list[slice]:
        batch, query_heads, length, _ = self.states.shape
        return row_blocks(length, batch * query_heads * (keys.slots.stop - keys.slots.start), self.states.device)

    def of(self, rows: slice, keys: KeyBlock) -> Tensor:
        """`[B, Hkv, G, l, c]` float32, -inf where a key must not be seen."""
        batch, kv_heads = keys.keys.shape[:2]
        queries = grouped(self.states[:, :, rows].float() * self.scoring.scale, kv_heads)
        logits = torch.bmm(queries, keys.keys.flatten(0, 1).transpose(1, 2))
        logits = self.scoring.capped(logits.view(batch, kv_heads, -1, rows.stop - rows.start, keys.keys.shape[2]))
        query_positions, key_positions = self.positions[:, rows], self.table.positions[:, :, keys.slots]
        if self.noise is not None:
            logits = self.noise.part(rows).perturb(logits, query_positions, key_positions)
        return logits.masked_fill_(hidden_keys(query_positions, key_positions), -math.inf)

    def running(self) -> tuple[Tensor, Tensor]:
        """Where a running softmax begins: maximum and sum of exponentials, `[B, Hkv, G, L, 1]`, of attention sinks."""
        batch, query_heads, length, _ = self.states.shape
        kv_heads, sinks = self.table.kv_heads, self.scoring.sinks
        largest = torch.full((batch, query_heads, length), -math.inf, dtype=torch.float32, device=self.states.device)
        if sinks is not None:
            largest.copy_(sinks[:, None])
        total = (largest > -math.inf).float()
        return tuple(tensor.unflatten(1, (kv_heads, -1))[..., None] for tensor in (largest, total))


def _larger(largest: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The new running maximum, and what the sums so far are to be multiplied by."""
    larger = torch.maximum(largest, logits.amax(-1, keepdim=True))
    return larger, torch.exp(largest - larger).nan_to_num_(0.0)  # NaN where nothing has been seen yet


def attention(states: Tensor, positions: Tensor, table: TokenTable, scoring: Scoring) -> Tensor:
    """Output `[B, Hq, L, Dv]` of queries that see the rows at their position or before; of padding, zero.

    states: `[B, Hq, L, D]`. positions: `[B or 1, L]`, -1 for padding.
    """
    logits = RowLogits(states, positions, table, scoring)
    largest, total = logits.running()
    output = torch.zeros(*largest.shape[:4], table.values.shape[3], dtype=torch.float32, device=states.device)
    for keys in key_blocks(table):
        values = keys.values()[:, :, None]
        for rows in logits.blocks(keys):
            block = logits.of(rows, keys)
            larger, shrink = _larger(largest[..., rows, :], block)
            weights = block.sub_(larger).exp_().nan_to_num_(0.0)
            total[..., rows, :] = total[..., rows, :] * shrink + weights.sum(-1, keepdim=True)
            output[..., rows, :] = output[..., rows, :] * shrink + torch.matmul(weights, values)
            largest[..., rows, :] = larger
    return output.div_(total.clamp(min=torch.finfo(torch.float32).tiny)).flatten(1, 2).to(states.dtype)


def attention_mass(
    states: Tensor, positions: Tensor, table: TokenTable, row_weights: RowWeights, scoring: Scoring, group: str
) -> Tensor:
    """Weighted attention mass of every row of the table, `[B, Hkv, rows]` float32; see `mass.attention_mass`.

    Two passes: the first finds the log-sum-exp of every row that is weighed, the second adds up columns.
    """
    states, weights, positions, noise = weighed_rows(states, row_weights, positions)
    logits = RowLogits(states, positions, table, scoring, noise)
    lse = log_sum_exp(logits)
    mass = torch.zeros(*table.positions.shape, dtype=torch.float32, device=states.device)
    for keys in key_blocks(table):
        for rows in logits.blocks(keys):
            probabilities = logits.of(rows, keys).sub_(lse[..., rows, :]).exp_().nan_to_num_(0.0)
            by_head = probabilities.mean(2) if group == "mean" else probabilities.amax(2)
            mass[:, :, keys.slots] += torch.einsum("bl,bhlk->bhk", weights[:, rows], by_head)
    return mass


def log_sum_exp(logits: RowLogits) -> Tensor:
    """Of every row over all keys, `[B, Hkv, G, L, 1]`."""
    largest, total = logits.running()
    for keys in key_blocks(logits.table):
        for rows in logits.blocks(keys):
            block = logits.of(rows, keys)
            larger, shrink = _larger(largest[..., rows, :], block)
            block = block.sub_(larger).exp_().nan_to_num_(0.0).sum(-1, keepdim=True)
            total[..., rows, :] = total[..., rows, :] * shrink + block
            largest[..., rows, :] = larger
    return largest + total.log()
