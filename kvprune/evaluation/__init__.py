"""Does the model still answer? Examples are answered from caches under policies and budgets, and scored."""
