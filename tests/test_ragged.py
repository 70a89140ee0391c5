"""A table whose heads hold different numbers of rows: the bytes of its rows, and all that a rectangle does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, feed, kept_everywhere, left_padded, stepwise
from hypothesis import example, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvprune import Adaptive, Everywhere, Policy, PolicyError, PrunedCache, Scoring, TokenTable
from kvprune.cache import step as layer_step
from kvprune.kernels import TORCH, cpu
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Keyformer, Knorm, SnapKV, StreamingLLM, ZipCache
from kvprune.table.basis import Basis
from kvprune.table.quantize import Codec
from kvprune.table.ragged import RaggedTable, keep_rows
from kvprune.table.rotated_rows import RotatedCodec
from kvprune.table.rows import true_rows


@cache
def model(family: str = "llama", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return build(family, dtype=dtype)


@contextmanager
def rectangles() -> Iterator[None]:
    """Tables stay rectangles, whose shorter heads have empty slots: slower, larger, and what ragged ones must equal."""

    def padded(table: TokenTable, slots: Tensor, room: int, *, apart: bool) -> TokenTable:
        table.compact(slots, room)
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_step, "keep_rows", padded)
        yield


# -- bytes -------------------------------------------------------------------------------------------------------------

HEADS, ROWS = 8, 800
SKEWS = {
    "none": [[100] * 7 + [99]],
    "some": [[30, 200, 10, 60, 300, 100, 50, 50]],
    "one head has all": [[800] + [0] * 7],
    "batch": [[800] + [1] * 7, [5] * 7 + [6]],
}


def table_of(counts: list[list[int]], dtype: torch.dtype, room: int = 1) -> tuple[TokenTable, int]:
    """A table that keeps so many rows of each sequence and head, and bytes of a row."""
    batch = len(counts)
    keys, values = torch.randn(2, batch, HEADS, ROWS, 64, dtype=dtype)
    positions = torch.arange(ROWS).expand(batch, 1, -1)
    table = TokenTable(keys, values, positions, {"score": torch.float32})
    row_bytes = table.token_bytes // (batch * HEADS)
    slots = torch.arange(ROWS).expand(batch, HEADS, -1)
    slots = slots.masked_fill(slots >= torch.tensor(counts)[..., None], -1)
    return keep_rows(table, slots, room), row_bytes


@pytest.mark.parametrize("counts", SKEWS.values(), ids=SKEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_rows(counts, dtype):
    """Whatever the skew, columns and spare slots included, within 3 %; while tokens come and rows go as well."""
    table, row_bytes = table_of(counts, dtype)
    assert isinstance(table, RaggedTable)
    rows = sum(map(sum, counts))
    assert table.nbytes <= 1.03 * rows * row_bytes
    batch = len(counts)
    for step in range(40):
        keys, values = torch.randn(2, batch, HEADS, 1, 64, dtype=dtype)
        table.append(keys, values, ROWS + step)
        table["score"].add_(1)
        worst = table.kernels.worst_rows(table["score"], table.positions, 0, ROWS + step + 1)
        table.evict(worst, exact=True)
        table.shrink(1)
        table.settle()
        assert table.nbytes <= 1.03 * rows * row_bytes
    assert table.row_totals() == tuple(map(sum, counts))


def test_heads_that_keep_as_many_stay_a_rectangle():
    table, _ = table_of([[7] * HEADS, [5] * HEADS], torch.float32)
    assert type(table) is TokenTable


# -- the same as a rectangle -------------------------------------------------------------------------------------------

SHARES = [Adaptive(0), Adaptive(0.3), Everywhere(0), Everywhere(0.3, normalize="z")]
MAKE = {
    "a2sf": lambda share, budget: A2SF(budget, sinks=1, recent=3, share=share),
    "max": lambda share, budget: H2O(budget, sinks=0, recent=2, group="max", kernel_size=3, share=share),
    "interval": lambda share, budget: H2O(budget, sinks=1, recent=0.25, interval=3, share=share),
    "snapkv": lambda share, budget: SnapKV(budget, sinks=1, window=4, share=share),
    "snapkv decodes": lambda share, budget: SnapKV(budget, sinks=1, window=6, recent=3, interval=1, share=share),
    "keyformer": lambda share, budget: Keyformer(budget, sinks=1, recent=3, share=share),
    "tova": lambda share, budget: TOVA(budget, recent=2, share=share),
    "knorm": lambda share, budget: Knorm(budget, sinks=1, recent=2, share=share),
    "streaming": lambda share, budget: StreamingLLM(budget, sinks=1, share=share),
    "chain": lambda share, budget: A2SF(1.0, recent=3, share=share) | SnapKV(budget, sinks=1, window=4, share=share),
    "then uniform": lambda share, budget: H2O(0.9, recent=2, share=share) | A2SF(budget, sinks=1, recent=3),
}
PACKING = {
    "kivi": lambda share, budget: A2SF(budget, sinks=1, recent=3, share=share) | KIVI(group_size=4, residual=2),
    "zipcache": lambda share, budget: A2SF(budget, sinks=1, recent=3, share=share) | ZipCache(buffer=4),
}


def run(policy: Policy, batch: dict[str, Tensor], steps: list[int], **settings: Any) -> tuple[Any, list[Tensor]]:
    pruned = PrunedCache(model(), policy, **settings)
    return pruned, list(stepwise(model(), batch, pruned, steps))


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@given(
    lengths=st.lists(st.integers(12, 30), min_size=1, max_size=2),
    padding=st.integers(0, 2),
    turn=st.integers(1, 9),
    share=st.sampled_from(SHARES),
    budget=st.one_of(st.integers(8, 16), st.sampled_from([0.3, 0.6])),
)
@profile(max_examples=max(2, profile.default.max_examples // 8))
def test_a_ragged_table_equals_a_rectangle_with_empty_slots(kernels, make, lengths, padding, turn, share, budget):
    """Prompt, generated tokens, another turn, more tokens: the same rows stay, and logits are the same."""
    policy = make(share, budget)
    batch = left_padded([length + turn + 10 for length in lengths], width=max(lengths) + turn + 10 + padding)
    steps = [max(lengths) + padding, *[1] * 5, turn, *[1] * 5]
    pruned, logits = run(policy, batch, steps, kernels=kernels)
    with rectangles():
        expected, others = run(policy, batch, steps, kernels=kernels)
    for mine, other in zip(logits, others, strict=True):
        torch.testing.assert_close(mine[:, -1], other[:, -1], atol=1e-5, rtol=1e-4)
    for row in range(len(lengths)):
        assert kept_everywhere(pruned, row) == kept_everywhere(expected, row)


@pytest.mark.parametrize("make", PACKING.values(), ids=PACKING)
@given(
    lengths=st.lists(st.integers(12, 30), min_size=1, max_size=2),
    turn=st.integers(1, 9),
    share=st.sampled_from(SHARES),
    budget=st.one_of(st.integers(8, 16), st.sampled_from([0.3, 0.6])),
)
@profile(max_examples=max(2, profile.default.max_examples // 8))
def test_packed_rows_of_heads_are_what_they_are_in_a_rectangle(make, lengths, turn, share, budget):
    """Heads pack, evict and attend to codes as if the others had as many rows, and in no more bytes."""
    policy = make(share, budget)
    batch = left_padded([length + turn + 12 for length in lengths])
    steps = [max(lengths), *[1] * 6, turn, *[1] * 6]
    pruned, logits = run(policy, batch, steps)
    with rectangles():
        expected, others = run(policy, batch, steps)
    for mine, other in zip(logits, others, strict=True):
        torch.testing.assert_close(mine[:, -1], other[:, -1], atol=5e-3, rtol=1e-3)
    for row in range(len(lengths)):
        assert kept_everywhere(pruned, row) == kept_everywhere(expected, row)


# -- all that a table can do -------------------------------------------------------------------------------------------

LENGTHS = [30, 21]
POLICIES = {
    "adaptive": A2SF(0.4, sinks=1, recent=3, share=Adaptive(0)),
    "everywhere": SnapKV(10, sinks=1, window=4, interval=1, share=Everywhere(0.1)),
    "interval": H2O(0.4, sinks=1, recent=3, interval=3, share=Adaptive(0.2)),
    "packed": A2SF(0.6, sinks=1, recent=3, share=Adaptive(0)) | KIVI(group_size=4, residual=2),
}
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def started(policy: Policy, tokens: int = 4) -> tuple[PrunedCache, dict[str, Tensor]]:
    """A cache after a prompt and some generated tokens, and what else may be fed to it."""
    pruned = PrunedCache(model(), policy)
    batch = left_padded([length + 20 for length in LENGTHS])
    feed(model(), batch, pruned, [max(LENGTHS), *[1] * tokens])
    assert any(isinstance(pruned.layers[index].table, RaggedTable) for index in pruned.pruned_layers)
    return pruned, batch


def go_on(pruned: PrunedCache, batch: dict[str, Tensor], begin: int) -> Tensor:
    """Logits of another turn and tokens after it."""
    return feed(model(), batch, pruned, [6, 1, 1, 1], begin=begin)


@policies
def test_a_fork_and_a_file_go_on_like_the_cache(policy, tmp_path: Path):
    pruned, batch = started(policy)
    fork, begin = pruned.fork(), pruned.seen_tokens
    pruned.save(tmp_path / "cache.safetensors")
    loaded = PrunedCache.load(tmp_path / "cache.safetensors", model())
    assert fork.nbytes == pruned.nbytes
    assert loaded.nbytes == pruned.nbytes
    expected = go_on(pruned, batch, begin)
    for other in (fork, loaded):
        torch.testing.assert_close(go_on(other, batch, begin), expected, atol=1e-6, rtol=1e-6)
        assert [kept_everywhere(other, row) for row in range(2)] == [kept_everywhere(pruned, row) for row in range(2)]


@policies
def test_sequences_are_repeated_reordered_and_selected(policy):
    """Sequence by sequence, with every column: what was one sequence goes on as it would have."""
    pruned, batch = started(policy)
    begin, order = pruned.seen_tokens, [1, 0, 1, 1]
    other = pruned.fork()
    other.batch_repeat_interleave(2)
    other.reorder_cache(torch.tensor([2, 1, 3, 2]))
    assert other.nbytes > pruned.nbytes
    expected = go_on(pruned, batch, begin)
    found = go_on(other, {name: tensor[order] for name, tensor in batch.items()}, begin)
    torch.testing.assert_close(found[:, -1], expected[order][:, -1], atol=5e-3 if policy.codecs else 1e-6, rtol=1e-4)
    assert [kept_everywhere(other, row) for row in range(4)] == [kept_everywhere(pruned, row) for row in order]
    other.batch_select_indices(torch.tensor([1]))
    assert kept_everywhere(other) == kept_everywhere(pruned)
    assert other.nbytes < pruned.nbytes


@policies
def test_drafts_are_taken_back(policy):
    """Tokens that `crop` takes back leave nothing, and those it accepts are as if they had been generated."""
    pruned, batch = started(policy, 2)
    begin = pruned.seen_tokens
    straight = pruned.fork()
    expected = feed(model(), batch, straight, [1, 1, 1], begin=begin)
    pruned.activate_past_recording()
    wrong = {**batch, "input_ids": batch["input_ids"].clone()}
    wrong["input_ids"][:, begin + 1 :] += 1
    wrong["input_ids"] %= 97
    feed(model(), wrong, pruned, [4], begin=begin)
    pruned.crop(-3)
    logits = feed(model(), batch, pruned, [1, 1], begin=begin + 1)
    pruned.crop(0)
    torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=5e-3 if policy.codecs else 1e-5, rtol=1e-3)
    assert [list(map(len, each)) for each in kept_everywhere(pruned)] == [
        list(map(len, each)) for each in kept_everywhere(straight)
    ]


@policies
def test_memory_is_bounded_while_tokens_are_generated(policy):
    """No head grows: what is generated takes the place of other rows."""
    pruned = PrunedCache(model(), policy)
    batch = left_padded([40 + 60])
    held = [pruned.nbytes for _ in stepwise(model(), batch, pruned, [40, *[1] * 60])]
    assert max(held[12:]) <= 1.25 * held[8] + 20 * (pruned.layers[0].table.token_bytes + 200)
    if not policy.codecs and policy.interval == 1:
        assert max(held[1:]) == held[1]


@pytest.mark.parametrize("family", ["gpt-oss", "gemma2", "qwen3-hybrid", "gpt-neox"])
def test_models_of_other_kinds(family):
    """Attention sinks, soft caps, sliding windows beside it, heads that share nothing: as with empty slots."""
    one = build(family, dtype=torch.float32 if family == "gpt-oss" else torch.float64)
    batch = left_padded([35, 35 if family == "gemma2" else 28])  # whose stock layers make NaN of padding
    found = []
    for context in (rectangles, None):
        pruned = PrunedCache(one, A2SF(0.4, sinks=1, recent=3, share=Adaptive(0)))
        if context is None:
            logits = feed(one, batch, pruned, [28, 1, 1, 3, 1, 1])
        else:
            with context():
                logits = feed(one, batch, pruned, [28, 1, 1, 3, 1, 1])
        found.append((logits[:, -1], kept_everywhere(pruned), kept_everywhere(pruned, 1)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    assert found[0][1:] == found[1][1:]


def test_texts_in_other_dtypes_stay_finite():
    for dtype in (torch.float32, torch.bfloat16):
        one = build("llama", dtype=dtype)
        pruned = PrunedCache(one, A2SF(0.4, sinks=1, recent=3, share=Adaptive(0)))
        assert feed(one, left_padded([40]), pruned, [30, *[1] * 10]).isfinite().all()


@given(shares=st.lists(st.integers(0, 9), min_size=4, max_size=4), seed=st.integers(0, 2**10))
@example(shares=[9, 0, 0, 0], seed=0)
def test_what_policies_write_comes_back_into_the_rows(shares, seed):
    """Columns as a policy sees them are the rows' own: what is written stays with the row, whatever moves."""
    counts = torch.tensor(shares).view(2, 2)
    numbers = torch.arange(10).expand(2, 2, -1)
    keys = torch.randn(2, 2, 10, 4, generator=torch.Generator().manual_seed(seed))
    table = TokenTable(keys, keys, numbers, {"score": torch.float32})
    table = RaggedTable.of(table, numbers.masked_fill(numbers >= counts[..., None], -1), 0)
    for step in range(3):
        new = torch.randn(2, 2, 1, 4)
        table.append(new, new, 10 + step)
        score = table["score"]
        score.add_(1)
        score[:, :, -1:] = table.newest_keys(1).sum(-1)
        table.settle()
    expected = table.keys.sum(-1)
    new = table.positions >= 10
    torch.testing.assert_close(table["score"][new] - (12 - table.positions[new]), expected[new].float())
    assert (table["score"][(table.positions >= 0) & ~new] == 3).all()
    assert table.row_totals() == tuple((counts + 3).sum(1).tolist())


