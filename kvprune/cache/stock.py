"""Layers that are not pruned: transformers' own, with a sliding window or with linear attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from kvprune.errors import CacheError
from kvprune.state import Saved, State

# By name: transformers 5.17 has no DummyLayer. Subclasses of these may hold more than is saved here.
_KINDS = (
    "DummyLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
_STATES = ("conv_states", "recurrent_states")


def nbytes(layer: Any) -> int:
    """Bytes of the storages behind a layer's tensors."""
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(layer))


def dense_nbytes(layer: Any) -> int:
    """Bytes of a layer's tensors alone; transformers keeps a sliding window as a view of the whole prompt (5.23)."""
    return sum(tensor.nbytes for tensor in _tensors(layer))


def _tensors(layer: Any) -> list[Tensor]:
    """Keys, values, and the states of linear attention."""
    values = [value.values() if isinstance(value, dict) else (value,) for value in vars(layer).values()]
    return [tensor for each in values for tensor in each if isinstance(tensor, Tensor) and tensor.ndim > 1]


def batch_size(layer: Any) -> int | None:
    """How many sequences a layer holds; None if it holds none."""
    return next((len(tensor) for tensor in _tensors(layer)), None)


def copied(layer: Any) -> Any:
    """An independent copy."""
    # deepcopy refuses tensors with a history, such as those of a prompt that was read without torch.no_grad().
    memo = {id(tensor): tensor.clone() for tensor in _tensors(layer) if tensor.grad_fn is not None}
    return copy.deepcopy(layer, memo)


def has_lost_what_it_needs(layer: Any, remove: int) -> bool:
    """Whether a layer with a sliding window cannot be cropped by so many tokens."""
    if not isinstance(layer, DynamicSlidingWindowLayer) or layer.get_seq_length() < layer.sliding_window:
        return False
    # Recording may have begun when the window had already moved on: transformers 5.23 would then crop too much.
    needed = min(layer.get_seq_length() - remove, layer.sliding_window - 1)
    return not layer.record_past or layer.keys.shape[2] - remove < needed


# -- saved and restored ------------------------------------------------------------------------------------------------


def state(layer: Any) -> State:
    """What `restore` makes the same layer of. Raises CacheError for a kind of layer that it does not know."""
    if not _is_known(layer):
        raise CacheError(f"a cache with layers of the kind {type(layer).__name__} cannot be saved.")
    saved = State({"kind": type(layer).__name__, "record_past": getattr(layer, "record_past", False)})
    if isinstance(layer, DynamicLayer):
        saved.facts |= {"filled": layer.is_initialized, "seen": layer.get_seq_length()}
        if layer.is_initialized:
            saved.tensors |= {"keys": layer.keys, "values": layer.values}
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        saved.facts["previous"] = list(layer.has_previous_state.values())
        saved.facts["kernel_sizes"] = [size or 0 for size in layer.conv_kernel_size.values()]
        for name in _STATES:
            held = {number: tensor for number, tensor in getattr(layer, name).items() if tensor is not None}
            saved.tensors |= {f"{name}.{number}": tensor for number, tensor in held.items()}
    return saved


def restore(layer: Any, saved: Saved, batch: int | None) -> None:
    """Make a new layer what it was. Raises CacheError.

    batch: sequences of the cache, None if no pruned layer holds any.
    """
    kind = saved.fact("kind", str)
    if kind != type(layer).__name__ or not _is_known(layer):
        raise saved.refused(f"is of the kind {kind}, and the model's layer is a {type(layer).__name__}")
    if saved.flag("record_past"):
        layer.record_past = True
    if isinstance(layer, DynamicLayer):
        _restore_keys(layer, saved, batch)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        _restore_states(layer, saved, batch)


def _is_known(layer: Any) -> bool:
    return type(layer).__name__ in _KINDS and type(layer).__module__ == cache_utils.__name__


def _restore_keys(layer: DynamicLayer, saved: Saved, batch: int | None) -> None:
    seen = saved.count("seen")
    if not saved.flag("filled"):
        if seen:
            raise saved.refused(f"has seen {seen} tokens, and holds none")
        return
    (shape, dtype), (value_shape, _) = saved.numbers("keys"), saved.numbers("values")
    rows = min(seen, window - 1) if (window := getattr(layer, "sliding_window", 0)) else seen
    # While the past is recorded, tokens before the window may still be there.
    fits = rows <= shape[2] <= seen if saved.flag("record_past") else shape[2] == rows
    if shape[0] != (batch or shape[0]) or not fits or value_shape[:3] != shape[:3]:
        raise saved.refused(f"has keys of shape {list(shape)} and values of shape {list(value_shape)}")
    keys, values = saved.tensor("keys", shape, dtype), saved.tensor("values", value_shape, dtype)
    DynamicLayer.lazy_initialization(layer, keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = seen
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(keys.device)


def _restore_states(layer: LinearAttentionCacheLayerMixin, saved: Saved, batch: int | None) -> None:
    numbers = range(layer.number_of_states)
    sizes = saved.counts("kernel_sizes", length=len(numbers))
    previous = saved.fact("previous", list)
    if len(previous) != len(numbers) or not all(isinstance(flag, bool) for flag in previous):
        raise saved.refused("does not say which of its states are there")
    for number in numbers:
        layer.has_previous_state[number], layer.conv_kernel_size[number] = previous[number], sizes[number] or None
        for name in _STATES:
            if not saved.has(f"{name}.{number}"):
                continue
            shape, dtype = saved.described(f"{name}.{number}")
            if not shape or shape[0] != (batch or shape[0]) or not dtype.is_floating_point:
                raise saved.refused(f"has {name} of shape {list(shape)} in {dtype}")
            tensor = saved.tensor(f"{name}.{number}", shape, dtype)
            torch._dynamo.mark_static_address(tensor)  # as transformers does, for CUDA graphs (5.23)
            getattr(layer, name)[number] = tensor
            getattr(layer, f"is_{name}_initialized")[number] = True
            layer.dtype, layer.device = layer.dtype or dtype, layer.device or tensor.device
