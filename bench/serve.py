"""Many clients on one server: is any answer lost, mixed up or wrong, and does a killed server find its prefixes?

    python bench/serve.py --clients 32 --minutes 10 --out bench/results/serve.json

The embedded model answers questions about documents, under three policies. What `generate()` answers is computed first;
then clients ask at random, streaming or not, and some hang up. Halfway the server is killed with SIGKILL and started
again. Every answer has to be that of `generate()`, and the new server has to find prefixes that the old one wrote;
neither the prefixes nor the process may take more memory than is allowed. It ends with a verdict on each, and exits
with 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from kvprune import PrunedCache, demo
from kvprune.cache.models import cache_argument
from kvprune.demo.task import RecallGenerator, decode
from kvprune.policy.registry import parse
from kvprune.serving.command import amount
from measuring.servers import Serving

CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"
POLICIES = {"snapkv:budget=0.25": 0, "keydiff:budget=0.25": 1, "kivi:bits=4": 1}
"""And how many messages are a prefix: SnapKV wants the question in the prompt."""
TOKENS = 8


@dataclass(frozen=True)
class Case:
    """One thing to ask, and what `generate()` answers."""

    document: str
    question: str
    policy: str
    answer: str


def cases(documents: int, questions: int, length: int) -> list[Case]:
    model, tokenizer = demo.load()
    found = []
    for seed in range(documents):
        recall = RecallGenerator(seed + 1).document(length, 24)
        document = decode(recall.document[1:])
        for note in range(questions):
            question = decode(recall.question(note))
            for policy, prefix in POLICIES.items():
                answer = generated(model, tokenizer, document, question, policy, prefix)
                found.append(Case(document, question, policy, answer))
    return found


def generated(model: Any, tokenizer: Any, document: str, question: str, policy: str, prefix: int) -> str:
    cache = PrunedCache(model, parse(policy))
    ids = tokenizer(f"{document} {question} ", add_special_tokens=False, return_tensors="pt")["input_ids"]
    if prefix:
        read = tokenizer(f"{document} ", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model(read, **cache_argument(cache))
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=TOKENS, do_sample=False
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@dataclass(frozen=True)
class Run:
    """What happened. Bytes: the most that was seen; a second server began after the kill."""

    counts: Counter[str]
    wrong: int
    prefixes: float
    resident: int
    found: float
    running: float


def verdicts(run: Run, prefixes: int, resident: int) -> dict[str, bool]:
    """What has to hold. prefixes, resident: most bytes of prefixes in memory, and of the process."""
    return {
        "some answers, and every one of them that of generate()": run.counts["answers"] > 0 and not run.wrong,
        "no answer lost": not run.counts["lost"],
        f"prefixes in memory within {prefixes / 2**20:.0f} MiB": run.prefixes <= prefixes,
        f"the process within {resident / 2**20:.0f} MiB": run.resident <= resident,
        "saved prefixes served after kill -9": run.found > 0,
        "nothing runs in the end": not run.running,
    }


class OurServing(Serving):
    """What `kvprune serve` serves, and what it says of itself."""

    def __init__(self, folder: Path, parallel: int, memory: str) -> None:
        (folder / "chat.jinja").write_text(CHAT)
        command = [
            *(sys.executable, "-m", "kvprune", "serve", "--model", "demo"),
            *("--chat-template", str(folder / "chat.jinja"), "--cache-dir", str(folder / "caches")),
            *("--parallel", str(parallel), "--cache-memory", memory, "--queue", "1000"),
        ]
        super().__init__(command, folder / "log")

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("kvprune_"): float(value) for name, value in pairs}

    def resident(self) -> int:
        """Bytes of its memory (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


class Clients:
    """What clients ask, and what they got."""

    def __init__(self, url: str, asked: list[Case]) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self._cases = asked
        self.over = threading.Event()
        self.down = threading.Event()  # the server was killed and is not there yet
        self.counts: Counter[str] = Counter()
        self.first: defaultdict[str, list[float]] = defaultdict(list)
        self.whole: list[float] = []
        self.wrong: list[tuple[str, str, str]] = []

    def run(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.over.is_set():
            case = chance.choice(self._cases)
            how = chance.choices(("whole", "stream", "hang up"), (5, 4, 1))[0]
            began_down = self.down.is_set()
            try:
                self._ask(case, how)
            except openai.OpenAIError:
                if began_down or self.down.is_set():
                    self.counts["interrupted by the kill"] += 1
                    time.sleep(1)
                else:
                    self.counts["lost"] += 1

    def _ask(self, case: Case, how: str) -> None:
        prefix = POLICIES[case.policy]
        started = time.perf_counter()
        answer: Any = self._client.chat.completions.create(
            model="demo",
            messages=[{"role": "system", "content": case.document}, {"role": "user", "content": case.question}],
            max_tokens=TOKENS,
            stream=how != "whole",
            extra_body={"policy": case.policy, "prefix": prefix}
            | ({} if how == "whole" else {"stream_options": {"include_usage": True}}),
        )
        if how == "whole":
            text = answer.choices[0].message.content
        else:
            text, first = "", None
            for piece in answer:
                if piece.choices and piece.choices[0].delta.content:
                    first = first or time.perf_counter() - started
                    text += piece.choices[0].delta.content
                    if how == "hang up":
                        answer.close()
                        self.counts["hung up"] += 1
                        return
                if piece.usage and first:
                    known = piece.usage.prompt_tokens_details.cached_tokens > 0
                    kind = "read again" if prefix == 0 else "prefix known" if known else "prefix new"
                    self.first[kind].append(first)
        self.counts["answers"] += 1
        self.whole.append(time.perf_counter() - started)
        if text != case.answer:
            self.wrong.append((case.policy, case.answer, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a document")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--memory", default="4MiB", help="of prefixes in memory: fewer than there are, by default")
    parser.add_argument("--resident", default="1GiB", help="most of the whole process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    asked = cases(options.documents, options.questions, options.length)
    with tempfile.TemporaryDirectory() as folder:
        server = OurServing(Path(folder), options.parallel, options.memory)
        server.start()
        clients = Clients(server.url, asked)
        began = time.perf_counter()
        threads = [threading.Thread(target=clients.run, args=[seed]) for seed in range(options.clients)]
        for thread in threads:
            thread.start()
        halves, resident, held = [], [], []
        for half in range(2):
            until = time.perf_counter() + options.minutes * 30
            while time.perf_counter() < until:
                time.sleep(min(2.0, options.minutes * 5))
                resident.append(server.resident())
                held.append(server.metrics().get('kept_bytes{store="memory"}', 0))
            halves.append(server.metrics())
            if half == 0:
                clients.down.set()
                os.kill(server.process.pid, signal.SIGKILL)
                server.process.wait()
                server.start()
                clients.down.clear()
        clients.over.set()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        for _ in range(100):  # who hung up last is noticed within a moment
            if not (last := server.metrics()).get("running") and not last.get("waiting"):
                break
            time.sleep(0.1)
        server.stop()
    summary: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "clients": options.clients,
        "seconds": seconds,
        "counts": dict(clients.counts) | {"wrong": len(clients.wrong)},
        "answers a second": clients.counts["answers"] / seconds,
        "whole answer, seconds, median and longest": [statistics.median(clients.whole), max(clients.whole)],
        "prefills before the kill": {k: v for k, v in halves[0].items() if k.startswith("prefills")},
        "prefills after it": {k: v for k, v in halves[1].items() if k.startswith("prefills")},
        "first token, seconds, median": {kind: statistics.median(each) for kind, each in clients.first.items()},
        "resident MiB": {"first": resident[0] / 2**20, "most": max(resident) / 2**20, "last": resident[-1] / 2**20},
        "prefixes in memory, most MiB": max(held) / 2**20,
        "running in the end": {k: v for k, v in last.items() if k in ("running", 'kept_bytes{store="running"}')},
    }
    run = Run(
        clients.counts, len(clients.wrong), max(held), max(resident),
        halves[1].get('prefills_total{source="disk"}', 0), last.get("running", 0),
    )  # fmt: skip
    summary["verdicts"] = verdicts(run, amount(options.memory, "--memory"), amount(options.resident, "--resident"))
    print(json.dumps(summary, indent=1))
    if clients.wrong:
        print(f"wrong, for example: {clients.wrong[0]}")
    for what, holds in summary["verdicts"].items():
        print(f"{'ok    ' if holds else 'FAILED'} {what}")
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(not all(summary["verdicts"].values()))


if __name__ == "__main__":
    main()
