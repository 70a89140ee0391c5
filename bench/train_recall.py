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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvprune.demo.measure import Questions, reference
from kvprune.demo.task import RecallGenerator
from kvprune.demo.words import BOS, EOS, PAD, SPECIAL, TOKEN_ID, UNK, VOCABULARY

TOKENS_PER_STEP = 8192
LEVELS = ((128, 4), (256, 8), (512, 16), (1024, 32), (2048, 64), (4096, 96))  # (document tokens, most notes)
COPY_LEVELS = 6  # blocks of 16, 32, ... 512 tokens
PEAK_RATE, WARMUP, DECAY = 3e-3, 200, 0.3  # learning rate, its first updates, and the share of updates it falls over
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


def some_of(rng: np.random.Generator, most: int) -> int:
    """Few as often as many: half of the draws are uniform in the logarithm, half uniform."""
    return int(np.exp(rng.uniform(0, np.log(most + 1)))) if rng.random() < 0.5 else int(rng.integers(1, most + 1))


def recall_batch(generator: RecallGenerator, length: int, most_notes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents with questions and answers at the end: weight 1 on answers and `</s>`, `LM_WEIGHT` on the document."""
    rng = generator.rng
    notes = some_of(rng, most_notes)
    questions = some_of(rng, notes)
    rows, weights = [], []
    for _ in range(max(1, TOKENS_PER_STEP // length)):
        recall = generator.document(length, notes)
        asked = rng.choice(notes, size=questions, replace=False)
        row, weight = [recall.document], [np.full(length, LM_WEIGHT)]
        for note in asked:
            row += [recall.question(note), recall.values[note], np.array([TOKEN_ID[EOS]])]
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


def train(updates: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), RecallGenerator(seed + 1)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    level, average = [1, 0], 0.0  # the stage and the level in it, and the accuracy on that level
    start = time.perf_counter()
    for update, (chosen, tokens, weights) in enumerate(batches(rng, generator, level)):
        if update == updates:
            break
        warm, left = min(1.0, (update + 1) / WARMUP), 1 - update / updates
        optimizer.param_groups[0]["lr"] = PEAK_RATE * warm * min(1.0, left / DECAY + 0.01)
        loss, accuracy = step(model, tokens, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if chosen == level[1]:
            average = 0.9 * average + 0.1 * accuracy
        if average > 0.9 and level[0] == 1:
            average = 0.0
            level[:] = [1, level[1] + 1] if level[1] < COPY_LEVELS - 1 else [2, 0]
        elif average > 0.93 and level[0] == 2 and level[1] < len(LEVELS) - 1:
            average = 0.0
            level[1] += 1
        if (update + 1) % 50 == 0:
            progress = {"update": update + 1, "minutes": round((time.perf_counter() - start) / 60, 1)}
            progress |= {"stage": level[0], "level": level[1], "accuracy": round(average, 4)}
            print(json.dumps(progress), flush=True)
    return model.eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a text begins with `<s>`."""
    tokenizer = Tokenizer(WordLevel(TOKEN_ID, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, TOKEN_ID[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNK, pad_token=PAD, padding_side="left",
        model_max_length=4096 + 512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def scores(model: LlamaForCausalLM) -> list[dict[str, float]]:
    """Recall with the full cache on documents that training did not see."""
    rows = []
    for tokens, notes in ((512, 16), (1024, 32), (2048, 32), (2048, 64), (4096, 32), (4096, 64), (4096, 96)):
        questions = Questions.draw(256, tokens=tokens, notes=notes, seed=10_000 + tokens + notes)
        dense = reference(model, questions)
        right = (dense.predictions[:, : questions.answers.shape[1]] == questions.answers).float()
        rows.append(
            {
                "tokens": tokens,
                "notes": notes,
                "first word": right[:, 0].mean().item(),
                "words after it": right[:, 1:].mean().item(),
                "whole answer": right.prod(1).mean().item(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def card(model: LlamaForCausalLM, rows: list[dict[str, float]], updates: int, seed: int, minutes: float) -> str:
    table = "\n".join(
        f"| {row['tokens']:,} | {row['notes']} | {row['first word']:.1%} | {row['words after it']:.1%} | "
        f"{row['whole answer']:.1%} |"
        for row in rows
    )
    return CARD.format(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}", table=table, updates=updates, seed=seed,
        minutes=round(minutes), torch=torch.__version__, threads=torch.get_num_threads(),
    )  # fmt: skip


CARD = """# The embedded recall model

A Llama of 3 layers, hidden size 128, 4 query and 2 KV heads of 32, {parameters} parameters, float32, with a vocabulary
of whole words. It reads a document with notes in it and answers questions about them:

    ... note amber falcon: copper lantern seven. ...  question amber falcon:  ->  copper lantern seven. </s>

kvprune ships it so that a compressed cache can be judged on a model that really has to find something in a long
context. It knows nothing else.

## How it was made

    python bench/train_recall.py --updates {updates} --seed {seed}

{minutes} minutes on {threads} CPU threads, torch {torch}. Stage 1: random blocks repeated after a gap, loss on the
second copy only, 16 to 512 tokens. Stage 2: documents of 128 to 4,096 tokens with up to 96 notes, questions at the end,
loss on the answers (and, with weight 0.05, on the filler). Lengths, numbers of notes and of questions are mixed
throughout.

## What it scores

Full cache, 256 questions a row on documents that training did not see, one question at the end of each prompt, right
words fed. "Words after it" is what the demo counts: the first word comes out of the prefill.

| tokens | notes | first word | words after it | whole answer |
| ---: | ---: | ---: | ---: | ---: |
{table}

Licence: Apache-2.0, as the rest of kvprune. The training data are generated; nothing else went in.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kvprune/demo/model"))
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.perf_counter()
    trained = train(arguments.updates, arguments.seed)
    minutes = (time.perf_counter() - began) / 60
    trained.save_pretrained(arguments.out)
    build_tokenizer().save_pretrained(arguments.out)
    text = card(trained, scores(trained), arguments.updates, arguments.seed, minutes)
    (arguments.out.parent / "README.md").write_text(text)
