"""The embedded model: a small Llama, trained by this project to retrieve notes from long documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL_PATH = Path(__file__).parent / "model"


def load() -> tuple[Any, Any]:
    """The embedded model and its tokenizer, as `from_pretrained(MODEL_PATH)` loads them; nothing is downloaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    showed_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it takes milliseconds
    try:
        return AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval(), AutoTokenizer.from_pretrained(MODEL_PATH)
    finally:
        if showed_progress:
            logging.enable_progress_bar()
