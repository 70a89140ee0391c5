"""Triton's attention of one query per sequence, dense, flattened and packed, against its twins in PyTorch."""

from __future__ import annotations

import pytest
import torch
from devices import DTYPES, EXACT, OUTPUT, interpreted, on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed import cases, seeds
from test_rotated import basis_of
from test_rotated import tokens as correlated
from torch import Tensor

from kvprune import PolicyError, Scoring, TokenTable
from kvprune.attention import packed
from kvprune.attention.softmax import single_query_attention
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.ragged import keep_rows
from kvprune.table.rotated_rows import RotatedCodec

pytest.importorskip("triton", reason="needs Triton: pip install triton")
from kvprune.kernels import TORCH
from kvprune.kernels import gpu as kernels
from kvprune.kernels.cuda import TRITON
from kvprune.kernels.gpu import splits

SHAPES = {
    "one of all": (1, 1, 1, 1, 16, 16),
    "groups of three, dim 80": (2, 2, 3, 70, 80, 96),
    "two splits, more heads than a tile": (1, 1, 17, 300, 32, 16),
    "tiny dims": (1, 2, 5, 33, 5, 3),
}
SCORES = [None, "probabilities", "mean", "max"]


def tokens(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `(B, Hkv, G, S, D, Dv)`."""
    batch, kv_heads, group, slots, dim, value_dim = shape
    queries = torch.randn(batch, kv_heads * group, 1, dim)
    keys, values = torch.randn(batch, kv_heads, slots, dim), torch.randn(batch, kv_heads, slots, value_dim)
    return tuple(tensor.to(device, dtype) for tensor in (queries, keys, values))


def reduced(probabilities: Tensor, scores: str | None) -> Tensor | None:
    """What is to be returned of probabilities `[B, Hkv, G, S]`."""
    if scores is None or scores == "probabilities":
        return None if scores is None else probabilities
    return probabilities.mean(2) if scores == "mean" else probabilities.amax(2)


def assert_alike(found, twin, scores: str | None, output=EXACT) -> None:
    """Both are an output and either scores or None; the twin's are always probabilities."""
    torch.testing.assert_close(found[0].float(), twin[0].float(), **output)
    expected = reduced(twin[1], scores)
    if expected is None:
        assert found[1] is None
    else:
        torch.testing.assert_close(found[1], expected, **EXACT)


def lengths_of(batch: int, kv_heads: int, slots: int, device: str) -> Tensor:
    """Different numbers of rows, from one to all."""
    return torch.linspace(1, slots, batch * kv_heads).int().view(batch, kv_heads).to(device)


# -- rows in full precision --------------------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scores", SCORES)
def test_dense(device, shape, scores):
    """Output and scores are the twin's, with empty slots, a soft cap and attention sinks."""
    queries, keys, values = tokens(shape, device)
    empty = torch.rand(keys.shape[:3]).to(device) < 0.3
    scoring = Scoring(0.3, 3.0, torch.randn(queries.shape[1]).to(device))
    found = kernels.decode_attention(queries, keys, values, scoring, empty=empty, scores=scores)
    assert_alike(found, single_query_attention(queries, keys, values, scoring, empty, True), scores)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device, dtype):
    """Scores are float32 whatever comes in; outputs have its dtype."""
    queries, keys, values = tokens((1, 2, 4, 130, 80, 96), device, dtype)
    scoring = Scoring(80**-0.5)
    found = kernels.decode_attention(queries, keys, values, scoring, scores="probabilities")
    assert found[0].dtype == dtype
    twin = single_query_attention(queries, keys, values, scoring, None, True)
    assert_alike(found, twin, "probabilities", OUTPUT[dtype])


@on_devices
def test_positions_say_what_is_empty(device):
    """Positions below zero mean what flags mean, in any order and with any strides."""
    queries, keys, values = tokens((2, 2, 2, 40, 16, 16), device)
    positions = torch.stack([torch.randperm(64)[:44] - 20 for _ in range(4)]).view(2, 2, 44).int().to(device)[..., 2:42]
    for scores in SCORES:
        by_position = kernels.decode_attention(queries, keys, values, Scoring(0.3), empty=positions, scores=scores)
        by_flag = kernels.decode_attention(queries, keys, values, Scoring(0.3), empty=positions < 0, scores=scores)
        torch.testing.assert_close(by_position, by_flag, atol=0, rtol=0)


