"""`PromptFilter`: the policies that shorten a prompt before the layers run.

The first layers look at all of the prompt, and the model then runs on the chosen tokens alone, as if they were the
whole prompt. `prompt_filter.py` does that, with a pass of `filter_pass.py`; here is the policy's side of it.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any

from kvprune.cache.models import text_config
from kvprune.passes.choosing import Chooser
from kvprune.passes.prompt_filter import install
from kvprune.policy.base import Policy


@dataclass(frozen=True)
class PromptFilter(Policy, Chooser, ABC):
    """Base of the policies that choose tokens of a prompt before the model runs on them: see `Chooser`."""

    @property
    def filters_prompt(self) -> bool:
        return True

    @property
    def needs_question(self) -> bool:
        return True  # its newest token's query chooses

    def attach(self, cache: Any, model: Any) -> None:
        """Let the model's decoder shorten prompts for this cache, unless there is nothing to prune."""
        if cache.pruned_layers:
            cache.filter_layer = self.filter_layer(text_config(model), cache.pruned_layers)
            install(model)
            cache.prompt_filter = self
