"""Which model a cache belongs to: what its config says of keys and positions, and samples of its weights."""

from __future__ import annotations

import hashlib
import json
import reprlib
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.models import heads_of, text_config

# What decides the keys and values of a token, and their positions, beside the weights.
_FACTS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rope_parameters",
    "sliding_window",
    "attn_logit_softcapping",
)
_SAMPLES = 64


def fingerprint(model: Any) -> dict[str, Any]:
    """Facts of a model as JSON, `weights` among them: equal where a cache of one model serves the other."""
    facts = {name: _fact(text_config(model), name) for name in _FACTS}
    facts["dtype"] = str(model.dtype).removeprefix("torch.")
    facts["process"] = _process(model)
    facts["weights"] = _weights(model)
    return json.loads(json.dumps(facts, sort_keys=True, default=str))  # tuples are lists from here on


def differences(saved: Any, model: dict[str, Any]) -> list[str]:
    """In what a saved fingerprint is not that of a model, in words; empty where they are equal."""
    if not isinstance(saved, dict) or saved.keys() != model.keys():
        return ["its description of the model is not one of this version"]
    told = [
        f"{name} is {reprlib.repr(saved[name])} there and {reprlib.repr(here)} here"
        for name, here in model.items()
        if name != "weights" and saved[name] != here
    ]
    if not told and saved["weights"] != model["weights"]:
        told = ["the weights are others, as those of another fine-tune or revision are"]
    return told


def _fact(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of transformers, where layers differ in it
        return [getattr(each, name, None) for each in config.per_layer_config]


def _process(model: Any) -> str:
    """Which share of a model this is, where tensor parallelism splits it: the weights and heads of others differ."""
    share = heads_of(model, 0)
    return f"{share.rank + 1} of {share.size}"


def _weights(model: Any) -> str:
    """A hash of some numbers of every parameter and every buffer that is saved with them.

    A fine-tune changes most numbers of the matrices that it touches, but may leave most matrices alone.
    """
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor) and not tensor.is_meta:  # accelerate leaves those of offloaded layers on "meta"
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(as_bytes(_sample(_local(tensor.detach()))))
    return digest.hexdigest()


def _local(tensor: Any) -> Tensor:
    """What this process holds of a tensor that tensor parallelism may have split (a DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]


def as_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as a buffer, which is the tensor's own memory where it is contiguous on the CPU."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
