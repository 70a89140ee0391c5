"""What policies may ask of the layers of a transformers model: their rotary positions, and their output projections."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.outputs import Outputs
from kvprune.attention.rotary import NO_ROTARY, Rotary
from kvprune.cache.models import text_config
from kvprune.errors import UnsupportedModelError

# Their full-attention layers turn nothing where others have a sliding window, and no attribute says so.
_TURN_ONLY_WINDOWS = ("cohere2", "exaone4")


def rotary_of(model: Any, layer: int) -> Rotary:
    """How a layer turns its queries and keys, by the model's own embedding and function.

    A copy of the embedding is asked: one with dynamic frequencies changes with the positions that it is asked for, and
    the model's own must not. Raises UnsupportedModelError where the model turns them by a function of its own kind.
    """
    config = text_config(model)
    decoder = _decoder(model)
    embedding = next((each for name, each in decoder.named_modules() if name.endswith("rotary_emb")), None)
    attention = attention_of(model, layer)
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    asked = [] if function is None else list(inspect.signature(function).parameters)
    if (embedding is None and function is None) or not _turns(attention, config):
        return NO_ROTARY
    # GPT-J asks for sines first, and for heads behind tokens; Llama 4 has complex numbers.
    if embedding is None or function is None or ["cos", "sin"] not in (asked[1:3], asked[2:4]):
        raise UnsupportedModelError(
            f"{type(model).__name__} turns queries by their positions in a way of its own, and this policy has to turn "
            "them back: choose a policy that needs no rotary positions, such as KeyDiff or SnapKV."
        )
    settings = {}
    if "layer_type" in inspect.signature(embedding.forward).parameters:
        settings["layer_type"] = config.layer_types[layer]
    copied = copy.deepcopy(embedding)
    single = asked[1] == "cos"

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        device = next(iter(copied.buffers()), positions).device
        cosines, sines = copied(torch.zeros(1, dtype=torch.float32, device=device), positions.to(device), **settings)
        return cosines, sines

    def apply(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        def turned(some: Tensor) -> Tensor:
            result: Tensor = function(some, cosines, sines) if single else function(some, some, cosines, sines)[0]
            return result

        width = cosines.shape[-1]
        if slices and width < states.shape[-1]:
            return torch.cat([turned(states[..., :width]), states[..., width:]], dim=-1)
        return turned(states)

    slices = _slices(angles, apply_to=function, single=single, attention=attention)
    return Rotary(angles, apply)


def outputs_of(model: Any, layer: int) -> Outputs:
    """What the values of a layer become in its output. Raises UnsupportedModelError where that cannot be told."""
    attention = attention_of(model, layer)
    if attention is None:
        raise UnsupportedModelError(
            f"the attention module of layer {layer} of {type(model).__name__} cannot be told, by whose output "
            "projection values could be weighed: choose a policy that weighs attention alone."
        )
    return Outputs(attention)


def attention_of(model: Any, layer: int) -> Any:
    """The attention module of a layer of the text decoder; None where it cannot be told."""
    decoder = _decoder(model)
    numbered = [each for each in decoder.modules() if getattr(each, "layer_idx", None) == layer]
    # A decoder layer may know its number too.
    inner = [each for each in numbered if not any(other in numbered for other in each.modules() if other is not each)]
    return inner[0] if inner else None


def _decoder(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _turns(attention: Any, config: Any) -> bool:
    if not getattr(attention, "use_rope", True):
        return False
    return config.model_type not in _TURN_ONLY_WINDOWS or getattr(config, "sliding_window", None) is None


def _slices(angles: Any, *, apply_to: Any, single: bool, attention: Any) -> bool:
    """Whether the attention itself gives its function the first channels alone, of models that turn only some."""
    dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", 0)
    cosines, sines = angles(torch.zeros(1, 1, dtype=torch.int64))
    if not dim or cosines.shape[-1] >= dim:
        return False
    states = torch.zeros(1, 1, 1, dim, dtype=torch.float32, device=cosines.device)
    try:
        found = apply_to(states, cosines, sines) if single else apply_to(states, states, cosines, sines)[0]
    except RuntimeError:  # shapes that do not fit
        return True
    return bool(found.shape != states.shape)
