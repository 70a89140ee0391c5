"""Which model a cache belongs to: what its config says of keys and positions, and samples of its weights."""

from __future__ import annotations

import json
import reprlib
from typing import Any

from kvprune.cache.models import heads_of, text_config
from kvprune.saving.weights import UnknownWeights, weights

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

TRUST = "If you know that they are the same, say trust_model=True"


def fingerprint(model: Any) -> dict[str, Any]:
    """Facts of a model as JSON: equal where a cache of one model serves the other.

    `weights` among them is a hash of those that a forward pass would use now; or, where that cannot be told, a dict
    whose `unknown` says why.
    """
    facts = {name: _fact(text_config(model), name) for name in _FACTS}
    facts["dtype"] = str(model.dtype).removeprefix("torch.")
    facts["process"] = _process(model)
    try:
        facts["weights"] = weights(model)
    except UnknownWeights as error:
        facts["weights"] = {"unknown": str(error)}
    return json.loads(json.dumps(facts, sort_keys=True, default=str))  # tuples are lists from here on


def unknown(facts: dict[str, Any]) -> str | None:
    """Why the weights of a fingerprint are not known; None if they are."""
    found = facts.get("weights")
    return found.get("unknown", "nothing says why") if isinstance(found, dict) else None


def differences(saved: Any, model: dict[str, Any], *, trust_model: bool = False) -> list[str]:
    """In what a saved fingerprint is not that of a model, in words; empty where they are equal.

    trust_model: take the caller's word for the weights, and compare the rest.
    """
    if not isinstance(saved, dict) or saved.keys() != model.keys():
        return ["its description of the model is not one of this version"]
    told = [
        f"{name} is {reprlib.repr(saved[name])} there and {reprlib.repr(here)} here"
        for name, here in model.items()
        if name != "weights" and saved[name] != here
    ]
    if told or trust_model:
        return told
    for where, facts in (("the model it was saved from", saved), ("this model", model)):
        if (reason := unknown(facts)) is not None:
            return [f"which weights {where} computes with cannot be told: {reason}. {TRUST}"]
    if saved["weights"] != model["weights"]:
        return ["the weights are others, as those of another fine-tune, revision or adapter are"]
    return []


def _fact(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of transformers, where layers differ in it
        return [getattr(each, name, None) for each in config.per_layer_config]


def _process(model: Any) -> str:
    """Which share of a model this is, where tensor parallelism splits it: the weights and heads of others differ."""
    share = heads_of(model, 0)
    return f"{share.rank + 1} of {share.size}"
