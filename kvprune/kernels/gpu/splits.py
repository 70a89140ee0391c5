"""Split-K attention of one query per sequence: what every split leaves behind, and the kernel that puts it together.

One query gives one program for each KV head, far too few for a GPU. So the rows of a head are split over many programs,
each with a softmax of its own (Flash-Decoding). `combine` brings their outputs to a common maximum and adds them up. As
the splits leave their logits too, it also makes the row of probabilities of them, or its mean or maximum over the query
heads of a KV head, which is all that a policy asks for while decoding: no key is read a second time.

A *pair* is a sequence and a KV head; a *segment* is the rows that one kernel goes over, such as a tier of packed rows.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvprune.attention.mass import GROUPS
from kvprune.errors import PolicyError
from kvprune.kernels.gpu.tiles import ceil_div, padded

SCORES = ("probabilities", *GROUPS)
# Programs to aim at, several for each multiprocessor of a large GPU, so that its last ones do not run alone for long. A
# split of 256 rows of 128 bfloat16 is 128 KiB of keys and values, beside which its partial output of 2 KiB is little.
_PROGRAMS = 1024
_LEAST_STRETCH = 256
_COMBINED_SLOTS = 1024
# These change as a cache grows: a kernel compiled for a multiple of 16 would be compiled again at the next step.
CHANGING = (
    "length blocks tokens slots stretch first_split splits first_slot pair_stride member_stride "
    "marks_batch_stride marks_head_stride"
).split()


@dataclass(frozen=True)
class Segment:
    """Rows that one kernel goes over, in splits of `stretch` rows: the first split and the first slot it writes to."""

    length: int
    stretch: int
    first_split: int = 0
    first_slot: int = 0

    @classmethod
    def of(cls, length: int, pairs: int, block: int, after: "Segment | None" = None) -> "Segment":
        """Splits in tiles of `block` rows, behind those of another segment. They depend on shapes alone."""
        wanted = max(1, min(_PROGRAMS // pairs, ceil_div(length, _LEAST_STRETCH)))
        stretch = max(1, ceil_div(ceil_div(length, wanted), block)) * block
        return cls(length, stretch, *((0, 0) if after is None else (after.last_split, after.last_slot)))

    @property
    def splits(self) -> int:
        return ceil_div(self.length, self.stretch)

    @property
    def last_split(self) -> int:
        """The number of splits up to here."""
        return self.first_split + self.splits

    @property
    def last_slot(self) -> int:
        """The number of slots up to here."""
        return self.first_slot + self.length


@dataclass(frozen=True)
class Partials:
    """What all splits leave, float32.

        outputs [pairs, G, splits, Dv]      maxima, sums [pairs, G, splits]
        logits [pairs, G, slots], or [G, slots] of pairs one after another; None if nobody asks for scores

    An output is that of the split's own softmax, times `sums`. A split without any row has a maximum of -inf, and
    nothing else of it is read.
    """

    outputs: Tensor
    maxima: Tensor
    sums: Tensor
    logits: Tensor | None

    @classmethod
    def empty(
        cls, pairs: int, group: int, splits: int, dim: int, slots: int, device: torch.device, scores: str | None,
        *, flat: bool = False,
    ) -> "Partials":  # fmt: skip
        """flat: that the slots of the pairs follow one another. Raises PolicyError for scores that do not exist."""
        if scores is not None and scores not in SCORES:
            raise PolicyError(f"scores must be None or one of {', '.join(map(repr, SCORES))}, not {scores!r}.")
        floats = partial(torch.empty, dtype=torch.float32, device=device)
        logits = floats((group, slots) if flat else (pairs, group, slots)) if scores else None
        outputs = floats((pairs, group, splits, dim))
        maxima, sums = floats((2, pairs, group, splits)).unbind()
        return cls(outputs, maxima, sums, logits)

    @property
    def pair_stride(self) -> int:
        """How far apart the logits of two pairs are; 0 where `starts` say."""
        return 0 if self.logits is None or self.logits.ndim == 2 else self.logits.stride(0)

    @property
    def member_stride(self) -> int:
        """How far apart the logits of two query heads of a pair are."""
        return 0 if self.logits is None else self.logits.shape[-1]


# -- in the kernels that attend ----------------------------------------------------------------------------------------


@triton.jit
def extent(pair, length, lengths, starts):
    """The first row of a pair among all, int64, and how many it has."""
    first = tl.zeros([], tl.int64)
    if starts is not None:
        first = tl.load(starts + pair).to(tl.int64)
        length = (tl.load(starts + pair + 1).to(tl.int64) - first).to(tl.int32)
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + pair).to(tl.int32), length)
    return first, length


@triton.jit
def is_empty(marks, slots, valid, stride, BELOW_ZERO: tl.constexpr):
    """Which slots hold no token, by flags or by positions, of which those are below zero."""
    found = tl.load(marks + slots.to(tl.int64) * stride, mask=valid, other=0)
    return found < 0 if BELOW_ZERO else found != 0


@triton.jit
def folded(logits, largest):
    """One step of a running softmax: weights `[G, N]`, by what to shrink all so far, and the new maxima."""
    larger = tl.maximum(largest, tl.max(logits, 1))
    base = tl.where(larger == float("-inf"), 0.0, larger)  # nothing seen yet: exp(-inf - 0), not exp(-inf + inf)
    weights = tl.exp(logits - base[:, None])
    shrink = tl.exp(largest - base)
    return weights, shrink, larger


@triton.jit
def store_logits(logits, values, members, slots, end, member_stride, GROUP: tl.constexpr):
    """Logits `[G, N]` of the slots below `end`. logits: those of the pair."""
    offsets = members.to(tl.int64)[:, None] * member_stride + slots[None, :]
    tl.store(logits + offsets, values, mask=(members < GROUP)[:, None] & (slots < end)[None, :])


@triton.jit
def store_nothing(logits, begin, end, members, member_stride, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """-inf for slots `begin .. end - 1`: no key is there beyond a head's own length, but scores are."""
    nothing = tl.full([members.shape[0], BLOCK_N], float("-inf"), tl.float32)
    for first in range(begin, end, BLOCK_N):
        store_logits(logits, nothing, members, first + tl.arange(0, BLOCK_N), end, member_stride, GROUP)


