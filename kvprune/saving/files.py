"""Caches in files: one safetensors file each. Everything that is read from it is validated before it is used.

    {"format": "kvprune.cache", "version": "1", "header": JSON, "sha256": of the header}      the file's metadata
    header: kvprune, policy, model (its fingerprint), seen, transcript, layers, tensors (sha256 of each)
    layers.<index>.table.keys, ...                                                            the tensors

A file that is damaged, malformed, or made for another model raises CacheError and nothing else. Nothing is unpickled,
and nothing is imported but policies that are registered.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvprune.cache import stock
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import layer_config, text_config
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.transcript import Transcript
from kvprune.errors import CacheError, PolicyError
from kvprune.policy.base import Policy
from kvprune.policy.registry import described, from_description
from kvprune.saving.fingerprint import TRUST, differences, fingerprint, unknown
from kvprune.saving.weights import as_bytes
from kvprune.state import Saved, State
from kvprune.table.rows import owned

FORMAT, VERSION = "kvprune.cache", 1
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


# -- to a file ---------------------------------------------------------------------------------------------------------


def save(cache: PrunedCache, model: Any, path: str | os.PathLike[str], *, trust_model: bool = False) -> None:
    """Write a cache; see `PrunedCache.save`."""
    facts = fingerprint(model)
    if not trust_model and (reason := unknown(facts)) is not None:
        raise CacheError(
            f"a saved cache says which weights it is of, and those of this {type(model).__name__} cannot be told: "
            f"{reason}. {TRUST} to save(), and again to load()."
        )
    state = State({"kvprune": version("kvprune"), "policy": described(cache.policy), "model": facts})
    state.facts["seen"] = cache.seen_tokens
    state.add("transcript", None if (known := cache.transcript) is None else known.state())
    state.add_all("layers", (_layer_state(layer) for layer in cache.layers))
    tensors = {name: owned(tensor.detach().cpu()) for name, tensor in sorted(state.tensors.items())}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise CacheError(f"{name} is in {tensor.dtype}, which cannot be saved.")
    state.facts["tensors"] = {name: _digest(tensor) for name, tensor in tensors.items()}
    header = json.dumps(state.facts)
    metadata = {"format": FORMAT, "version": str(VERSION), "header": header, "sha256": _digest(header)}
    _write(tensors, metadata, Path(os.path.realpath(path)))


def _layer_state(layer: Any) -> State:
    return layer.state() if isinstance(layer, PrunedLayer) else stock.state(layer)


def _digest(content: Tensor | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else as_bytes(content)).hexdigest()


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """All of it or nothing: whatever happens, the folder holds the old file or the new one, and nothing else."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{FORMAT}.", dir=path.parent) as folder:
            written = Path(folder) / "cache"
            written.touch()
            mode = written.stat().st_mode  # what the umask leaves; safetensors 0.8 makes files for their owner alone
            save_file(tensors, written, metadata)
            written.chmod(mode)
            with written.open("rb+") as file:
                os.fsync(file.fileno())
            written.replace(path)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"the cache cannot be saved to {path}: {error}.") from error


# -- from a file -------------------------------------------------------------------------------------------------------


def load(
    kind: type[PrunedCache],
    path: str | os.PathLike[str],
    model: Any,
    policy: Policy | None = None,
    *,
    trust_model: bool = False,
    **settings: Any,
) -> PrunedCache:
    """Read a cache; see `PrunedCache.load`. settings: of its constructor."""
    path = Path(path)
    try:
        with safe_open(path, "pt") as opened:
            file = _File(path, opened)
            header = Saved(file, file.header)
            told = differences(header.fact("model", dict), fingerprint(model), trust_model=trust_model)
            if told:
                raise file.refused(f"it is of another model than this {type(model).__name__}: {'; '.join(told)}")
            cache = kind(model, _policy(file, policy), **settings)
            _restore(cache, header, model)
            return cache
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} cannot be loaded, or is no whole safetensors file: {error}.") from error


