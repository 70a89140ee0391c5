"""What kvprune asks of a transformers model: its config, layer by layer, and an attention that can be reached."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed
from transformers.masking_utils import create_causal_mask

from kvprune.cache.adapters import check_adapters
from kvprune.cache.registration import PREFIX, base_name, register
from kvprune.errors import UnsupportedModelError
from kvprune.policy.heads import ALL_HEADS, Heads

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Under which name models and `generate()` take a cache: transformers 5.24 renamed it, and warns of the old name."""
_BATCHES = "init_continuous_batching"
"""The method of a model that every way into continuous batching goes through."""
_switching = threading.Lock()


def cache_argument(cache: Any) -> dict[str, Any]:
    """The cache as an argument of a model, or of `generate()`, of the transformers that is installed."""
    return {CACHE_ARGUMENT: cache}


def text_config(model: Any) -> Any:
    """The config of the text decoder."""
    return model.config.get_text_config(decoder=True)


def layer_config(config: Any, layer: int) -> Any:
    """The config of one layer of a text decoder: in Gemma 4, heads differ in number and size from layer to layer."""
    layers = getattr(config, "per_layer_config", None)  # not in transformers 5.17
    return config if layers is None else layers[layer]


def head_dim(config: Any) -> int:
    """Size of a query, by the config of a layer."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def kv_heads(config: Any) -> int:
    """Number of KV heads, by the config of a layer."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def heads_of(model: Any, layer: int) -> Heads:
    """The share of a layer's heads that this process has, if the model's plan splits attention: see `Heads.present`."""
    size = getattr(model, "tp_size", None) or 1
    if size == 1:
        return ALL_HEADS
    mesh = model._device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")  # transformers 5.17 has one dimension
    config = layer_config(text_config(model), layer)
    rank = torch.distributed.get_rank(group)
    return Heads(rank, size, config.num_attention_heads, kv_heads(config), group, model.device)


def check_supported(model: Any) -> None:
    """Raise UnsupportedModelError for a model whose cache cannot be pruned, as far as its config tells."""
    _check_is_model(model)
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model, and its two caches are not made of one growing sequence: "
            "use a decoder-only model (AutoModelForCausalLM)."
        )
    check_adapters(model, CACHE_ARGUMENT)
    if not getattr(type(model), "_can_set_attn_implementation", lambda: True)():
        raise UnsupportedModelError(
            f"the attention of {name} does not go through transformers' attention registry, so kvprune cannot reach "
            "it. BLOOM, MPT and Falcon are such models, and GPT-J before transformers 5.24; Llama, Mistral, Qwen, "
            "Phi-3, Gemma, GPT-NeoX, OPT, GPT-2 and most others work."
        )
    text = text_config(model)
    if getattr(text, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention, which transforms its keys after caching them: kvprune does not "
            "support it."
        )
    if _reads_others(text):
        raise UnsupportedModelError(
            f"layers of {name} read the cache of other layers, whose rows may be gone: kvprune does not support it."
        )


def _check_is_model(model: Any) -> None:
    if getattr(model, "config", None) is None or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModelError(
            f"PrunedCache needs a transformers causal language model, not {type(model).__name__}."
        )


def _reads_others(config: Any) -> bool:
    """Whether layers read what others have cached."""
    if not hasattr(config, "kv_sharing_modes"):  # transformers 5.17
        return bool(getattr(config, "num_kv_shared_layers", 0))
    return any(mode not in (None, "store") for mode in config.kv_sharing_modes or ())


def switch_attention(model: Any) -> None:
    """Switch the text decoder of a model to the kvprune attention over the one it has; a vision tower keeps its own."""
    with _switching:  # another thread must not find a model that is switched in part
        base = text_config(model)._attn_implementation or "eager"
        if not base.startswith(PREFIX):
            _decoder(model).set_attn_implementation(register(base))
        if hasattr(type(model), _BATCHES):
            setattr(model, _BATCHES, _Batching(model))


def restore(model: Any) -> None:
    """Give a model back the attention it was loaded with.

    A PrunedCache made before says so when it is used again; a new one switches the model again. `attention(model)` is
    both ways. Raises UnsupportedModelError for what is no model of transformers.
    """
    _check_is_model(model)
    with _switching:
        decoder = _decoder(model)
        name = decoder.config._attn_implementation or ""
        if name.startswith(PREFIX):
            decoder.set_attn_implementation(base_name(name))
        vars(model).pop(_BATCHES, None)


class _Batching:
    """transformers' own `init_continuous_batching` of a switched model, after giving it back its own attention.

    Continuous batching takes attentions by name, and knows the model's own ones alone. The model is held weakly, since
    this is an attribute of it: a model that nobody uses any more is to be freed at once.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        restore(model)
        return getattr(model, _BATCHES)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the model has its own
        return _Batching, (self._model(),)


@contextmanager
def attention(model: Any) -> Iterator[None]:
    """Within it a model is switched to the kvprune attention; after it the model is as it was before."""
    check_supported(model)
    before = text_config(model)._attn_implementation or "eager"
    switch_attention(model)
    try:
        yield
    finally:
        if not before.startswith(PREFIX):
            restore(model)


def _decoder(model: Any) -> Any:
    """The part of a model that has the text config: all of it, but for models of several kinds of input."""
    text = text_config(model)
    parts = (each for each in model.modules() if hasattr(each, "set_attn_implementation"))
    return next((each for each in parts if getattr(each, "config", None) is text), model)
