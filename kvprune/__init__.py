"""kvprune: KV-cache compression for long-context language models.

from kvprune import PrunedCache
from kvprune.policies import A2SF

cache = PrunedCache(model, A2SF(budget=0.25))
model.generate(**inputs, past_key_values=cache)
"""

from kvprune.asking import Answers, ask
from kvprune.attention.mass import RowWeights, Scoring, attention_mass
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.report import CacheReport
from kvprune.errors import (
    BudgetError,
    CacheError,
    EvaluationError,
    KVPruneError,
    PolicyError,
    QuestionWarning,
    UnsupportedModelError,
)
from kvprune.policy.base import Chain, Decision, Policy, Step
from kvprune.policy.budget import Budget
from kvprune.policy.eviction import Eviction
from kvprune.policy.selection import PromptFilter
from kvprune.table.quantize import Codec
from kvprune.table.token_table import TokenTable

__version__ = "0.1.0"

__all__ = [
    "Answers",
    "Budget",
    "BudgetError",
    "CacheError",
    "CacheReport",
    "Chain",
    "Codec",
    "Decision",
    "EvaluationError",
    "Eviction",
    "KVPruneError",
    "Policy",
    "PolicyError",
    "PromptFilter",
    "PrunedCache",
    "QuestionWarning",
    "RowWeights",
    "Scoring",
    "Step",
    "TokenTable",
    "UnsupportedModelError",
    "ask",
    "attention_mass",
]