@triton.jit
def store_partial(
    outputs, maxima, sums, output, largest, total, pair, split, splits, members, dims,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Leave the softmax of one split. dims: which channel each column of `output` is."""
    places = (pair.to(tl.int64) * GROUP + members) * splits + split
    tl.store(maxima + places, largest, mask=members < GROUP)
    tl.store(sums + places, total, mask=members < GROUP)
    mask = (members < GROUP)[:, None] & (dims < VALUE_DIM)[None, :]
    tl.store(outputs + places[:, None] * VALUE_DIM + dims[None, :], output, mask=mask)


# -- what puts the splits together -------------------------------------------------------------------------------------


@triton.jit
def _whole(maxima, sums, sinks, row, head, splits, BLOCK_SPLITS: tl.constexpr):
    """Maximum (0 where nothing is seen) and one over the sum of a whole row of logits. row: of `[pairs, G]`."""
    each = tl.arange(0, BLOCK_SPLITS)
    of_splits = tl.load(maxima + row * splits + each, mask=each < splits, other=float("-inf"))
    largest = tl.max(of_splits)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        largest = tl.maximum(largest, sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    of_sums = tl.load(sums + row * splits + each, mask=of_splits > float("-inf"), other=0.0)
    total = tl.sum(of_sums * tl.exp(of_splits - largest))
    if sinks is not None:
        total += tl.exp(sink - largest)
    return largest, 1.0 / tl.maximum(total, 1e-30)  # at least 1 where anything is seen


@triton.jit(do_not_specialize=CHANGING)
def _combine_kernel(
    outputs, maxima, sums, logits, sinks, starts, output, scores,
    splits, slots, kv_heads, pair_stride, member_stride,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, SCORES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The output of one query head, by the first programs of a pair, and the scores of a stretch of slots, by all."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_head = (pair % kv_heads) * GROUP
    if part < GROUP:
        row = pair * GROUP + part
        largest, share = _whole(maxima, sums, sinks, row, first_head + part, splits, BLOCK_SPLITS)
        dims = tl.arange(0, BLOCK_DV)
        added = tl.zeros([BLOCK_DV], tl.float32)
        for first in range(0, splits, 16):
            each = first + tl.arange(0, 16)
            of_splits = tl.load(maxima + row * splits + each, mask=each < splits, other=float("-inf"))
            mask = (of_splits > float("-inf"))[:, None] & (dims < VALUE_DIM)[None, :]
            found = tl.load(
                outputs + (row * splits + each)[:, None] * VALUE_DIM + dims[None, :], mask=mask, other=0.0
            )  # fmt: skip
            added += tl.sum(found * tl.exp(of_splits - largest)[:, None], 0)
        tl.store(output + row * VALUE_DIM + dims, (added * share).to(output.dtype.element_ty), mask=dims < VALUE_DIM)

    if SCORES is not None:
        begin, length = extent(pair, slots, None, starts)
        each = part * BLOCK_S + tl.arange(0, BLOCK_S)
        places = logits + pair * pair_stride + begin + each
        reduced = tl.zeros([BLOCK_S], tl.float32)
        if part * BLOCK_S < length:
            for member in range(GROUP):
                row = pair * GROUP + member
                largest, share = _whole(maxima, sums, sinks, row, first_head + member, splits, BLOCK_SPLITS)
                probabilities = tl.exp(tl.load(places, mask=each < length, other=float("-inf")) - largest) * share
                if SCORES == "probabilities":  # in place of the logits
                    tl.store(places, probabilities, mask=each < length)
                elif SCORES == "max":
                    reduced = tl.maximum(reduced, probabilities)
                else:
                    reduced += probabilities / GROUP
                places += member_stride
            if SCORES != "probabilities":
                scores += begin if starts is not None else pair * slots
                tl.store(scores + each, reduced, mask=each < length)


def combine(
    partials: Partials,
    kv_heads: int,
    dtype: torch.dtype,
    sinks: Tensor | None,
    scores: str | None,
    *,
    starts: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, Hq, 1, Dv]` of this dtype, and scores: None, or float32

        "probabilities"    [B, Hkv, G, slots], or [G, slots] where `starts` are given
        "mean", "max"      [B, Hkv, slots],    or [slots],      reduced over the query heads of a KV head

    A query that sees nothing has an output and probabilities of zero.

    starts: `[pairs + 1]`, where the slots of each pair begin. longest: the most slots of a pair.
    """
    pairs, group, splits, dim = partials.outputs.shape
    batch = pairs // kv_heads
    device = partials.outputs.device
    output = torch.empty(batch, kv_heads * group, 1, dim, dtype=dtype, device=device)
    logits = partials.logits
    slots = 0 if logits is None else logits.shape[-1]
    shape = (slots,) if starts is not None else (batch, kv_heads, slots)
    reduced = torch.empty(shape, dtype=torch.float32, device=device) if scores in GROUPS else None
    stretches = ceil_div(slots if longest is None else min(slots, longest), _COMBINED_SLOTS)
    _combine_kernel[pairs, max(group, stretches)](
        partials.outputs, partials.maxima, partials.sums, logits, sinks, starts, output, reduced,
        splits, slots, kv_heads, partials.pair_stride, partials.member_stride,
        GROUP=group, VALUE_DIM=dim, SCORES=scores,
        BLOCK_SPLITS=padded(splits), BLOCK_DV=padded(dim), BLOCK_S=_COMBINED_SLOTS,
        num_warps=4,
    )  # fmt: skip
    if scores != "probabilities" or logits is None:
        return output, reduced
    return output, logits if starts is not None else logits.view(batch, kv_heads, group, slots)
