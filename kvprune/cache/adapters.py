"""Adapters of PEFT that change what a cache is given: virtual tokens before a prompt, or keys and values of their own.

Adapters of weights, such as LoRA, are the model's own business and pass through here unseen.
"""

from __future__ import annotations

from typing import Any

import torch

from kvprune.errors import UnsupportedModelError


def check_adapters(model: Any, cache_argument: str) -> None:
    """Raise UnsupportedModelError for an adapter at work under which a pruned cache would not be used, or wrongly.

    model: as it was given, wrapped by PEFT or not. cache_argument: under which name `generate()` takes a cache.
    """
    wrapper = _virtual_tokens_of(model)
    if wrapper is None:
        return
    kind = getattr(wrapper.active_peft_config.peft_type, "value", "an adapter")
    if not isinstance(_prompt(wrapper), torch.Tensor):
        raise UnsupportedModelError(
            f"the adapter at work, {kind} of PEFT, brings keys and values of its own, in a cache of its "
            "own: use DynamicCache with it, or an adapter of weights (LoRA) or of embeddings (prompt tuning)."
        )
    if _generates(model, wrapper) and not _finds(wrapper, cache_argument):
        raise UnsupportedModelError(
            f"this PEFT looks for the cache under a name that generate() has given up for {cache_argument}=, so it "
            f"puts the virtual tokens of {kind} into every step, which makes wrong tokens with any cache. Give them "
            "once, to the model below: base = model.get_base_model(); virtual = model.get_prompt(batch_size); "
            "base.generate(inputs_embeds=torch.cat([virtual, base.get_input_embeddings()(input_ids)], 1), "
            f"attention_mask=..., {cache_argument}=PrunedCache(base, policy))."
        )


def _virtual_tokens_of(model: Any) -> Any:
    """What wraps a model in virtual tokens now: what was given, or what is generating with it; None if nothing does."""
    for each in (model, _preparing(model)):
        config = getattr(each, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False) and not getattr(each, "_adapters_disabled", False):
            return each
    return None


def _preparing(model: Any) -> Any:
    # PEFT's generate() puts its own method in place of the model's while it runs (0.21).
    return getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)


def _generates(model: Any, wrapper: Any) -> bool:
    return _preparing(getattr(wrapper, "base_model", None)) is wrapper or (
        model is not wrapper and _preparing(model) is wrapper
    )


def _finds(wrapper: Any, cache_argument: str) -> bool:
    """Whether the wrapper's preparation of a step has the name of the cache among its words."""
    return cache_argument in wrapper.prepare_inputs_for_generation.__code__.co_consts


@torch.no_grad()
def _prompt(wrapper: Any) -> Any:
    """Virtual tokens of one sequence: embeddings, or what an adapter makes of them."""
    task = torch.zeros(1, dtype=torch.int64, device=wrapper.device)  # asked for by prompts of several tasks
    return wrapper.get_prompt(1, task_ids=task)
