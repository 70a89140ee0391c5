"""The main contenders on one CUDA GPU, at the size of Llama-3.1-8B with random weights.

    bench/gpu.sh                                        # the GPU tests, then this
    python bench/gpu.py --out bench/results/gpu.json
    python bench/gpu.py --device cpu --tiny             # whether it runs, anywhere

bfloat16, batch 1. For each context: seconds of the prefill, generated tokens per second, and the peak of the allocator
in both phases, weights included. Ratios are medians over rounds, to the stock cache in the same round. kvpress, given
as a folder of wheels with the transformers that it needs, runs after everyone else in a process of its own, beside a
stock cache of its own. Contenders that run out of memory are named and left out. Kernels are measured by
gpu_kernels.py, which this calls.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from measuring.workload import MODELS, Job, build_model
from printing.output import Log, save, save_markdown, table
from subjects.contenders import PEERS_STOCK, STOCK, WITHOUT_CUDNN
from subjects.rounds import Row, Runner, interleave, label, summarise
from subjects.worker import Here, Worker, incomparable, versions

Run = tuple[str, float | int | None]
# The first of each is what the others are compared with: a contender and its budget.
OURS: tuple[Run, ...] = (
    (STOCK, None), (WITHOUT_CUDNN, None), ("A2SF", 0.25), ("A2SF", 0.1), ("SnapKV", 0.25), ("ZipCache", None),
    ("A2SF | ZipCache", 0.25), ("GemFilter", 1024), ("H2O", 0.25), ("Keyformer", 0.25),
    ("SnapKV adaptive", 0.25), ("KIVI 2 bit", None), ("Spectral 2 bit", None), ("KVzip", 0.1), ("Bits", 0.1),
)  # fmt: skip
PRESSES: tuple[Run, ...] = ((PEERS_STOCK, None), ("kvpress SnapKV", 0.25))
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights, and of the keys and values of a token."""

    weights: int
    kv_token: int
    """Of the keys and values of one token in all layers."""

    @classmethod
    def of(cls, model: str, dtype: str) -> Sizes:
        config, itemsize = MODELS[model], getattr(torch, dtype).itemsize
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        return cls(
            weights=sum(parameter.nbytes for parameter in build_model(model, dtype, device="meta").parameters()),
            kv_token=2 * itemsize * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim,
        )

    def over_ideal(self, row: Row) -> float | None:
        """The peak of the decode over weights and the budget's share of keys and values."""
        if row.get("budget") is None or "decode_peak_bytes" not in row:
            return None
        tokens = row["budget"] if isinstance(row["budget"], int) else row["budget"] * row["tokens"]
        return (self.weights + row["decode_peak_bytes"]) / (self.weights + tokens * self.kv_token)


@dataclass(frozen=True)
class Target:
    """What is wanted of a figure beside what was measured, None if its run is missing."""

    what: str
    wanted: float
    measured: float | None
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted


def targets(rows: Sequence[Row], sizes: Sizes) -> list[Target]:
    """Those of the longest context."""
    longest = max((row["tokens"] for row in rows), default=0)
    found = {(row["contender"], row["budget"]): row for row in rows if row["tokens"] == longest}
    halved, quartered = found.get(("A2SF", 0.1), {}), found.get(("A2SF", 0.25), {})
    decode = halved.get("decode_ms_ratio")
    return [
        Target("decode peak of A2SF 25%, over weights + budget", 1.03, sizes.over_ideal(quartered)),
        Target("decode peak of A2SF 10%, over weights + budget", 1.03, sizes.over_ideal(halved)),
        Target("decode of A2SF 10%, times as fast as stock", 2.0, decode and 1 / decode, at_least=True),
        Target("decode of ZipCache, of stock's time", 1.0, found.get(("ZipCache", None), {}).get("decode_ms_ratio")),
        Target("prefill of A2SF 25%, of stock's time", 1.03, quartered.get("prefill_s_ratio")),
    ]


def shown(tokens: int, rows: Sequence[Row], sizes: Sizes) -> Table:
    made = table(
        f"{tokens:,} tokens",
        f"Ratios to the stock cache in the same rounds. Peaks include {sizes.weights / GIB:.1f} GiB of weights; over "
        "ideal: the peak of the decode over weights and the budget's share of keys and values.",
        "contender", "prefill s", "ratio", "tokens/s", "decode", "prefill GiB", "decode GiB", "over ideal", "KV GiB",
    )  # fmt: skip
    for row in rows:
        over = sizes.over_ideal(row)
        ratios = [f"{row[name]:.2f}x" if name in row else "" for name in ("prefill_s_ratio", "decode_ms_ratio")]
        peaks = [
            f"{(sizes.weights + row[name]) / GIB:.1f}" if name in row else ""
            for name in ("prefill_peak_bytes", "decode_peak_bytes")
        ]
        made.add_row(
            label(row["contender"], row["budget"]), f"{row['prefill_s']:.2f}", ratios[0],
            f"{1000 / row['decode_ms']:.1f}", ratios[1], *peaks, "" if over is None else f"{over:.3f}",
            f"{row['nbytes'] / GIB:.2f}",
        )  # fmt: skip
    return made