def test_a_report_shows_that_heads_differ():
    pruned, _ = started(POLICIES["adaptive"])
    layers = pruned.report().layers
    assert any(layer.fewest_rows < layer.rows for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_loops_equal_pytorch(dtype):
    """Attention with sinks, what a policy sees and writes, rows that come and go: on heads of 1 to 700 rows."""
    if cpu.library() is None:
        pytest.skip("no compiler when kvprune was installed")
    random = torch.Generator().manual_seed(0)
    counts = torch.tensor([[3, 700, 1, 40], [9, 1, 512, 257]])
    keys, values = torch.randn(2, 2, 4, 800, 32, generator=random).to(dtype)
    numbers = torch.arange(800).expand(2, 4, -1)
    slots = numbers.masked_fill(numbers >= counts[..., None], -1)
    tables = []
    for kernels in (cpu.CPU, TORCH):
        table = TokenTable(keys, values, numbers, {"score": torch.float32}, kernels=kernels)
        tables.append(keep_rows(table, slots, 1))
    scoring = Scoring(0.3, sinks=torch.randn(8, generator=random))
    rounding = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    for step in range(3):
        new = torch.randn(2, 2, 4, 1, 32, generator=random).to(dtype)
        queries = torch.randn(2, 8, 1, 32, generator=random).to(dtype)
        found = []
        for table in tables:
            table.append(*new, torch.tensor([800 + step, 900 + step]).view(2, 1, 1))
            output, probabilities = table.kernels.flat_single_query(queries, table, scoring)
            table["score"].add_(probabilities.mean(2))
            worst = table.kernels.worst_rows(table["score"], table.positions, 0, 800 + step)
            found.append((output.float(), probabilities, table["score"].clone(), worst, table.positions.clone()))
            table.evict(worst, exact=True)
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, **rounding)
    assert tables[0].row_totals() == tables[1].row_totals() == tuple(counts.sum(1).tolist())
    torch.testing.assert_close(tables[0].keys, tables[1].keys)