@on_devices
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("slots", [20, 300])
def test_rows_behind_a_heads_length_are_not_read(device, scores, slots):
    """A head with fewer rows than others sees its own; what lies behind may be anything, and its scores are zero."""
    queries, keys, values = tokens((2, 2, 2, slots, 16, 16), device)
    lengths = lengths_of(2, 2, slots, device)
    behind = torch.arange(slots, device=device) >= lengths[..., None]
    twin = single_query_attention(queries, keys, values, Scoring(0.3), behind, True)
    keys[behind], values[behind] = torch.nan, torch.nan
    found = kernels.decode_attention(queries, keys, values, Scoring(0.3), lengths=lengths, scores=scores)
    assert_alike(found, twin, scores)


@on_devices
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("longest", [70, 90])
def test_flattened(device, scores, longest):
    """Heads one after another, with no padding between; the longest may be given too high."""
    queries, keys, values = tokens((2, 2, 3, 70, 20, 12), device)
    lengths = lengths_of(2, 2, 70, device)
    there = torch.arange(70, device=device) < lengths[..., None]
    scoring = Scoring(0.3, None, torch.randn(6).to(device))
    twin = single_query_attention(queries, keys, values, scoring, ~there, True)
    starts = torch.cat([lengths.new_zeros(1), lengths.flatten().cumsum(0).int()])
    flat = keys[there], values[there]
    output, found = kernels.varlen_decode_attention(queries, *flat, scoring, starts, longest, scores=scores)
    torch.testing.assert_close(output, twin[0], **EXACT)
    expected = reduced(twin[1], scores)
    if scores == "probabilities":
        torch.testing.assert_close(found, expected.permute(2, 0, 1, 3)[:, there], **EXACT)
    elif expected is not None:
        torch.testing.assert_close(found, expected[there], **EXACT)


@on_devices
def test_a_query_that_sees_nothing(device):
    """Output and scores of a head without any row are zero, even if another has rows."""
    queries, keys, values = tokens((1, 2, 2, 20, 16, 16), device)
    lengths = torch.tensor([[0, 20]], dtype=torch.int32, device=device)
    empty = torch.arange(2, device=device)[None, :, None].expand(1, 2, 20) == 0
    for settings_ in ({"lengths": lengths}, {"empty": empty}):
        output, scores = kernels.decode_attention(queries, keys, values, Scoring(0.3), scores="mean", **settings_)
        assert (output[:, :2] == 0).all()
        assert (scores[:, 0] == 0).all()
        torch.testing.assert_close(scores[:, 1].sum(), torch.tensor(1.0, device=device))


@on_devices
@given(seed=seeds, size=st.sampled_from([16, 48]), slots=st.integers(1, 90))
def test_splits_change_nothing(device, seed, size, slots):
    """However many splits there are, output and scores are the same to rounding."""
    torch.manual_seed(seed)
    queries, keys, values = tokens((1, 2, 2, slots, 8, 8), device)
    whole = kernels.decode_attention(queries, keys, values, Scoring(1.0), scores="max")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "_LEAST_STRETCH", size)
        split = kernels.decode_attention(queries, keys, values, Scoring(1.0), scores="max")
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-5)


def test_unknown_scores():
    """Other scores than the four are an error."""
    with pytest.raises(PolicyError, match="scores must be None or one of"):
        kernels.decode_attention(*tokens(SHAPES["one of all"], "cpu"), Scoring(1.0), scores="sum")


# -- packed rows -------------------------------------------------------------------------------------------------------

CODECS = {
    "2 bits": Codec(2),
    "2 bits, groups both ways": Codec(2, tokens=16, channels=32),
    "3 bits": Codec(3, tokens=20),
    "4 bits, separable": Codec(4, separable=True),
    "4 bits, odd groups": Codec(4, tokens=7, channels=5),
    "8 bits, separable blocks": Codec(8, tokens=16, separable=True),
}


def tier_of(codec: Codec, rows: int, key_dim: int, value_dim: int, device: str, *, heads: int = 2) -> PackedRows:
    """Random rows of one sequence."""
    keys, values = torch.randn(1, heads, rows, key_dim), torch.randn(1, heads, rows, value_dim)
    return PackedRows.encode(codec, keys.to(device), values.to(device))


def dense_twin(queries: Tensor, tiers: list[PackedRows], keys: Tensor, values: Tensor, scoring: Scoring, empty=None):
    """Attention over what the rows stand for, in the dtype of the queries."""
    decoded = [tier.decoded() for tier in tiers]
    keys = torch.cat([*(pair[0].to(keys.dtype) for pair in decoded), keys], dim=2)
    values = torch.cat([*(pair[1].to(values.dtype) for pair in decoded), values], dim=2)
    return single_query_attention(queries, keys, values, scoring, empty, True)


