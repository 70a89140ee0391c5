"""Rows in the coordinates of a basis: against the formulas in numpy, and what must hold wherever the basis goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import (
    build,
    feed,
    generate,
    kept_everywhere,
    left_padded,
    rows,
    sequence,
    shared,
    storage_nbytes,
    token_ids,
)
from held import held_by
from torch import Tensor

from kvprune import Adaptive, CacheError, PolicyError, PrunedCache, Scoring, TokenTable
from kvprune.attention import packed
from kvprune.attention.softmax import single_query_attention
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import cache_argument
from kvprune.kernels import TORCH, cpu
from kvprune.kernels.cpu.kernels import CPU
from kvprune.policies import H2O, KIVI, OSCAR, Spectral, TurboQuant, ZipCache
from kvprune.policy.base import Decision
from kvprune.table.basis import LEFT, LEFT_OF_MIXED, Basis, lanes_of
from kvprune.table.hadamard import hadamard
from kvprune.table.packed_rows import Stretch
from kvprune.table.ragged import RaggedTable, pack_rows
from kvprune.table.rotated_codes import PARTS, STEPS, code_bytes, nearest
from kvprune.table.rotated_rows import RotatedCodec, RotatedRows
from kvprune.table.rows import in_order, true_rows


def tokens(batch: int, heads: int, rows: int, dims: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of two heads for each KV head, keys and values whose channels hang together and have a mean."""
    random = torch.Generator().manual_seed(seed)

    def correlated(heads: int, dim: int) -> Tensor:
        mixed = torch.linalg.qr(torch.randn(heads, dim, dim, generator=random)).Q * torch.logspace(0, -0.7, dim)
        return torch.randn(batch, heads, rows, dim, generator=random) @ mixed.mT + 2.0

    queries = torch.randn(batch, 2 * heads, rows, dims[0], generator=random) * torch.linspace(0.7, 1.4, dims[0])
    return queries, correlated(heads, dims[0]), correlated(heads, dims[1])


def basis_of(queries: Tensor, keys: Tensor, values: Tensor, mixed: bool = False) -> Basis:
    asked = torch.ones(len(queries), queries.shape[2], dtype=torch.bool, device=keys.device)
    held = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    return Basis.estimate(queries, keys, values, asked, held, mixed)


