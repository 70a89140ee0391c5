"""The modes of PyTorch that a model may be called in, on which nothing that is cached may depend.

Under autocast, keys and values come in different dtypes. In inference mode, tensors are made that cannot be written to
outside of it. With gradients enabled, every tensor keeps what it was computed from. A cache outlives all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from kvprune.errors import CacheError

F = TypeVar("F", bound=Callable[..., Any])


def cast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of attention under autocast, where that is on."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:  # which autocast leaves as it is
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def without_gradients(method: F) -> F:
    """For methods that make or write what is cached."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return run  # type: ignore[return-value]


class _Untrainable(torch.autograd.Function):
    """The output of attention; gradients that come back to it raise CacheError."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, queries: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise CacheError(
            "a PrunedCache keeps no graph to send gradients back through: train with use_cache=False or a DynamicCache."
        )


def untrainable(output: Tensor, queries: Tensor) -> Tensor:
    """The output of attention to these queries, computed without gradients: where some are wanted, they are refused."""
    if queries.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():
        return _Untrainable.apply(output, queries)
    return output
