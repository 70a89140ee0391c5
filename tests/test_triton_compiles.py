"""Every kernel compiles for GPUs of two kinds, and fits on them, without a GPU: the interpreter accepts more than the
compiler does.

A process of its own, as Triton is interpreted in this one, makes the launches that the wrappers make, for a driver that
names a GPU and has none; nothing is run.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

# What a program may take: 99 KiB on consumer cards (8.6, 8.9, 12.0), which compile as their large relatives do.
SHARED_BYTES = 99 << 10


class NoDriver:
    """A driver that names a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch(dim: int, dtype: torch.dtype) -> None:
    """Every kernel in the variants that differ most, with heads of this size."""
    from kvprune import RowWeights, Scoring
    from kvprune.attention.noise import Gumbel
    from kvprune.kernels import gpu as kernels
    from kvprune.table.basis import Basis
    from kvprune.table.packed_rows import PackedRows
    from kvprune.table.quantize import Codec
    from kvprune.table.rotated_rows import RotatedCodec, RotatedRows

    queries, keys = torch.randn(1, 8, 160, dim, dtype=dtype), torch.randn(1, 2, 256, dim, dtype=dtype)
    positions = torch.arange(256, dtype=torch.int32).expand(1, 2, -1)
    plain, full = Scoring(0.1), Scoring(0.1, 50.0, torch.zeros(8))
    by_position = {"query_positions": positions[:, 0, -160:], "key_positions": positions}
    noise = Gumbel(1, 2, torch.ones(160))
    chosen = RowWeights.explicit(torch.arange(20), torch.rand(20)).noisy(noise)
    kernels.attention_mass(queries, keys, RowWeights.geometric(160, 0.9), plain)
    kernels.attention_mass(queries, keys, chosen, full, group="max", **by_position)
    noisy = RowWeights.uniform(160).noisy(Gumbel(1, 2))
    kernels.attention_mass(queries, keys, noisy, plain, in_order=True, **by_position)

    kernels.attention_maxima(queries, keys, torch.ones(1, 160), full, by_position["query_positions"], positions)

    query = queries[:, :, :1]
    lengths = torch.tensor([[3, 200]], dtype=torch.int32)
    kernels.decode_attention(query, keys, keys, plain)
    kernels.decode_attention(query, keys, keys, full, empty=positions, lengths=lengths, scores="probabilities")
    starts = torch.tensor([0, 100, 256])
    kernels.varlen_decode_attention(query, keys[0, 0], keys[0, 1], full, starts, 156, scores="mean")
    for codec in (Codec(2), Codec(3, tokens=32, channels=32, separable=True), Codec(8, separable=True)):
        tier = PackedRows.encode(codec, keys, keys)
        kernels.packed_decode_attention(query, [tier], keys, keys, plain, scores="max")
    basis = Basis.estimate(
        queries.float(), keys.float(), keys.float(), torch.ones(1, 160, dtype=torch.bool),
        torch.ones(keys.shape[:3], dtype=torch.bool),
    )  # fmt: skip
    for codec, part in (
        (RotatedCodec(4, normal=True), Basis.fixed(dim, dim)),
        (RotatedCodec(3, key_clip=0.9, value_clip=0.9), basis),
    ):  # fmt: skip
        tier = RotatedRows.encode_in(codec, part, keys, keys)
        kernels.packed_decode_attention(query, [tier], keys, keys, full, empty=positions, scores="probabilities")


def main(capability: int, dim: int, dtype: torch.dtype) -> None:
    """Compile; print the name of each kernel and the bytes of shared memory that it takes."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(NoDriver(capability))
    run = JITFunction.run

    def compiled(self, *args, **options):
        kernel = run(self, *args, **{**options, "warmup": True})
        print(self.fn.__name__, kernel.metadata.shared)
        return kernel

    JITFunction.run = compiled
    launch(dim, dtype)


@pytest.mark.parametrize(
    ("capability", "dim", "dtype"),
    [(80, 256, torch.float32), (90, 128, torch.bfloat16)],
    ids=str,
)
def test_every_kernel_compiles(capability, dim, dtype):
    """No variant is refused by the compiler, or takes more shared memory than small GPUs have."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability), str(dim), str(dtype).removeprefix("torch.")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared: dict[str, int] = {}
    for line in done.stdout.splitlines():
        name, bytes_ = line.split()
        shared[name] = max(shared.get(name, 0), int(bytes_))
    named = ("lse", "mass", "maxima", "decode", "packed", "rotated", "combine")
    assert set(shared) == {f"_{name}_kernel" for name in named}
    assert max(shared.values()) <= SHARED_BYTES, shared


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]))
