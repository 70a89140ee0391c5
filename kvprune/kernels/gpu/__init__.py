"""Triton kernels, each the twin of a function in PyTorch that says what it computes.

    attention_mass             kvprune.attention_mass
    attention_maxima           attention.maxima.attention_maxima, head by head
    decode_attention           attention.softmax.single_query_attention, and what a policy makes of the probabilities
    varlen_decode_attention    the same over heads of different lengths, without padding
    packed_decode_attention    attention.packed.single_query

Triton is imported when the first of them is looked up. Launches depend on shapes alone and never wait for the device,
so CUDA graphs can capture them. With TRITON_INTERPRET=1, set before Triton is imported, they run on the CPU: slow, and
good for tests.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from os import environ
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvprune.errors import KVPruneError

if TYPE_CHECKING:
    from kvprune.kernels.gpu.decode import decode_attention, varlen_decode_attention
    from kvprune.kernels.gpu.mass import attention_mass
    from kvprune.kernels.gpu.maxima import attention_maxima
    from kvprune.kernels.gpu.packed_decode import packed_decode_attention
    from kvprune.table.rotated_rows import RotatedRows

__all__ = [
    "attention_mass",
    "attention_maxima",
    "available",
    "decode_attention",
    "packed_decode_attention",
    "supported",
    "takes_rotated",
    "varlen_decode_attention",
]

_HOMES = {
    "attention_mass": "mass",
    "attention_maxima": "maxima",
    "decode_attention": "decode",
    "varlen_decode_attention": "decode",
    "packed_decode_attention": "packed_decode",
}
# Tiles are whole heads; of larger ones, such as the 576 of multi-head latent attention, too little fits on chip.
_MOST_DIM = 256
_MOST_ROW_BYTES = 128  # of codes in the coordinates of a basis
_LEAST_CAPABILITY = (8, 0)  # that Triton supports; ours for packed rows do not compile for older ones


def available(device: torch.device) -> bool:
    """Whether kernels can run there: Triton is installed, and knows the GPU (Ampere or newer), or interprets."""
    interpreted = environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if find_spec("triton") is None or (device.type == "cuda") == interpreted:
        return False
    return interpreted or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def supported(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether kernels exist for these: one dtype, float32, float16 or bfloat16, and heads of at most 256 numbers."""
    alike = queries.dtype == keys.dtype == values.dtype
    return (
        alike
        and queries.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and max(keys.shape[-1], values.shape[-1]) <= _MOST_DIM
    )


def takes_rotated(rows: RotatedRows) -> bool:
    """Whether kernels exist for rows in the coordinates of a basis: components share widths by whole bytes, and all
    signs of a row, 4 bits of 256 components or 8 of 128, fit in registers."""
    row_bytes = max(rows.tensors[f"{kind}_codes"].shape[3] for kind in ("key", "value"))
    return rows.key_dim % 8 == 0 and rows.value_dim % 8 == 0 and row_bytes <= _MOST_ROW_BYTES


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("triton") is None:
        raise KVPruneError(f"kvprune.kernels.gpu.{name} needs Triton: pip install 'kvprune[triton]'.")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)  # asked for once
    return found
