"""The kernels that causal attention over several new tokens runs on. All compute the same; they differ in speed.

    sdpa        torch's scaled_dot_product_attention, with a mask where the new tokens follow others
    flash       without any mask: what came before and the new tokens are two calls, merged by their log-sum-exp
    flash-attn  the flash-attn package, which also takes sequences of different lengths in one call

What a fused kernel cannot do (soft caps, sinks, empty slots) and single queries never come here.
"""

from __future__ import annotations

import importlib
from functools import cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.errors import CacheError

HALF = (torch.float16, torch.bfloat16)
_MOST_HEAD_DIM = 256  # of the flash kernels, torch's and the package's


def fused_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None, causal: bool = False
) -> Tensor:
    """torch's scaled_dot_product_attention over grouped heads. visible: bool `[B or 1, Hq or 1, L, S]`."""
    group = queries.shape[1] // keys.shape[1]
    if visible is not None and queries.is_cuda and group > 1:  # masked GQA would fall back to the slow math kernel
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        group = 1
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=group > 1
    )


class Sdpa:
    """The general backend, and base class of the others, which override what they can do beyond it."""

    name = "sdpa"

    @staticmethod
    def missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """What it lacks to serve such a model; None if nothing."""
        return None

    def takes(self, queries: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether `causal` does it without a mask."""
        return queries.shape[2] == keys.shape[2]

    def causal(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """The queries are the newest `L` of the `S` keys: query `i` sees keys `0 .. S - L + i`.

        queries: `[B, Hq, L, D]`. keys: `[B, Hkv, S, D]`. values: `[B, Hkv, S, Dv]`. Returns the output `[B, Hq, L, Dv]`
        and, where it is told, the log-sum-exp of every query's logits, `[B, Hq, L]`.
        """
        return fused_attention(queries, keys, values, scale, causal=queries.shape[2] > 1), None

    def spans(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, spans: list[tuple[int, int]]
    ) -> Tensor | None:
        """The same of padded sequences, `L == S`: where each begins and ends. None if it cannot do them in one call."""
        return None


class Flash(Sdpa):
    """torch's flash kernels.

    Their causal mask begins at the upper left, which is wrong where the queries are the last of the keys; a mask of
    ones and zeros instead takes up to 1.4 times as long (CPU, torch 2.13). But what came before is seen by all queries:
    that part needs no mask, and there the queries of a group can stand side by side, so that no key is repeated.
    """

    name = "flash"

    @staticmethod
    def missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type == "cpu":
            return None
        if device.type != "cuda":
            return f"torch has flash kernels for the CPU and for CUDA, not for {device.type}"
        return _missing_on_cuda(device, dtype, head_dim)

    def takes(self, queries: Tensor, keys: Tensor, values: Tensor) -> bool:
        equal = queries.shape[2] == keys.shape[2]
        return equal or (
            queries.shape[3] == values.shape[3] and not self.missing(queries.device, queries.dtype, queries.shape[3])
        )

    def causal(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        earlier, group = keys.shape[2] - queries.shape[2], queries.shape[1] // keys.shape[1]
        if not earlier:
            if queries.is_cuda or queries.shape[3] != values.shape[3] or not _takes_groups(group):
                return super().causal(queries, keys, values, scale)
            return _flash(queries, keys, values, scale, causal=True)
        batch, _, rows, dim = queries.shape
        folded = queries.reshape(batch, keys.shape[1], group * rows, dim)
        before, before_lse = _flash(folded, keys[:, :, :earlier], values[:, :, :earlier], scale, causal=False)
        own_keys, own_values = (tensor[:, :, earlier:].repeat_interleave(group, dim=1) for tensor in (keys, values))
        among, among_lse = _flash(queries, own_keys, own_values, scale, causal=True)
        # Of two parts of a softmax, the share of the first is exp(lse of it) / (that + exp(lse of the second)).
        ahead = before_lse.reshape(among_lse.shape) - among_lse
        before = before.reshape(among.shape).to(ahead.dtype)  # float32, or float64 in a model of that
        output = torch.lerp(among.to(ahead.dtype), before, torch.sigmoid(ahead).unsqueeze(-1))
        return output.to(queries.dtype), among_lse + F.softplus(ahead)

    def takes_single(self, queries: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether `single` can be asked."""
        alike = queries.dtype == keys.dtype == values.dtype and queries.shape[3] == values.shape[3]
        return alike and not self.missing(queries.device, queries.dtype, queries.shape[3])

    def single(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """A single query of every sequence sees all keys: `[B, Hq, 1, Dv]`.

        Not through scaled_dot_product_attention, which on newer GPUs takes cuDNN's kernel: that is planned anew for
        every length, which takes longer than many steps (35 ms of a step on an H200, torch 2.11).
        """
        folded = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[3])
        return _flash(folded, keys, values, scale, causal=False)[0].reshape(*queries.shape[:3], values.shape[3])


class FlashAttn(Sdpa):
    """The flash-attn package (version 2.1 or later, whose causal mask ends at the lower right)."""

    name = "flash-attn"

    @staticmethod
    def missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"flash-attn runs on CUDA, and the model is on the {device.type}"
        return _missing_on_cuda(device, dtype, head_dim) or _missing_package()

    def takes(self, queries: Tensor, keys: Tensor, values: Tensor) -> bool:
        return queries.shape[3] == values.shape[3] and not self.missing(queries.device, queries.dtype, queries.shape[3])

    def causal(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        tokens_first = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
        return _package().flash_attn_func(*tokens_first, softmax_scale=scale, causal=True).transpose(1, 2), None

    def spans(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, spans: list[tuple[int, int]]
    ) -> Tensor | None:
        if not self.takes(queries, keys, values):
            return None
        lengths = [end - begin for begin, end in spans]
        real = torch.zeros(queries.shape[0], queries.shape[2], dtype=torch.bool)
        for row, (begin, end) in enumerate(spans):
            real[row, begin:end] = True
        real = real.to(queries.device)
        ends = torch.tensor([0, *lengths], dtype=torch.int32, device=queries.device).cumsum(0, dtype=torch.int32)
        packed = (tensor.transpose(1, 2)[real] for tensor in (queries, keys, values))  # [tokens, H, D]
        attend = partial(_package().flash_attn_varlen_func, softmax_scale=scale, causal=True)
        output = queries.new_zeros(queries.shape[0], queries.shape[2], queries.shape[1], values.shape[3])
        output[real] = attend(*packed, ends, ends, max(lengths), max(lengths))
        return output.transpose(1, 2)


SDPA, FLASH = Sdpa(), Flash()
BACKENDS: dict[str, Sdpa] = {backend.name: backend for backend in (FlashAttn(), FLASH, SDPA)}
"""By name, the fastest first."""


def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Sdpa:
    """The backend of this name, or under "auto" the fastest, for a model of such queries.

    Raises CacheError for a name that is not known, and for a backend that cannot serve the model.
    """
    if name == "auto":
        return next(each for each in BACKENDS.values() if each.missing(device, dtype, head_dim) is None)
    if name not in BACKENDS:
        names = ", ".join(f'"{each}"' for each in ("auto", *BACKENDS))
        raise CacheError(f"attention={name!r} is no attention backend: write one of {names}.")
    missing = BACKENDS[name].missing(device, dtype, head_dim)
    if missing is not None:
        raise CacheError(
            f'attention="{name}" cannot be used: {missing}. Write attention="auto" for the fastest there is.'
        )
    return BACKENDS[name]


def _flash(queries: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp `[B, Hq, L]`."""
    if queries.is_cuda:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse, *_ = kernel(queries, keys, values, 0.0, causal, scale=scale)
    return output, lse


@cache
def _takes_groups(group: int) -> bool:
    """Whether the flash kernel for a CPU takes fewer KV heads than query heads, which no interface promises."""
    keys = torch.zeros(1, 1, 1, 16, dtype=torch.float32)
    try:
        _flash(keys.expand(1, group, 1, 16), keys, keys, 1.0, causal=True)
    except (AttributeError, RuntimeError):
        return False
    return True


def _missing_on_cuda(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in HALF:
        return f"flash kernels compute in float16 or bfloat16, and the model is in {dtype}"
    if head_dim > _MOST_HEAD_DIM or head_dim % 8:
        return f"flash kernels take heads of up to {_MOST_HEAD_DIM}, in eights, and those of the model have {head_dim}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "flash kernels need a GPU of compute capability 8.0 (Ampere) or later"
    return None


def _missing_package() -> str | None:
    try:
        _package()
    except ImportError as error:
        return f"the package flash-attn cannot be imported ({error}): pip install flash-attn"
    return None


def _package() -> ModuleType:
    return importlib.import_module("flash_attn")
