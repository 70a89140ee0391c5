"""What the tests of tensor parallelism run in one process and in several, which `torchrun` starts with this file.

    torchrun --standalone --nproc-per-node 2 tests/tensor_parallel.py FOLDER

Every process loads the models of the folder, runs all cases, and leaves what it found in FOLDER/<rank>.pt.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from families import generate, left_padded, token_ids
from transformers import AutoModelForCausalLM
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from kvprune import Adaptive, Everywhere, KVPruneError, Policy, PrunedCache, Rotations
from kvprune.cache.models import cache_argument
from kvprune.policies import (
    A2SF,
    H2O,
    KIVI,
    OSCAR,
    TOVA,
    Bits,
    Full,
    GemFilter,
    Keyformer,
    Knorm,
    KVzip,
    KVzipPlus,
    SnapKV,
    StreamingLLM,
    ZipCache,
)

PROCESSES = 2
LIMIT = 200
"""Seconds after which a process ends itself: one that waits for another would wait for half an hour."""
NEW_TOKENS = 20
PROMPT = (60, 41)
BYTES = 44_000
"""A budget for the whole cache of two layers, four KV heads of dim 8 and two sequences."""

# 8 query and 4 KV heads: two KV heads a process. Of others, even sizes: transformers 5.17 splits nothing else.
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 98}
MODELS: dict[str, dict[str, int]] = {
    "llama": _HEADS,
    "gemma3": {"vocab_size": 98},  # sliding windows
    "phi3": {"vocab_size": 98},  # its plan leaves attention whole
    "gpt-oss": {"vocab_size": 98},  # a plan that leaves out attention, with its sinks
}
WHOLE = ("phi3", "gpt-oss")
"""Models whose attention every process has all of."""
POLICIES: dict[str, Policy] = {
    "full": Full(),
    "a2sf": A2SF(0.4, recent=4, kernel_size=3),
    "h2o": H2O(20, recent=4),
    "snapkv": SnapKV(0.4, window=8),
    "snapkv, interval": SnapKV(20, window=8, interval=4, pooling="avg"),
    "tova": TOVA(0.3),
    "streaming": StreamingLLM(16),
    "keyformer": Keyformer(0.4),
    "gemfilter": GemFilter(24),
    "zipcache": ZipCache(buffer=8),
    "kivi": KIVI(group_size=8, residual=8),
    "a2sf | tova": A2SF(24, recent=4) | TOVA(16, recent=4),
    "gemfilter | tova | kivi": GemFilter(40) | TOVA(24, recent=4) | KIVI(group_size=8, residual=8),
    "tova, bytes": TOVA(f"{BYTES}B"),
    "snapkv, bytes": SnapKV(f"{BYTES}B", window=8, interval=1),
    "h2o | kivi, bytes": H2O(f"{BYTES}B", recent=4) | KIVI(group_size=8, residual=8),
    "gemfilter, bytes": GemFilter(f"{BYTES}B"),
    # heads compete with those of the other process
    "adaptive": A2SF(0.4, recent=4, share=Adaptive(0.2)),
    "adaptive, z": Knorm(16, recent=4, share=Adaptive(0, normalize="z")),
    "everywhere": SnapKV(0.4, window=8, share=Everywhere()),
    "everywhere, share of bytes": H2O("0.6b", recent=4, share=Everywhere(0.3)),
    "everywhere | kivi": H2O(24, recent=4, share=Everywhere()) | KIVI(group_size=8, residual=8),
    "kvzip": KVzip(0.4, recent=4, chunk=32),
    "kvzip+": KVzipPlus(0.4, recent=4),
    "bits": Bits(0.7, score=SnapKV(window=8), sinks=2, recent=4),
    "bits, adaptive": Bits("0.75b", score=H2O(), share=Adaptive(0.2), sinks=2, recent=4),
    "bits, interval": Bits(0.7, score=SnapKV(window=8), sinks=2, recent=4, interval=6),
    "bits, kvzip": Bits(0.7, score=KVzip(chunk=32), sinks=2, recent=4),
}
CASES = [*(("llama", name) for name in POLICIES), *((model, "tova") for model in MODELS if model != "llama")]
CASES += [(model, "keyformer") for model in WHOLE]


def found(cache: PrunedCache, ids: torch.Tensor) -> dict[str, Any]:
    """What is compared: tokens, and what is kept of them."""
    kept = [cache.kept_positions(layer) for layer in cache.pruned_layers]
    return {"ids": ids, "kept": kept, "nbytes": cache.nbytes, "dense": cache.dense_nbytes}


def generated(model: Any, policy: str) -> dict[str, Any]:
    """A batch with left padding."""
    cache = PrunedCache(model, POLICIES[policy])
    return found(cache, generate(model, left_padded(PROMPT), NEW_TOKENS, **cache_argument(cache)))


def beams(model: Any) -> dict[str, Any]:
    cache = PrunedCache(model, POLICIES["tova"])
    return found(cache, generate(model, left_padded(PROMPT), NEW_TOKENS, **cache_argument(cache), num_beams=3))


def drafts(model: Any) -> dict[str, Any]:
    """Drafts from the prompt, most of which are taken back."""
    ids = token_ids(1, 20).repeat(1, 3)
    cache = PrunedCache(model, POLICIES["a2sf | tova"])
    return found(cache, model.generate(ids, **cache_argument(cache), max_new_tokens=12, prompt_lookup_num_tokens=3))


def saved(model: Any, path: Path) -> dict[str, Any]:
    """A second turn on a cache that was saved and loaded."""
    cache = PrunedCache(model, POLICIES["tova"])
    ids = generate(model, left_padded(PROMPT), 4, **cache_argument(cache))
    cache.save(path)
    cache = PrunedCache.load(path, model)
    more = torch.cat([ids, token_ids(len(ids), 9, seed=1)], dim=1)
    mask = torch.nn.functional.pad(left_padded(PROMPT)["attention_mask"], (0, 13), value=1)
    return found(cache, generate(model, {"input_ids": more, "attention_mask": mask}, 8, **cache_argument(cache)))


def turned(model: Any, path: Path) -> dict[str, Any]:
    """Rotations that all heads share, measured and used."""
    rotations = Rotations.measure(model, token_ids(1, 90), length=40)
    rotations.save(path.with_name("rotations.json"))
    cache = PrunedCache(model, OSCAR(8, residual=8, sinks=2, rotations=rotations))
    return found(cache, generate(model, left_padded(PROMPT), NEW_TOKENS, **cache_argument(cache))) | {
        "rotations": tuple(rotations)
    }


TURNS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    "beams": lambda model, path: beams(model),
    "drafts": lambda model, path: drafts(model),
    "saved": saved,
    "rotations": turned,
}


def run(models: dict[str, Any], folder: Path) -> dict[Any, dict[str, Any]]:
    """What all cases find."""
    results: dict[Any, dict[str, Any]] = {case: generated(models[case[0]], case[1]) for case in CASES}
    return results | {name: turn(models["llama"], folder / "cache") for name, turn in TURNS.items()}


def refusal(attempt: Callable[[], Any]) -> str:
    """The error that it raises."""
    try:
        attempt()
    except KVPruneError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(folder: Path) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of tp_plan, which transformers 5.17 and 5.23 both take
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto").eval() for name in MODELS}
    rank = torch.distributed.get_rank()
    own, others = folder / f"process{rank}", folder / f"process{1 - rank}"
    own.mkdir()
    results: dict[Any, Any] = run(models, own)
    torch.distributed.barrier()
    results["loaded from another"] = refusal(lambda: PrunedCache.load(others / "cache", models["llama"]))
    for trusted in (False, True):
        results["rotations of another", trusted] = refusal(
            lambda trusted=trusted: Rotations.load(others / "rotations.json", models["llama"], trust_model=trusted)
        )

    # One KV head in every process, and half of the query heads: correct for transformers.
    plan = {"q_proj": "colwise", "o_proj": "rowwise", "k_proj": "replicate", "v_proj": "replicate"}
    plan = {f"model.layers.*.self_attn.{name}": kind for name, kind in plan.items() if kind in ALL_PARALLEL_STYLES}
    model = AutoModelForCausalLM.from_pretrained(folder / "one KV head", tp_plan=plan).eval()
    results["queries alone"] = refusal(
        lambda: generate(model, left_padded(PROMPT), 2, **cache_argument(PrunedCache(model, A2SF(40))))
    )
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
