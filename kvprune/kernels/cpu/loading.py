"""The compiled loops, and what each of them takes."""

from __future__ import annotations

import ctypes
import warnings
from ctypes import c_float, c_int, c_int32, c_long, c_uint32, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from torch import Tensor

_INTERFACE = 4  # as in rows.c; of what an older build lacks, PyTorch does the work


class _Pointer:
    """An argument that is a tensor, for the address of its first number, or None."""

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> c_void_p | None:
        return None if tensor is None else c_void_p(tensor.data_ptr())


_SIGNATURES: dict[str, list[Any]] = {
    "noisy_weights": [_Pointer] * 9 + [c_float] + [c_long] * 4 + [c_int],
    "mass_from_lse": [_Pointer, c_void_p] + [_Pointer] * 4 + [c_long] * 5 + [c_int],
    "noisy_mass_from_lse": [_Pointer] * 3 + [c_void_p] + [_Pointer] * 6 + [c_long] * 5 + [c_int],
    "attend_maxima": [_Pointer] * 5 + [c_void_p] * 2 + [_Pointer] * 5 + [c_long] * 6 + [c_int],
    "dots": [_Pointer, c_long, c_long, _Pointer, _Pointer, c_long, c_float, c_long, c_int] + [c_long] * 3 + [c_int],
    "softmax": [_Pointer, _Pointer, c_long, _Pointer] + [c_long] * 3 + [c_int],
    "sums": [_Pointer] + [c_long] * 2 + [_Pointer] + [c_long] * 2 + [_Pointer] + [c_long] * 2 + [c_int]
    + [c_long] * 3 + [c_int],
    "add_parts": [_Pointer, _Pointer] + [c_long] * 3,
    "single_query": [_Pointer] * 4 + [c_long, _Pointer, c_long, _Pointer, c_long, _Pointer, _Pointer, c_float, c_int]
    + [c_long] * 5 + [c_int],
    "flat_query": [_Pointer] * 9 + [c_float, c_int] + [c_long] * 5 + [c_int],
    "ragged_query": [_Pointer] * 3 + [c_void_p] * 2 + [_Pointer, c_float, c_int] + [c_long] * 6 + [c_int],
    "append_rows": [c_void_p, c_long, _Pointer, _Pointer] + [_Pointer, c_long, c_long] * 2 + [_Pointer, c_long, c_long],
    "drop_rows": [c_void_p, c_long] + [_Pointer] * 3 + [c_long] * 2,
    "spread": [_Pointer] * 4 + [c_uint32, c_long, c_long],
    "collect": [_Pointer] * 4 + [c_long] * 2,
    "mean": [_Pointer, _Pointer] + [c_long] * 3 + [c_int],
    "noisy_query": [_Pointer] * 4 + [c_long, c_uint32, c_long, c_float, c_float] + [c_long] * 4 + [c_int],
    "packed_dots": [_Pointer, c_long, c_long, _Pointer, c_void_p, c_float, c_int, c_long, c_long, c_int],
    "packed_sums": [_Pointer] + [c_long] * 2 + [_Pointer] + [c_long] * 2 + [c_void_p, c_int, c_long, c_long, c_int],
    "rotated_dots": [_Pointer, c_long, c_long, _Pointer, _Pointer, c_void_p, c_long, c_long, c_int],
    "rotated_encode": [c_void_p] + [_Pointer] * 5 + [c_long, c_long, c_int],
    "rotated_sums": [_Pointer, _Pointer, c_long, c_long, c_void_p, c_long, c_long, c_int],
    "worst_rows": [_Pointer, _Pointer] + [c_long] * 3 + [_Pointer, c_long] * 2 + [c_long] * 5,
    "largest_near": [_Pointer, _Pointer] + [c_long] * 3 + [_Pointer, c_long, _Pointer, c_int32, c_int32]
    + [c_long] * 3 + [c_int],
    "move_rows": [c_void_p, c_long, c_long, _Pointer, c_long, c_long],
    "channel_sizes": [_Pointer, c_void_p] + [c_long] * 2 + [c_int],
    "encode_keys": [c_void_p] * 2 + [c_int, c_long, c_int],
    "encode_values": [c_void_p] * 2 + [c_int, c_long, c_int],
    "append_row": [c_void_p] + [c_long] * 3 + [_Pointer, c_long, c_long] * 2 + [c_int32, c_long, c_long],
}  # fmt: skip


@cache
def library() -> Any:
    """The compiled loops by name; None where kvprune was installed without a compiler."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).parent.with_name(f"_cpu{suffix}")
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            if getattr(loaded, "kvprune_interface", int)() == _INTERFACE:
                return _Library(loaded)
            warnings.warn(
                f"{path.name} was compiled of other files, and is not used: install kvprune again.", stacklevel=2
            )
    return None


class _Library:
    def __init__(self, loaded: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(loaded, f"kvprune_{name}", None)
            if function is not None:
                function.argtypes = arguments
            setattr(self, name, function)
