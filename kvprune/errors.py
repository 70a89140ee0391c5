"""Every mistake a person can make raises one of these; the message says what was wrong and what to write instead."""

from __future__ import annotations


class KVPruneError(ValueError):
    """Base of all errors that kvprune raises on purpose."""


class BudgetError(KVPruneError):
    """A budget that has no meaning, or that cannot hold the tokens a policy always keeps."""


class PolicyError(KVPruneError):
    """A policy, a policy's setting or a chain of policies that cannot work."""


class UnsupportedModelError(KVPruneError):
    """A model whose attention cannot be reached, or that does not compute what a pruned cache can reproduce."""


class CacheError(KVPruneError):
    """A cache used in a way it cannot serve: another model or batch size, rows that are gone, a damaged file."""


class EvaluationError(KVPruneError):
    """Data, settings or results that an evaluation cannot work with."""


class QuestionWarning(UserWarning):
    """A policy that keeps what a question looks at was given a document without one."""


class HistoryWarning(UserWarning):
    """A conversation is not what its cache has read any more, so that all of it is read again."""
