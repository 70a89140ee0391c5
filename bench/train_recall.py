"""Train the embedded recall model from a seed, on a CPU, in under an hour.

    python bench/train_recall.py --out kvprune/demo/model

Stage 1 teaches copying: random blocks repeated after a gap, loss on the second copy, the block doubling whenever the
accuracy passes 0.9. Stage 2 teaches the recall task on documents that double in length whenever the accuracy passes a
threshold, always mixed with all shorter ones (a model trained on the last length alone forgets the others). Training on
the task directly stalls: induction has to exist first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from kvprune.demo.task import RecallGenerator
from kvprune.demo.words import BOS, EOS, PAD, SPECIAL, TOKEN_ID, VOCABULARY

TOKENS_PER_STEP = 8192
LEVELS = ((128, 4), (256, 8), (512, 16), (1024, 32), (2048, 64), (4096, 96))  # (document tokens, most notes)
LM_WEIGHT = 0.05  # of the loss on the filler words: enough to write readable text, too little to crowd out recall


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def copy_batch(rng: np.random.Generator, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[B, n]` and loss weights `[B, n]`: a random block, a gap, the block again (weight 1 on the second)."""
    gap = int(rng.integers(0, max(2, block // 2)))
    batch = max(1, TOKENS_PER_STEP // (2 * block + gap + 1))
    words = rng.integers(len(SPECIAL), len(VOCABULARY), size=(batch, block + gap))
    tokens = np.concatenate([np.full((batch, 1), TOKEN_ID[BOS]), words, words[:, :block]], axis=1)
    weights = np.zeros(tokens.shape, dtype=np.float32)
    weights[:, 2 + block + gap :] = 1.0  # the first word of the copy cannot be known
    return torch.from_numpy(tokens), torch.from_numpy(weights)


def recall_batch(generator: RecallGenerator, length: int, most_notes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents with questions and answers at the end: weight 1 on answers and `</s>`, `LM_WEIGHT` on the document."""
    rng = generator.rng
    notes = int(np.exp(rng.uniform(0, np.log(most_notes + 1))))
    questions = int(np.exp(rng.uniform(0, np.log(notes + 1))))
    rows, weights = [], []
    for _ in range(max(1, TOKENS_PER_STEP // length)):
        recall = generator.document(length, notes)
        asked = rng.choice(notes, size=questions, replace=False)
        row, weight = [recall.document], [np.full(length, LM_WEIGHT)]
        for note in asked:
            row += [recall.question(note), recall.values[note], [TOKEN_ID[EOS]]]
            weight += [np.zeros(3), np.ones(4)]
        rows.append(np.concatenate(row))
        weights.append(np.concatenate(weight))
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(weights)).float()


def step(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Weighted cross-entropy, and the accuracy over the tokens of weight 1."""
    hidden = model.model(tokens[:, :-1]).last_hidden_state
    weights, targets = weights[:, 1:], tokens[:, 1:]
    used = weights > 0
    logits = model.lm_head(hidden[used])
    targets, weights = targets[used], weights[used]
    answers = weights == 1
    loss = F.cross_entropy(logits, targets, reduction="none")
    total = loss[answers].mean()
    if not bool(answers.all()):
        total = total + LM_WEIGHT * loss[~answers].mean()
    accuracy = (logits[answers].argmax(-1) == targets[answers]).float().mean().item()
    return total, accuracy


def batches(
    rng: np.random.Generator, generator: RecallGenerator, level: list[int]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Endless batches: the current level half of the time, all earlier ones the other half."""
    while True:
        stage, current = level
        chosen = current if rng.random() < 0.5 else int(rng.integers(0, current + 1))
        if stage == 1:
            yield chosen, *copy_batch(rng, 16 << chosen)
        elif rng.random() < 0.05:
            yield -1, *copy_batch(rng, 512)
        else:
            yield chosen, *recall_batch(generator, *LEVELS[chosen])


def train(minutes: float, seed: int, out: Path) -> None:
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), RecallGenerator(seed + 1)
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    peak, warmup = 3e-3, 200
    level, average = [1, 0], 0.0
    start = time.perf_counter()
    for updates, (chosen, tokens, weights) in enumerate(batches(rng, generator, level), start=1):
        elapsed = (time.perf_counter() - start) / 60
        if elapsed > minutes:
            break
        left = 1 - elapsed / minutes
        optimizer.param_groups[0]["lr"] = peak * min(1, updates / warmup) * min(1, left / 0.3 + 0.01)
        loss, accuracy = step(model, tokens, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if chosen == level[1]:
            average = 0.9 * average + 0.1 * accuracy
        if updates % 50 == 0:
            print(
                json.dumps(
                    {
                        "minutes": round(elapsed, 2), "updates": updates, "stage": level[0], "level": level[1],
                        "loss": round(loss.item(), 4), "accuracy": round(average, 4),
                    }
                ),
                flush=True,
            )  # fmt: skip
        if level[0] == 1 and average > 0.9:
            average = 0.0
            level[1] += 1
            if level[1] == 6:
                level[:] = [2, 0]
        elif level[0] == 2 and average > 0.93 and level[1] < len(LEVELS) - 1:
            average = 0.0
            level[1] += 1
    model.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kvprune/demo/model"))
    parser.add_argument("--minutes", type=float, default=45.0, help="wall-clock budget (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.minutes, arguments.seed, arguments.out)
