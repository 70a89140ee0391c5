"""What a policy is, and what most of them share.

    base        `Policy`, its `Chain`s, the `Step` that it is told of and the `Decision` that it returns
    eviction    `Eviction`: rank rows by a score and keep the best within a budget; budget: what budgets mean
    ranking     what rows are ranked by, and what stays whatever its rank; pooling: scores over neighbouring positions
    allotment   how many bits each row gets of a number of bytes; byte_limits: how many there are, by who shares them
    scored      base of policies that do other things than evict by the scores of one that ranks rows
    representatives   links of a chain that choose a part of what the one before them keeps
    heads       whose heads a policy sees, where several processes share a layer
    registry    policies by name and by text; plugins: what other packages bring

A policy of your own imports all it needs from `kvprune`: see CONTRIBUTING.md. Shapes: see `kvprune.table`.
"""

from kvprune.policy.base import Chain, Decision, Policy, Step
from kvprune.policy.budget import Budget
from kvprune.policy.eviction import Eviction

__all__ = ["Budget", "Chain", "Decision", "Eviction", "Policy", "Step"]