@interpreted
@settings(max_examples=3 * settings.default.max_examples)
@given(case=cases(most_queries=1, padding=False), scores=st.sampled_from(SCORES))
def test_packed_tables(case, scores):
    """Any table, of up to three tiers with holes, gives the output and the scores of its twin."""
    table = case.table
    queries, empty = case.queries[:, :, :1], None if table.dense else table.positions
    found = kernels.packed_decode_attention(
        queries, table.packed, table.keys, table.values, case.scoring, empty=empty, scores=scores
    )
    assert_alike(found, packed.single_query(queries, table, case.scoring), scores)


@on_devices
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dims", [(64, 64), (80, 20)], ids=str)
def test_codecs(device, codec, dims):
    """Every width of codes, and parameters of rows, blocks, groups of channels and channels."""
    queries, keys, values = tokens((1, 2, 3, 10, *dims), device)
    tiers = [tier_of(codec, 50, *dims, device), tier_of(Codec(2), 5, *dims, device)]
    tiers[0].append(tier_of(codec, 20, *dims, device))
    empty = torch.rand(1, 2, 85).to(device) < 0.2
    scoring = Scoring(0.2, 5.0, torch.randn(6).to(device))
    found = kernels.packed_decode_attention(queries, tiers, keys, values, scoring, empty=empty, scores="probabilities")
    assert_alike(found, dense_twin(queries, tiers, keys, values, scoring, empty), "probabilities")


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_dtypes(device, dtype):
    """Decoded rows are rounded to the dtype of the queries, as the dense cache would hold them."""
    queries, keys, values = tokens((1, 2, 4, 3, 96, 96), device, dtype)
    tiers = [tier_of(Codec(4, separable=True), 70, 96, 96, device)]
    found = kernels.packed_decode_attention(queries, tiers, keys, values, Scoring(0.1), scores="mean")
    twin = dense_twin(queries, tiers, keys, values, Scoring(0.1))
    torch.testing.assert_close(found[0], twin[0], **OUTPUT[dtype])
    torch.testing.assert_close(found[1], twin[1].mean(2), **OUTPUT[dtype])


