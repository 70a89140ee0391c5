"""TurboQuant and OSCAR against their formulas in numpy, and what must hold of their rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from families import generate, left_padded, shared, storage_nbytes, token_ids
from test_rotated import basis_of, packed_output, read_codes, tokens
from torch import Tensor

from kvprune import Adaptive, PolicyError, PrunedCache, Scoring, TokenTable
from kvprune.attention import packed
from kvprune.cache.models import cache_argument
from kvprune.kernels import cpu
from kvprune.kernels.cpu.kernels import CPU
from kvprune.policies import H2O, OSCAR, Spectral, TurboQuant
from kvprune.table.basis import Basis, lanes_of
from kvprune.table.rotated_codes import STEPS, normal_levels
from kvprune.table.rotated_rows import RotatedCodec, RotatedRows
from kvprune.table.spreading import rotations


def signs(size: int) -> np.ndarray:
    """The Hadamard matrix of Sylvester: -1 to the number of bits that row and column have in common."""
    return np.array([[(-1.0) ** (row & column).bit_count() for column in range(size)] for row in range(size)])


def oscar_basis(queries: Tensor, keys: Tensor, values: Tensor) -> Basis:
    asked = torch.ones(len(queries), queries.shape[2], dtype=torch.bool)
    held = torch.ones(keys.shape[:3], dtype=torch.bool)
    return Basis.estimate(queries, keys, values, asked, held, rotate=rotations)


def codes_at(packed_rows: RotatedRows, kind: str, row: int, dim: int) -> np.ndarray:
    widths = packed_rows.tensors[f"{kind}_widths"][0, 0].tolist()
    return np.array(read_codes(bytes(packed_rows.tensors[f"{kind}_codes"][0, 0, row].tolist()), widths, dim))


# -- TurboQuant --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_levels_are_those_of_lloyd_and_max(bits):
    """Each is the mean of what is nearest to it, by a sum over a fine grid; known values of Max's table."""
    levels = np.array(normal_levels(bits))
    grid = np.linspace(-8, 8, 400_001)
    density = np.exp(-(grid**2) / 2)
    owner = np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)
    means = np.bincount(owner, density * grid) / np.bincount(owner, density)
    np.testing.assert_allclose(levels, means, atol=2e-3 if bits < 8 else 2e-2)
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-12)
    known = {1: 0.7979, 2: 1.5104, 3: 2.1520, 4: 2.7326}
    assert bits == 8 or levels[-1] == pytest.approx(known[bits], abs=1e-3)


