"""kvprune: KV-cache compression for long-context language models.

from kvprune import PrunedCache
from kvprune.policies import A2SF

cache = PrunedCache(model, A2SF(budget=0.25))
model.generate(**inputs, cache=cache)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvprune.asking import Answers, ask
    from kvprune.attention.mass import RowWeights, Scoring, attention_mass
    from kvprune.cache.models import restore
    from kvprune.cache.report import CacheReport
    from kvprune.chat.conversation import Chat, Turn
    from kvprune.errors import (
        BudgetError,
        CacheError,
        EvaluationError,
        HistoryWarning,
        KVPruneError,
        PolicyError,
        QuestionWarning,
        UnsupportedModelError,
    )
    from kvprune.passes.cascades import Cascade
    from kvprune.passes.filters import PromptFilter
    from kvprune.policy.base import Chain, Decision, Policy, Step
    from kvprune.policy.budget import Budget
    from kvprune.policy.eviction import Eviction
    from kvprune.policy.shares import Adaptive, Everywhere, Pyramid, Share, Uniform
    from kvprune.routing.router import Router
    from kvprune.saving import PrunedCache
    from kvprune.saving.heads import HeadScores
    from kvprune.saving.rotations import Rotations
    from kvprune.table.quantize import Codec
    from kvprune.table.token_table import TokenTable

__version__ = "0.1.0"

# Where each public name lives. It is imported when it is first asked for: torch and transformers take seconds, and
# `kvprune --help` needs neither.
_HOMES = {
    "kvprune.cache.models": ("restore",),
    "kvprune.asking": ("Answers", "ask"),
    "kvprune.attention.mass": ("RowWeights", "Scoring", "attention_mass"),
    "kvprune.chat.conversation": ("Chat", "Turn"),
    "kvprune.routing.router": ("Router",),
    "kvprune.saving": ("PrunedCache",),
    "kvprune.saving.heads": ("HeadScores",),
    "kvprune.saving.rotations": ("Rotations",),
    "kvprune.cache.report": ("CacheReport",),
    "kvprune.errors": (
        *("BudgetError", "CacheError", "EvaluationError", "HistoryWarning", "KVPruneError", "PolicyError"),
        *("QuestionWarning", "UnsupportedModelError"),
    ),
    "kvprune.policy.base": ("Chain", "Decision", "Policy", "Step"),
    "kvprune.policy.budget": ("Budget",),
    "kvprune.policy.eviction": ("Eviction",),
    "kvprune.policy.shares": ("Adaptive", "Everywhere", "Pyramid", "Share", "Uniform"),
    "kvprune.passes.cascades": ("Cascade",),
    "kvprune.passes.filters": ("PromptFilter",),
    "kvprune.table.quantize": ("Codec",),
    "kvprune.table.token_table": ("TokenTable",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_PACKAGES = ("attention", "policies", "integrations")

__all__ = [
    "Adaptive",
    "Answers",
    "Budget",
    "BudgetError",
    "CacheError",
    "CacheReport",
    "Cascade",
    "Chain",
    "Chat",
    "Codec",
    "Decision",
    "EvaluationError",
    "Everywhere",
    "Eviction",
    "HeadScores",
    "HistoryWarning",
    "KVPruneError",
    "Policy",
    "PolicyError",
    "PromptFilter",
    "PrunedCache",
    "Pyramid",
    "QuestionWarning",
    "Rotations",
    "Router",
    "RowWeights",
    "Scoring",
    "Share",
    "Step",
    "TokenTable",
    "Turn",
    "Uniform",
    "UnsupportedModelError",
    "ask",
    "attention_mass",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    elif name in _PACKAGES:
        value = import_module(f"kvprune.{name}")
    else:
        raise AttributeError(f"module 'kvprune' has no attribute {name!r}")
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
