"""kvprune: KV-cache compression for long-context language models.

from kvprune import PrunedCache
from kvprune.policies import A2SF

cache = PrunedCache(model, A2SF(budget=0.25))
model.generate(**inputs, past_key_values=cache)
"""

from kvprune.asking import Answers, ask
from kvprune.budget import Budget
from kvprune.cache import PrunedCache
from kvprune.errors import (
    BudgetError,
    CacheError,
    EvaluationError,
    KVPruneError,
    PolicyError,
    QuestionWarning,
    UnsupportedModelError,
)
from kvprune.eviction import Eviction
from kvprune.mass import RowWeights, Scoring, attention_mass
from kvprune.policy import Chain, Decision, Policy, Step
from kvprune.quantize import Codec
from kvprune.report import CacheReport
from kvprune.selection import PromptFilter
from kvprune.table import TokenTable

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
