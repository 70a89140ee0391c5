"""How many times smaller than 16 bits a number the quantizing policies are, with everything they hold counted.

    python bench/compression.py --out bench/results/compression.json

One layer of 8 KV heads, random float16 keys and values, right after a prompt and after some generated tokens. The
second figure of each pair counts codes alone, without parameters, positions and block numbers, which is how papers
count: 60 % of the tokens at 4 bits and the rest at 2 are 3.2 bits, 5.0x.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvprune import Scoring
from kvprune.cache.layer import PrunedLayer
from kvprune.policy.registry import parse
from printing.output import save, table

HEADS = 8
POLICIES = ("zipcache", "zipcache:group_size=128", "zipcache:high_bits=4,low_bits=4", "kivi:bits=2", "kivi:bits=4")


def compress(policy: str, tokens: int, head_dim: int, generated: int) -> dict[str, Any]:
    """Feed a prompt and then tokens one by one; ratios of a 16-bit dense cache to what the layer holds."""
    layer = PrunedLayer(parse(policy), 0)
    random = torch.Generator().manual_seed(0)
    row: dict[str, Any] = {"policy": policy, "tokens": tokens, "head_dim": head_dim}
    for step in range(generated + 1):
        length = 1 if step else tokens
        queries, keys, values = (torch.randn(1, HEADS, length, head_dim, generator=random).half() for _ in range(3))
        layer.update(keys, values)
        layer.attend(queries, None, Scoring(head_dim**-0.5))
        if step in (0, generated) and layer.table is not None:
            dense = layer.seen * layer.table.kv_token_bytes
            name = "after_prompt" if step == 0 else f"after_{generated}_more"
            row[name] = dense / layer.nbytes
            row[name + "_codes_alone"] = dense / layer.table.code_nbytes
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--generated", type=int, default=250)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help='as in "zipcache:group_size=128"')
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [
        compress(policy, arguments.tokens, head_dim, arguments.generated)
        for head_dim in arguments.head_dims
        for policy in arguments.policies
    ]
    names = [name for name in rows[0] if name not in ("policy", "tokens", "head_dim")]
    shown = table(
        f"times smaller than 16 bits a number, {arguments.tokens:,} tokens",
        "and in codes alone",
        "policy", "head dim", *(name.replace("_", " ").removesuffix(" alone") for name in names),
    )  # fmt: skip
    for row in rows:
        shown.add_row(row["policy"], str(row["head_dim"]), *(f"{row[name]:.2f}x" for name in names))
    Console().print(shown)
    save(arguments.out, rows=rows)


if __name__ == "__main__":
    main()
