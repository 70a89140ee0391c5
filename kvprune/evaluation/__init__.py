"""Evaluation: examples are answered from caches under policies and budgets, and scored."""
