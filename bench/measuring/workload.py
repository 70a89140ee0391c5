"""One measurement: a model of random weights, a prompt, its prefill and a greedy decode, and what they took.

Needs nothing but torch and transformers, so it also runs in environments that have no kvprune.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from measuring.turns import seconds_of

MODELS: dict[str, dict[str, int]] = {
    "core": {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "deep": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
# Tokens; more than the observation window of any contender, and on a GPU enough for the kernels of long prompts.
WARM_UP = {"cpu": 256, "cuda": 4096}
HANDOVER_S = 0.02  # threads of an OpenMP runtime spin for some milliseconds after their last work


def cache_argument(held: Cache) -> dict[str, Cache]:
    """The cache as an argument of a model: `kvprune.cache.models.cache_argument`, where there is no kvprune."""
    renamed = "cache" in inspect.signature(create_causal_mask).parameters  # transformers 5.24
    return {"cache" if renamed else "past_key_values": held}


@dataclass(frozen=True)
class Job:
    """What to measure.

    budget: a fraction of the prompt, or tokens if an int; None for contenders that have none. device: "cpu" or "cuda".
    """

    contender: str
    tokens: int
    budget: float | int | None = None
    batch: int = 1
    dtype: str = "float32"
    new_tokens: int = 128
    model: str = "core"
    device: str = "cpu"


@dataclass
class Session:
    """A cache, and what has to be active around the model's calls."""

    cache: Cache
    prefilling: AbstractContextManager[Any] = field(default_factory=nullcontext)
    decoding: AbstractContextManager[Any] = field(default_factory=nullcontext)
    logical_positions: bool = False
    """Whether the cache forgets how many tokens it has seen, so that the model must be told the positions."""


@dataclass(frozen=True)
class Contender:
    """A way to hold a KV cache. `family` says whose it is, and with that in which environment it runs."""

    name: str
    family: str
    open: Callable[[LlamaForCausalLM, Job], Session]
    attention: str = "sdpa"
    has_budget: bool = False
    package: str | None = None
    """A module that must be importable and that its family does not imply."""


def build_model(
    name: str = "core", dtype: str = "float32", attention: str = "sdpa", device: str = "cpu"
) -> LlamaForCausalLM:
    """A Llama with random weights, the same for everyone who asks with the same arguments."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **MODELS[name], max_position_embeddings=1 << 18, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    with torch.device(device):  # weights are made where they stay: 8B of them take minutes on a CPU
        model: LlamaForCausalLM = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    return model.eval()


@cache
def _model(owner: str, name: str, dtype: str, attention: str, device: str) -> LlamaForCausalLM:
    """owner: the contender that has this model for itself, because a cache may leave traces on it."""
    return build_model(name, dtype, attention, device)


def model_for(contender: Contender, job: Job) -> LlamaForCausalLM:
    """The model of a job; on a GPU all contenders share one, since memory holds no more."""
    owner = contender.name if job.device == "cpu" else ""
    return _model(owner, job.model, job.dtype, contender.attention, job.device)


def forget_models() -> None:
    _model.cache_clear()


def fingerprint(model: torch.nn.Module, sample: int = 4096) -> str:
    """A hash of the first numbers of every parameter: whether two environments have built the same model."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().flatten()[:sample].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def prompt_of(job: Job, model: LlamaForCausalLM) -> torch.Tensor:
    """`[batch, tokens]`, drawn from the seed `tokens`."""
    random = torch.Generator().manual_seed(job.tokens)
    return torch.randint(0, model.config.vocab_size, (job.batch, job.tokens), generator=random).to(job.device)


# -- time --------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds between marks. On a GPU marks are events in its stream, so that setting one does not synchronize."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: list[Any] = []
        if self._cuda:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """One figure for each mark that was set."""
        if not self._cuda:
            return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in zip(self._marks, self._marks[1:], strict=False)]


# -- memory ------------------------------------------------------------------------------------------------------------


class AllocatorPeak:
    """Growth of the peak of a GPU's allocator over what it held when this object was made."""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def take(self) -> int:
        """Bytes at the peak since the last take."""
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - self._before
        torch.cuda.reset_peak_memory_stats()
        return peak


class ResidentPeak:
    """The same of this process' resident memory (Linux); means something in a process that has done little else."""

    def __init__(self) -> None:
        self._before = self._restart()

    def take(self) -> int:
        peak = resident("VmHWM") - self._before
        self._restart()
        return peak

    @staticmethod
    def _restart() -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free must not count as held
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        return resident("VmHWM")


