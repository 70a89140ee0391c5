"""A decode step on a GPU, eagerly and as one CUDA graph: what launching kernels costs, and what is left without.

    python bench/gpu_steps.py --out bench/results/gpu_steps.json
    python bench/gpu_steps.py --device cpu --layers 1 --contexts 256       # whether it runs, anywhere

Some layers of Llama-3.1-8B with random weights, bfloat16, batch 1. A policy that evicts at every token has steps of one
shape: "eager" replays its part of a layer, and `torch.compile(mode="reduce-overhead")` the whole model. Of
transformers' own caches only StaticCache has such steps, with all of its rows, empty ones too. SDPA of a stock cache
may be that of cuDNN, which plans anew for every length: "stock" is measured with it, as PyTorch chooses, and without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from kvprune import PrunedCache
from kvprune.policy.registry import parse
from measuring.workload import MODELS, build_model, cache_argument
from printing.output import Log, save, table
from subjects.contenders import WITHOUT_CUDNN, without_cudnn

WARM_UP = 6
POLICIES = (
    "full", "snapkv", "a2sf", "h2o", "tova", "keyformer", "streaming_llm", "adakv", "zipcache", "kivi:bits=2",
    "spectral:bits=2", "bits:score=snapkv",
)  # fmt: skip
COMPILED = ("a2sf", "tova", "streaming_llm")


def prefilled(model: Any, held: Any, prompt: Tensor) -> Tensor:
    """Read a prompt; the token that comes next, `[1, 1]`."""
    return model(prompt, **cache_argument(held), logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)


def steps(forward: Callable[..., Any], held: Any, token: Tensor, count: int) -> tuple[float, float]:
    """Milliseconds of a step, and of those the ones that Python and the launches took; medians."""
    wait = torch.cuda.synchronize if token.is_cuda else lambda: None
    whole, launching = [], []
    for step in range(WARM_UP + count):
        wait()
        began = time.perf_counter()
        token = forward(token, **cache_argument(held)).logits[:, -1].argmax(-1, keepdim=True)
        launched = time.perf_counter()
        wait()
        if step >= WARM_UP:
            whole.append(time.perf_counter() - began)
            launching.append(launched - began)
    return 1000 * statistics.median(whole), 1000 * statistics.median(launching)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--compiled", nargs="*", default=list(COMPILED), help="as one graph too; and StaticCache")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--profile", type=Path, help="a folder for tables of what the steps of each policy call")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    MODELS["some layers"] = MODELS["llama-3.1-8b"] | {"num_hidden_layers": arguments.layers}
    model = build_model("some layers", "bfloat16", device=arguments.device)
    log = Log()
    rows: list[dict[str, Any]] = []

    def pruned(name: str) -> PrunedCache:
        return PrunedCache(model, parse(name, budget=arguments.budget))

    def measure(who: str, held: Any, forward: Callable[..., Any], how: str = "eager") -> None:
        try:
            token = prefilled(model, held, prompt)
            began = time.perf_counter()
            whole, launching = steps(forward, held, token, arguments.steps)
        except Exception as error:
            log.note(f"left out: {who}, {how}: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
            return
        rows.append({"tokens": prompt.shape[1], "cache": who, "steps": how, "ms": whole, "launching_ms": launching})
        log.console.print(
            f"{prompt.shape[1]:,} tokens, {who}, {how}: {whole:.2f} ms, {launching:.2f} to launch "
            f"({time.perf_counter() - began:.0f} s in all)",
            highlight=False,
        )

    for tokens in arguments.contexts:
        prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device=arguments.device)
        with torch.inference_mode():
            measure("stock", DynamicCache(config=model.config), model)
            with without_cudnn():
                measure(WITHOUT_CUDNN, DynamicCache(config=model.config), model)
            for name in arguments.policies:
                measure(name, pruned(name), model)
                if arguments.profile:
                    profile(model, pruned(name), prompt, arguments.profile / f"{name.replace(':', '-')}-{tokens}.txt")
        if arguments.compiled:
            with torch.no_grad():
                held: list[tuple[str, Any]] = [(name, pruned(name)) for name in arguments.compiled]
                room = tokens + WARM_UP + arguments.steps + 1
                held.append(("StaticCache", StaticCache(config=model.config, max_cache_len=room)))
                for name, each in held:
                    torch._dynamo.reset()
                    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=name != "StaticCache")
                    measure(name, each, forward, "one graph")
        shown = table(
            f"{tokens:,} tokens, {arguments.layers} layers, budget {arguments.budget:.0%}",
            "milliseconds of a decode step, and of its launches; ratio to the stock cache in the same run",
            "cache", "steps", "ms", "launching", "ratio",
        )  # fmt: skip
        found = [row for row in rows if row["tokens"] == tokens]
        for row in found:
            ratio = row["ms"] / found[0]["ms"]
            shown.add_row(row["cache"], row["steps"], f"{row['ms']:.2f}", f"{row['launching_ms']:.2f}", f"{ratio:.2f}x")
        log.console.print(shown)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    save(arguments.out, device=device, layers=arguments.layers, budget=arguments.budget, notes=log.notes, rows=rows)


def profile(model: Any, held: Any, prompt: Tensor, path: Path) -> None:
    """What two steps call, by time on the CPU and on the GPU."""
    from torch.profiler import ProfilerActivity

    token = prefilled(model, held, prompt)
    steps(model, held, token, 1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if prompt.is_cuda else [])]
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(2):
            model(token, **cache_argument(held))
    path.parent.mkdir(parents=True, exist_ok=True)
    orders = ["self_cpu_time_total", *(["self_device_time_total"] if prompt.is_cuda else [])]
    path.write_text("\n".join(found.key_averages().table(sort_by=each, row_limit=40) for each in orders))


if __name__ == "__main__":
    main()
