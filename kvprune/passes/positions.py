"""How many positions a model can be given."""

from __future__ import annotations

from typing import Any

import torch

from kvprune.cache.models import text_config

_OFFSETS = 8  # rows that some tables of positions have beside those of positions, such as the 2 of OPT


def most_positions(model: Any) -> int | None:
    """Of a model that looks positions up in a table, GPT-2 or OPT, how many it has; None where any number will do."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    words = model.get_input_embeddings()
    tables = (
        each for each in model.get_decoder().modules() if isinstance(each, torch.nn.Embedding) and each is not words
    )
    return most if any(most <= table.num_embeddings <= most + _OFFSETS for table in tables) else None
