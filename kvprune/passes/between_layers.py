"""Hooks on the decoder layers of a model, through which tokens stop between them: one before a layer, one after it.

They do nothing but for a `PrunedCache` whose policy stops tokens, and look no further than whether theirs is one.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.models import CACHE_ARGUMENT
from kvprune.errors import UnsupportedModelError

_CACHE_NAMES = (CACHE_ARGUMENT, "past_key_values", "past_key_value", "layer_past")
_installing = threading.Lock()


class Between:
    """The hooks of one decoder layer."""

    def __init__(self, layer: torch.nn.Module, index: int, layers: int) -> None:
        """index: of the layer, out of so many. Raises UnsupportedModelError for one that is called in another way."""
        self.index, self.layers = index, layers
        self.names = list(inspect.signature(layer.forward).parameters)
        self.cache_name = next((name for name in _CACHE_NAMES if name in self.names), "")
        if not self.cache_name or self.names[0] != "hidden_states" or "attention_mask" not in self.names:
            raise UnsupportedModelError(
                f"{type(layer).__name__} takes {', '.join(self.names)}, and not hidden_states, an attention_mask and a "
                "cache, so tokens could not stop before it. Use a policy that evicts after the prompt, such as SnapKV."
            )
        self.cache_place = self.names.index(self.cache_name)

    def _cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache, if its policy stops tokens; else None."""
        cache = kwargs.get(self.cache_name)
        if cache is None and len(args) > self.cache_place:
            cache = args[self.cache_place]
        return cache if getattr(cache, "cascade", None) is not None else None

    def before(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = self._cache(args, kwargs)
        return None if cache is None else self._enter(cache, args, kwargs)

    def after(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        cache = self._cache(args, kwargs)
        return None if cache is None or cache.trip is None else self._leave(cache, output)

    @torch.compiler.disable
    def _enter(self, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        hidden = given["hidden_states"]
        if not self.index:
            cache.expect(None, None)  # what a pass that failed before its first keys has left there
            cache.trip = cache.cascade.trip(cache, hidden, given.get("attention_mask"))
        if cache.trip is None:
            return None
        taken = cache.trip.enter(self.index, hidden, given)
        if taken is None:
            return None
        placed = self.names[: len(args)]
        return tuple(taken[name] for name in placed), {name: taken[name] for name in taken if name not in placed}

    @torch.compiler.disable
    def _leave(self, cache: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        result: Tensor = cache.trip.leave(self.index, states)
        if self.index == self.layers - 1:
            cache.trip.arrive(self.layers)
            cache.trip = None
        if result is states:
            return None
        return (result, *output[1:]) if isinstance(output, tuple) else result


def install(model: Any, layers: int) -> None:
    """Register the hooks on a model's decoder layers, once. Raises UnsupportedModelError where they could not work."""
    found = _decoder_layers(model, layers)
    hooks = [Between(layer, index, layers) for index, layer in enumerate(found)]
    with _installing:
        for layer, hook in zip(found, hooks, strict=True):
            known = (getattr(each, "__self__", None) for each in layer._forward_pre_hooks.values())
            if not any(isinstance(each, Between) for each in known):
                layer.register_forward_pre_hook(hook.before, with_kwargs=True)
                # First, so that whoever collects hidden states gets those of all columns.
                layer.register_forward_hook(hook.after, with_kwargs=True, prepend=True)


def _decoder_layers(model: Any, layers: int) -> torch.nn.ModuleList:
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            numbers = [
                {part.layer_idx for part in layer.modules() if isinstance(getattr(part, "layer_idx", None), int)}
                for layer in module
            ]
            if numbers == [{index} for index in range(layers)]:
                return module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {layers} decoder layers with an attention each, between which tokens "
        "could stop. Use a policy that evicts after the prompt, such as SnapKV."
    )
