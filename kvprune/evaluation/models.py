"""Models and tokenizers as the command line names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvprune.errors import KVPruneError
from kvprune.evaluation import smollm2

EMBEDDED = "demo"
"""The name of the model that is part of the package."""


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and a name: that on the hub, or that of the folder."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def window(self) -> int | None:
        """Most tokens that the model was made for; None where its config does not say."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def load(name: str, *, dtype: str = "auto", device_map: Any = None, local_index: int = 0) -> LanguageModel:
    """A model folder, a name on the hub, "demo" or "smollm2". Raises KVPruneError where it cannot be loaded.

    device_map: as transformers takes it; None for the GPU of this process, or the CPU where there is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvprune.demo import MODEL_PATH

    named = {EMBEDDED: lambda: MODEL_PATH, smollm2.NAME: smollm2.checkpoint}
    source = str(named[name]()) if name in named else name
    if device_map is None and torch.cuda.is_available():
        device_map = f"cuda:{local_index}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map).eval()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise KVPruneError(f"cannot load the model {name!r}: {error}") from error
    return LanguageModel(Path(name).resolve().name if Path(name).is_dir() else name, model, tokenizer)
