"""Quantizers and packed rows: against the formulas in numpy, and what must hold whatever the numbers are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor

from kvprune import PolicyError
from kvprune.table import packed_rows
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import BITS, Codec, pack, packed_bytes, unpack

thorough = profile(max_examples=6 * profile.default.max_examples)

LARGEST = 65504.0  # of float16

# -- strategies --------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**16)
bits = st.sampled_from(BITS)
codecs = st.builds(
    Codec,
    bits=bits,
    tokens=st.one_of(st.none(), st.integers(1, 9)),
    channels=st.one_of(st.none(), st.integers(1, 9)),
    separable=st.booleans(),
)
shapes = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))
"""Sequences, KV heads, rows, and the dims of keys and values."""


def outliers(numbers: Tensor) -> Tensor:
    """The first channel is a hundred times as large as the others."""
    return numbers * torch.where(torch.arange(numbers.shape[-1]) == 0, 100.0, 1.0)


KINDS = {
    "normal": lambda numbers: numbers,
    "outliers": outliers,
    "far from zero": lambda numbers: numbers + 40,
    "zero": torch.zeros_like,
    "constant": lambda numbers: torch.full_like(numbers, -3.14159),
    "constant rows": lambda numbers: numbers[..., :1].expand_as(numbers).clone(),
    "constant channels": lambda numbers: numbers[:, :, :1].expand_as(numbers).clone(),
    "tiny": lambda numbers: numbers * 1e-7,
    "denormal": lambda numbers: numbers * 1e-40,
    "large": lambda numbers: numbers * 1e4,
    "too large for float16": lambda numbers: numbers * 1e6,
}
kinds = st.sampled_from(list(KINDS))


def draw(shape: tuple[int, ...], kind: str = "normal", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of a kind."""
    *rows, key_dim, value_dim = shape
    random = torch.Generator().manual_seed(seed)
    return tuple(KINDS[kind](torch.randn(*rows, dim, generator=random)) for dim in (key_dim, value_dim))


def codes_of(packed: PackedRows, name: str) -> Tensor:
    dim = packed.key_dim if name == "key" else packed.value_dim
    return unpack(packed.tensors[f"{name}_codes"], packed.codec.bits, dim)


def blocks_of(codec: Codec, rows: int) -> list[slice]:
    size = codec.tokens or rows
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


# -- bits --------------------------------------------------------------------------------------------------------------


