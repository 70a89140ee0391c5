"""What the forward pass of a model computes with: its tensors, wherever they are, without those that are switched off.

A parameter may be on disk (accelerate leaves it on "meta", and its hook knows where the numbers are), may be made of
other tensors (torchao), or may belong to an adapter that is not at work (PEFT). Nothing of these packages is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_SAMPLES = 64


class UnknownWeights(Exception):  # noqa: N818 - it says what cannot be told, and is not seen by users
    """Weights that cannot be read; the message says which."""


def weights(model: torch.nn.Module) -> str:
    """A hash of some numbers of every tensor in use: of parameters, and of buffers that are saved with them.

    A fine-tune changes most numbers of the matrices that it touches, but may leave most matrices alone.
    Raises UnknownWeights where some cannot be read.
    """
    digest = hashlib.sha256()
    for name, value in _in_use(model):
        try:
            for part in _parts(value):
                digest.update(part)
        except UnknownWeights as error:
            raise UnknownWeights(f"{name} {error}") from None
        except Exception as error:
            raise UnknownWeights(f"{name} cannot be read ({type(error).__name__}: {error})") from error
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as a buffer, which is the tensor's own memory where it is contiguous on the CPU."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _in_use(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and what they stand for, then the settings of the adapters at work."""
    adapters = {name: _Adapter(module) for name, module in model.named_modules() if _Adapter.is_one(module)}
    offloaded = {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    for name, value in model.state_dict().items():
        if all(
            adapter.uses(name[len(prefix) + bool(prefix) :])
            for prefix, adapter in adapters.items()
            if not prefix or name.startswith(f"{prefix}.")
        ):
            yield name, _loaded(name, offloaded) if isinstance(value, Tensor) and value.is_meta else value
    for prefix, adapter in adapters.items():
        for name, setting in adapter.settings():
            yield f"{prefix}.{name}", setting


# -- adapters ----------------------------------------------------------------------------------------------------------


class _Adapter:
    """A module of PEFT: the layer of an adapter, another module in place of one, or what makes a prompt."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._layers: tuple[str, ...] = getattr(module, "adapter_layer_names", None) or ("prompt_encoder",)
        active = getattr(module, "active_adapters", None) or ()
        active = [active] if isinstance(active, str) else active
        merged = getattr(module, "merged_adapters", None) or ()
        off = self._is_off()
        if off and merged:
            raise UnknownWeights(
                f"has the adapters {list(merged)} merged and switched off: the next pass unmerges them"
            )
        self._used = [] if off else [name for name in active if name not in merged]

    @staticmethod
    def is_one(module: Any) -> bool:
        return bool(getattr(module, "adapter_layer_names", None)) or isinstance(
            getattr(module, "prompt_encoder", None), torch.nn.ModuleDict
        )

    def _is_off(self) -> bool:
        off = getattr(self._module, "disable_adapters", None)
        if isinstance(off, bool):
            return off
        off = getattr(self._module, "_disable_adapters", None)  # of modules that take the place of others
        return off if isinstance(off, bool) else "forward" in vars(self._module)  # of prompts: the base model's forward

    def uses(self, name: str) -> bool:
        """Whether a tensor, by its name within the module, takes part."""
        first, _, rest = name.partition(".")
        if first == "original_module":  # stands aside for a module that is at work
            return not any(adapter in getattr(self._module, "modules_to_save", ()) for adapter in self._used)
        return first not in self._layers or any(f"{rest}.".startswith(f"{adapter}.") for adapter in self._used)

    def settings(self) -> Iterator[tuple[str, Any]]:
        """What is not a tensor: the factor by which an adapter counts."""
        scaling = getattr(self._module, "scaling", None)
        if isinstance(scaling, dict):
            yield from (("scaling", float(scaling[name])) for name in self._used if name in scaling)


# -- tensors -----------------------------------------------------------------------------------------------------------


def _loaded(name: str, hooks: dict[str, Any]) -> Tensor:
    """The numbers of a parameter on "meta", from the hook that loads them before a forward pass."""
    path = name
    while path:
        path, _, _ = path.rpartition(".")
        for hook in _each(hooks.get(path)):
            held = getattr(hook, "weights_map", None)
            if held is not None:
                try:
                    found = held[name[len(path) + bool(path) :]]
                except KeyError:
                    continue
                return found
    raise UnknownWeights(f"{name} is on the device meta, and nothing says where its numbers are")


def _each(hook: Any) -> tuple[Any, ...]:
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    """Bytes to hash of a value that a state dict holds."""
    if isinstance(value, Tensor):
        value = value.detach()
        if hasattr(value, "to_local"):  # a DTensor: what this process holds of it
            value = value.to_local()
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            yield repr((type(value).__name__, context)).encode()
            for name in names:
                yield from _parts(getattr(value, name))
        elif value.is_meta:
            raise UnknownWeights("is on the device meta")
        elif value.is_quantized:
            yield repr((value.qscheme(), tuple(value.shape))).encode()
            yield from _parts(value.int_repr())
            yield from _parts(value.dequantize())
        else:
            yield str(tuple(value.shape)).encode()
            yield as_bytes(_sample(value))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _parts(each)
    elif isinstance(value, dict):
        for key, each in sorted(value.items(), key=repr):
            yield repr(key).encode()
            yield from _parts(each)
    elif value is None or isinstance(value, str | bytes | int | float | torch.dtype):
        yield repr(value).encode()
    else:
        raise UnknownWeights(f"is a {type(value).__name__}, whose numbers cannot be read")


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]
