"""Contenders: stock caches of transformers, the policies of kvprune, the presses of kvpress.

What a contender needs is imported when it runs: kvprune and kvpress need different versions of transformers and live in
different environments.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache

from measuring.workload import Contender, Job, Session

STOCK, EAGER, PEERS_STOCK = "stock sdpa", "stock eager", "stock beside kvpress"
WITHOUT_CUDNN = "stock, no cuDNN"
TRANSFORMERS, KVPRUNE, KVPRESS = "transformers", "kvprune", "kvpress"
# As `kvprune.policy.registry.parse` reads them; those with a budget take that of the job.
POLICIES = {
    "Full": "full",
    "A2SF": "a2sf",
    "A2SF interval=16": "a2sf:interval=16",
    "A2SF adaptive": "a2sf:share=adaptive",
    "SnapKV": "snapkv",
    "SnapKV adaptive": "snapkv:share=adaptive",
    "SnapKV everywhere": "snapkv:share=everywhere",
    "DropKV": "dropkv",
    "KVzip": "kvzip",
    "H2O": "h2o",
    "TOVA": "tova",
    "StreamingLLM": "streaming_llm",
    "Keyformer": "keyformer",
    "GemFilter": "gemfilter",
    "A2SF | KVCrush": "a2sf | kvcrush",
    "ZipCache": "zipcache",
    "KIVI 2 bit": "kivi:bits=2",
    "KIVI 4 bit": "kivi:bits=4",
    "Spectral 2 bit": "spectral:bits=2",
    "A2SF | ZipCache": "a2sf | zipcache",
    "Bits": "bits:score=snapkv",
    "Bits by DropKV": "bits:score=dropkv",
    "SnapKV | KIVI 2 bit": "snapkv | kivi:bits=2",
    "SnapKV adaptive | KIVI 2 bit": "snapkv:share=adaptive | kivi:bits=2",
}
WITHOUT_BUDGET = ("Full", "ZipCache", "KIVI 2 bit", "KIVI 4 bit", "Spectral 2 bit")
# Of heads that compete, which kvpress attends to as if nothing had gone.
WRAPPED_PRESSES = {"kvpress AdaKV": ("AdaKVPress", "SnapKVPress")}
PRESSES = {
    "kvpress SnapKV": "SnapKVPress",
    "kvpress TOVA": "TOVAPress",
    "kvpress StreamingLLM": "StreamingLLMPress",
    "kvpress ObservedAttention": "ObservedAttentionPress",
    "kvpress Knorm": "KnormPress",
}
# Presses that go on while tokens are generated: of what, and every how many steps.
DECODING_PRESSES = {
    "kvpress TOVA interval=1": ("TOVAPress", 1),
    "kvpress Knorm interval=16": ("KnormPress", 16),
}
QUANTIZED: dict[str, tuple[str, int | None, str | None]] = {
    "quanto 4 bit": ("quanto", 4, "optimum.quanto"),
    "quanto 2 bit": ("quanto", 2, "optimum.quanto"),
    "HQQ 4 bit": ("hqq", 4, "hqq"),
}


def _stock(model: LlamaForCausalLM, job: Job) -> Session:
    return Session(DynamicCache(config=model.config))


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Without cuDNN's attention, which PyTorch chooses on newer GPUs, and plans anew for every length."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _stock_without_cudnn(model: LlamaForCausalLM, job: Job) -> Session:
    return Session(DynamicCache(config=model.config), decoding=without_cudnn())


def _quantized(backend: str, bits: int | None, model: LlamaForCausalLM, job: Job) -> Session:
    return Session(QuantizedCache(backend, model.config, nbits=bits))


def _pruned(policy: str, model: LlamaForCausalLM, job: Job) -> Session:
    from kvprune import PrunedCache
    from kvprune.policy.registry import parse

    budget = {} if job.budget is None else {"budget": job.budget}
    return Session(PrunedCache(model, parse(policy, **budget)))


def _kept(job: Job) -> tuple[float, int]:
    """The budget as a fraction of the prompt and in tokens."""
    if job.budget is None:
        raise ValueError(f"{job.contender} needs a budget")
    tokens = job.budget if isinstance(job.budget, int) else math.ceil(job.budget * job.tokens)
    return tokens / job.tokens, tokens


def _pressed(press: str, model: LlamaForCausalLM, job: Job) -> Session:
    """As kvpress' pipeline does it: its hooks are on the model while the prompt is read, and gone when it decodes."""
    import kvpress

    fraction, _ = _kept(job)
    hooks = getattr(kvpress, press)(compression_ratio=1 - fraction)(model)
    return Session(DynamicCache(config=model.config), prefilling=hooks, logical_positions=True)


def _pressed_together(wrapper: str, press: str, model: LlamaForCausalLM, job: Job) -> Session:
    """A press over another, which says who gets rows."""
    import kvpress

    fraction, _ = _kept(job)
    hooks = getattr(kvpress, wrapper)(getattr(kvpress, press)(compression_ratio=1 - fraction))(model)
    return Session(DynamicCache(config=model.config), prefilling=hooks, logical_positions=True)


def _pressed_throughout(press: str, interval: int, model: LlamaForCausalLM, job: Job) -> Session:
    """The same press on the prompt and, every `interval` steps, on what has been generated since."""
    import kvpress

    fraction, tokens = _kept(job)
    score = getattr(kvpress, press)
    decoding = kvpress.DecodingPress(
        score(), compression_interval=interval, target_size=tokens, hidden_states_buffer_size=interval
    )
    hooks = kvpress.PrefillDecodingPress(score(compression_ratio=1 - fraction), decoding)
    return Session(DynamicCache(config=model.config), hooks(model), hooks(model), logical_positions=True)


def _attention(press: str) -> str:
    return "eager" if press == "ObservedAttentionPress" else "sdpa"


_ALL = [
    Contender(STOCK, TRANSFORMERS, _stock),
    Contender(EAGER, TRANSFORMERS, _stock, attention="eager"),
    Contender(WITHOUT_CUDNN, TRANSFORMERS, _stock_without_cudnn),
    *(
        Contender(name, KVPRUNE, partial(_pruned, policy), has_budget=name not in WITHOUT_BUDGET)
        for name, policy in POLICIES.items()
    ),
    *(
        Contender(name, TRANSFORMERS, partial(_quantized, backend, bits), package=package)
        for name, (backend, bits, package) in QUANTIZED.items()
    ),
    Contender(PEERS_STOCK, KVPRESS, _stock),
    *(
        Contender(name, KVPRESS, partial(_pressed, press), attention=_attention(press), has_budget=True)
        for name, press in PRESSES.items()
    ),
    *(
        Contender(name, KVPRESS, partial(_pressed_together, *presses), has_budget=True)
        for name, presses in WRAPPED_PRESSES.items()
    ),
    *(
        Contender(name, KVPRESS, partial(_pressed_throughout, press, interval), has_budget=True)
        for name, (press, interval) in DECODING_PRESSES.items()
    ),
]
CONTENDERS = {contender.name: contender for contender in _ALL}


def missing_package(contender: Contender) -> str | None:
    """Why a contender cannot run in this environment, or None if it can."""
    for package in (contender.package, contender.family):
        if package and not _installed(package):
            return f"needs {package}, which is not installed"
    return None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of its parent
        return False