@thorough
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    count=st.integers(1, 70),
    lead=st.lists(st.integers(1, 3), max_size=3),
    seed=seeds,
)
def test_unpacking_gives_what_was_packed(bits, count, lead, seed):
    """Codes of any width and number come back, from as few bytes as hold them."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (*lead, count), generator=random, dtype=torch.uint8)
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, packed_bytes(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)
    assert torch.equal(codes, before)


@pytest.mark.parametrize(("bits", "size"), [(1, 13), (2, 25), (3, 38), (4, 50), (8, 100)])
def test_bytes_of_a_hundred_codes(bits, size):
    """b bits a code, rounded up to bytes; three bits are stored as two and one."""
    assert packed_bytes(100, bits) == size


# -- the formulas ------------------------------------------------------------------------------------------------------


def rounded_down(numbers):
    """The largest float16 that is not above."""
    half = numbers.astype(np.float16)
    with np.errstate(over="ignore"):  # below the lowest, where it is not asked for
        return np.where(half.astype(np.float32) > numbers, np.nextafter(half, np.float16(-np.inf)), half)


def quantized(numbers, bits, axis):
    """Codes, scale and zero point of numbers that share them along an axis: in float32, parameters in float16."""
    levels = np.float32(2**bits - 1)
    zero = rounded_down(numbers.min(axis, keepdims=True)).astype(np.float32)
    scale = -rounded_down(-(numbers.max(axis, keepdims=True) - zero) / levels).astype(np.float32)
    codes = np.rint((numbers - zero) / np.where(scale > 0, scale, np.float32(1)))
    return np.clip(codes, 0, levels), scale, zero


@thorough
@given(shape=shapes, codec=codecs, kind=kinds, seed=seeds)
def test_codes_and_parameters_are_those_of_the_formulas(shape, codec, kind, seed):
    """Bit for bit: channels of keys over blocks of tokens, values by token over groups of channels."""
    keys, values = draw(shape, kind, seed)
    packed = PackedRows.encode(codec, keys, values)
    found_keys, found_values = packed.decoded()
    value_dim = shape[4]
    for sequence in range(shape[0]):
        for head in range(shape[1]):
            at = sequence, head
            for number, rows in enumerate(blocks_of(codec, shape[2])):
                block = np.clip(keys[at][rows].numpy(), -LARGEST, LARGEST)
                codes, scale, zero = quantized(block, codec.bits, 0)
                assert (codes_of(packed, "key")[at][rows].numpy() == codes).all()
                assert (packed.tensors["key_scale"][at][number].numpy() == scale).all()
                assert (packed.tensors["key_zero_point"][at][number].numpy() == zero).all()
                np.testing.assert_allclose(found_keys[at][rows], codes * scale + zero, atol=1e-6 * np.abs(zero).max())
                block = np.clip(values[at][rows].numpy(), -LARGEST, LARGEST)
                channels = np.ones(value_dim, np.float32)
                if codec.separable:
                    roots = np.sqrt(np.abs(block).max(0))
                    channels = packed.tensors["channel_scale"][at][number].float().numpy()
                    # Square roots differ in their last bit from one library to another, and so, rarely, in float16.
                    np.testing.assert_allclose(channels, np.where(roots < 2**-25, 1, roots), rtol=1e-3, atol=2**-24)
                size = codec.channels or value_dim
                for group, first in enumerate(range(0, value_dim, size)):
                    some = slice(first, min(value_dim, first + size))
                    codes, scale, zero = quantized(block[:, some] / channels[some], codec.bits, 1)
                    assert (codes_of(packed, "value")[at][rows, some].numpy() == codes).all()
                    assert (packed.tensors["value_scale"][at][rows, group].numpy() == scale[:, 0]).all()
                    expected = (codes * scale + zero) * channels[some]
                    rounding = 1e-6 * np.abs(zero * channels[some]).max()
                    np.testing.assert_allclose(found_values[at][rows, some], expected, atol=rounding)


def steps_of(packed: PackedRows) -> tuple[Tensor, Tensor]:
    """The distance of two neighbouring codes, for each element of keys and values, from what is stored."""
    rows = packed.tensors["value_codes"].shape[:3]
    block = packed.tensors.get("block", torch.zeros(rows, dtype=torch.uint8)).long()[..., None]
    keys = packed.tensors["key_scale"].float().take_along_dim(block, dim=2)
    values = packed.tensors["value_scale"].float().repeat_interleave(packed.codec.channels or packed.value_dim, dim=3)
    values = values[..., : packed.value_dim]
    if packed.codec.separable:
        values = values * packed.tensors["channel_scale"].float().take_along_dim(block, dim=2)
    return keys, values


@thorough
@given(shape=shapes, codec=codecs, kind=kinds, seed=seeds)
def test_no_element_is_off_by_more_than_half_a_step(shape, codec, kind, seed):
    """|x - x^| is at most scale / 2 for keys and values, c_j * scale / 2 for channel-separable values."""
    originals = draw(shape, kind, seed)
    packed = PackedRows.encode(codec, *originals)
    for original, found, step in zip(originals, packed.decoded(), steps_of(packed), strict=True):
        assert found.isfinite().all()
        within = original.clamp(-LARGEST, LARGEST)
        # Arithmetic is float32; a channel scale is rounded to float16 before it divides, so it costs nothing.
        assert ((within - found).abs() <= step / 2 * (1 + 1e-5) + within.abs() * 1e-6 + 1e-30).all()


@thorough
@given(shape=shapes, codec=codecs, kind=kinds, seed=seeds)
def test_parameters_are_not_larger_than_they_must_be(shape, codec, kind, seed):
    """Rounding outwards costs a scale little: 2**bits - 1 steps span the numbers and hardly more."""
    keys, _ = draw(shape, kind, seed)
    packed = PackedRows.encode(codec, *draw(shape, kind, seed))
    for number, rows in enumerate(blocks_of(codec, shape[2])):
        block = keys[:, :, rows].clamp(-LARGEST, LARGEST)
        span = block.amax(2) - block.amin(2)
        spanned = packed.tensors["key_scale"][:, :, number].float() * (2**codec.bits - 1)
        slack = 2e-3 * (span + block.abs().amax(2)) + 2e-7 * 2**codec.bits
        assert ((spanned >= span * (1 - 1e-6)) & (spanned <= span + slack)).all()


@given(separable=st.booleans(), kind=st.sampled_from(["normal", "outliers", "far from zero"]), seed=seeds)
def test_more_bits_are_no_worse(separable, kind, seed):
    """The mean error falls with every bit, of keys and of values."""
    originals = draw((1, 2, 64, 16, 16), kind, seed)
    before = None
    for bits in BITS:
        packed = PackedRows.encode(Codec(bits, separable=separable), *originals)
        errors = [(a - b).abs().mean().item() for a, b in zip(originals, packed.decoded(), strict=True)]
        if before is not None:
            assert all(now < then for now, then in zip(errors, before, strict=True))
        before = errors


def test_dividing_channels_helps_where_one_is_an_outlier():
    """Channel-separable values are more exact than plain ones where a channel is far larger than the others."""
    keys, values = draw((1, 1, 200, 8, 32), "outliers")
    errors = {}
    for separable in (False, True):
        packed = PackedRows.encode(Codec(4, separable=separable), keys, values)
        errors[separable] = (values - packed.decoded()[1])[..., 1:].abs().mean()
    assert errors[True] < errors[False] / 2


@pytest.mark.parametrize("kind", ["zero", "constant", "constant rows", "constant channels"])
@given(shape=shapes, codec=codecs, seed=seeds)
def test_what_does_not_vary_is_kept_but_for_float16(kind, shape, codec, seed):
    """Numbers that share a value come back as that value, to the precision of float16."""
    keys, values = draw(shape, kind, seed)
    packed = PackedRows.encode(codec, keys, values)
    found_keys, found_values = packed.decoded()
    if kind != "constant rows":
        torch.testing.assert_close(found_keys, keys, atol=1e-6, rtol=2e-3)
    if kind != "constant channels" and not codec.separable:
        torch.testing.assert_close(found_values, values, atol=1e-6, rtol=2e-3)
    if kind == "zero":
        assert (found_values == 0).all()


@thorough
@given(shape=shapes, codec=codecs, seed=seeds, data=st.data())
def test_numbers_that_are_none_stay_finite(shape, codec, seed, data):
    """NaN counts as 0 and infinity as the largest float16, also for their neighbours."""
    originals = draw(shape, seed=seed)
    replaced = []
    for tensor in originals:
        for value in (torch.nan, torch.inf, -torch.inf):
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value
        replaced.append(tensor.nan_to_num(nan=0.0, posinf=LARGEST, neginf=-LARGEST))
    packed, same = PackedRows.encode(codec, *originals), PackedRows.encode(codec, *replaced)
    assert all(tensor.isfinite().all() for tensor in (*packed.decoded(), *packed.tensors.values()))
    for name, tensor in same.tensors.items():
        assert torch.equal(packed.tensors[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@given(shape=shapes, codec=codecs, seed=seeds)
def test_any_dtype_is_quantized_in_float32(dtype, shape, codec, seed):
    """Keys and values of another dtype give the codes of the same numbers in float32."""
    keys, values = (tensor.to(dtype) for tensor in draw(shape, seed=seed))
    packed, same = PackedRows.encode(codec, keys, values), PackedRows.encode(codec, keys.float(), values.float())
    for name, tensor in same.tensors.items():
        assert torch.equal(packed.tensors[name], tensor)


# -- what shares parameters with what ----------------------------------------------------------------------------------


@thorough
@given(shape=shapes, codec=codecs, seed=seeds, order=st.randoms(use_true_random=False))
def test_permuting_the_tokens_of_a_block_permutes_codes(shape, codec, seed, order):
    """Tokens that change places within their block take their codes along; nothing else changes."""
    keys, values = draw(shape, seed=seed)
    index = []
    for block in blocks_of(codec, shape[2]):
        rows = list(range(block.start, block.stop))
        order.shuffle(rows)
        index += rows
    packed = PackedRows.encode(codec, keys, values)
    moved = PackedRows.encode(codec, keys[:, :, index], values[:, :, index])
    for name, tensor in packed.tensors.items():
        of_blocks = name in ("key_scale", "key_zero_point", "channel_scale", "block")
        assert torch.equal(moved.tensors[name], tensor if of_blocks else tensor[:, :, index])


@thorough
@given(shape=shapes, codec=codecs, seed=seeds, order=st.randoms(use_true_random=False))
def test_permuting_channels_permutes_codes(shape, codec, seed, order):
    """Channels of keys, and of values within their group, take their codes along."""
    keys, values = draw(shape, seed=seed)
    of_keys = list(range(shape[3]))
    order.shuffle(of_keys)
    of_values, size = [], codec.channels or shape[4]
    for first in range(0, shape[4], size):
        channels = list(range(first, min(shape[4], first + size)))
        order.shuffle(channels)
        of_values += channels
    packed = PackedRows.encode(codec, keys, values)
    moved = PackedRows.encode(codec, keys[..., of_keys], values[..., of_values])
    assert torch.equal(codes_of(moved, "key"), codes_of(packed, "key")[..., of_keys])
    assert torch.equal(moved.tensors["key_scale"], packed.tensors["key_scale"][..., of_keys])
    assert torch.equal(codes_of(moved, "value"), codes_of(packed, "value")[..., of_values])
    assert torch.equal(moved.tensors["value_scale"], packed.tensors["value_scale"])


@thorough
@given(shape=shapes, codec=codecs, seed=seeds)
def test_sequences_and_heads_share_nothing(shape, codec, seed):
    """A KV head of a sequence has the codes and parameters that it has alone."""
    keys, values = draw(shape, seed=seed)
    packed = PackedRows.encode(codec, keys, values)
    for sequence in range(shape[0]):
        for head in range(shape[1]):
            one = slice(sequence, sequence + 1), slice(head, head + 1)
            alone = PackedRows.encode(codec, keys[one], values[one])
            for name, tensor in alone.tensors.items():
                assert torch.equal(packed.tensors[name][one], tensor)


@thorough
@given(shape=shapes, codec=codecs, seed=seeds, garbage=st.sampled_from([0.0, 1e9, -1e9, torch.nan, torch.inf]))
def test_empty_rows_influence_nothing(shape, codec, seed, garbage):
    """What lies in empty rows reaches neither parameters nor codes of the others, and empty rows decode finitely."""
    keys, values = draw(shape, seed=seed)
    empty = torch.rand(shape[:3], generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = PackedRows.encode(codec, keys, values, empty)
    other = PackedRows.encode(codec, *(t.masked_fill(empty[..., None], garbage) for t in (keys, values)), empty)
    for name, tensor in packed.tensors.items():
        rows = slice(None) if name in ("key_scale", "key_zero_point", "channel_scale") else ~empty
        assert torch.equal(other.tensors[name][rows], tensor[rows])
    assert all(tensor.isfinite().all() for tensor in other.decoded())


@thorough
@given(shape=shapes, codec=codecs, seed=seeds)
def test_empty_rows_are_as_if_they_were_not_there(shape, codec, seed):
    """Rows that are quantized together with empty ones have the codes that they have without them."""
    codec = replace(codec, tokens=None)
    keys, values = (tensor[:1, :1] for tensor in draw(shape, seed=seed))
    filled = torch.rand(shape[2], generator=torch.Generator().manual_seed(seed)) < 0.6
    filled[0] = True
    packed = PackedRows.encode(codec, keys, values, ~filled[None, None])
    alone = PackedRows.encode(codec, keys[:, :, filled], values[:, :, filled])
    for mine, theirs in zip(packed.decoded(), alone.decoded(), strict=True):
        assert torch.equal(mine[:, :, filled], theirs)


@given(shape=shapes, codec=codecs, seed=seeds, data=st.data())
def test_values_by_token_do_not_depend_on_who_is_packed_with_them(shape, codec, seed, data):
    """At equal bits, any split of the tokens into two packs leaves plain values as they come in one."""
    codec = replace(codec, separable=False)
    keys, values = draw(shape, seed=seed)
    first = torch.tensor(data.draw(st.lists(st.booleans(), min_size=shape[2], max_size=shape[2])))
    together = PackedRows.encode(codec, keys, values).decoded()[1]
    for some in (first, ~first):
        if some.any():
            apart = PackedRows.encode(codec, keys[:, :, some], values[:, :, some])
            assert torch.equal(apart.decoded()[1], together[:, :, some])


# -- rows --------------------------------------------------------------------------------------------------------------


@thorough
@given(shape=shapes, codec=codecs, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=seeds)
def test_rows_that_are_appended_leave_the_others(shape, codec, sizes, seed):
    """Whatever is packed later, every row decodes bit for bit to what it was when it was packed."""
    packed, expected = None, []
    for number, size in enumerate(sizes):
        new = PackedRows.encode(codec, *draw((*shape[:2], size, *shape[3:]), seed=seed + number))
        expected.append(new.decoded())
        if packed is None:
            packed = new
        else:
            packed.append(new)
    for found, parts in zip(packed.decoded(), zip(*expected, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts, dim=2))


@pytest.mark.parametrize("more", [1, 60, 33_000])
def test_rows_of_very_many_blocks(more):
    """Block numbers outgrow a byte, and two, and rows still decode to what they did."""
    parts = [draw((1, 1, count, 2, 2), seed=count) for count in (200, more)]
    codec = Codec(8, tokens=1, separable=True)
    packed, new = (PackedRows.encode(codec, *part) for part in parts)
    expected = [torch.cat(both, dim=2) for both in zip(packed.decoded(), new.decoded(), strict=True)]
    packed.append(new)
    assert packed.blocks == 200 + more
    assert all(torch.equal(found, then) for found, then in zip(packed.decoded(), expected, strict=True))
    last = torch.arange(150, 201)[None, None]
    packed.keep(last, torch.zeros_like(last, dtype=torch.bool))
    assert packed.tensors["block"].dtype == torch.uint8
    assert all(torch.equal(found, then[:, :, 150:201]) for found, then in zip(packed.decoded(), expected, strict=True))


@thorough
@given(shape=shapes, codec=codecs, seed=seeds, data=st.data())
def test_rows_that_are_kept_decode_as_before(shape, codec, seed, data):
    """Any rows, in any order and each head its own, keep what they decode to; parameters nobody needs are freed."""
    batch, heads, count = shape[:3]
    packed = PackedRows.encode(codec, *draw(shape, seed=seed))
    packed.append(PackedRows.encode(codec, *draw(shape, seed=seed + 1)))
    before = packed.decoded()
    stay = data.draw(st.integers(1, 2 * count))
    random = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(2 * count, generator=random)[:stay] for _ in range(batch * heads)])
    rows = rows.view(batch, heads, stay)
    empty = torch.rand(rows.shape, generator=random) < 0.3
    empty[0, 0, 0] = False
    blocks = set(packed.tensors["block"].gather(2, rows)[~empty].tolist())
    packed.keep(rows, empty)
    for found, then in zip(packed.decoded(), before, strict=True):
        assert torch.equal(found[~empty], then.gather(2, rows[..., None].expand(-1, -1, -1, then.shape[3]))[~empty])
    assert packed.blocks == len(blocks)


@thorough
@given(shape=shapes, codec=codecs, appended=st.booleans(), seed=seeds)
@example(shape=(1, 1, 10, 8, 8), codec=Codec(4, tokens=8), appended=False, seed=0)  # a slice of one head is contiguous
def test_bytes_are_those_that_a_codec_foretells(shape, codec, appended, seed):
    """A row costs what `row_bytes` says, or up to two bytes less, a block what `block_bytes` says; all in storages."""
    packed = PackedRows.encode(codec, *draw(shape, seed=seed))
    if appended:
        packed.append(PackedRows.encode(codec, *draw(shape, seed=seed + 1)))
    held = sum(tensor.untyped_storage().nbytes() for tensor in packed.tensors.values())
    each_head, dims = shape[0] * shape[1], shape[3:]
    of_blocks = each_head * packed.blocks * codec.block_bytes(*dims)
    of_rows = each_head * len(packed) * codec.row_bytes(*dims)
    assert of_blocks + of_rows - 2 * each_head * len(packed) <= held <= of_blocks + of_rows
    codes = each_head * len(packed) * sum(packed_bytes(dim, codec.bits) for dim in dims)
    assert packed.code_nbytes == codes


@given(shape=shapes, codec=codecs, seed=seeds, data=st.data())
def test_sequences_are_selected_and_copied(shape, codec, seed, data):
    """Selected sequences, repeated or not, and clones decode as before and share nothing."""
    packed = PackedRows.encode(codec, *draw(shape, seed=seed))
    before = packed.decoded()
    index = data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=4))
    selected, clone = packed.select_batch(torch.tensor(index)), packed.clone()
    for tensor in packed.tensors.values():
        tensor.zero_()
    assert all(torch.equal(found, then[index]) for found, then in zip(selected.decoded(), before, strict=True))
    assert all(torch.equal(found, then) for found, then in zip(clone.decoded(), before, strict=True))


def some_of(packed: PackedRows, share: float, random: torch.Generator) -> Tensor:
    """Rows to keep, in order, as many of every head."""
    count = max(1, round(share * len(packed)))
    order = torch.rand(packed.tensors["key_codes"].shape[:3], generator=random).argsort(-1)
    return order[:, :, :count].sort(-1).values


@thorough
@given(
    shape=shapes, more=st.lists(st.integers(1, 9), max_size=3), share=st.one_of(st.none(), st.floats(0, 1)),
    codec=codecs, block_bytes=st.integers(1, 4000), seed=seeds,
)  # fmt: skip
def test_products_with_rows_are_those_with_what_they_decode_to(shape, more, share, codec, block_bytes, seed):
    """Rows decoded a few at a time, q.k and weighted sums are those of all rows decoded by their block numbers."""
    random = torch.Generator().manual_seed(seed)
    packed = PackedRows.encode(codec, *draw(shape, seed=seed))
    for number, size in enumerate(more):
        packed.append(PackedRows.encode(codec, *draw((*shape[:2], size, *shape[3:]), seed=seed + 1 + number)))
    if share is not None:
        kept = some_of(packed, share, random)
        packed.keep(kept, torch.zeros(kept.shape, dtype=torch.bool))
    keys, values = packed.decoded()
    queries = torch.randn(*shape[:2], 3, shape[3], generator=random)
    weights = torch.rand(*shape[:2], 3, len(packed), generator=random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packed_rows._BLOCK_BYTES, "cpu", block_bytes)
        rows = [range(one.rows.start, one.rows.stop) for one in packed.stretches()]
        assert [row for some in rows for row in some] == list(range(len(packed)))
        assert torch.equal(torch.cat([packed.keys(one) for one in packed.stretches()], dim=2), keys)
        assert torch.equal(torch.cat([packed.values(one) for one in packed.stretches()], dim=2), values)
        products, sums = packed.dot_keys(queries), packed.sum_values(weights)
    torch.testing.assert_close(products, queries @ keys.transpose(2, 3), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sums, weights @ values, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 16, None, "4"])
def test_bits_that_no_codec_has(bits):
    """A codec takes 2, 3, 4 or 8 bits, and says so."""
    with pytest.raises(PolicyError, match=f"{bits!r} bits are not supported: choose 2, 3, 4 or 8"):
        Codec(bits)