WIDTHS = {
    "rotated": [RotatedCodec(2), RotatedCodec(3), RotatedCodec(8)],
    "in blocks": [Codec(2, 32, 16), Codec(4, None, None)],
    "both": [RotatedCodec(4, value_bits=2), Codec(8, 32, 16)],
    "clipped": [RotatedCodec(2, key_clip=0.95, value_clip=0.9), RotatedCodec(4, value_clip=0.9)],  # head by head
}


@pytest.mark.parametrize("codecs", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("basis", ["own", "fixed"])
def test_one_call_attends_to_packed_rows_of_heads(codecs, basis):
    """Heads of several widths, one of a single one, of none, and of no row in full precision; an evicted row in one."""
    if cpu.library() is None:
        pytest.skip("no compiler when kvprune was installed")
    random = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 2, 2, 320, 32, generator=random)
    queries = torch.randn(2, 6, 320, 32, generator=random)
    numbers = torch.arange(320).expand(2, 2, -1)
    stays = torch.tensor([[320, 41], [290, 300]])
    codec_of = torch.randint(0, len(codecs) + 1, (2, 2, 320), generator=random)  # the last for full precision
    codec_of[0, 1], codec_of[1, 0], codec_of[1, 1] = len(codecs), 0, codec_of[1, 1].clamp(max=len(codecs) - 1)
    tables = []
    for kernels in (cpu.CPU, TORCH):
        table = TokenTable(keys.clone(), values.clone(), numbers, {}, kernels=kernels)
        if basis == "own":
            seen = torch.ones(2, 320, dtype=torch.bool)
            table.turn(Basis.estimate(queries, keys, values, seen, seen[:, None].expand(-1, 2, -1)))
        table = keep_rows(table, numbers.masked_fill(numbers >= stays[..., None], -1), 1)
        there = numbers < stays[..., None]
        slots = [(codec, true_rows((codec_of == place) & there)) for place, codec in enumerate(codecs)]
        shifted = table.length - stays[..., None]  # rows of a head are its last slots
        table.quantize([(codec, torch.where(own < 0, own, own + shifted)) for codec, own in slots])
        tables.append(table)
    scoring = Scoring(0.2, sinks=torch.randn(6, generator=random))
    for step in range(3):
        new = torch.randn(2, 2, 2, 1, 32, generator=random)
        query = torch.randn(2, 6, 1, 32, generator=random)
        found = []
        for table in tables:
            if step:
                table.append(*new, 320 + step)
            if step == 2:  # a packed row goes, and leaves a hole
                table.evict(torch.tensor([[[-1], [-1]], [[table.packed_length - 1]] * 2]))
            found.append(table.kernels.ragged_single_query(query, table, scoring))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)
    assert (tables[0].native is None) == any("key_offset" in tier.tensors for tier in tables[0].packed)


def test_a_slot_that_holds_no_row_is_not_evicted():
    if cpu.library() is None:
        pytest.skip("no compiler when kvprune was installed")
    table, _ = table_of(SKEWS["some"], torch.float32)
    table._kernels = cpu.CPU
    with pytest.raises(PolicyError):
        table.evict(torch.zeros(1, HEADS, 1, dtype=torch.int64), exact=True)
