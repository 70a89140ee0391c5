"""What few bits do to a model's predictions: divergence from the full cache, at measured bits a number.

    python bench/bits.py TEXT [--model smollm2] [--windows 3] [--window 1024] [--of "KIVI(2)" "Spectral(2)" "quanto(2)"]

Windows of a text. The first half of each is a prompt, the second follows 64 tokens at a time, each of which is packed
as its policy says; the second half is compared. KL is that of the next token's distribution from the full cache's, in
nats; top-1 how often both have the same best token. Beside policies of kvprune, `quanto(bits)` and `HQQ(bits)` are
transformers' `QuantizedCache` with these backends, which have to be installed (`pip install kvprune[bench]`).

    python bench/bits.py TEXT --calibrate ANOTHER --of "OSCAR(2)" "OSCAR(2, rotations=rotations)"

measures rotations on the first tokens of another text, and gives them to policies that name them.

Bits are those of packed numbers, with every parameter that stands for them but the basis of a rotated codec, which
belongs to a head. Kept is all that the cache holds at the end, of what keys and values take in 16 bits. What is held in
float32, rows in full precision and scales of other libraries, counts as if it were in 16 bits, as a model of 16 bits
would hold it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, QuantizedCache

from kvprune import Policy, PrunedCache, Rotations, policies
from kvprune.cache.models import cache_argument
from kvprune.evaluation.models import load
from kvprune.policies import Full
from measuring.workload import held_tensors

PIECE = 64
ALL = ("KIVI(2)", "KIVI(4)", "quanto(2)", "quanto(4)", "HQQ(2)", "HQQ(4)", "Spectral(2)", "Spectral(3)", "Spectral(4)")


@dataclass(frozen=True)
class Peer:
    """A cache of transformers, with the axes that its documentation names for the backend."""

    backend: str
    bits: int
    axis: int

    def __str__(self) -> str:
        return f"QuantizedCache({self.backend}, nbits={self.bits})"


def quanto(bits: int) -> Peer:
    return Peer("quanto", bits, axis=0)


def HQQ(bits: int) -> Peer:  # noqa: N802  as it is spelt
    return Peer("hqq", bits, axis=1)


def cache_of(model: PreTrainedModel, what: Policy | Peer) -> Cache:
    if isinstance(what, Policy):
        return PrunedCache(model, what)
    return QuantizedCache(what.backend, model.config, nbits=what.bits, axis_key=what.axis, axis_value=what.axis)


@torch.inference_mode()
def predictions(model: PreTrainedModel, window: Tensor, what: Policy | Peer) -> tuple[Tensor, Cache]:
    """Log-probabilities of what follows each token of the second half, `[half, vocab]`, and the cache."""
    cache, half = cache_of(model, what), len(window) // 2
    model(window[None, :half], **cache_argument(cache), logits_to_keep=1)
    logits = [model(piece[None], **cache_argument(cache)).logits[0] for piece in window[half:].split(PIECE)]
    return torch.cat(logits).float().log_softmax(-1), cache


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, floating-point numbers at no more than 16 bits each."""
    held = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        wide = tensor.itemsize // 2 if tensor.is_floating_point() and tensor.itemsize > 2 else 1
        held[storage.data_ptr()] = storage.nbytes() // wide
    return sum(held.values())


def bits_of(cache: Cache) -> float:
    """Bits of a number of a packed row, its parameters included; 0 where none is packed."""
    parts: list[tuple[Any, int]] = []  # what holds packed numbers, and how many
    if isinstance(cache, PrunedCache):
        for tier in (tier for layer in cache.layers for tier in layer.table.packed):
            rows = tier.tensors["key_codes"].shape[:3].numel()
            parts.append((tier.tensors, rows * (tier.key_dim + tier.value_dim)))
    else:
        for layer in cache.layers:
            for quantized in (layer._quantized_keys, layer._quantized_values):
                exact = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
                # Heads and channels are no public fact of a quantized layer: they are those of what it decodes to.
                decoded = layer._dequantize(quantized)
                assert decoded.shape[2] + exact == layer.get_seq_length()
                parts.append((quantized, decoded.numel()))
    numbers = sum(count for _, count in parts)
    return 8 * sum(bytes_of(held_tensors(part)) for part, _ in parts) / numbers if numbers else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window", type=int, default=1024, help="tokens of each")
    parser.add_argument("--of", nargs="+", default=list(ALL), help="policies as one writes them, quanto(2), HQQ(4)")
    parser.add_argument("--calibrate", type=Path, help="a text to measure `rotations` on")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens of it, in pieces of a window each")
    asked = parser.parse_args()
    named = load(asked.model, dtype="float32")
    model, size = named.model, asked.window
    ids = named.tokenizer(asked.text.read_text("utf-8"), return_tensors="pt").input_ids[0, : asked.windows * size]
    windows = ids.view(-1, size)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dense = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * size
    full = [predictions(model, window, Full())[0] for window in windows]
    names = {**vars(policies), "quanto": quanto, "HQQ": HQQ}
    if asked.calibrate is not None:
        read = named.tokenizer(asked.calibrate.read_text("utf-8"), return_tensors="pt").input_ids
        names["rotations"] = Rotations.measure(model, read[:, : asked.calibration], length=size)
    for text in asked.of:
        what = eval(text, names)  # what the person at the keyboard wrote
        rows = []
        for window, expected in zip(windows, full, strict=True):
            found, cache = predictions(model, window, what)
            divergence = (expected.exp() * (expected - found)).sum(-1).mean()
            agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean()
            rows.append([bits_of(cache), bytes_of(held_tensors(cache)) / dense, float(divergence), float(agreement)])
        bits, kept, divergence, agreement = torch.tensor(rows).mean(0).tolist()
        print(
            json.dumps(
                {"of": str(what), "bits": round(bits, 2), "kept": round(kept, 3), "kl": round(divergence, 4),
                 "top1": round(agreement, 3), "kl_of_windows": [round(row[2], 4) for row in rows]}
            ),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
