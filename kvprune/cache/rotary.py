"""How a model turns its keys by their position, found by trying: two passes of one token at two positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvprune.attention.rotation import Rotation
from kvprune.cache.models import cache_argument, text_config
from kvprune.errors import UnsupportedModelError

_PLACE = 5  # far enough to tell frequencies apart, and near enough for half precision
_TOKENS = 4  # some of which are padding, whose keys are zero
_MOVING = {"dynamic", "longrope"}
_ADVICE = 'write positions="original", which keeps keys where they were in the text'


def moving(model: Any) -> set[str]:
    """Rope types of a model whose frequencies depend on the longest text of a batch."""
    return set(_kinds(getattr(text_config(model), "rope_parameters", None))) & _MOVING


def rotations(model: Any, layers: tuple[int, ...]) -> dict[int, Rotation | None]:
    """For each of these layers, how it turns its keys; None for a layer that does not.

    A text of a single token attends to itself, whatever its position: two passes differ in how keys are turned, and in
    nothing else.

    Raises UnsupportedModelError for models with another kind of positions than rotary ones, and for those whose
    frequencies depend on the length of the text.
    """
    name = type(model).__name__
    kinds = set(_kinds(getattr(text_config(model), "rope_parameters", None)))
    for kind in sorted(moving(model)):
        raise UnsupportedModelError(
            f'the frequencies of {name} depend on the length of the text (rope type "{kind}"), so that its keys cannot '
            f"be turned on to their places in the cache: {_ADVICE}."
        )
    if "mrope" in kinds:
        raise UnsupportedModelError(f"{name} has positions of several dimensions, not one of the cache: {_ADVICE}.")
    first, second = (_keys(model, place) for place in (0, _PLACE))
    candidates, found = (None, *_candidates(model)), dict[int, Rotation | None]()
    for layer in layers:
        fitting = [each for each in candidates if _fits(each, first[layer], second[layer])]
        if not fitting:
            raise UnsupportedModelError(
                f"the keys of layer {layer} of {name} are not turned by their position in a way that is known (rotary "
                f"embedding of the first channels, in halves or in pairs), or the model is training: {_ADVICE}."
            )
        rotation = fitting[0]
        device = first[layer].device  # of a model on several, not where its frequencies are
        found[layer] = None if rotation is None else rotation.on(device)
    if found and all(rotation is None for rotation in found.values()):
        raise UnsupportedModelError(f"no key of {name} depends on the position ids that it is given: {_ADVICE}.")
    return found


def _kinds(parameters: Any) -> Iterator[str]:
    """Rope types of a config, of all kinds of layers."""
    if not isinstance(parameters, dict):
        return
    if parameters.get("mrope_section"):
        yield "mrope"
    if isinstance(parameters.get("rope_type"), str):
        yield parameters["rope_type"]
    for part in parameters.values():
        yield from _kinds(part)


def _candidates(model: Any) -> Iterator[Rotation]:
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("inv_freq") and "original" not in buffer_name and buffer.ndim == 1:
            frequencies = buffer.detach().float()  # the model's own, as a rule
            yield Rotation(frequencies)
            yield Rotation(frequencies, interleaved=True)


def _fits(rotation: Rotation | None, first: Tensor, second: Tensor) -> bool:
    if rotation is None:
        expected = first
    elif 2 * len(rotation.frequencies) > first.shape[-1]:
        return False
    else:
        states = first.float()
        expected = rotation.turned(states, torch.full_like(states[..., 0], _PLACE))
    exact = first.dtype in (torch.float32, torch.float64)
    return bool(
        (expected.float() - second.float()).abs().max() <= (1e-4 if exact else 3e-2) * first.float().abs().max()
    )


@torch.no_grad()
def _keys(model: Any, place: int) -> dict[int, Tensor]:
    """Keys `[B, Hkv, 1, D]` that every layer makes of a few single tokens at this position."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(_TOKENS, device=model.device)[:, None]
    try:
        model(ids, position_ids=torch.full_like(ids, place), **cache_argument(cache), use_cache=True)
    except TypeError as error:
        raise UnsupportedModelError(f"{type(model).__name__} takes no position ids ({error}): {_ADVICE}.") from None
    return {index: layer.keys for index, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None}
