"""Random numbers by counter: each depends on what it is for, and on nothing else.

A generator that hands out numbers in sequence would make scores depend on block sizes, chunks, padding and the order of
a batch. Here a number is a hash of a seed and of counters such as a layer, a head and two positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9
_GOLDEN_INVERSE = pow(_GOLDEN, -1, 1 << 32)
# Rows and columns must not be the same function of a position: their exclusive or would vanish where they meet.
_COLUMN = 0x7FEB352D


def mix(bits: Tensor) -> Tensor:
    """Spread every bit over all bits, in place, int32: the finalizer of MurmurHash3, a bijection."""
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)  # torch shifts the sign in
    bits *= _signed(0x85EBCA6B)
    bits ^= (bits >> 13).bitwise_and_(0x7FFFF)
    bits *= _signed(0xC2B2AE35)
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def hashed(seed: int, *counters: int | Tensor) -> Tensor:
    """A hash of a seed and counters, ints first and then tensors that broadcast against each other, int32."""
    bits: int | Tensor = _signed(hash_word(seed, *(counter for counter in counters if isinstance(counter, int))))
    for counter in counters:
        if isinstance(counter, Tensor):
            bits = mix(counter.int() + _signed_multiple(bits))
    return bits if isinstance(bits, Tensor) else torch.tensor(bits, dtype=torch.int32)


def _signed_multiple(bits: int | Tensor) -> int | Tensor:
    if isinstance(bits, Tensor):
        return bits * _signed(_GOLDEN) + 1
    return _signed(bits * _GOLDEN + 1)


def hash_word(seed: int, *counters: int) -> int:
    """The same of ints alone, as an int below 2**32."""
    word = 0
    for counter in (seed, seed >> 32, *counters):
        word = (word * _GOLDEN + counter + 1) & 0xFFFFFFFF
        word = (word ^ word >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        word = (word ^ word >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        word ^= word >> 16
    return word


def uniform(bits: Tensor) -> Tensor:
    """Uniform in (0, 1), float32, of hashes: 2**23 values, none of which is 0 or 1."""
    return (bits >> 9).float().mul_(2**-23).add_(0.5 + 2**-24)


def consecutive(first: int, count: int, device: torch.device) -> Tensor:
    """Counters `first .. first + count - 1`, `[count]`, for `hashed`."""
    # No arange: inductor (torch 2.13) knows its bounds, and takes it that sums and products stay within theirs.
    return torch.ones(count, dtype=torch.float32, device=device).cumsum(0).add_(first - 1)


@dataclass(frozen=True)
class Gumbel:
    """Noise for attention logits x, and a temperature: probabilities become softmax((x + noise) / temperature).

    Gumbel noise has the distribution function exp(-exp(-x)). The noise of a logit is a function of seed, layer, query
    head, and the positions of query and key in their sequence.

    temperature: a float, or a tensor `[L]` with one for each query. scale: multiplies the noise; 0 is none.
    first_head: the number of the first query head, where a process has a share of them.
    """

    seed: int
    layer: int
    temperature: float | Tensor = 1.0
    scale: float = 1.0
    first_head: int = 0

    def part(self, rows: slice | Tensor) -> Gumbel:
        """The same for some of the queries."""
        if isinstance(self.temperature, float):
            return self
        return replace(self, temperature=self.temperature[rows])

    @property
    def word(self) -> int:
        """A hash of seed and layer, below 2**32: where those of heads, counted from 0, and positions begin."""
        # The next hash is that of head + _GOLDEN * word + 1, so heads are shifted by a shift of the word.
        return (hash_word(self.seed, self.layer) + self.first_head * _GOLDEN_INVERSE) & 0xFFFFFFFF

    def row_words(self, positions: Tensor, kv_heads: int, group: int) -> Tensor:
        """A hash of every query head and position `[B or 1, L]`: `[B or 1, Hkv, G, L]` int32."""
        heads = consecutive(self.first_head, kv_heads * group, positions.device).view(1, kv_heads, group, 1)
        return hashed(self.seed, self.layer, heads, positions[:, None, None, :])

    def column_words(self, positions: Tensor) -> Tensor:
        """A hash of every key position, of their shape, int32."""
        return mix(positions.int() ^ _COLUMN)

    def perturb(self, logits: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Perturb in place logits `[B, Hkv, G, L, S]` float32; -inf stays -inf.

        query_positions: `[B or 1, L]`. key_positions: `[B or 1, Hkv or 1, S]`.
        """
        if self.scale:
            rows = self.row_words(query_positions, *logits.shape[1:3])[..., None]
            columns = self.column_words(key_positions)[:, :, None, None, :]
            # -log(-log(u)), with the outer minus in the subtraction.
            noise = uniform(mix(rows ^ columns)).log_().neg_().log_()
            logits.sub_(noise, alpha=self.scale)
        if isinstance(self.temperature, Tensor):
            return logits.div_(self.temperature.to(logits.device).view(-1, 1))
        return logits if self.temperature == 1 else logits.div_(self.temperature)


def _signed(word: int) -> int:
    """The int32 with the same lowest 32 bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