def hadamard_rotation(keys: Tensor, values: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Of one head: what any function is that makes rotations."""
    assert keys.ndim == values.ndim == queries.ndim == 2
    return hadamard(keys.shape[1]), hadamard(values.shape[1])


# -- the basis ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [(2, 0.7), (3, 0.85)])
def test_few_bits_serve_queries_that_look_where_the_prompts_did_not(bits, share):
    """A later question finds a row by components that the prompt's queries hardly look at, if rows differ there."""
    random = torch.Generator().manual_seed(0)
    looked_at, different = torch.ones(64), torch.ones(64)
    looked_at[48:], different[48:] = 0.01, 30**0.5
    queries = torch.randn(1, 2, 300, 64, generator=random) * looked_at
    keys, values = torch.randn(2, 1, 1, 300, 64, generator=random)
    keys = keys * different
    packed_rows = RotatedRows.encode_in(RotatedCodec(bits), basis_of(queries, keys, values), keys, values)
    asked = keys.clone()
    asked[..., :48] = 0
    found = packed_rows.dot_keys(asked).argmax(-1) == torch.arange(300)
    assert found.float().mean() > share


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dims", [(8, 8), (48, 16)], ids=str)
def test_components_hang_together_with_no_other_group_and_cost_their_eigenvalue(dims, mixed):
    """E[z_i^2] = 1, and an error of z moves logits, or the output, by its eigenvalue, or the mean of those mixed."""
    queries, keys, values = tokens(1, 2, 150, dims)
    basis = basis_of(queries, keys, values, mixed)
    for head in range(2):
        asked = queries[0, 2 * head : 2 * head + 2].reshape(-1, dims[0]).double().numpy()
        for part, held, own in ((basis.keys, keys, asked.T @ asked / len(asked)), (basis.values, values, None)):
            exact, lanes = held[0, head].double().numpy(), lanes_of(part.dim)
            turning, mean = part.turning(keys.device)[0, head].double().numpy(), part.mean[0, head].double().numpy()
            np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-3, atol=2e-3)
            numbers = np.linalg.solve(turning, (exact - mean).T)
            covariance = (numbers @ numbers.T / 150).reshape(part.dim // lanes, lanes, part.dim // lanes, lanes)
            np.testing.assert_allclose(np.diag(covariance.reshape(part.dim, -1)), 1, rtol=0.1)
            for one, other in np.argwhere(~np.eye(part.dim // lanes, dtype=bool)):
                assert np.abs(covariance[one, :, other]).max() < 0.1

            own = np.eye(part.dim) if own is None else own
            sizes, vectors = np.linalg.eigh(own)
            root = vectors * np.sqrt(sizes) @ vectors.T
            eigenvalues = np.linalg.eigvalsh(root @ np.cov((exact - exact.mean(0)).T, bias=True) @ root)[::-1]
            if mixed:
                eigenvalues = np.repeat(eigenvalues.reshape(-1, lanes).mean(1), lanes)
            else:
                np.testing.assert_allclose(numbers @ numbers.T / 150, np.eye(part.dim), atol=0.1)
            groups = np.log2(eigenvalues).reshape(-1, lanes).mean(1)
            np.testing.assert_allclose(part.spectrum[0, head].numpy(), groups, atol=2e-2)
            costs, expected = turning.T @ own @ turning, eigenvalues
            np.testing.assert_allclose(np.diag(costs), expected, rtol=3e-2)
            scale = np.sqrt(expected[:, None] * expected)
            assert (np.abs(costs / scale - np.eye(part.dim))[~np.eye(part.dim, dtype=bool)] < 5e-2).all()
            # Of 8 bits a number.
            assert part.matrix.dtype == torch.int8
            assert (part.matrix.abs().amax(2) == 127).all()


def test_what_is_left_is_that_of_a_logistic_distribution():
    """Of variance 1, at the even steps, by a sum over a fine grid."""
    grid = np.linspace(-60, 60, 1_200_001)
    spread = np.sqrt(3) / np.pi
    density = 1 / np.cosh(grid / (2 * spread)) ** 2
    density /= density.sum()
    assert LEFT[0] == pytest.approx((density * grid**2).sum()) == 1
    for width in range(1, 9):
        middle = (2**width - 1) / 2
        codes = np.clip(np.rint(grid / STEPS[width] + middle), 0, 2 * middle)
        assert (density * (grid - (codes - middle) * STEPS[width]) ** 2).sum() == pytest.approx(LEFT[width], abs=1e-5)


@pytest.mark.parametrize("bits", [2, 2.5, 3, 4, 8])
@pytest.mark.parametrize("dim", [32, 64, 80])
def test_bits_go_where_the_next_one_helps_most(bits, dim):
    """One bit after another, greedily, none beyond eight; as many as fit."""
    queries, keys, values = tokens(1, 1, 200, (dim, dim))
    part = basis_of(queries, keys, values).keys
    widths = [0] * (dim // lanes_of(dim))
    spectrum = part.spectrum[0, 0].tolist()
    for _ in range(int(bits * len(widths))):
        left = LEFT if bits < 3 else LEFT_OF_MIXED
        taken = [0 if width == 8 else left[width] - left[width + 1] for width in widths]
        widths[int(np.argmax(2 ** np.array(spectrum) * taken))] += 1
    assert part.widths(bits, (1, 1), keys.device)[0, 0].tolist() == widths


@pytest.mark.parametrize("dim", [1, 6, 8, 48, 80, 128])
def test_hadamard_in_blocks(dim):
    """Orthogonal to float16, and of entries of one size within a block."""
    turning = hadamard(dim)
    torch.testing.assert_close(turning @ turning.T, torch.eye(dim), atol=2e-3, rtol=0)
    assert len(turning[turning != 0].abs().unique()) == 1


def test_a_hadamard_matrix_is_made_once():
    """And serves where gradients are wanted, though it was made where none are."""
    hadamard.cache_clear()
    with torch.inference_mode():
        turning = hadamard(12)
    assert hadamard(12) is turning
    some = torch.ones(1, 1, 1, 12, requires_grad=True)
    (Basis.fixed(12, 12).keys.back(some) ** 2).sum().backward()
    assert some.grad is not None


def test_too_few_rows_and_rows_that_do_not_vary_get_hadamard():
    """Of each head by itself; of all, no matrix is held then, and of very few rows, nothing."""
    queries, keys, values = tokens(2, 1, 40, (8, 8))
    few = Basis.estimate(
        queries[:, :, :10], keys[:, :, :10], values[:, :, :10],
        torch.ones(2, 10, dtype=torch.bool), torch.ones(2, 1, 10, dtype=torch.bool),
    )  # fmt: skip
    assert not few.estimated
    assert few.nbytes == 0
    held = torch.ones(2, 1, 40, dtype=torch.bool)
    held[1, :, 9:] = False
    mixed = Basis.estimate(queries, keys, values, torch.ones(2, 40, dtype=torch.bool), held)
    assert mixed.estimated
    turning = mixed.keys.turning(keys.device)
    torch.testing.assert_close(turning[1, 0], hadamard(8), atol=1e-6, rtol=0)
    assert not torch.allclose(turning[0, 0], hadamard(8), atol=1e-2)
    nothing = basis_of(queries, torch.zeros_like(keys), torch.full_like(values, torch.nan))
    assert all(bool(tensor.isfinite().all()) for tensor in nothing.tensors().values())


def test_a_short_prompt_tells_its_mean_alone():
    """Of sixteen rows and more, in the coordinates of a Hadamard matrix: rows stand for mean + H z."""
    queries, keys, values = tokens(1, 2, 100, (64, 64))
    basis = basis_of(queries[:, :, :20], keys[:, :, :20], values[:, :, :20])
    assert not basis.estimated
    assert list(basis.tensors()) == ["mean_keys", "mean_values"]
    mean = keys[0, 1, :20].double().mean(0)
    torch.testing.assert_close(basis.keys.mean[0, 1].double(), mean, atol=2e-3, rtol=1e-3)
    numbers = basis.keys.of(keys)[0, 1]
    centred = keys[0, 1] - basis.keys.mean[0, 1].float()
    torch.testing.assert_close(numbers, centred @ hadamard(64), atol=5e-3, rtol=1e-3)
    packed = RotatedRows.encode_in(RotatedCodec(8), basis, keys, values)
    torch.testing.assert_close(packed.decoded()[0], keys, atol=0.1, rtol=0.05)
    without = RotatedRows.encode_in(RotatedCodec(2), Basis.fixed(64, 64), keys, values).decoded()[0]
    with_it = RotatedRows.encode_in(RotatedCodec(2), basis, keys, values).decoded()[0]
    assert (with_it - keys).square().mean() < 0.5 * (without - keys).square().mean()


@pytest.mark.parametrize("rotate", [None, hadamard_rotation], ids=["principal", "given"])
def test_heads_tell_alike_what_each_tells_alone(rotate):
    """Where one holds rows in other places, each is estimated by itself; too few, and rows that are nothing, too."""
    queries, keys, values = tokens(2, 4, 300, (16, 32))
    keys[0, 2] = 0.0
    asked, held = torch.ones(2, 300, dtype=torch.bool), torch.ones(2, 4, 300, dtype=torch.bool)
    asked[1, :50] = held[1, :, :50] = False
    together = Basis.estimate(queries, keys, values, asked, held, rotate=rotate)
    held[:, 3, 100:] = False
    apart = Basis.estimate(queries, keys, values, asked, held, rotate=rotate)
    for name, tensor in together.tensors().items():
        mine, its = (each[:, :3] if each.ndim > 1 else each for each in (tensor, apart.tensors()[name]))
        torch.testing.assert_close(mine.float(), its.float(), atol=1.0 if "matrix" in name else 1e-3, rtol=1e-3)


def test_what_is_extraordinary_in_a_component_is_spread_over_its_group():
    """A few rows of heavy tails lose less, at two bits, than where every component has codes of its own."""
    random = torch.Generator().manual_seed(3)
    rows = torch.randn(1, 1, 600, 64, generator=random) ** 3 * torch.logspace(0, -1, 64)  # uncorrelated as they are
    basis = basis_of(torch.randn(1, 2, 600, 64, generator=random), rows, rows, mixed=True)
    found = RotatedRows.encode_in(RotatedCodec(2), basis, rows, rows).decoded()[1]
    variances = rows[0, 0].var(0).sort(descending=True)
    alone = rows[..., variances.indices] / variances.values.sqrt()
    widths = basis.values.widths(2, (1, 1), rows.device)
    codes, scale = nearest(alone, widths, code_bytes(64, 2))
    apart = Basis.fixed(64, 64)
    tensors = {f"value_{name}": part for name, part in (("codes", codes), ("scale", scale), ("widths", widths))}
    own = RotatedRows(RotatedCodec(2), 64, 64, tensors | {"key_codes": codes}, apart)
    decoded = own._numbers("value", Stretch(slice(0, 600), None), apart.values) * variances.values.sqrt()
    error = (decoded - rows[..., variances.indices]).square().mean()
    assert (found - rows).square().mean() < 0.8 * error


# -- codes -------------------------------------------------------------------------------------------------------------


def read_codes(row: bytes, widths: list[int], dim: int) -> list[int]:
    """Codes of a row, bit by bit, as the head of `rotated_rows.py` says."""
    codes, first, lanes = [], 0, lanes_of(dim)
    for width in widths:
        found = [0] * lanes
        left = 0
        for part in PARTS[width]:
            for lane in range(lanes):
                for bit in range(part):
                    place = lane * part + bit
                    found[lane] |= (row[first + place // 8] >> place % 8 & 1) << left + bit
            first, left = first + -(-lanes * part // 8), left + part
        codes += found
    assert first == len(row)
    return codes


@pytest.mark.parametrize("dims", [(8, 8), (32, 16), (48, 8), (6, 5)], ids=str)
@pytest.mark.parametrize("estimated", [False, True])
@pytest.mark.parametrize(("bits", "value_bits"), [(2, None), (3, 2), (2.5, 4), (4, None), (8, 4)])
def test_rows_are_those_of_the_formula(bits, value_bits, dims, estimated):
    """Codes read bit by bit; within half a step of z but at the ends; the scale is the best of those tried."""
    queries, keys, values = tokens(1, 1, 100, dims)
    basis = basis_of(queries, keys, values) if estimated else Basis.fixed(*dims)
    codec = RotatedCodec(bits, value_bits=value_bits)
    packed = RotatedRows.encode_in(codec, basis, keys, values)
    assert basis.estimated == estimated
    decoded = dict(zip(("key", "value"), packed.decoded(), strict=True))
    for kind, held, part in (("key", keys, basis.keys), ("value", values, basis.values)):
        turning = part.turning(keys.device).expand(1, 1, part.dim, part.dim)[0, 0].double().numpy()
        mean = np.zeros(part.dim) if part.mean is None else part.mean[0, 0].double().numpy()
        lanes = lanes_of(part.dim)
        widths = np.repeat(packed.tensors[f"{kind}_widths"][0, 0].tolist(), lanes)
        assert widths.sum() == int(codec.bits_of(kind) * (part.dim // lanes)) * lanes
        steps, middle = np.array(STEPS)[widths], (2.0**widths - 1) / 2
        for at in range(0, 100, 9):
            codes = np.array(
                read_codes(
                    bytes(packed.tensors[f"{kind}_codes"][0, 0, at].tolist()), widths[::lanes].tolist(), part.dim
                )
            )
            scale = packed.tensors[f"{kind}_scale"][0, 0, at].double().item()
            found = (codes - middle) * steps * scale
            np.testing.assert_allclose(
                decoded[kind][0, 0, at].double().numpy(), mean + turning @ found, rtol=1e-3, atol=2e-3
            )
            exact = np.linalg.solve(turning, held[0, 0, at].double().numpy() - mean)
            inner = (codes > 0) & (codes < 2**widths - 1)
            assert (
                np.abs(found - exact)[inner] <= (steps * scale / 2)[inner] * 1.01 + 1e-3 * np.abs(exact).max()
            ).all()
            size = np.sqrt(np.mean(exact**2))
            for multiple in (0.75, 1.0, 1.5, 2.5):
                other = np.rint(exact / np.where(widths > 0, steps * size * multiple, np.inf) + middle)
                other = (np.clip(other, 0, 2**widths - 1) - middle) * steps * size * multiple
                assert ((exact - found) ** 2).sum() <= ((exact - other) ** 2).sum() * 1.01 + 1e-3


@pytest.mark.parametrize("dims", [(64, 64), (24, 10)], ids=str)
@pytest.mark.parametrize("codec", [RotatedCodec(2), RotatedCodec(3, value_bits=2), RotatedCodec(8)], ids=str)
def test_rows_go_and_move_as_they_are(codec, dims):
    """Whatever is appended, kept or selected, rows decode as before, take what is foretold, and products are theirs."""
    queries, keys, values = tokens(2, 2, 150, dims)
    basis = basis_of(queries, keys, values)
    packed = RotatedRows.encode_in(codec, basis, keys[:, :, :100], values[:, :, :100])
    packed.append(RotatedRows.encode_in(codec, basis, keys[:, :, 100:], values[:, :, 100:]))
    whole = RotatedRows.encode_in(codec, basis, keys, values)
    assert all(torch.equal(packed.tensors[name], tensor) for name, tensor in whole.tensors.items())
    held = sum(tensor.untyped_storage().nbytes() for tensor in packed.tensors.values())
    groups = sum(dim // lanes_of(dim) for dim in dims)
    assert held == 4 * (150 * codec.row_bytes(*dims) + groups)
    own = 2  # more than a byte for each of two sequences are foretold, one for each of four heads
    assert basis.nbytes + 4 * groups + own == 4 * codec.block_bytes(*dims)
    assert packed.code_nbytes == 4 * 150 * (
        code_bytes(dims[0], codec.bits) + code_bytes(dims[1], codec.bits_of("value"))
    )

    before = packed.decoded()
    kept = torch.rand(2, 2, 150, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :, :40].sort(-1).values
    packed.keep(kept, torch.zeros_like(kept, dtype=torch.bool))
    for found, then in zip(packed.decoded(), before, strict=True):
        torch.testing.assert_close(found, then.gather(2, kept[..., None].expand(-1, -1, -1, then.shape[3])))
    keys, values = packed.decoded()
    some, weights = torch.randn(2, 2, 3, dims[0]), torch.rand(2, 2, 3, 40)
    torch.testing.assert_close(packed.dot_keys(some), some @ keys.mT, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(packed.sum_values(weights), weights @ values, atol=1e-3, rtol=1e-4)


def by_token(table: TokenTable) -> dict[tuple[int, int, int], tuple[RotatedCodec | None, bytes, Tensor, Tensor, float]]:
    """By sequence, head and position: how a row is packed, its codes and scales, key and value, and its score."""
    found = {}
    for number, each in enumerate(table.heads if isinstance(table, RaggedTable) else [table]):
        tiers = [(tier, slot) for tier in each.packed for slot in range(len(tier))]
        keys, values = each.all_keys(), each.all_values()
        for row, head, slot in (each.positions >= 0).nonzero().tolist():
            tier, place = tiers[slot] if slot < len(tiers) else (None, 0)
            codes = b"" if tier is None else b"".join(
                tier.tensors[name][row, head, place].numpy().tobytes()
                for name in ("key_codes", "value_codes", "key_scale", "value_scale")
            )  # fmt: skip
            of = divmod(number, table.kv_heads) if isinstance(table, RaggedTable) else (row, head)
            found[(*of, int(each.positions[row, head, slot]))] = (
                tier and tier.codec, codes, keys[row, head, slot], values[row, head, slot],
                float(each["score"][row, head, slot]),
            )  # fmt: skip
    return found


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("estimated", [False, True])
@pytest.mark.parametrize("kernels", [TORCH, *([] if cpu.library() is None else [CPU])], ids=lambda each: each.name)
def test_packed_rows_lose_bits_beside_others_that_go_or_stay(kernels, estimated, apart):
    """What loses bits is the encoding of what it stood for, in the same basis; all else is as it was, bit for bit.

    Heads keep and pack other numbers of rows, from other tiers; and then it is done once more.
    """
    queries, keys, values = tokens(2, 2, 40, (32, 16))
    positions = torch.arange(40).expand(2, 2, -1).clone()
    positions[1, :, :3] = -1
    table = TokenTable(keys, values, positions, {"score": torch.float32}, dense=False, kernels=kernels)
    basis = basis_of(queries, keys, values) if estimated else Basis.fixed(32, 16)
    table.own()
    table.turn(basis)
    table["score"] = torch.arange(40).float()
    wide, narrow, other = RotatedCodec(8), RotatedCodec(2), RotatedCodec(3)
    slots = torch.arange(5, 35).expand(2, 2, -1)
    table.quantize([(wide, slots[:, :, ::2]), (RotatedCodec(4), slots[:, :, 1::2])])
    for turn in range(2):
        before = by_token(table)
        draw = torch.Generator().manual_seed(turn)
        fate = torch.rand(2, 2, 40, generator=draw)  # by position
        at = table.positions.long()
        fate = fate.gather(2, at.clamp(min=0)).masked_fill(at < 0, -1.0)
        bits = torch.full_like(at, 16)
        bits[:, :, : table.packed_length] = table.code_bits()
        kept = fate > (-0.5 if turn == 0 and not apart else 0.2)  # without being apart, all heads keep as many
        parts = [
            (codec, in_order(true_rows(kept & chosen & (bits > codec.bits)), at))
            for codec, chosen in ((narrow, fate > 0.8), (other, (fate > 0.6) & (fate <= 0.8)))
        ]
        keep = in_order(true_rows(kept), at)
        expected = {
            codec: {(row, head, int(at[row, head, slot]))
                    for row, head in np.ndindex(2, 2) for slot in slots[row, head].tolist() if slot >= 0}
            for codec, slots in parts
        }  # fmt: skip
        Decision(keep=keep, quantize=tuple(parts)).check(table)
        table = pack_rows(table, parts, keep, apart=apart)
        after = by_token(table)
        assert isinstance(table, RaggedTable) == (apart or turn == 1)
        assert after.keys() == {(row, head, int(at[row, head, slot])) for row, head, slot in kept.nonzero().tolist()}
        for token, (codec, codes, key, value, score) in after.items():
            assert score == before[token][4] == token[2]
            aim = next((codec for codec, those in expected.items() if token in those), None)
            if aim is None:
                assert (codec, codes) == before[token][:2]
                assert codec or (torch.equal(key, before[token][2]) and torch.equal(value, before[token][3]))
                continue
            assert codec == aim
            own = basis.of_head(*token[:2])
            then = [part[None, None, None] for part in before[token][2:4]]
            for found, decoded in zip((key, value), RotatedRows.encode_in(aim, own, *then).decoded(), strict=True):
                torch.testing.assert_close(found, decoded[0, 0, 0], atol=1e-4, rtol=1e-4)
        assert table.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in table.tensors().values())


def test_more_bits_and_a_basis_of_its_own_are_nearer():
    """Errors of logits fall with every bit, and where the spectrum is steep, far below those of a Hadamard matrix."""
    queries, keys, values = tokens(1, 1, 400, (64, 64))

    def errors(bits: int, basis: Basis) -> float:
        found, _ = RotatedRows.encode_in(RotatedCodec(bits), basis, keys, values).decoded()
        return float((queries @ (found - keys).mT).square().mean())

    own, fixed = basis_of(queries, keys, values), Basis.fixed(64, 64)
    assert errors(2, own) > errors(3, own) > errors(4, own) > errors(8, own)
    assert errors(2, own) < 0.2 * errors(2, fixed)


# -- policies ----------------------------------------------------------------------------------------------------------


def step(layer: PrunedLayer, given: tuple[Tensor, ...], valid: Tensor | None = None) -> Tensor:
    queries, keys, values = given
    layer.update(keys, values)
    return layer.attend(queries, valid, Scoring(0.5))


def test_what_is_packed_when():
    """Sinks, the newest, and what does not make another 32 stay exact; first and last layers have bits of their own."""
    given = tokens(1, 1, 110, (8, 8))
    policy = Spectral(2, sinks=3, residual=10, edge_layers=1, edge_bits=8)
    layer = PrunedLayer(policy, 0)
    layer.planner.depth, layer.planner.pruned_layers = 1, 3
    step(layer, tuple(part[:, :, :100] for part in given))
    for at in range(100, 110):
        step(layer, tuple(part[:, :, at : at + 1] for part in given))
        packed_rows = (at + 1 - 3 - 10) // 32 * 32
        assert layer.table.packed_length == packed_rows
        assert layer.table.positions[0, 0, :packed_rows].sort().values.tolist() == list(range(3, 3 + packed_rows))
    assert {tier.codec for tier in layer.table.packed} == {RotatedCodec(2), RotatedCodec(4)}
    assert policy.codecs == (RotatedCodec(8), RotatedCodec(2), RotatedCodec(4))
    assert Spectral(2.5, edge_layers=1).codecs == tuple(map(RotatedCodec, (4, 2.5, 6, 4.5)))
    assert policy.codecs_at(0, 3) == (RotatedCodec(8),)
    assert policy.codecs_at(1, 3) == (RotatedCodec(2), RotatedCodec(4))
    exact = Spectral(2, edge_layers=2, edge_bits=16, outliers=0)
    assert exact.codecs == (RotatedCodec(2),)
    assert exact.codec(1, 9) is None
    assert exact.codec(7, 9) is None
    assert Spectral(2, edge_layers=10**9).codecs == tuple(map(RotatedCodec, (4, 2, 6)))
    assert Spectral(3, value_bits=2).codecs == (RotatedCodec(3, value_bits=2), RotatedCodec(5, value_bits=4))
    assert Spectral(2, value_bits=8, outlier_bits=4).codecs[1] == RotatedCodec(4, value_bits=8)
    assert Spectral(4, outlier_bits=4).codecs == Spectral(4, outliers=0).codecs == (RotatedCodec(4),)


@pytest.mark.parametrize("residual", [0, 50])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.33])
def test_rows_of_most_leverage_have_more_bits(share, residual):
    """Of every head the share, rounded up, of largest |z_k|^2 / D + |z_v|^2 / Dv, as numpy has it of the prompt."""
    given = tokens(1, 2, 200, (16, 8))
    policy = Spectral(2.5, sinks=4, residual=residual, outliers=share, outlier_bits=6)
    layer = PrunedLayer(policy, 0)
    step(layer, given)
    table, packed_rows = layer.table, (200 - 4 - residual) // 32 * 32
    expected = -(-round(1000 * share) * packed_rows // 1000)
    for head in range(2):
        leverage = np.zeros(packed_rows)
        for exact, part in ((given[1], table.basis.keys), (given[2], table.basis.values)):
            centred = (exact[0, head, 4 : 4 + packed_rows] - part.mean[0, head]).double().numpy()
            numbers = np.linalg.solve(part.turning(exact.device)[0, head].double().numpy(), centred.T)
            leverage += (numbers**2).mean(0)
        far = {4 + int(row) for row in (-leverage).argsort()[:expected]}
        positions, bits = table.positions[0, head, :packed_rows], table.code_bits()[0, head]
        assert set(positions[bits == 6].tolist()) == far
        assert set(positions[bits == 2].tolist()) == set(range(4, 4 + packed_rows)) - far


def test_what_few_rows_say_loses_least():
    """Rows unlike all others, which a later question asks for, are where few bits lose most."""
    random = torch.Generator().manual_seed(1)
    queries, keys, values = (torch.randn(1, heads, 400, 64, generator=random) for heads in (2, 1, 1))
    keys *= torch.logspace(0.5, -0.5, 64)
    strange = torch.arange(20, 380, 20)
    keys[:, :, strange, 32:] += 2 * torch.randn(len(strange), 32, generator=random)

    def errors(policy: Spectral) -> tuple[float, float]:
        """Of rows that are strange, and of all others."""
        layer = PrunedLayer(policy, 0)
        step(layer, (queries, keys, values))
        order = layer.table.positions[0, 0].argsort()
        error = (layer.table.all_keys()[0, 0, order] - keys[0, 0]).square().sum(-1)
        return float(error[strange].mean()), float(error[~torch.isin(torch.arange(400), strange)].mean())

    few, (many_strange, many) = errors(Spectral(2, residual=0)), errors(Spectral(2, residual=0, outliers=0))
    assert many_strange > 2 * many
    assert few[0] < 0.2 * many_strange
    assert few[1] <= many


@pytest.mark.parametrize(("bits", "whole"), [(2.25, 2.25), (2.6, 2.5), (4.99, 4.75), (8, 8), (np.float32(3.5), 3.5)])
@pytest.mark.parametrize("make", [Spectral, TurboQuant, OSCAR], ids=lambda kind: kind.__name__)
def test_bits_in_quarters(make, bits, whole):
    """64 numbers in four groups, each of whole bits: what there is not is not taken, and bytes are those there are."""
    given = tokens(1, 2, 200, (64, 64))
    settings = {"outliers": 0} if make is Spectral else {"edge_layers": 0} if make is TurboQuant else {}
    layer = PrunedLayer(make(bits, residual=0, sinks=0, **settings), 0)
    step(layer, given)
    (tier,) = layer.table.packed
    for kind in ("key", "value"):
        assert (tier.tensors[f"{kind}_widths"].sum(-1) == 4 * whole).all()
        assert tier.tensors[f"{kind}_codes"].shape[3] == 8 * whole == code_bytes(64, bits)
    assert len(tier) == 192
    held = sum(tensor.untyped_storage().nbytes() for tensor in tier.tensors.values())
    assert held == 2 * (192 * tier.codec.row_bytes(64, 64) + 8)
    if make is Spectral:  # the others cut off what is extraordinary
        error = (tier.decoded()[0] - given[1][:, :, :192]).norm() / given[1].norm()
        assert error < 2.0**-whole


def test_layers_that_pack_nothing_hold_no_basis():
    cache = PrunedCache(shared(), Spectral(2, edge_layers=1, edge_bits=16, residual=4, sinks=1))
    generate(shared(), left_padded([90]), 2, **cache_argument(cache))
    learnt = [layer.table.basis is not None for layer in cache.layers]
    assert learnt == [Spectral(2, edge_layers=1, edge_bits=16).codec(at, len(learnt)) is not None
                      for at in range(len(learnt))]  # fmt: skip


def test_tokens_beside_exact_sinks_wait_until_the_buffer_is_full():
    """Every `buffer` generated tokens are packed together, as the blocks of probes are counted."""
    given = tokens(1, 1, 52, (8, 8))
    layer = PrunedLayer(ZipCache(buffer=5, rotate=True), 0)
    step(layer, tuple(part[:, :, :40] for part in given))
    for generated in range(1, 13):
        step(layer, tuple(part[:, :, 39 + generated : 40 + generated] for part in given))
        assert layer.table.packed_length == 36 + generated // 5 * 5


@pytest.mark.parametrize(
    "policy", [Spectral(residual=4, sinks=1), KIVI(3, group_size=4, residual=4, rotate=True)], ids=str
)
def test_a_padded_batch_holds_what_each_sequence_holds_alone(policy):
    """Every sequence has a basis and codes of its own."""
    lengths, width = [60, 41, 12], 64
    given = tokens(3, 2, width + 6, (8, 8))
    valid = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    together = PrunedLayer(policy, 0)
    step(together, tuple(part[:, :, :width] for part in given), valid)
    alone = [PrunedLayer(policy, 0) for _ in lengths]
    for row, length in enumerate(lengths):
        step(alone[row], tuple(part[row : row + 1, :, width - length : width] for part in given))
    for at in range(width, width + 6):
        output = step(together, tuple(part[:, :, at : at + 1] for part in given))
        for row, layer in enumerate(alone):
            expected = step(layer, tuple(part[row : row + 1, :, at : at + 1] for part in given))
            torch.testing.assert_close(
                output[row], expected[0], atol=2e-2, rtol=0
            )  # a code between two may fall otherwise
    for row, layer in enumerate(alone):
        own = together.table.positions[row] >= 0
        for name, held in rows_of(layer.table, 0).items():
            found = rows_of(together.table, row)[name]
            assert (found[:, -held.shape[1] :] - held).abs().gt(1e-3).float().mean() < 0.01, name
        assert int(own.sum()) == layer.table.positions.numel()


def rows_of(table: TokenTable, row: int) -> dict[str, Tensor]:
    """Decoded keys and values of a sequence, by position."""
    order = table.positions[row].argsort(-1)[..., None]
    return {
        name: held[row].gather(1, order.expand(-1, -1, held.shape[3]))
        for name, held in (("keys", table.all_keys()), ("values", table.all_values()))
    }


ROTATING = [
    Spectral(residual=8, sinks=2),
    KIVI(4, group_size=8, residual=4, rotate=True),
    ZipCache(buffer=8, rotate=True),
    H2O(40, recent=8) | KIVI(group_size=8, residual=8, rotate=True),
    H2O(40, recent=8, share=Adaptive()) | Spectral(3, value_bits=2, residual=0, sinks=0),
]


@pytest.mark.parametrize("policy", ROTATING, ids=str)
def test_the_basis_goes_where_its_table_goes(policy, tmp_path):
    """Forks, files, beams and crops: the same tokens follow, and every byte is counted."""
    model = shared()
    batch = left_padded([90, 70], seed=3)
    cache = PrunedCache(model, policy)
    generate(model, batch, 4, **cache_argument(cache))
    assert any(layer.table.packed for layer in cache.layers)
    assert all(layer.table.basis is not None and layer.table.basis.estimated for layer in cache.layers)
    assert cache.nbytes == storage_nbytes(cache)
    fork = cache.fork()
    cache.save(tmp_path / "cache.safetensors")
    loaded = PrunedCache.load(tmp_path / "cache.safetensors", model)
    fork.reorder_cache(torch.tensor([1, 0]))
    assert fork.nbytes == storage_nbytes(fork)
    assert loaded.nbytes <= cache.nbytes
    for layer, other, third in zip(cache.layers, fork.layers, loaded.layers, strict=True):
        for name, tensor in layer.table.basis.tensors().items():
            assert torch.equal(third.table.basis.tensors()[name], tensor)
            if layer.table.basis.tensors()[name].shape[0] == 2:
                assert torch.equal(other.table.basis.tensors()[name], tensor[[1, 0]])
    more = token_ids(2, 3, seed=5)
    with torch.no_grad():
        one, two = (model(more, **cache_argument(each)).logits for each in (cache, loaded))
        turned = model(more[[1, 0]], **cache_argument(fork)).logits
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned[[1, 0]], one, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "policy",
    [*ROTATING, OSCAR(4, residual=4, sinks=2), H2O(30, recent=4) | ZipCache(buffer=8, rotate=True)],
    ids=str,
)
def test_each_sequence_of_a_batch_learns_when_it_would_alone(policy):
    """One that began with a greeting has its matrices from a later prompt, beside others whose rows are packed."""
    turns = [(60, 5), (6, 50), (4, 3)]
    pieces = [left_padded(turn, seed=seed) for seed, turn in enumerate(turns)]
    batch = {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}
    model = build("llama", dtype=torch.float64)
    together = PrunedCache(model, policy)
    logits = feed(model, batch, together, [60, 50, 4])
    for row in range(2):
        alone = PrunedCache(model, policy)
        expected = feed(model, sequence(batch, row), alone, [turn[row] for turn in turns])
        torch.testing.assert_close(logits[row, -1], expected[0, -1], atol=5e-3, rtol=1e-3)
        for mine, own in zip(held_by(together), held_by(alone), strict=True):
            tokens = own.bits.shape[2]
            assert torch.equal(mine.bits[row, :, :tokens], own.bits[0])
            torch.testing.assert_close(mine.keys[row, :, :tokens], own.keys[0], atol=5e-3, rtol=1e-3)
    learned = [layer.table.may_learn.tolist() for layer in together.layers]
    assert learned == [[False, False]] * 2


@pytest.mark.parametrize(
    ("policy", "newest"),
    [
        (Spectral(residual=6, sinks=4), 24),
        (KIVI(8, group_size=8, residual=4, rotate=True), 8),
        (ZipCache(buffer=8, rotate=True), 0),
        (KIVI(8, group_size=8, residual=4), 4),
    ],
    ids=str,
)
def test_what_was_packed_cannot_be_taken_back(policy, newest):
    """Sinks are exact as well, and not the newest for that."""
    cache = PrunedCache(shared(), policy)
    feed(shared(), left_padded([60]), cache, [60])
    taken = []
    for count in range(60):
        fork = cache.fork()
        try:
            fork.crop(-count)
        except CacheError:
            assert kept_everywhere(fork) == kept_everywhere(cache)
            continue
        assert kept_everywhere(fork) == [[[*range(60 - count)]] * 2] * 2
        taken.append(count)
    assert taken == [*range(newest + 1)]


def packed_output(table: TokenTable, query: Tensor) -> Tensor:
    """Attention of a query to all keys and values as they decode."""
    empty = table.positions < 0
    return single_query_attention(query, table.all_keys(), table.all_values(), Scoring(0.4), empty, True)[0]


def test_attention_is_that_to_decoded_rows():
    """Over codes of several widths, with holes, and rows in full precision."""
    queries, keys, values = tokens(2, 2, 90, (32, 16))
    table = TokenTable(keys, values, torch.arange(90), {})
    table.turn(basis_of(queries, keys, values))
    slots = torch.arange(80).expand(2, 2, -1)
    table.quantize([(RotatedCodec(2), slots[:, :, :50]), (RotatedCodec(4, value_bits=3), slots[:, :, 50:])])
    table.evict(torch.tensor([7, 60]).expand(2, 2, -1))
    query = queries[:, :, :1]
    output, _ = packed.single_query(query, table, Scoring(0.4))
    torch.testing.assert_close(output, packed_output(table, query), atol=1e-4, rtol=1e-3)


def test_beams_and_assisted_decoding_and_half_precision():
    """Generation goes through with all that moves tables; eight bits follow the stock model for a while."""
    model, prompt = build("llama"), {"input_ids": token_ids(1, 60, seed=1)}
    policy = KIVI(8, group_size=4, residual=4, rotate=True)
    expected = generate(model, prompt, 6)
    assert generate(model, prompt, 6, **cache_argument(PrunedCache(model, policy))).tolist() == expected.tolist()
    beams = generate(model, prompt, 8, **cache_argument(PrunedCache(model, policy)), num_beams=3)
    assert beams.shape[1] == 68
    looked_up = PrunedCache(model, policy)
    assert (
        generate(model, prompt, 6, **cache_argument(looked_up), prompt_lookup_num_tokens=3).tolist()
        == expected.tolist()
    )
    half = build("llama", dtype=torch.bfloat16)
    cache = PrunedCache(half, Spectral(residual=4, sinks=1))
    generate(half, prompt, 4, **cache_argument(cache))
    assert all(torch.isfinite(each).all() for name, each in rows(cache, 0).items() if name in ("keys", "values"))


def test_settings_that_cannot_be():
    """Each says what was wrong, and what to write."""
    for make in (
        lambda: Spectral(9), lambda: Spectral(value_bits=1), lambda: Spectral(edge_bits=15), lambda: Spectral(sinks=-1),
        lambda: Spectral(True), lambda: Spectral("2"), lambda: Spectral(float("nan")), lambda: Spectral(None),
        lambda: Spectral(outliers=1.5), lambda: Spectral(outlier_bits=16), lambda: KIVI(2.5),
        lambda: KIVI(rotate=1), lambda: ZipCache(rotate="yes"), lambda: RotatedCodec(2, value_bits=1.5),
    ):  # fmt: skip
        with pytest.raises(PolicyError, match=r"not supported|True or False|at least 0|from 0 to 1"):
            make()


@pytest.mark.parametrize("dims", [(64, 64), (32, 128)], ids=str)
@pytest.mark.parametrize("estimated", [False, True])
@pytest.mark.parametrize("bits", [2, 2.5, 3, 4, 8])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_compiled_loops_are_the_twin_of_pytorch(dims, estimated, bits, group):
    """Of every width, over several parts of a tier, with holes, several tiers, and rows in full precision."""
    if cpu.library() is None or cpu.library().rotated_encode is None:
        pytest.skip("no compiled loops")
    queries, keys, values = tokens(2, 2, 330, dims)
    table = TokenTable(keys, values, torch.arange(330), {})
    if estimated:
        table.turn(basis_of(queries, keys, values))
    slots = torch.arange(320).expand(2, 2, -1)
    table.quantize([(RotatedCodec(bits), slots[:, :, :300]), (RotatedCodec(2, value_bits=4), slots[:, :, 300:])])
    table.evict(torch.tensor([7, 310]).expand(2, 2, -1))
    query = torch.randn(2, 2 * group, 1, dims[0], generator=torch.Generator().manual_seed(0))
    scoring = Scoring(0.3, sinks=torch.randn(2 * group))
    found, expected = (each(query, table, scoring) for each in (CPU.packed_single_query, packed.single_query))
    torch.testing.assert_close(found[1], expected[1], atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(found[0], expected[0], atol=2e-4, rtol=1e-3)


def test_rows_too_long_for_compiled_loops_are_packed_without_them():
    keys = torch.randn(1, 1, 8, 1040, generator=torch.Generator().manual_seed(0))
    found = CPU.encode(RotatedCodec(2), keys, keys, torch.arange(8).expand(1, 1, -1))
    expected = RotatedRows.encode_in(RotatedCodec(2), Basis.fixed(1040, 1040), keys, keys)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("dims", [(64, 16), (32, 128)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_packed_alike_by_compiled_loops(dims, bits):
    """Scales are the same, and codes but for numbers that lie between two; rows that are nothing included."""
    if cpu.library() is None or cpu.library().rotated_encode is None:
        pytest.skip("no compiled loops")
    queries, keys, values = tokens(2, 2, 300, dims)
    keys[0, 0, 5], values[1, 1, 7] = 0.0, float("nan")
    basis = basis_of(queries, keys, values)
    slots = torch.arange(300).expand(2, 2, -1).clone()
    slots[0, 1, 290:] = -1
    found, expected = (each.encode(RotatedCodec(bits), keys, values, slots, basis) for each in (CPU, TORCH))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert (found.tensors[name] == tensor).float().mean() > 0.995, name
