"""Tokens that stop between layers, against the stock cache, in the same run.

    python bench/layers.py
    python bench/layers.py --length 8192 --rounds 1

A Llama of 16 layers, hidden size 512, 8 query and 2 KV heads, float32, random weights, one thread. Every round prefills
once with each contender, one after the other, and then generates a few tokens; what is reported are medians over the
rounds of ratios to the stock cache in the same round, in time of the processor. Random weights attend to other tokens
at every step, so more go on again than would in a trained model.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvprune import Policy, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import FTP, Full, LazyLLM, PyramidDrop, SpAtten
from printing.output import Log, table

EARLY = ((0.3, 0.7), (0.6, 0.5), (0.9, 0.3))
CONTENDERS: tuple[Policy | None, ...] = (
    None,
    Full(),
    LazyLLM(EARLY, revive=False),
    LazyLLM(EARLY),
    LazyLLM(revive=False),
    LazyLLM(),
    SpAtten(),
    SpAtten(heads=((0.5, 0.5),)),
    PyramidDrop(),
    FTP(),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=arguments.length + 100,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.randint(1, 1000, (1, arguments.length))
    rounds = [
        [run(model, prompt, policy, arguments.new_tokens) for policy in CONTENDERS] for _ in range(arguments.rounds)
    ]
    shown = table(
        f"{arguments.length:,} tokens: ratios to stock", f"Medians over {arguments.rounds} rounds.",
        "contender", "prefill s", "prefill", "decode", "bytes",
    )  # fmt: skip
    for number, policy in enumerate(CONTENDERS):
        own = [each[number] for each in rounds]
        ratios = [[mine / its for mine, its in zip(each[number], each[0], strict=True)] for each in rounds]
        prefill, decode, size = (median(column) for column in zip(*ratios, strict=True))
        shown.add_row(
            "stock" if policy is None else str(policy), f"{median(each[0] for each in own):.2f}",
            f"{prefill:.2f}x", f"{decode:.2f}x", f"{size:.2f}x",
        )  # fmt: skip
    Log().console.print(shown)


@torch.no_grad()
def run(model: torch.nn.Module, prompt: torch.Tensor, policy: Policy | None, tokens: int) -> tuple[float, float, float]:
    """Seconds of the prompt, of a generated token, and bytes when the last of them has come."""
    cache = DynamicCache(config=model.config) if policy is None else PrunedCache(model, policy)
    begun = time.process_time()
    model(prompt, logits_to_keep=1, **cache_argument(cache))
    prefill = time.process_time() - begun
    took = []
    for token in prompt[:, :tokens].split(1, dim=1):
        begun = time.process_time()
        model(token, logits_to_keep=1, **cache_argument(cache))
        took.append(time.process_time() - begun)
    stock = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if policy is None else 0
    return prefill, median(took), float(stock or cache.nbytes)


if __name__ == "__main__":
    main()
