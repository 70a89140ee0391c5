"""Rows picked by the indices of each head."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune.table.rows import take_rows, top_rows, true_rows

sizes, seeds = st.integers(1, 4), st.integers(0, 2**16)
LAYOUTS = {
    "contiguous": lambda rows: rows,
    "heads last": lambda rows: rows.transpose(1, 2).contiguous().transpose(1, 2),
    "spare room": lambda rows: torch.cat([rows, rows], dim=2)[:, :, : rows.shape[2]],
    "part of wider rows": lambda rows: torch.cat([rows[..., :1], rows], dim=-1)[..., 1:],
    "every second channel": lambda rows: rows.repeat_interleave(2, dim=-1)[..., ::2],
    "one head for all": lambda rows: rows[:, :1].expand_as(rows),
    "bfloat16": lambda rows: rows.bfloat16(),
    "bool": lambda rows: rows > 0,
}


@given(
    batch=sizes, kv_heads=sizes, rows=st.integers(1, 20), dim=st.sampled_from((None, 1, 3, 8)),
    taken=st.integers(0, 30),
    layout=st.sampled_from(list(LAYOUTS)), begins=st.integers(0, 2), seed=seeds,
)  # fmt: skip
def test_rows_are_taken_from_any_layout(batch, kv_heads, rows, dim, taken, layout, begins, seed):
    """Each head gets its own rows, in the order of its index, also the same one twice, and no memory is shared."""
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(batch, kv_heads, begins + rows, dim or 4, generator=random)
    tensor = LAYOUTS[layout](tensor)[:, :, begins:]
    if dim is None:
        tensor = tensor[..., 0]
    index = torch.randint(0, rows, (batch, kv_heads, taken), generator=random)
    found = take_rows(tensor, index)
    assert found.is_contiguous()
    assert found.shape == (batch, kv_heads, taken, *tensor.shape[3:])
    assert found.untyped_storage().nbytes() == found.nbytes
    for sequence in range(batch):
        for head in range(kv_heads):
            assert torch.equal(found[sequence, head], tensor[sequence, head][index[sequence, head]])


def test_no_rows_are_taken_from_none():
    """A table may hold no row in full precision."""
    index = torch.empty(2, 3, 0, dtype=torch.long)
    assert take_rows(torch.empty(2, 3, 0, 8), index).shape == (2, 3, 0, 8)


@given(batch=sizes, kv_heads=sizes, rows=st.integers(0, 20), first=st.integers(0, 5), share=st.floats(0, 1), seed=seeds)
def test_indices_of_true(batch, kv_heads, rows, first, share, seed):
    """Ascending in each head, with -1 behind them where another head has more."""
    chosen = torch.rand(batch, kv_heads, rows, generator=torch.Generator().manual_seed(seed)) < share
    found = true_rows(chosen, first)
    for mine, expected in zip(found.flatten(0, 1), chosen.flatten(0, 1), strict=True):
        held = expected.nonzero()[:, 0] + first
        assert mine.tolist() == held.tolist() + [-1] * (len(mine) - len(held))
    assert found.shape[2] == (chosen.sum(-1).max() if rows else 0)


@given(batch=sizes, kv_heads=sizes, rows=st.integers(1, 20), data=st.data(), seed=seeds)
def test_rows_of_highest_rank(batch, kv_heads, rows, data, seed):
    """As many as were asked for, for all sequences or each its own, and none of them ranks below another row."""
    random = torch.Generator().manual_seed(seed)
    ranks = torch.rand(batch, kv_heads, rows, generator=random).argsort(-1) - rows // 2
    counts = data.draw(st.lists(st.integers(0, rows), min_size=batch, max_size=batch))
    for count in (counts[0], torch.tensor(counts).view(-1, 1, 1)):
        best = top_rows(ranks, count)
        assert (best.sum(-1, keepdim=True) == count).all()
        lowest = ranks.masked_fill(~best, rows).amin(-1)
        assert (ranks.masked_fill(best, -rows).amax(-1) < lowest).all()
