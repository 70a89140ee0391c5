"""The command line: `kvprune serve`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from kvprune.errors import KVPruneError, PolicyError

KEY = "KVPRUNE_API_KEY"
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def amount(text: str, option: str) -> int:
    """Bytes, as a person writes them: "512MiB". Raises KVPruneError."""
    found = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise KVPruneError(f'{option} is {text!r}: write bytes such as "512MiB" or "2GiB".')
    return int(found[1]) * _UNITS[found[2]]


def serve(
    model: Annotated[
        str, typer.Option(help='A model folder or hub name; "demo" is the embedded model, "smollm2" a real one.')
    ],
    policy: Annotated[str, typer.Option(help="Of requests that name none.")] = "a2sf:kernel_size=21",
    budget: Annotated[
        str | None, typer.Option(help="Of policies that have one, where the request names none. Default: 0.25.")
    ] = None,
    prefix: Annotated[
        int, typer.Option(min=0, help="How many first messages of a chat are compressed by themselves, and kept.")
    ] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in requests. Default: as it was loaded.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Batches of requests that are answered at once.")] = 2,
    batch: Annotated[
        int, typer.Option(min=1, help="Most requests of a batch: those of one policy that wait at the same time.")
    ] = 8,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of prompts that a batch reads at once. A longer one is read alone.")
    ] = 2**15,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with 429.")] = 64,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt. Default: the model's window.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    cache_memory: Annotated[str, typer.Option(help="Most bytes of compressed prefixes in memory.")] = "1GiB",
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder for compressed prefixes, which a restarted server finds again.")
    ] = None,
    cache_disk: Annotated[str, typer.Option(help="Most bytes of files in that folder.")] = "10GiB",
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY, help="What requests have to send as Authorization: Bearer KEY.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja template, for a model that has none.")
    ] = None,
    dtype: Annotated[str, typer.Option(help='Weights: "auto", "float32", "bfloat16", "float16".')] = "auto",
    device_map: Annotated[str | None, typer.Option(help='Where to load the model, e.g. "auto" or "cuda".')] = None,
) -> None:
    """Serve a model over compressed caches: the API of OpenAI, and a page that chats at the address itself."""
    try:
        import uvicorn

        from kvprune.serving.app import Options, Server, application
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "starlette", "pydantic"):
            raise
        raise KVPruneError(f"a server needs {error.name}, which is not there: pip install 'kvprune[serve]'.") from None
    import logging

    from kvprune.evaluation.models import load
    from kvprune.policy.registry import parse, takes_budget

    level = os.environ.get("KVPRUNE_LOG", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise KVPruneError(f"KVPRUNE_LOG is {level!r}: write DEBUG, INFO, WARNING or ERROR.")
    if api_key is None:  # typer takes a variable that is there and empty for none
        api_key = os.environ.get(KEY)
    options = Options(
        policy, budget or "0.25", prefix, parallel, queue, max_prompt_tokens, max_new_tokens,
        amount(cache_memory, "--cache-memory"), cache_dir, amount(cache_disk, "--cache-disk"), api_key,
        batch=batch, batch_tokens=batch_tokens,
    )  # fmt: skip
    chosen = parse(policy, budget=options.budget)  # before the model loads: a mistake should not cost minutes
    if budget is not None and not takes_budget(policy):
        raise PolicyError(f"{chosen} takes no other budget: leave --budget out, or put a policy before it that evicts.")
    if cache_dir is not None and cache_dir.exists() and not cache_dir.is_dir():
        raise KVPruneError(f"--cache-dir is {cache_dir}, which is no folder: give one, or the name of one to be made.")
    template = _read(chat_template) if chat_template else None
    logging.basicConfig(level=level, format="%(levelname)s:     %(message)s")
    loaded = load(model, dtype=dtype, device_map=device_map)
    if template is not None:
        loaded.tokenizer.chat_template = template
    server = Server(name or loaded.name, loaded.model, loaded.tokenizer, options)
    uvicorn.run(application(server), host=host, port=port, timeout_graceful_shutdown=5)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KVPruneError(f"cannot read the chat template {path}: {error}") from error
