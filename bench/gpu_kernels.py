"""The Triton kernels at decode and prefill shapes of Llama 3.1 8B, against the bandwidth of the same GPU.

    python bench/gpu_kernels.py --out bench/results/gpu_kernels.json

One layer, one sequence: 8 KV heads of 4 query heads each, head dim 128, bfloat16. Each call is captured in a CUDA
graph, so that what is timed is the GPU's work and not Python's; the L2 cache is overwritten before each. The bandwidth
is that of a copy of 1 GiB in the same run, counted as bytes read plus bytes written; the bytes of a kernel are those
that it cannot avoid: keys, values and codes, and the scores where it writes them.
"""

# Not kernels.py: this folder is on the path, and transformers would take that for the package of that name (5.23).

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from kvprune import RowWeights, Scoring
from kvprune.attention.noise import Gumbel
from kvprune.kernels import gpu as kernels
from kvprune.table.basis import Basis
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.rotated_rows import RotatedCodec, RotatedRows
from printing.output import save, table

KV_HEADS, GROUP, DIM = 8, 4, 128
WINDOW = 32  # of SnapKV
A2SF_ROWS = 238  # that matter with a forgetting factor of 0.95
SAMPLE = 512  # queries that a basis is estimated from
FLUSH_BYTES = 256 << 20  # more than any L2 cache


@dataclass(frozen=True)
class Timed:
    kernel: str
    rows: int
    microseconds: float
    bytes: int
    share_of_copy: float


