"""The operations that have several implementations.

    torch     PyTorch, on every device: what all others are tested against
    cpu       compiled loops, on a CPU (cpu/)
    triton    Triton, on a CUDA device (gpu/)

`choose` picks one for a device, or the one that was asked for.
"""

from __future__ import annotations

import torch

from kvprune.errors import PolicyError
from kvprune.kernels.reference import TORCH, Kernels

NAMES = ("auto", "torch", "cpu", "triton")

__all__ = ["NAMES", "TORCH", "Kernels", "check_name", "choose"]


def check_name(name: str) -> None:
    """Raise PolicyError for a name that no kernels have."""
    if name not in NAMES:
        raise PolicyError(f"there are no kernels named {name!r}: write one of {', '.join(map(repr, NAMES))}.")


def choose(name: str, device: torch.device) -> Kernels:
    """The fastest kernels for a device, or those of that name. Raises PolicyError where they cannot be had."""
    check_name(name)
    if name == "torch":
        return TORCH
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        from kvprune.kernels import gpu

        if gpu.available(device):
            from kvprune.kernels import cuda

            return cuda.TRITON
        if name == "triton":
            raise PolicyError(
                'kernels="triton" need Triton and a CUDA device of compute capability 8.0 or newer, and the cache is '
                f"on {device}: pip install 'kvprune[triton]' where there is one, or write kernels=\"auto\"."
            )
    if name == "auto" and device.type != "cpu":
        return TORCH
    if device.type != "cpu":
        raise PolicyError(f'kernels="cpu" are for a cache on a CPU, and this one is on {device}: write kernels="auto".')
    from kvprune.kernels import cpu

    if cpu.library() is not None:
        return cpu.CPU
    if name == "cpu":
        raise PolicyError(
            'kernels="cpu" were not compiled when kvprune was installed, for want of a C compiler: install one, such '
            'as gcc, and install kvprune again, or write kernels="auto" to do without.'
        )
    return TORCH
