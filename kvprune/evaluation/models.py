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

_CONFIGS = ("config.json", "adapter_config.json")


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

    kind = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise KVPruneError(f'weights cannot be {dtype!r}: write "auto", "float32", "bfloat16" or "float16".')
    named = {EMBEDDED: lambda: MODEL_PATH, smollm2.NAME: smollm2.checkpoint}
    source = str(named[name]()) if name in named else _checked(name)
    if device_map is None and torch.cuda.is_available():
        device_map = f"cuda:{local_index}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map).eval()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        elsewhere = "" if Path(source).is_dir() else f"there is no folder {name} here, and of the hub: "
        raise KVPruneError(f"cannot load the model {name!r}: {elsewhere}{error}") from error
    return LanguageModel(Path(name).resolve().name if Path(name).is_dir() else name, model, tokenizer)


def _checked(name: str) -> str:
    """A folder, or a name on the hub. Raises KVPruneError for a path that can be neither, with what is wrong."""
    path = Path(name).expanduser()
    if path.is_dir() and not any((path / each).is_file() for each in _CONFIGS):
        raise KVPruneError(f"the folder {name} holds no model: there is no config.json in it.")
    if path.is_file():
        raise KVPruneError(f"{name} is a file: give the folder that a model was saved to.")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise KVPruneError(f"there is no folder {name}.")
    return str(path) if path.is_dir() else name