def microseconds(work: Callable[[], Any], rounds: int) -> float:
    """Median time of one replay of this work on the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile first: nothing may be compiled during a capture
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    began, ended = ([torch.cuda.Event(enable_timing=True) for _ in range(rounds)] for _ in range(2))
    for begin, end in zip(began, ended, strict=True):
        flush.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1000 * statistics.median(begin.elapsed_time(end) for begin, end in zip(began, ended, strict=True))


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (microseconds(lambda: target.copy_(source), rounds) * 1e-6)


def works(rows: int) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name, work, and bytes of each kernel over so many rows; the stock attention first."""
    queries, keys, values = (
        torch.randn(1, heads, rows, DIM, dtype=torch.bfloat16, device="cuda")
        for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    query, scoring = queries[:, :, -1:].clone(), Scoring(DIM**-0.5)
    cache, scores = keys.nbytes + values.nbytes, 4 * KV_HEADS * rows

    decode = partial(kernels.decode_attention, query, keys, values, scoring)
    yield "stock sdpa", partial(F.scaled_dot_product_attention, query, keys, values, enable_gqa=True), cache
    yield "decode", decode, cache
    yield "decode, mean", partial(decode, scores="mean"), cache + scores
    yield "decode, probabilities", partial(decode, scores="probabilities"), cache + GROUP * scores
    lengths = torch.linspace(rows // 8, rows, KV_HEADS, device="cuda").int()[None]
    there = torch.arange(rows, device="cuda") < lengths[..., None]
    flat_keys, flat_values = keys[there], values[there]
    starts = F.pad(lengths.flatten().cumsum(0), (1, 0)).int()
    ragged = flat_keys.nbytes + flat_values.nbytes
    yield "decode, mean, ragged", partial(decode, lengths=lengths, scores="mean"), ragged + scores
    flat = partial(kernels.varlen_decode_attention, query, flat_keys, flat_values, scoring, starts, rows)
    yield "decode, mean, ragged and flat", partial(flat, scores="mean"), ragged + 4 * len(flat_keys)
    yield from packed_works(query, keys, values, scoring)
    yield from rotated_works(query, keys, values, scoring)
    for name, weights in (
        ("mass, last row", RowWeights.last_window(1)),
        ("mass, last row, noisy", RowWeights.last_window(1).noisy(Gumbel(0, 0, 1.5))),
        (f"mass, window of {WINDOW}", RowWeights.last_window(WINDOW)),
        (f"mass, {A2SF_ROWS} rows", RowWeights(A2SF_ROWS, 0.95)),
    ):
        # Keys are read once for the log-sum-exp and once for the mass.
        yield name, partial(kernels.attention_mass, queries, keys, weights, scoring), 2 * keys.nbytes + scores


def packed_works(
    query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring
) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Everything packed, and a step's worth of rows in full precision."""
    loose = keys[:, :, :WINDOW].clone(), values[:, :, :WINDOW].clone()
    for name, codec in (
        ("4 bits, separable", Codec(4, separable=True)),
        ("2 bits", Codec(2)),
        ("2 bits, groups of 32", Codec(2, tokens=32, channels=32)),
        ("8 bits", Codec(8)),
    ):
        tier = PackedRows.encode(codec, keys, values)
        decode = partial(kernels.packed_decode_attention, query, [tier], *loose, scoring, scores="mean")
        size = sum(tensor.nbytes for tensor in tier.tensors.values())
        yield f"packed decode, {name}", decode, size + 4 * KV_HEADS * keys.shape[2]


def rotated_works(
    query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring
) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """As above, in the coordinates of a basis, of keys and values whose components differ as a prompt's do."""
    loose = keys[:, :, :WINDOW].clone(), values[:, :, :WINDOW].clone()
    keys, values = (each * torch.logspace(0, -1, DIM, device=each.device, dtype=each.dtype) for each in (keys, values))
    there = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    queries = query + torch.randn(*query.shape[:2], SAMPLE, DIM, dtype=query.dtype, device=query.device)
    basis = Basis.estimate(queries, keys, values, torch.ones_like(there[:, 0, :1]).expand(-1, SAMPLE), there)
    few, more = RotatedCodec(2), RotatedCodec(4)
    outliers = keys.shape[2] // 10
    for name, parts in (
        ("2 bits", [(few, slice(None))]),
        ("4 bits", [(more, slice(None))]),
        ("2 bits, a tenth at 4", [(few, slice(outliers, None)), (more, slice(outliers))]),
        ("2 bits, normal levels", [(RotatedCodec(2, normal=True), slice(None))]),
    ):
        tiers = [RotatedRows.encode_in(codec, basis, keys[:, :, rows], values[:, :, rows]) for codec, rows in parts]
        decode = partial(kernels.packed_decode_attention, query, tiers, *loose, scoring, scores="mean")
        size = sum(tensor.nbytes for tier in tiers for tensor in tier.tensors.values())
        yield f"rotated decode, {name}", decode, size + 4 * KV_HEADS * keys.shape[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8 << 10, 32 << 10, 128 << 10])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "bench/gpu_kernels.py times kernels on a GPU, and torch finds no CUDA device here.\n")
    torch.manual_seed(0)
    console = Console()
    bandwidth = copy_bandwidth(arguments.rounds)
    measured: list[Timed] = []
    for rows in arguments.rows:
        shown = table(
            f"{rows:,} rows",
            f"copy of 1 GiB: {bandwidth / 1e9:,.0f} GB/s; bytes that cannot be avoided, per time",
            "kernel", "microseconds", "GB/s", "share of copy", "of stock's time",
        )  # fmt: skip
        stock_time = 0.0
        for name, work, size in works(rows):
            taken = microseconds(work, arguments.rounds)
            stock_time = stock_time or taken
            speed = size / (taken * 1e-6)
            measured.append(Timed(name, rows, taken, size, speed / bandwidth))
            shown.add_row(
                name, f"{taken:,.1f}", f"{speed / 1e9:,.0f}", f"{speed / bandwidth:.0%}", f"{taken / stock_time:.2f}x"
            )
        console.print(shown)
    save(
        arguments.out,
        gpu=torch.cuda.get_device_name(),
        copy_bytes_per_second=bandwidth,
        kernels=[asdict(one) for one in measured],
    )


if __name__ == "__main__":
    main()