@on_devices
@pytest.mark.parametrize("loose", [0, 12])
def test_packed_lengths(device, loose):
    """Heads with their own numbers of rows in each tier and in full precision."""
    queries, keys, values = tokens((1, 2, 2, loose, 16, 16), device)
    tiers = [tier_of(Codec(2), 30, 16, 16, device), tier_of(Codec(4), 9, 16, 16, device)]
    lengths = torch.tensor([[[30, 4]], [[0, 9]], [[loose, loose // 2]]], dtype=torch.int32, device=device)
    sizes = [30, 9, loose]
    behind = [torch.arange(n, device=device) >= own[..., None] for n, own in zip(sizes, lengths, strict=True)]
    twin = dense_twin(queries, tiers, keys, values, Scoring(0.3), torch.cat(behind, dim=2))
    for own, codes in zip(lengths, (tier.tensors["key_codes"] for tier in tiers), strict=False):
        codes[torch.arange(codes.shape[2], device=device) >= own[..., None]] = 255  # whatever they are
    for scores in SCORES:
        found = kernels.packed_decode_attention(
            queries, tiers, keys, values, Scoring(0.3), lengths=lengths, scores=scores
        )  # fmt: skip
        assert_alike(found, twin, scores)


def exact_attention(queries: Tensor, tier: PackedRows, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, 1, Dv]` and probabilities in float64, by what codes and parameters stand for."""
    keys, values = (tensor.double() for tensor in tier.decoded())
    grouped = queries.double().view(keys.shape[0], keys.shape[1], -1, keys.shape[3])
    weights = torch.softmax(torch.einsum("bhgd,bhnd->bhgn", grouped, keys) * scale, -1)
    return torch.einsum("bhgn,bhnd->bhgd", weights, values).flatten(1, 2)[:, :, None], weights


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [Codec(2), Codec(3), Codec(4, separable=True), Codec(8)], ids=str)
def test_packed_rows_far_from_zero(device, dtype, codec):
    """Where zero points are hundreds of scales away, probabilities are exact in any dtype: no key is rounded to it.

    Of outputs, only the last step is, or values and the last step. One step of rounding is a place at 2 .. 4, as the
    interpreter cuts off a bfloat16.
    """
    torch.manual_seed(0)
    keys, values = 0.5 * torch.randn(1, 2, 100, 64), 0.1 * torch.randn(1, 2, 100, 64)
    keys[..., 5] += 200.0
    values += 3.0
    tier = PackedRows.encode(codec, keys.to(device), values.to(device))
    queries = torch.randn(1, 8, 1, 64).to(device, dtype)
    loose = torch.empty(1, 2, 0, 64, dtype=dtype, device=device)
    found = kernels.packed_decode_attention(queries, [tier], loose, loose, Scoring(0.3), scores="probabilities")
    output, probabilities = exact_attention(queries, tier, 0.3)
    torch.testing.assert_close(found[1].double(), probabilities, atol=1e-6, rtol=2e-4)
    steps = 1 if codec.bits in (2, 4) else 2
    bound = 1e-4 if dtype == torch.float32 else 1.02 * steps * 2 * torch.finfo(dtype).eps
    assert (found[0].double() - output).abs().max() < bound


@on_devices
@pytest.mark.parametrize("rows", [64, 100])
@pytest.mark.parametrize("codec", [Codec(4, tokens=32, channels=32), Codec(2, tokens=64, separable=True)], ids=str)
def test_regular_blocks(device, rows, codec):
    """Blocks of whole tiles, of which the last may have fewer rows, have their numbers from the slots."""
    queries, keys, values = tokens((1, 2, 3, 5, 64, 64), device)
    tier = tier_of(codec, rows, 64, 64, device)
    found = kernels.packed_decode_attention(queries, [tier], keys, values, Scoring(0.2), scores="probabilities")
    assert_alike(found, dense_twin(queries, [tier], keys, values, Scoring(0.2)), "probabilities")


# -- rows in the coordinates of a basis --------------------------------------------------------------------------------

ROTATED = {
    "2 bits": RotatedCodec(2),
    "3 and 2 bits": RotatedCodec(3, value_bits=2),
    "8 and 4 bits": RotatedCodec(8, value_bits=4),
    "2.5 bits": RotatedCodec(2.5),
    "normal levels": RotatedCodec(3, normal=True),
    "clipped": RotatedCodec(4, key_clip=0.9, value_clip=0.95),
}


def rotated_table(codec: RotatedCodec, dims: tuple[int, int], estimated: bool, device: str, rows: int = 70):
    """Queries of three heads for each of two, and a table with holes, a tier of this codec, one of another, and rows in
    full precision."""
    queries, keys, values = (each.to(device) for each in correlated(1, 2, 300, dims))
    table = TokenTable(keys[:, :, :rows], values[:, :, :rows], torch.arange(rows, device=device), {})
    if estimated:
        table.turn(basis_of(queries, keys, values))
    slots = torch.arange(rows - 10, device=device).expand(1, 2, -1)
    table.quantize([(codec, slots[:, :, :-20]), (RotatedCodec(2, value_bits=3), slots[:, :, -20:])])
    table.evict(torch.tensor([7, rows - 19], device=device).expand(1, 2, -1))
    return torch.randn(1, 6, 1, dims[0]).to(device), table


@on_devices
@pytest.mark.parametrize(
    ("name", "dims", "estimated"),
    [*((name, (64, 32), True) for name in ROTATED), ("3 and 2 bits", (80, 24), True), ("2 bits", (64, 64), False),
     ("normal levels", (64, 64), False)],
    ids=str,
)  # fmt: skip
def test_rotated_codes(device, name, dims, estimated):
    """Every width of a spectrum, or one alone; rows with an offset, and levels that are not even."""
    queries, table = rotated_table(ROTATED[name], dims, estimated, device)
    scoring = Scoring(0.2, 5.0, torch.randn(6).to(device))
    empty = None if table.dense else table.positions
    found = kernels.packed_decode_attention(
        queries, table.packed, table.keys, table.values, scoring, empty=empty, scores="probabilities"
    )  # fmt: skip
    assert_alike(found, packed.single_query(queries, table, scoring), "probabilities")


@on_devices
def test_several_splits_of_rotated_codes(device):
    """Each is turned back by itself."""
    queries, table = rotated_table(ROTATED["3 and 2 bits"], (16, 16), True, device, rows=300)
    assert len(table.packed[0]) > splits._LEAST_STRETCH
    found = TRITON.packed_single_query(queries, table, Scoring(0.2))
    assert_alike(found, packed.single_query(queries, table, Scoring(0.2)), "probabilities")


@on_devices
@pytest.mark.parametrize("kind", ["flat", "packed"])
def test_who_asks_for_no_probabilities_gets_none(device, kind):
    """And the same output; of heads of different lengths, probabilities lie at the end of each."""
    if kind == "packed":
        queries, table = rotated_table(ROTATED["2 bits"], (16, 16), True, device)
        single, twin = TRITON.packed_single_query, packed.single_query
    else:
        queries, keys, values = tokens((2, 2, 3, 20, 16, 16), device)
        counts = torch.tensor([[20, 3], [7, 11]], device=device)
        slots = torch.arange(20, device=device).expand(2, 2, -1)
        table = keep_rows(TokenTable(keys, values, slots, {}), slots.masked_fill(slots >= counts[..., None], -1), 1)
        single, twin = TRITON.flat_single_query, TORCH.flat_single_query
    found, expected = single(queries, table, Scoring(0.2)), twin(queries, table, Scoring(0.2))
    assert_alike(found, expected, "probabilities")
    output, probabilities = single(queries, table, Scoring(0.2), False)
    assert probabilities is None
    torch.testing.assert_close(output, expected[0], **EXACT)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [ROTATED["2 bits"], ROTATED["normal levels"]], ids=str)
def test_rotated_dtypes(device, dtype, codec):
    """Queries count as they are turned, in float32, and codes of even levels exactly."""
    queries, table = rotated_table(codec, (64, 64), True, device)
    tiers, queries = table.packed, queries.to(dtype)
    loose = torch.empty(1, 2, 0, 64, dtype=dtype, device=device)
    found = kernels.packed_decode_attention(queries, tiers, loose, loose, Scoring(0.2), scores="probabilities")
    grouped, rows = queries.float().view(1, 2, 3, 64), [len(tier) for tier in tiers]
    expected = torch.softmax(torch.cat([tier.dot_keys(grouped) for tier in tiers], -1) * 0.2, -1)
    parts = zip(tiers, expected.split(rows, -1), strict=True)
    output = sum(tier.sum_values(weights) for tier, weights in parts).view(1, 6, 1, 64)
    exact = dtype == torch.float32 or not codec.normal
    torch.testing.assert_close(found[1], expected, atol=1e-5 if exact else 2e-3, rtol=1e-3 if exact else 3e-2)
    torch.testing.assert_close(found[0], output.to(dtype), **OUTPUT[dtype])


@on_devices
def test_rotated_lengths(device):
    """Heads with their own numbers of rows; what lies behind is not read."""
    queries, table = rotated_table(ROTATED["3 and 2 bits"], (16, 16), True, device)
    tiers = table.packed
    sizes = [*map(len, tiers), table.keys.shape[2]]
    lengths = torch.tensor([[[sizes[0], 4]], [[0, sizes[1]]], [[5, 0]]], dtype=torch.int32)
    behind = torch.cat([torch.arange(n) >= own[..., None] for n, own in zip(sizes, lengths, strict=True)], dim=2)
    twin = dense_twin(queries, tiers, table.keys, table.values, Scoring(0.3), behind.to(device))
    found = kernels.packed_decode_attention(
        queries, tiers, table.keys, table.values, Scoring(0.3), lengths=lengths.to(device), scores="mean"
    )  # fmt: skip
    assert_alike(found, twin, "mean")


@pytest.mark.parametrize(("dim", "bits"), [(20, 2), (256, 5)])
def test_sizes_that_do_not_fit_are_left_to_pytorch(dim, bits):
    """Those that 8 does not divide, and rows whose signs would take more registers than there are."""
    keys = torch.randn(1, 1, 40, dim)
    table = TokenTable(keys, keys, torch.arange(40), {})
    table.quantize([(RotatedCodec(bits), torch.arange(40).view(1, 1, -1))])
    assert not kernels.takes_rotated(table.packed[0])
    query = torch.randn(1, 1, 1, dim)
    found, expected = (each(query, table, Scoring(0.3)) for each in (TRITON.packed_single_query, packed.single_query))
    torch.testing.assert_close(found, expected)


# -- the package -------------------------------------------------------------------------------------------------------


def test_what_is_supported():
    """One dtype that tensor cores know, and heads that fit on chip."""
    queries, keys, values = tokens((1, 1, 1, 2, 256, 256), "cpu", torch.float16)
    assert kernels.supported(queries, keys, values)
    assert not kernels.supported(queries.float(), keys, values)
    assert not kernels.supported(*(tensor.double() for tensor in (queries, keys, values)))
    assert not kernels.supported(*tokens((1, 1, 1, 2, 576, 512), "cpu"))


def test_availability(monkeypatch):
    """Interpreted kernels run on the CPU, compiled ones on a GPU that Triton knows, and none without Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (kernels.available(cpu), kernels.available(cuda)) == (True, False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert (kernels.available(cpu), kernels.available(cuda)) == (False, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.available(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert not kernels.available(cuda)
    monkeypatch.delitem(vars(kernels), "attention_mass", raising=False)  # which may have been looked up
    with pytest.raises(ValueError, match="needs Triton: pip install"):
        _ = kernels.attention_mass
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kernels.nothing