@pytest.mark.parametrize("dim", [32, 64, 24])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_keys_have_the_nearest_level_in_a_hadamard_matrix(bits, dim):
    """k^ = H s level(...), s the root mean square; no component is farther off than half of what levels are apart."""
    _, keys, values = tokens(1, 1, 40, (dim, dim))
    policy = TurboQuant(bits, edge_layers=0)
    codec = policy.codec(0, 1)
    rows = RotatedRows.encode_in(codec, Basis.fixed(dim, dim), keys, values)
    size = dim & -dim
    turning = np.kron(np.eye(dim // size), signs(size)) / math.sqrt(size)
    levels = np.array(normal_levels(bits))
    gaps = np.concatenate([[np.inf], np.diff(levels), [np.inf]])
    decoded = rows.decoded()[0][0, 0].double().numpy()
    for row in range(0, 40, 3):
        exact = turning @ keys[0, 0, row].double().numpy()
        scale = np.linalg.norm(exact) / math.sqrt(dim)
        codes = codes_at(rows, "key", row, dim)
        expected = np.abs(exact[:, None] / scale - levels).argmin(1)
        assert (codes == expected).mean() > 0.9
        assert np.abs(codes - expected).max() <= 1  # what lies between two may fall otherwise
        assert rows.tensors["key_scale"][0, 0, row] == pytest.approx(scale, rel=2e-3)
        found = scale * levels[codes]
        np.testing.assert_allclose(decoded[row], turning.T @ found, atol=4e-3 * np.abs(exact).max(), rtol=1e-3)
        above, below = gaps[codes + 1] / 2, gaps[codes] / 2
        slack = 4e-3 * np.abs(exact).max() + 1e-3
        assert (exact - found <= scale * above + slack).all()
        assert (found - exact <= scale * below + slack).all()
    assert codec.row_bytes(dim, dim) * 40 == sum(
        rows.tensors[f"{kind}_{part}"].nbytes for kind in ("key", "value") for part in ("codes", "scale")
    )


def test_values_of_turboquant_have_even_levels():
    """Of the same rotation, as `Spectral` has them where nothing is estimated."""
    _, keys, values = tokens(1, 1, 40, (32, 32))
    fixed = Basis.fixed(32, 32)
    found = RotatedRows.encode_in(TurboQuant(2).packed(2, 3), fixed, keys, values)
    expected = RotatedRows.encode_in(RotatedCodec(2, value_bits=3), fixed, keys, values)
    assert torch.equal(found.decoded()[1], expected.decoded()[1])


# -- OSCAR -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(32, 32), (48, 16)], ids=str)
def test_the_rotations_are_those_of_the_formula(dims):
    """R = U P H of E[q q^T], and of E[w v v^T]; every component then costs the same."""
    queries, keys, values = tokens(1, 1, 150, dims)
    basis = oscar_basis(queries, keys, values)
    q, k, v = (part.reshape(-1, part.shape[-1]).double().numpy() for part in (queries[0], keys[0], values[0]))
    of_queries = sum(np.outer(each, each) for each in q) / len(q)
    weights = np.array([each @ of_queries @ each for each in k])
    weights /= weights.mean()
    of_values = sum(weight * np.outer(each, each) for weight, each in zip(weights, v, strict=True)) / len(v)
    for part, covariance in ((basis.keys, of_queries), (basis.values, of_values)):
        turning, dim = part.turning(keys.device)[0, 0].double().numpy(), part.dim
        size = dim & -dim
        np.testing.assert_allclose(turning.T @ turning, np.eye(dim), atol=3e-2)  # of 8 bits a number
        sizes, vectors = np.linalg.eigh(covariance)
        sizes, vectors = sizes[::-1], vectors[:, ::-1]
        reverse = [int(format(number, f"0{size.bit_length() - 1}b")[::-1], 2) for number in range(size)]
        order = [number * (dim // size) + block for block in range(dim // size) for number in reverse]
        mixed = np.kron(np.eye(dim // size), signs(size)) / math.sqrt(size)
        expected = vectors[:, order] @ mixed
        # An eigenvector may have either sign, so what is compared is what does not depend on them.
        costs = turning.T @ covariance @ turning
        np.testing.assert_allclose(np.diag(costs), np.diag(expected.T @ covariance @ expected), rtol=5e-2)
        if size == dim:
            np.testing.assert_allclose(np.diag(costs), sizes.mean(), rtol=5e-2)
        shares = np.abs(vectors[:, order].T @ turning @ mixed.T)
        np.testing.assert_allclose(shares, np.eye(dim), atol=0.1)
        assert part.widths(2, (1, 1), keys.device).unique().tolist() == [2]
        assert not part.mean.any()


@pytest.mark.parametrize("dims", [(32, 32), (24, 10)], ids=str)
@pytest.mark.parametrize(("bits", "clips"), [(2, (0.96, 0.92)), (3, (0.5, 1.0)), (4, (1.0, 1.0)), (8, (0.0, 1.0))])
def test_clipped_rows_are_those_of_the_formula(bits, clips, dims):
    """Cut off at the quantile that numpy finds, even levels from end to end; half a step off, and what was cut off."""
    queries, keys, values = tokens(1, 1, 100, dims)
    keys[0, 0, 3] = 0.0
    basis = oscar_basis(queries, keys, values)
    codec = OSCAR(bits, key_clip=clips[0], value_clip=clips[1]).codec(0, 1)
    rows = RotatedRows.encode_in(codec, basis, keys, values)
    decoded = dict(zip(("key", "value"), rows.decoded(), strict=True))
    for kind, held, part, clip in (("key", keys, basis.keys, clips[0]), ("value", values, basis.values, clips[1])):
        turning = part.turning(keys.device)[0, 0].double().numpy()
        for at in range(0, 100, 3):
            exact = np.linalg.solve(turning, held[0, 0, at].double().numpy())
            most = np.quantile(np.abs(exact), clip)
            cut = np.clip(exact, -most, most)
            apart = (cut.max() - cut.min()) / (2**bits - 1)
            codes = codes_at(rows, kind, at, part.dim)
            scale, offset = (rows.tensors[f"{kind}_{name}"][0, 0, at].double().item() for name in ("scale", "offset"))
            slack = 2e-3 * np.abs(exact).max() + 1e-6
            assert scale * STEPS[bits] == pytest.approx(apart, rel=4e-3, abs=2 * slack / (2**bits - 1))
            assert offset == pytest.approx((cut.max() + cut.min()) / 2, abs=slack)
            found = (codes - (2**bits - 1) / 2) * STEPS[bits] * scale + offset
            assert (np.abs(found - exact) <= apart / 2 + np.abs(exact - cut) + slack).all()
            np.testing.assert_allclose(decoded[kind][0, 0, at].double().numpy(), turning @ found, rtol=1e-3, atol=4e-3)
    held = sum(tensor.nbytes for name, tensor in rows.tensors.items() if not name.endswith("widths"))
    assert held == 100 * codec.row_bytes(*dims)


# -- both --------------------------------------------------------------------------------------------------------------

CODECS = [RotatedCodec(2, normal=True), RotatedCodec(4, value_bits=3, normal=True), RotatedCodec(2, key_clip=0.9),
          RotatedCodec(3, key_clip=0.96, value_clip=0.92), RotatedCodec(8, normal=True, value_clip=1.0)]  # fmt: skip


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_rows_go_and_move_as_they_are(codec, own):
    """Whatever is appended or kept, rows decode as before, and products are theirs; in any coordinates."""
    queries, keys, values = tokens(2, 2, 150, (64, 32))
    basis = basis_of(queries, keys, values) if own else Basis.fixed(64, 32)
    rows = RotatedRows.encode_in(codec, basis, keys[:, :, :100], values[:, :, :100])
    rows.append(RotatedRows.encode_in(codec, basis, keys[:, :, 100:], values[:, :, 100:]))
    before = rows.decoded()
    kept = torch.rand(2, 2, 150, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :, :40].sort(-1).values
    rows.keep(kept, torch.zeros_like(kept, dtype=torch.bool))
    for found, then in zip(rows.decoded(), before, strict=True):
        torch.testing.assert_close(found, then.gather(2, kept[..., None].expand(-1, -1, -1, then.shape[3])))
    keys, values = rows.decoded()
    some, weights = torch.randn(2, 2, 3, 64), torch.rand(2, 2, 3, 40)
    torch.testing.assert_close(rows.dot_keys(some), some @ keys.mT, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(rows.sum_values(weights), weights @ values, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_attention_is_that_to_decoded_rows(codec):
    """By PyTorch and by compiled loops, with holes, several tiers, and rows in full precision."""
    queries, keys, values = tokens(2, 2, 330, (32, 64))
    table = TokenTable(keys, values, torch.arange(330), {})
    table.turn(oscar_basis(queries, keys, values))
    slots = torch.arange(320).expand(2, 2, -1)
    table.quantize([(codec, slots[:, :, :300]), (RotatedCodec(4, value_clip=0.9), slots[:, :, 300:])])
    table.evict(torch.tensor([7, 310]).expand(2, 2, -1))
    query, scoring = queries[:, :, :1], Scoring(0.4)
    output, probabilities = packed.single_query(query, table, scoring)
    torch.testing.assert_close(output, packed_output(table, query), atol=1e-3, rtol=1e-3)
    if cpu.library() is not None and cpu.library().rotated_encode is not None:
        found = CPU.packed_single_query(query, table, scoring)
        torch.testing.assert_close(found[0], output, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found[1], probabilities, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "policy",
    [
        TurboQuant(3, residual=8, edge_layers=0),
        OSCAR(residual=8, sinks=2),
        H2O(40, recent=8, share=Adaptive()) | OSCAR(3, value_bits=2, residual=0, sinks=0),
        H2O(60, recent=8) | TurboQuant(2, residual=8, edge_layers=0),
    ],
    ids=str,
)
def test_forks_and_files_go_on_alike(policy, tmp_path):
    """The same tokens follow, every byte is counted, and rows of ragged tables are packed too."""
    model, batch = shared(), left_padded([90, 70], seed=3)
    cache = PrunedCache(model, policy)
    generate(model, batch, 4, **cache_argument(cache))
    assert all(layer.table.packed for layer in cache.layers)
    assert cache.nbytes == storage_nbytes(cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded, fork = PrunedCache.load(tmp_path / "cache.safetensors", model), cache.fork()
    more = token_ids(2, 3, seed=5)
    with torch.no_grad():
        one, two, three = (model(more, **cache_argument(each)).logits for each in (cache, loaded, fork))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(three, one, atol=1e-4, rtol=1e-4)


def test_nothing_is_held_beside_rows_of_turboquant():
    """No basis; first and last layers exact unless said otherwise."""
    cache = PrunedCache(shared(), TurboQuant(residual=4, sinks=1, edge_layers=0))
    generate(shared(), left_padded([90]), 2, **cache_argument(cache))
    assert all(layer.table.packed and layer.table.basis is None for layer in cache.layers)
    assert TurboQuant().codec(1, 9) is None
    assert TurboQuant().codec(2, 9) == RotatedCodec(4, normal=True)


def test_settings_that_cannot_be():
    """Each says what was wrong, and what to write."""
    for make in (
        lambda: TurboQuant(1.5), lambda: TurboQuant(edge_layers=-1), lambda: OSCAR(key_clip=1.5),
        lambda: OSCAR(value_clip=None), lambda: RotatedCodec(2, key_clip=-0.1),
        lambda: RotatedCodec(2, normal=True, key_clip=0.9),
    ):  # fmt: skip
        with pytest.raises(PolicyError, match=r"not supported|at least 0|from 0 to 1|leave key_clip out"):
            make()


def test_few_bits_are_nearest_in_the_basis_of_the_prompt():
    """Errors of logits: Spectral, then OSCAR, then TurboQuant, where keys hang together and have a mean."""
    queries, keys, values = tokens(1, 1, 400, (64, 64))

    def errors(codec: RotatedCodec, basis: Basis) -> float:
        found, _ = RotatedRows.encode_in(codec, basis, keys, values).decoded()
        return float((queries @ (found - keys).mT).square().mean())

    own = errors(Spectral(2).codec(0, 1), basis_of(queries, keys, values))
    spread = errors(OSCAR(2).codec(0, 1), oscar_basis(queries, keys, values))
    fixed = errors(TurboQuant(2, edge_layers=0).codec(0, 1), Basis.fixed(64, 64))
    assert own < spread < fixed
    assert lanes_of(64) == 16