def resident(what: str) -> int:
    """Bytes of resident memory, now ("VmRSS") or at its peak ("VmHWM"). Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def held_bytes(cache: Cache) -> int:
    """Bytes of every storage that a cache holds, quantized ones included."""
    storages = (tensor.untyped_storage() for tensor in held_tensors(cache))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_tensors(holder: Any) -> Iterator[torch.Tensor]:
    """Every plain tensor that can be reached from an object, those inside of quantized ones included."""
    yield from _tensors(holder, set())


def _tensors(holder: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(holder, (str, int, float, torch.nn.Module)) or holder is None or id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, torch.Tensor):
        # Quantized tensors of some packages are shells around plain ones.
        inner = holder.__tensor_flatten__()[0] if hasattr(holder, "__tensor_flatten__") else ()
        if not inner:
            yield holder
        parts: list[Any] = [getattr(holder, name) for name in inner]
    elif isinstance(holder, (list, tuple, set)):
        parts = list(holder)
    else:
        parts = list(holder.values() if isinstance(holder, dict) else getattr(holder, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, seen)


# -- both --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def run(
    session: Session,
    model: LlamaForCausalLM,
    prompt: torch.Tensor,
    new_tokens: int,
    peak: AllocatorPeak | ResidentPeak | None = None,
) -> dict[str, Any]:
    """Prefill and decode greedily.

    Returns seconds of the prefill, milliseconds of a decode step (the median), how much longer steps got from the first
    to the last quarter, bytes that the cache holds at the end and, where `peak` is given, the peaks of both phases.
    """
    held, peaks = session.cache, {}
    watch = Stopwatch(prompt.device.type)
    with session.prefilling:
        token = model(prompt, **cache_argument(held), logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        getattr(held, "nbytes", None)  # to ask is to end the prompt: a replay, and a decision for all layers, are of it
    watch.mark()
    (prefill,) = watch.seconds()
    if peak:
        peaks["prefill_peak_bytes"] = peak.take()
    watch = Stopwatch(prompt.device.type)
    with session.decoding:
        for step in range(new_tokens):
            told = {"position_ids": torch.full_like(token, prompt.shape[1] + step)} if session.logical_positions else {}
            token = model(token, **cache_argument(held), **told).logits[:, -1].argmax(-1, keepdim=True)
            watch.mark()
    steps = watch.seconds()
    if peak:
        peaks["decode_peak_bytes"] = peak.take()
    quarter = max(1, new_tokens // 4)
    return {
        "prefill_s": prefill,
        "decode_ms": 1000 * statistics.median(steps),
        "last_to_first_quarter": statistics.median(steps[-quarter:]) / statistics.median(steps[:quarter]),
        "nbytes": held_bytes(held),
        **peaks,
    }


def warm_up(contender: Contender, job: Job) -> None:
    """Whatever happens only once: kernels are compiled, memory is mapped."""
    model = model_for(contender, job)
    short = replace(job, tokens=min(job.tokens, WARM_UP[job.device]), new_tokens=4)
    run(contender.open(model, short), model, prompt_of(short, model), short.new_tokens)


def measure(contender: Contender, job: Job, *, peaks: bool = False) -> dict[str, Any]:
    """One run. Peaks are free on a GPU and taken anyway; on a CPU they would cost time, and are taken if asked for."""
    model = model_for(contender, job)
    prompt = prompt_of(job, model)
    time.sleep(HANDOVER_S)
    peak: AllocatorPeak | ResidentPeak | None = None
    if job.device != "cpu":
        peak = AllocatorPeak()
    elif peaks:
        peak = ResidentPeak()
    return run(contender.open(model, job), model, prompt, job.new_tokens, peak)


class Generation:
    """A cache that reads a prompt, `[B, tokens]`, and goes on from there greedily, a few tokens at a time."""

    def __init__(self, model: LlamaForCausalLM, held: Cache, prompt: torch.Tensor) -> None:
        self.model, self.cache = model, held
        self._read(prompt)
        getattr(held, "nbytes", None)  # to ask is to end the prompt

    @torch.inference_mode()
    def turn(self, steps: int) -> float:
        """Seconds of a step."""
        return seconds_of(lambda: self._read(self._token), steps)

    @torch.inference_mode()
    def _read(self, ids: torch.Tensor) -> None:
        output = self.model(ids, **cache_argument(self.cache), logits_to_keep=1)
        self._token = output.logits[:, -1].argmax(-1, keepdim=True)
