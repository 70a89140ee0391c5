"""`attention_mass`: the one statistic that nearly every published score is made of.

    mass[b, h, k] = sum_q w[q] * P[b, h, q, k]

where P are the attention probabilities, reduced over the query heads of a KV head. H2O weighs every row with 1, A2SF
with gamma^age, SnapKV the last window, TOVA the last row. The sum is exact and is taken over blocks of rows, so no
n x n matrix ever exists, and rows of weight zero are never computed.

Shapes: `B` batch, `Hq` query heads, `Hkv` KV heads, `G = Hq / Hkv`, `L` queries, `S` keys, `D` head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvprune.attention.noise import Gumbel
from kvprune.errors import PolicyError

GROUPS = ("mean", "max")
# A block of probabilities should stay in the cache of the processor: 32 rows of 8 heads over 4,096 keys are 4 MiB.
_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class RowWeights:
    """Which attention rows to weigh, and how much. Make one with the constructors below.

    Rows are counted back from the newest query. `last` rows are weighed, the row of age `a` with `decay ** a`; or, if
    `rows` is given, exactly those rows (indices into the step's queries, `[R]` or `[B, R]`) with `weights` of the same
    shape, float32. With `noise`, the rows are not those of the model's softmax but of a noisy, tempered one.
    """

    last: int
    decay: float = 1.0
    rows: Tensor | None = None
    weights: Tensor | None = None
    noise: Gumbel | None = None

    @classmethod
    def uniform(cls, queries: int) -> RowWeights:
        """Every row counts 1 (H2O)."""
        return cls(queries)

    @classmethod
    def last_window(cls, window: int) -> RowWeights:
        """The last `window` rows count 1 (SnapKV; TOVA with a window of 1)."""
        return cls(window)

    @classmethod
    def geometric(cls, queries: int, decay: float, epsilon: float = 0.0) -> RowWeights:
        """The row of age `a` counts `decay ** a` (A2SF).

        Rows are left out once all that follow could add at most `epsilon` to any key: the weights past the last T rows
        sum to less than `decay**T / (1 - decay)`, and no probability exceeds 1.
        """
        if epsilon > 0 and 0 < decay < 1:
            rows = math.ceil((math.log(epsilon) + math.log(1 - decay)) / math.log(decay))
            queries = min(queries, max(rows, 1))
        elif decay == 0:
            queries = min(queries, 1)
        return cls(queries, decay)

    @classmethod
    def explicit(cls, rows: Tensor, weights: Tensor) -> RowWeights:
        """Chosen rows with chosen weights (probe rows)."""
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else repr(each) for each in (rows, weights)]
        if not isinstance(shapes[0], tuple) or shapes[0] != shapes[1] or len(shapes[0]) not in (1, 2):
            raise PolicyError(
                f"rows and weights must be tensors of the same shape, [R] or [B, R], not {shapes[0]} and {shapes[1]}."
            )
        return cls(rows.shape[-1], 1.0, rows.long(), weights.float())

    @property
    def is_whole(self) -> bool:
        """Whether it says what it must: how many rows, or which."""
        counted = isinstance(self.last, int | np.integer) and self.last >= 0
        return counted and isinstance(self.decay, float | int) and (self.rows is None) == (self.weights is None)

    def chosen(self, queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of so many rows are weighed, indices `[R]` or `[B, R]`, and how much, float32 of the same shape."""
        if self.rows is not None:
            return self.rows.to(device), self.weights.to(device)  # type: ignore[union-attr]
        used = min(self.last, queries)
        return torch.arange(queries - used, queries, device=device), self.suffix(device, used)

    def noisy(self, noise: Gumbel) -> RowWeights:
        """The same rows of a noisy, tempered softmax (Keyformer)."""
        return replace(self, noise=noise)

    def same_as(self, other: RowWeights) -> bool:
        """Whether both weigh the same rows alike."""
        if self.noise is not other.noise:
            return False
        if self.rows is None and other.rows is None:
            return (self.last, self.decay) == (other.last, other.decay)
        return self.rows is other.rows and self.weights is other.weights

    def suffix(self, device: torch.device, count: int) -> Tensor:
        """Weights of the newest `count` rows, oldest first, `[count]` float32."""
        if self.decay == 1.0:
            return torch.ones(count, dtype=torch.float32, device=device)
        ages = torch.arange(count - 1, -1, -1, device=device, dtype=torch.float64)
        return torch.pow(self.decay, ages).float()  # from exponents: repeated products would drift


@dataclass(frozen=True)
class Scoring:
    """How a model turns queries and keys into probabilities.

    scale: multiplies q.k. softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2). sinks: `[Hq]`, one more
    logit per query head that takes probability and has no value (GPT-OSS).
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether this is the softmax that fused attention kernels compute."""
        return self.softcap is None and self.sinks is None

    def to(self, device: torch.device) -> Scoring:
        return self if self.sinks is None else replace(self, sinks=self.sinks.to(device))

    def capped(self, logits: Tensor) -> Tensor:
        """Logits under the soft cap, where there is one."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def softmax(self, logits: Tensor) -> Tensor:
        """Probabilities of capped logits `[B, Hkv, G, L, S]`; where there are sinks, a row adds up to less than 1."""
        if self.sinks is None:
            return torch.softmax(logits, dim=-1)
        batch, kv_heads, _, rows, _ = logits.shape
        sinks = self.sinks.float().view(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, rows, 1)
        return torch.softmax(torch.cat([logits, sinks], dim=-1), dim=-1)[..., :-1]

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """Of the rows of capped logits `[B, Hkv, G, L, S]`, and of the sinks where there are some, `[B, Hkv, G, L]`."""
        total = torch.logsumexp(logits, dim=-1)
        if self.sinks is None:
            return total
        return torch.logaddexp(total, self.sinks.float().view(1, logits.shape[1], -1, 1))


def grouped(queries: Tensor, kv_heads: int) -> Tensor:
    """`[B, Hq, L, D] -> [B * Hkv, G * L, D]`: the query heads of a KV head side by side, so no key is repeated."""
    batch, heads, length, dim = queries.shape
    return queries.reshape(batch * kv_heads, heads // kv_heads * length, dim)


def row_probabilities(
    queries: Tensor,
    keys: Tensor,
    scoring: Scoring,
    hidden: Tensor | None = None,
) -> Tensor:
    """Attention probabilities of a few query rows, `[B, Hkv, G, L, S]` float32, whatever the dtype of the model.

    Args:
        queries: `[B, Hq, L, D]`. keys: `[B, Hkv, S, D]`.
        hidden: bool, broadcastable to `[B, Hkv, 1, L, S']`, True where one of the last S' keys must not be seen. A row
            that sees nothing is NaN, unless the model has attention sinks.
    """
    logits = row_logits(queries, keys, scoring)
    if hidden is not None:
        logits[..., keys.shape[2] - hidden.shape[-1] :].masked_fill_(hidden, -math.inf)
    return scoring.softmax(logits)


def row_logits(queries: Tensor, keys: Tensor, scoring: Scoring) -> Tensor:
    """Capped logits `[B, Hkv, G, L, S]` float32 of queries `[B, Hq, L, D]` with all keys `[B, Hkv, S, D]`."""
    batch, kv_heads, length, dim = keys.shape
    rows = queries.shape[2]
    flat_keys = keys.reshape(batch * kv_heads, length, dim).transpose(1, 2)
    flat_queries = grouped(queries, kv_heads)
    if queries.dtype == torch.float32:
        logits = torch.bmm(flat_queries * scoring.scale, flat_keys)
    elif queries.is_cuda and queries.dtype != torch.float64:
        # Half precision in, float32 out, without a float32 copy of the keys.
        logits = torch.bmm(flat_queries, flat_keys, out_dtype=torch.float32).mul_(scoring.scale)
    else:
        logits = torch.bmm(flat_queries.float() * scoring.scale, flat_keys.float())
    return scoring.capped(logits.view(batch, kv_heads, -1, rows, length))


def row_blocks(rows: int, row_elements: int, device: torch.device, block_bytes: int | None = None) -> list[slice]:
    """Slices of `range(rows)`, each as long as float32 blocks of `row_elements` a row may be on this device."""
    limit = block_bytes or _BLOCK_BYTES.get(device.type, _BLOCK_BYTES["cpu"])
    size = max(1, limit // (4 * row_elements))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def hidden_keys(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Which keys the queries must not see, bool `[B, Hkv, 1, L, S]`: empty slots (-1) and later positions.

    Args:
        query_positions: `[B, L]` or `[1, L]`. key_positions: `[B, Hkv, S]`.
    """
    keys = key_positions[:, :, None, None, :]
    return (keys > query_positions[:, None, None, :, None]) | (keys < 0)


def weighed_rows(queries: Tensor, row_weights: RowWeights, positions: Any) -> tuple[Tensor, Tensor, Any, Gumbel | None]:
    """The queries `[B, Hq, R, D]` that are weighed, their weights `[B, R]`, positions `[B or 1, R]`, and their noise.

    queries: `[B, Hq, L, D]`. positions: `[B or 1, L]`, -1 for padding, which weighs nothing; or None.
    """
    batch, query_heads, length, dim = queries.shape
    if row_weights.rows is not None:
        rows = row_weights.rows.to(queries.device).expand(batch, -1)
        weights = row_weights.weights.to(queries.device).expand(batch, -1)  # type: ignore[union-attr]
        queries = queries.gather(2, rows[:, None, :, None].expand(-1, query_heads, -1, dim))
        chosen: Any = rows
        if positions is not None:
            positions = positions.expand(batch, -1).gather(1, rows)
    else:
        used = min(row_weights.last, length)
        chosen = slice(length - used, None)
        queries = queries[:, :, chosen]
        weights = row_weights.suffix(queries.device, used).expand(batch, -1)
        positions = None if positions is None else positions[:, chosen]
    if positions is not None:
        weights = weights * (positions >= 0)
    return queries, weights, positions, None if row_weights.noise is None else row_weights.noise.part(chosen)


class MassOperations:
    """What `attention_mass` leaves to kernels, in PyTorch."""

    def noisy_weights(
        self,
        logits: Tensor,
        noise: Gumbel,
        scoring: Scoring,
        query_positions: Tensor,
        key_positions: Tensor,
        lse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A noisy, tempered softmax of capped logits `[B, Hkv, G, L, S]` float32, which may be overwritten.

        Returns weights of that shape, 0 where a query does not see a key, and what a row of them is to be divided by,
        `[B, Hkv, G, L]`.

        query_positions: `[B or 1, L]`, -1 for padding. key_positions: `[B or 1, Hkv or 1, S]`, -1 for empty. lse:
        log-sum-exp of the logits, of that shape, if it is known.
        """
        hidden = hidden_keys(query_positions, key_positions)
        logits = noise.perturb(logits, query_positions, key_positions).masked_fill_(hidden, -math.inf)
        # Normalized already; NaN where a row sees nothing.
        return scoring.softmax(logits).nan_to_num_(0.0), logits.new_ones(logits.shape[:4])

    def mass_from_lse(
        self,
        queries: Tensor,
        keys: Tensor,
        weights: Tensor,
        scoring: Scoring,
        places: Tensor,
        lse: Tensor,
        noise: Gumbel | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor | None:
        """Attention mass `[B, Hkv, S]` of the mean over query heads, where rows need not be normalized any more.

        None where that is not faster than `attention_mass` without it, as in PyTorch, which would write every tile of
        logits several times. queries: those weighed, `[B, Hq, R, D]`. weights: `[B, R]`. places: of these queries among
        the keys, LongTensor `[B or 1, R]`, ascending. lse: log-sum-exp of their logits, `[B, Hq, R]`. noise goes by
        query_positions `[B or 1, R]` and key_positions `[B or 1, Hkv or 1, S]`.
        """
        return None


TORCH_MASS = MassOperations()


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    row_weights: RowWeights,
    scoring: Scoring,
    *,
    group: str = "mean",
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    in_order: bool = False,
    lse: Tensor | None = None,
    block_bytes: int | None = None,
    kernels: MassOperations = TORCH_MASS,
) -> Tensor:
    """Weighted attention mass of every key, `[B, Hkv, S]` float32.

    Without positions the queries are the newest tokens of the keys, in order: query `i` sees keys `0 .. S - L + i`.
    With positions, a query sees the keys whose position is at most its own; -1 marks an empty slot, and a query at
    position -1 counts nothing. Noise goes by positions.

    Args:
        queries: `[B, Hq, L, D]`. keys: `[B, Hkv, S, D]`.
        row_weights: which of the L rows to weigh; the result of a row of weight w adds up to w.
        scoring: the scale, soft cap and sinks of the model's softmax.
        group: how the probabilities of the query heads of a KV head are reduced, "mean" or "max", row by row.
        query_positions: `[B, L]`. key_positions: `[B, Hkv, S]`; both or neither.
        in_order: that the queries are the newest keys in order even though positions are given, and no slot is empty.
        lse: log-sum-exp of the logits of every query, `[B, Hq, L]` float32, if it is known: saves a pass where it can.
        block_bytes: size of a block of probabilities; the result depends on it by float32 rounding alone.
        kernels: what computes it; PyTorch by default.
    """
    if group not in GROUPS:
        raise PolicyError(f'group must be "mean" or "max", not {group!r}.')
    batch, query_heads, length, _ = queries.shape
    kv_heads, keys_length = keys.shape[1:3]
    device = queries.device
    in_order |= query_positions is None
    if query_positions is None and row_weights.noise is not None:
        query_positions = torch.arange(keys_length - length, keys_length, device=device)[None]
        key_positions = torch.arange(keys_length, device=device)[None, None]
    if in_order and row_weights.rows is not None:
        places = row_weights.rows.to(device).expand(batch, -1) + (keys_length - length)  # of the rows among the keys
        last = places.amax(0).tolist()
    asked = row_weights
    queries, weights, query_positions, noise = weighed_rows(queries, asked, query_positions)

    count = queries.shape[2]
    if lse is not None:
        lse = lse_of_weighed(lse, asked)
        if in_order and group == "mean" and scoring.plain:
            if asked.rows is None:
                places = torch.arange(keys_length - count, keys_length, device=device)[None]
            found = kernels.mass_from_lse(
                queries, keys, weights, scoring, places, lse, noise, query_positions, key_positions
            )
            if found is not None:
                return found
    mass = torch.zeros(batch, kv_heads, 1, keys_length, dtype=torch.float32, device=device)
    for block in row_blocks(count, batch * query_heads * keys_length, device, block_bytes):
        hidden: Tensor | None
        if in_order and row_weights.rows is not None:
            seen = max(last[block]) + 1
            hidden = torch.arange(seen, device=device) > places[:, None, None, block, None]
        elif in_order:
            seen = keys_length - count + block.stop
            size = block.stop - block.start  # of the keys before these queries, none is hidden
            hidden = torch.ones(size, size, dtype=torch.bool, device=device).triu_(1) if size > 1 else None
        else:
            seen = keys_length
            hidden = hidden_keys(query_positions[:, block], key_positions)  # type: ignore[arg-type]
        if noise is not None:
            weighed, totals = kernels.noisy_weights(
                row_logits(queries[:, :, block], keys[:, :, :seen], scoring), noise.part(block), scoring,
                query_positions[:, block], key_positions[:, :, :seen],  # type: ignore[index]
                None if lse is None else lse[:, :, block].unflatten(1, (kv_heads, -1)),
            )  # fmt: skip
            probabilities = weighed.div_(totals[..., None])
        else:
            probabilities = row_probabilities(queries[:, :, block], keys[:, :, :seen], scoring, hidden)
            if not in_order:
                probabilities = probabilities.nan_to_num_(0.0)  # rows that see nothing
        if group == "max":
            probabilities = probabilities.amax(2, keepdim=True)
        heads = probabilities.shape[2]
        row = (weights[:, None, None, block] / heads).expand(-1, kv_heads, heads, -1)
        mass[..., :seen] += torch.matmul(row.reshape(batch, kv_heads, 1, -1), probabilities.flatten(2, 3))
    return mass.squeeze(2)


def lse_of_weighed(lse: Tensor, row_weights: RowWeights) -> Tensor:
    """Of the log-sum-exp of all rows `[B, Hq, L]`, that of those weighed, `[B, Hq, R]`."""
    if row_weights.rows is None:
        return lse[:, :, max(0, lse.shape[2] - row_weights.last) :]
    rows = row_weights.rows.to(lse.device).expand(len(lse), -1)
    return lse.gather(2, rows[:, None].expand(-1, lse.shape[1], -1))