class _File:
    """An open file: its header, and its tensors as whoever reads them expects them. `Tensors` of state.py."""

    def __init__(self, path: Path, opened: Any) -> None:
        self._path, self._opened = path, opened
        self.header = self._checked_header()
        digests = self.header.get("tensors")
        self._digests: dict[str, Any] = digests if isinstance(digests, dict) else {}
        if set(opened.keys()) != self._digests.keys():
            raise self.refused("tensors are missing, or there are some that its header does not know")

    def refused(self, reason: str) -> CacheError:
        return CacheError(f"{self._path} cannot be loaded: {reason}.")

    def _checked_header(self) -> dict[str, Any]:
        metadata = self._opened.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise self.refused("it is no cache that kvprune saved")
        version = metadata.get("version", "")
        if version.isascii() and version.isdigit() and len(version) < 10 and int(version) > VERSION:
            raise self.refused(
                f"its format is {version}, and this kvprune reads up to {VERSION}: install the kvprune that saved it, "
                "or a later one"
            )
        text = metadata.get("header", "")
        if version != str(VERSION) or metadata.get("sha256") != _digest(text):
            raise self.refused("its header is damaged")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise self.refused("its header is no JSON object")
        return header

    @cached_property
    def _described(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        found = {}
        for name in self._digests:
            part = self._opened.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise self.refused(f"{name} is in {part.get_dtype()}, which no cache holds")
            found[name] = tuple(part.get_shape()), dtype
        return found

    def described(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        return self._described.get(name)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._opened.get_tensor(name)  # a view of the mapped file
        if self._digests[name] != _digest(tensor):
            raise self.refused(f"{name} is damaged")
        return tensor


def _policy(file: _File, given: Policy | None) -> Policy:
    """The policy that the file names, or the one that was given, if it is the same."""
    description = file.header.get("policy")
    if given is not None:
        if described(given) != description:
            raise file.refused(f"its policy is {_told(description)}, and not {given}")
        return given
    try:
        return from_description(description)
    except PolicyError as error:
        raise file.refused(
            f"its policy cannot be had ({error}) If it is a class of your own, give an object of it with the settings "
            "that the file names: load(path, model, policy=...)"
        ) from error


def _told(description: Any) -> str:
    """A policy as it is printed, without what is too long to; as the file has it, where it cannot be had."""
    try:
        return str(from_description(description))
    except PolicyError:
        return json.dumps(description)


def _restore(cache: PrunedCache, header: Saved, model: Any) -> None:
    """Fill a new cache."""
    devices = _devices(model)
    rest = next(iter(devices.values()), model.device)
    states = [
        replace(state, device=devices.get(index, rest))
        for index, state in enumerate(header.parts("layers", len(cache.layers)))
    ]
    batch = None
    for index in cache.pruned_layers:
        layer, state = cast(PrunedLayer, cache.layers[index]), states[index]
        layer.restore(state)
        _check_layer(cache, layer, state, model)
        if batch not in (None, len(layer.tokens)):
            raise state.refused(f"holds a batch of {len(layer.tokens)}, and others one of {batch}")
        batch = len(layer.tokens)
    for layer, state in zip(cache.layers, states, strict=True):
        if not isinstance(layer, PrunedLayer):
            stock.restore(layer, state, batch or None)
    seen = header.count("seen")
    if cache.lengths - {seen}:
        raise header.refused(f"says that {seen} tokens were seen, and its layers that {sorted(cache.lengths)} were")
    if "transcript" in header.facts and (part := header.part("transcript", torch.device("cpu"))) is not None:
        cache.transcript = Transcript.restored(part, seen)


def _check_layer(cache: PrunedCache, layer: PrunedLayer, state: Saved, model: Any) -> None:
    query_heads = getattr(layer_config(text_config(model), layer.index), "num_attention_heads", None)
    if layer.table is not None and isinstance(query_heads, int) and query_heads % layer.kv_heads:
        raise state.refused(f"has {layer.kv_heads} KV heads, and the model {query_heads} query heads")
    if layer.selection is not None and (
        layer.index != cache.pruned_layers[0] or layer.selection.layer != cache.filter_layer
    ):
        raise state.refused("holds what a prompt filter chose that this policy is not")


def _devices(model: Any) -> dict[int, torch.device]:
    """The device on which the attention of each layer runs, taken from its weights, or from what loads them."""
    found: dict[int, torch.device] = {}
    for module in model.get_decoder().modules():
        if isinstance(index := getattr(module, "layer_idx", None), int):
            devices = (each for part in module.modules() for each in _where(part) if each.type != "meta")
            if (device := next(devices, None)) is not None:
                found.setdefault(index, device)
    return found


def _where(module: torch.nn.Module) -> Iterator[torch.device]:
    yield from (weight.device for weight in module.parameters(recurse=False))
    device = getattr(
        getattr(module, "_hf_hook", None), "execution_device", None
    )  # of accelerate, for offloaded weights
    if device is not None:
        yield torch.device(device)
