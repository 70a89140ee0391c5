"""Throughput and time to the first token of a server: batches, prefixes that are known, and transformers' own server.

    OMP_NUM_THREADS=1 python bench/clients.py --out bench/results/clients.json

The embedded model answers questions about a few documents, as many tokens for everyone. Every client asks one question
after the other, streaming, until all of them are answered.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from kvprune.demo import MODEL_PATH
from kvprune.demo.task import RecallGenerator, decode
from measuring.servers import Serving
from printing.output import Log, save, save_markdown, table

CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"


@dataclass(frozen=True)
class Setup:
    """Who serves, and what is asked of them."""

    name: str
    command: tuple[str, ...]
    body: dict[str, Any]


def setups(policy: str) -> list[Setup]:
    """Each of them serves two requests, or batches of them, at a time, where that can be said."""
    kvprune = (sys.executable, "-m", "kvprune", "serve", "--parallel", "2", "--queue", "1000", "--batch")
    transformers = (sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu")
    asked = {"policy": policy}
    return [
        Setup("full cache, one by one", (*kvprune, "1"), {"policy": "full"}),
        Setup(f"{policy}, one by one", (*kvprune, "1"), asked),
        Setup(f"{policy}, one by one, prefix known", (*kvprune, "1"), asked | {"prefix": 1}),
        Setup("full cache, batches of 8", (*kvprune, "8"), {"policy": "full"}),
        Setup(f"{policy}, batches of 8", (*kvprune, "8"), asked),
        Setup(f"{policy}, batches of 8, prefix known", (*kvprune, "8"), asked | {"prefix": 1}),
        Setup("transformers serve", transformers, {}),
        Setup("transformers serve --continuous-batching", (*transformers, "--continuous-batching"), {}),
    ]


def endless(folder: Path) -> Path:
    """The embedded model with a chat template, and no token that would end its answers."""
    for path in MODEL_PATH.iterdir():
        content = path.read_bytes()
        if path.name in ("config.json", "generation_config.json"):
            content = json.dumps(json.loads(content) | {"eos_token_id": None}).encode()
        if path.name == "tokenizer_config.json":
            content = json.dumps(json.loads(content) | {"chat_template": CHAT}).encode()
        (folder / path.name).write_bytes(content)
    return folder


def questions(documents: int, length: int, number: int) -> list[list[dict[str, str]]]:
    made = [RecallGenerator(seed + 1).document(length, 24) for seed in range(documents)]
    pairs = [
        (decode(each.document[1:]), decode(each.question(note))) for note, each in itertools.product(range(24), made)
    ]
    return [
        [{"role": "system", "content": document}, {"role": "user", "content": question}]
        for document, question in itertools.islice(itertools.cycle(pairs), number)
    ]


def measured(server: Serving, model: str, setup: Setup, asked: list[Any], clients: int, tokens: int) -> dict[str, Any]:
    """Tokens a second, and for a second of CPU time, of all clients together, and the time to a first token."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)
    line, firsts, written = iter(asked), list[float](), list[int]()
    taking = threading.Lock()

    def run() -> None:
        while True:
            with taking:
                messages = next(line, None)
            if messages is None:
                return
            started, first = time.perf_counter(), None
            stream: Any = client.chat.completions.create(
                model=model, messages=messages, max_tokens=tokens, temperature=0, stream=True,
                stream_options={"include_usage": True}, extra_body=setup.body,
            )  # fmt: skip
            for piece in stream:
                if first is None and piece.choices and piece.choices[0].delta.content:
                    first = time.perf_counter() - started
                if piece.usage:
                    written.append(piece.usage.completion_tokens)
            if first is not None:
                firsts.append(first)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    started, cpu_before = time.perf_counter(), server.cpu_seconds()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, cpu = time.perf_counter() - started, server.cpu_seconds() - cpu_before
    if len(written) != len(asked) or len(firsts) != len(asked):
        raise SystemExit(f"{setup.name}: {len(asked) - len(written)} of {len(asked)} requests got no answer")
    return {
        "setup": setup.name, "clients": clients, "requests": len(asked), "tokens": sum(written), "seconds": seconds,
        "tokens_per_second": sum(written) / seconds, "tokens_per_cpu_second": sum(written) / cpu,
        "first_token": statistics.median(firsts), "latest": max(firsts),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="in all, or one for each client if those are more")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a document")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--policy", default="kivi:bits=4", help="that needs no question when it decides")
    parser.add_argument("--only", help="setups whose name has this in it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    log, results = Log(), list[dict[str, Any]]()
    asked = questions(options.documents, options.length, max(options.requests, *options.clients))
    chosen = [setup for setup in setups(options.policy) if (options.only or "") in setup.name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "model").mkdir()
        model = str(endless(folder / "model"))
        for command, some in itertools.groupby(chosen, lambda setup: setup.command):
            where = ("--model", model, "--name", model) if "kvprune" in command else (model,)
            server = Serving([*command, *where], folder / "log")
            server.start()
            try:
                for setup in some:
                    measured(server, model, setup, asked[: options.documents], 1, 2)  # loaded, and prefixes read
                    for clients in options.clients:
                        number = max(options.requests, clients)
                        results.append(measured(server, model, setup, asked[:number], clients, options.tokens))
                        log.console.print(results[-1])
            except (SystemExit, openai.OpenAIError) as error:
                log.note(f"{setup.name}: {type(error).__name__}: {error}")
            finally:
                server.stop()
    sizes = f"documents of {options.length} tokens, answers of {options.tokens}"
    shown = table(
        f"{sizes}; {options.requests} requests, or one a client",
        "tokens a second of all clients, and a second of CPU time of the server; median seconds to a first token",
        "server", "clients", "tokens/s", "tokens per CPU second", "first token",
    )  # fmt: skip
    for each in results:
        shown.add_row(
            each["setup"], str(each["clients"]), f"{each['tokens_per_second']:.0f}",
            f"{each['tokens_per_cpu_second']:.0f}", f"{each['first_token']:.2f}",
        )  # fmt: skip
    log.console.print(shown)
    save(options.out, results=results, notes=log.notes)
    save_markdown(options.out, [shown], log.notes)


if __name__ == "__main__":
    main()
