"""ZipCache: more bits for salient tokens. He et al., arXiv 2405.14256, NeurIPS 2024."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kvprune.attention.mass import GROUPS, RowWeights
from kvprune.attention.noise import hash_word, hashed
from kvprune.errors import PolicyError
from kvprune.policy.aging import ROTATED_SINKS, learn_basis
from kvprune.policy.base import Decision, Policy, Step
from kvprune.policy.budget import share
from kvprune.policy.pooling import along_positions, max_pool
from kvprune.policy.settings import check_count, check_flag, check_kernel, check_number, check_seed
from kvprune.table.quantize import Codec, is_width
from kvprune.table.rotated_rows import RotatedCodec
from kvprune.table.rows import EMPTY, in_order, ranked, top_rows, true_rows
from kvprune.table.token_table import TokenTable

_UNSIGNED = 0xFFFFFFFF
_FIRST = 1 << 40  # above any hash


@dataclass(frozen=True)
class ZipCache(Policy):
    """Keeps every token, salient ones at `high_bits` and the rest at `low_bits`.

        p_k = sum over probes q of P[q, k]  /  number of probes that could see k

    Saliency is the mean attention of probe queries. Dividing by those that could see a token, and not by all, keeps old
    tokens from winning by age. A prompt's probes are its newest queries and some drawn at random; while tokens are
    generated, the newest of each block of `buffer` tokens and some drawn among the others.

    Keys are quantized per channel, values per token after each channel has been divided by the root of its largest
    value. A prompt is packed as soon as it has been attended to; generated tokens wait in a buffer in full precision
    and are packed when it is full. What is packed is never quantized again: the published code decodes and quantizes
    the whole cache anew every 100 tokens, and its error grows with every time.

    The paper finds answers of models of 7B and more unharmed at these settings. At the sizes measured here they are
    not: SmolLM2-135M wrote 6 of 18 numbers of 3 to 20 digits in full, where the full cache wrote all, and the embedded
    model 73 % of its words. What is lost is the range of a key channel over a whole prompt: with `group_size=32` they
    wrote 12 of 18 and 100 %, for 15 to 20 % more bytes. From 2,000 tokens that wrote 4 of 12 numbers, and where
    the question comes later 7 of 18; `KIVI(bits=4)` wrote all of both, and is what to take for a small model.

    Settings:
        salient: share of tokens, per KV head, that get `high_bits`; rounded up.
        high_bits, low_bits: 2, 3, 4 or 8.
        buffer: generated tokens that are packed together.
        probe_recent, probe_random: shares of the queries that probe; rounded up, the newest query always does.
        normalizer: "probes"; or "official", as in the published code: the sum over a prompt's probes is divided by the
            number of all queries that could see the token, and generated tokens are ranked by the newest query alone.
        group_size: tokens that share the parameters of a key channel; None is all that are packed at once, as in the
            paper. Smaller groups follow keys whose range moves with the position, for some bytes.
        kernel_size: odd; saliency is max-pooled over that many neighbouring positions before a prompt is packed.
        rotate: quantize principal components in place of channels, as in `KIVI(rotate=True)`; group_size then means
            nothing, and the first 4 tokens stay exact.
        group: how the attention of the query heads of a KV head is reduced, "mean" or "max". seed: of random probes.
    """

    salient: float = 0.6
    _: KW_ONLY
    high_bits: int = 4
    low_bits: int = 2
    buffer: int = 100
    probe_recent: float = 0.05
    probe_random: float = 0.05
    normalizer: str = "probes"
    group_size: int | None = None
    kernel_size: int = 1
    rotate: bool = False
    group: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("salient", "probe_recent", "probe_random"):
            check_number(name, getattr(self, name), low=0, high=1)
        for name in ("high_bits", "low_bits"):
            if not is_width(getattr(self, name)):
                raise PolicyError(f"{name}={getattr(self, name)!r} is not supported: choose 2, 3, 4 or 8.")
        if self.high_bits < self.low_bits:
            raise PolicyError(
                f"high_bits={self.high_bits} is below low_bits={self.low_bits}: salient tokens get the high ones, "
                "exchange them."
            )
        check_count("buffer", self.buffer, least=1)
        check_kernel(self.kernel_size)
        if self.group_size is not None:
            check_count("group_size", self.group_size, least=1)
        check_flag("rotate", self.rotate)
        check_seed(self.seed)
        if self.normalizer not in ("probes", "official"):
            raise PolicyError(f'normalizer must be "probes" or "official", not {self.normalizer!r}.')
        if self.group not in GROUPS:
            raise PolicyError(f'group must be "mean" or "max", not {self.group!r}.')

    @property
    def codecs(self) -> tuple[Codec, ...]:
        widths = dict.fromkeys((self.high_bits, self.low_bits))
        if self.rotate:
            return tuple(RotatedCodec(bits) for bits in widths)
        return tuple(Codec(bits, tokens=self.group_size, separable=True) for bits in widths)

    def buffer_columns(self) -> dict[str, torch.dtype]:
        return {"saliency": torch.float32, "probes": torch.float32}

    # -- probes ------------------------------------------------------------------------------------------------------

    def row_weights(self, step: Step) -> RowWeights | None:
        if step.prefill:
            return RowWeights.explicit(*self._prompt_probes(step))
        rows = self._generated_probes(step)
        if not rows:
            return None
        if rows == [step.queries - 1]:
            return RowWeights.last_window(1)
        index = torch.tensor(rows, device=step.query_positions.device)
        return RowWeights.explicit(index, torch.ones_like(index, dtype=torch.float32))

    def _prompt_probes(self, step: Step) -> tuple[Tensor, Tensor]:
        """Probes of each sequence: rows `[B or 1, R]`, and 1.0 for each, or 0.0 where a sequence has fewer."""
        positions, tokens, new = step.query_positions, _flat(step.tokens), _flat(step.new_tokens)
        recent = share(self.probe_recent, new, least=1)
        random = share(self.probe_random, new)
        drawn = hashed(self.seed, step.layer, positions).long() & _UNSIGNED
        order = torch.where(positions >= tokens - recent, _FIRST + positions, drawn)
        order = order.masked_fill(positions < 0, EMPTY)
        most = min(int(torch.as_tensor(recent + random).max()), step.queries)
        rows = order.topk(most, dim=1).indices
        count = torch.minimum(torch.as_tensor(recent + random), torch.as_tensor(new)).to(rows.device)
        weights = (torch.arange(most, device=rows.device) < count).float().expand_as(rows)
        rows, ascending = rows.sort(dim=1)  # so that rows that are weighed together see about the same
        return rows, weights.gather(1, ascending)

    def _generated_probes(self, step: Step) -> list[int]:
        """Rows of this step that probe."""
        newest = 1 if self.normalizer == "official" else share(self.probe_recent, self.buffer, least=1)
        drawn = 0.0 if self.normalizer == "official" else self.probe_random * 2**32
        rows = []
        for row in range(step.queries):
            number = int(step.generated) - step.queries + row  # of tokens generated before
            if number % self.buffer >= self.buffer - newest or hash_word(self.seed, step.layer, number) < drawn:
                rows.append(row)
        return rows

    def observe(self, table: TokenTable, step: Step) -> None:
        if self.rotate:
            learn_basis(table, step, self.low_bits)
        if step.weighed is None:
            return
        loose = slice(table.packed_length, table.length)
        saliency, probes, positions = table["saliency"], table["probes"], table.positions[:, :, loose]
        saliency.add_(step.mass[:, :, loose])
        if step.prefill and self.normalizer == "official":
            newest = step.query_positions.amax(1).view(-1, 1, 1)
            probes.add_((newest + 1 - positions).clamp(max=step.new_tokens))
        else:
            probes.add_(step.witnesses(positions))

    # -- precision ---------------------------------------------------------------------------------------------------

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        waiting = table.length - table.packed_length - (ROTATED_SINKS if self.rotate else 0)
        if waiting <= 0 or not (step.prefill or waiting >= self.buffer):
            return None
        positions = table.positions[:, :, table.packed_length :]
        if self.rotate:  # as if sinks were not there
            positions = positions.masked_fill(positions < ROTATED_SINKS, EMPTY)
        rows = waiting if table.dense and not self.rotate else (positions >= 0).sum(-1, keepdim=True)
        saliency = table["saliency"] / table["probes"].clamp(min=1)
        if self.kernel_size > 1 and step.prefill:
            saliency = along_positions(saliency, positions, max_pool(self.kernel_size), fill=0.0)
        ranks = ranked(saliency, positions).masked_fill(positions < 0, torch.iinfo(torch.int64).min)
        salient = top_rows(ranks, share(self.salient, rows) if len(self.codecs) > 1 else rows)
        parts = zip(self.codecs, (salient, ~salient & (positions >= 0)), strict=False)
        return Decision(
            quantize=tuple((codec, in_order(true_rows(part), positions, table.packed_length)) for codec, part in parts)
        )


def _flat(count: int | Tensor) -> int | Tensor:
    """Counts `[B, 1, 1]` as `[B, 1]`."""
    return count if isinstance(count, int) else count[:, 0]