def shown_targets(found: Sequence[Target]) -> Table:
    made = table("targets, at the longest context", "", "what", "wanted", "measured", "met")
    for target in found:
        wanted = f"{'>=' if target.at_least else '<='} {target.wanted:.2f}x"
        measured = "not measured" if target.measured is None else f"{target.measured:.3f}x"
        met = "" if target.measured is None else "yes" if target.met else "no"
        made.add_row(target.what, wanted, measured, met)
    return made


@dataclass(frozen=True)
class Telling:
    """A runner that says what each run took, for who waits."""

    runner: Runner
    log: Log

    def ask(self, measure: str, job: Job) -> dict[str, Any]:
        found = self.runner.ask(measure, job)
        if "decode_ms" in found:
            took = f"prefill {found['prefill_s']:.2f} s, a step {found['decode_ms']:.1f} ms"
            self.log.console.print(f"{label(job.contender, job.budget)}: {took}", highlight=False)
        return found


@dataclass
class Report:
    """What has been measured so far."""

    out: Path
    sizes: Sizes
    device: str
    log: Log = field(default_factory=Log)
    rows: list[Row] = field(default_factory=list)
    beside_kvpress: dict[str, str] | None = None

    def compare(self, runner: Runner, jobs: Sequence[Job], rounds: int) -> None:
        """Measure jobs of one context; the first is what the others are compared with."""
        tokens, reference = jobs[0].tokens, jobs[0].contender
        self.log.heading(f"{tokens:,} tokens")
        telling = Telling(runner, self.log)
        measured = interleave(jobs, lambda _: telling, rounds=rounds, minutes=60, say=self.log.note)
        self.rows += summarise(measured, reference)
        self.log.console.print(self.table(tokens))
        self.save()

    def table(self, tokens: int) -> Table:
        return shown(tokens, [row for row in self.rows if row["tokens"] == tokens], self.sizes)

    def targets(self) -> list[Target]:
        return targets(self.rows, self.sizes)

    def save(self) -> None:
        """Called after every context: what is there stays when the rest is cut short."""
        save(
            self.out, device=self.device, versions=versions(), beside_kvpress=self.beside_kvpress,
            weights_bytes=self.sizes.weights, notes=self.log.notes, rows=self.rows,
            targets=[asdict(target) | {"met": target.met} for target in self.targets()],
        )  # fmt: skip
        contexts = dict.fromkeys(row["tokens"] for row in self.rows)
        save_markdown(self.out, [*map(self.table, contexts), shown_targets(self.targets())], self.log.notes)


def unpack(wheels: Path, folder: str) -> None:
    """Install wheels into a folder that PYTHONPATH can name: it comes before the packages that are there."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
    subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(name for name, _ in OURS[1:] + PRESSES[1:]))
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--contenders", nargs="+", default=names, choices=names, metavar="NAME", help="beside stock")
    parser.add_argument("--wheels", type=Path, help="a folder with the wheels of peers/wheels.txt")
    parser.add_argument("--no-kernels", action="store_true", help="do not run gpu_kernels.py")
    parser.add_argument("--out", type=Path, help="JSON; default: gpu.json in $OUT, or in bench/results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny shows whether this runs")
    model, dtype = "tiny" if arguments.tiny else "llama-3.1-8b", "bfloat16"
    report = Report(
        arguments.out or Path(os.environ.get("OUT", Path(__file__).parent / "results")) / "gpu.json",
        Sizes.of(model, dtype),
        torch.cuda.get_device_name() if cuda else "cpu",
    )
    if cuda and not arguments.no_kernels:
        kernels = Path(__file__).with_name("gpu_kernels.py")
        subprocess.run([sys.executable, kernels, "--out", report.out.with_name("gpu_kernels.json")], check=False)

    def job(run: Run, tokens: int = 1) -> Job:
        return Job(run[0], tokens, run[1], 1, dtype, arguments.new_tokens, model, arguments.device)

    def compare(runner: Runner, runs: Sequence[Run]) -> None:
        chosen = [run for run in runs if run == runs[0] or run[0] in arguments.contenders]
        for tokens in arguments.contexts:
            report.compare(runner, [job(run, tokens) for run in chosen], arguments.rounds)

    here = Here()
    compare(here, OURS)
    ours = here.ask("versions", job(OURS[0]))
    here.close()  # its model must be gone before another process brings its own
    if arguments.wheels is None:
        report.log.note("skipped: kvpress: no --wheels")
    else:
        with tempfile.TemporaryDirectory() as folder:
            unpack(arguments.wheels, folder)
            with Worker(environment={"PYTHONPATH": folder}) as worker:
                theirs = worker.ask("versions", job(PRESSES[0]))
                if reason := incomparable(ours, theirs):
                    report.log.note(f"skipped: kvpress: {reason}")
                else:
                    report.beside_kvpress = theirs["versions"]
                    compare(worker, PRESSES)
    report.log.console.print(shown_targets(report.targets()))
    report.save()


if __name__ == "__main__":
    main()
