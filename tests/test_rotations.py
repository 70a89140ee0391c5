"""Rotations that are measured once: against the formula in numpy, in files, and wherever a table goes with them."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import build, feed, generate, left_padded, sequence, shared, stepwise, stock, storage_nbytes, token_ids
from test_turboquant_oscar import signs
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvprune import Adaptive, CacheError, PolicyError, PrunedCache, Rotations
from kvprune.cache.models import cache_argument
from kvprune.policies import H2O, OSCAR, Full
from kvprune.policy import registry
from kvprune.table.rotated_rows import RotatedRows

DIM, LAYERS = 8, 2


def random_rotations(layers: int = LAYERS, dims: tuple[int, int] = (DIM, DIM), seed: int = 0) -> Rotations:
    random = torch.Generator().manual_seed(seed)
    return Rotations(
        [tuple(torch.linalg.qr(torch.randn(dim, dim, generator=random)).Q for dim in dims) for _ in range(layers)]
    )


FEW = OSCAR(residual=4, sinks=1, rotations=random_rotations())


def turning(rotations: Rotations, layer: int) -> tuple[np.ndarray, np.ndarray]:
    basis = rotations.basis(layer, (1, 1), torch.device("cpu"))
    return tuple(part.turning(torch.device("cpu"))[0, 0].double().numpy() for part in (basis.keys, basis.values))


# -- measured ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def states(model: torch.nn.Module, ids: Tensor) -> list[list[np.ndarray]]:
    """Queries, keys and values of every layer, `[heads, n, D]`, by the modules of transformers."""
    hidden = model.model(ids, output_hidden_states=True).hidden_states
    cosines, sines = model.model.rotary_emb(hidden[0], torch.arange(ids.shape[1])[None])
    found = []
    for layer, entering in zip(model.model.layers, hidden, strict=False):
        attention, normed = layer.self_attn, layer.input_layernorm(entering)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        queries, keys, values = (each(normed).unflatten(2, (-1, DIM)).transpose(1, 2) for each in projections)
        queries, keys = apply_rotary_pos_emb(queries, keys, cosines, sines)
        found.append([each[0].double().numpy() for each in (queries, keys, values)])
    return found


def expected_covariances(ids: Tensor, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """C_Q and C_V of every layer, token by token."""
    pieces = [states(stock(), piece) for piece in ids.split(length, dim=1)]
    found = []
    for layer in range(LAYERS):
        queries, keys, values = (np.concatenate([piece[layer][kind] for piece in pieces], 1) for kind in range(3))
        group, heads, of_keys, of_values = len(queries) // len(keys), len(keys), 0.0, 0.0
        for head in range(heads):
            asked = queries[head * group : (head + 1) * group].reshape(-1, DIM)
            own = sum(np.outer(query, query) for query in asked) / len(asked)
            weights = np.array([key @ own @ key for key in keys[head]])
            weights /= weights.mean()
            of_keys += own / heads
            of_values += sum(
                weight * np.outer(value, value) for weight, value in zip(weights, values[head], strict=True)
            ) / (len(weights) * heads)
        found.append((of_keys, of_values))
    return found


@pytest.mark.parametrize("length", [400, 64])
def test_rotations_are_those_of_the_formula(length):
    """R = U P H of the means over heads, of a text in one piece or several; every component then costs the same."""
    ids = token_ids(1, 150, seed=1)
    rotations = Rotations.measure(shared(), ids, length=length)
    assert rotations.dims == [(DIM, DIM)] * LAYERS
    hadamard = signs(DIM) / math.sqrt(DIM)
    order = [int(format(number, "03b")[::-1], 2) for number in range(DIM)]
    for layer, covariances in enumerate(expected_covariances(ids, length)):
        for found, covariance in zip(turning(rotations, layer), covariances, strict=True):
            np.testing.assert_allclose(found.T @ found, np.eye(DIM), atol=3e-2)  # of 8 bits a number
            sizes, vectors = np.linalg.eigh(covariance)
            sizes, vectors = sizes[::-1], vectors[:, ::-1]
            np.testing.assert_allclose(np.diag(found.T @ covariance @ found), sizes.mean(), rtol=5e-2)
            # An eigenvector may have either sign.
            shares = np.abs(vectors[:, order].T @ found @ hadamard.T)
            np.testing.assert_allclose(shares, np.eye(DIM), atol=0.1)
    pooled, alone = turning(rotations, 0)[0], turning(Rotations.measure(shared(), ids[:, :40]), 0)[0]
    assert np.abs(pooled - alone).max() > 0.05


def test_a_model_is_what_it_was_when_it_has_been_measured():
    """It generates what it did, with a stock cache; the same text gives the same rotations."""
    model, batch = build("llama"), left_padded([20])
    before = generate(model, batch)
    assert Rotations.measure(model, token_ids(1, 60)) == Rotations.measure(model, token_ids(1, 60))
    assert torch.equal(generate(model, batch), before)


def test_texts_that_cannot_be_measured():
    for ids, settings in ((token_ids(2, 60), {}), (token_ids(1, 15), {}), (token_ids(1, 60)[0], {})):
        with pytest.raises(CacheError, match="one text of at least 16 tokens"):
            Rotations.measure(shared(), ids, **settings)
    with pytest.raises(CacheError, match="length=0"):
        Rotations.measure(shared(), token_ids(1, 60), length=0)
    broken = build("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[3] = math.inf
    with pytest.raises(CacheError, match=r"layer 1 of LlamaForCausalLM .* not finite"):
        Rotations.measure(broken, token_ids(1, 60))


# -- a value, and in files ---------------------------------------------------------------------------------------------


def test_rotations_go_to_a_file_and_come_back(tmp_path):
    """Equal, of one model alone, and as a setting by the path of their file."""
    path, model = tmp_path / "rotations.json", shared()
    rotations = Rotations.measure(model, token_ids(1, 60))
    rotations.save(path)
    loaded = Rotations.load(path, model)
    assert loaded == rotations == Rotations(tuple(rotations))
    assert loaded.model == rotations.model
    assert copy.deepcopy(rotations) == pickle.loads(pickle.dumps(rotations)) == rotations
    assert pickle.loads(pickle.dumps(rotations)).model == rotations.model
    for known in (str(path), tuple(rotations), list(rotations)):
        policy = OSCAR(3, rotations=known)
        assert policy == OSCAR(3, rotations=rotations) != OSCAR(3)
        assert hash(policy) == hash(OSCAR(3, rotations=rotations))
    assert registry.parse(f"oscar:bits=3,rotations={path}") == policy
    assert str(policy) == "OSCAR(bits=3, rotations=Rotations(2 layers))"
    PrunedCache(model, policy)

    other = build("llama", seed=1)
    with pytest.raises(CacheError, match=r"another model .*weights are others"):
        Rotations.load(path, other)
    with pytest.raises(CacheError, match=r"another model .*weights are others"):
        PrunedCache(other, OSCAR(rotations=str(path)))
    assert not other.config._attn_implementation.startswith("kvprune")  # nothing has changed
    PrunedCache(other, OSCAR(rotations=Rotations.load(path, other, trust_model=True)))
    with pytest.raises(CacheError, match=r"another model .*hidden_size"):
        Rotations.load(path, build("llama", hidden_size=64), trust_model=True)
    with pytest.raises(CacheError, match="nobody has said"):
        random_rotations().save(path)
    with pytest.raises(CacheError, match="cannot be saved"):
        rotations.save(tmp_path)


def test_orthogonal_tensors_become_rotations():
    """Within what 8 bits leave, whatever their dims; and saved descriptions hold them."""
    for dims in ((8, 8), (24, 10), (1, 64)):
        random = torch.Generator().manual_seed(2)
        given = [torch.linalg.qr(torch.randn(dim, dim, generator=random)).Q for dim in dims]
        rotations = Rotations([given])
        assert rotations.dims == [dims]
        for found, expected in zip(turning(rotations, 0), given, strict=True):
            # A column's numbers are off by half of a 127th of its largest.
            assert (np.abs(found - expected.numpy()) <= expected.abs().amax(0).numpy() / 254 + 1e-6).all()
        assert Rotations([[each.bfloat16().float() for each in given]]).dims == [dims]
    policy = OSCAR(rotations=rotations)
    assert registry.from_description(json.loads(json.dumps(registry.described(policy)))) == policy


@pytest.mark.parametrize(
    "given",
    [
        (), 3, "no pairs", [("a", "b")], [("QUJD", "QUJD")], [(torch.eye(4), torch.ones(4, 4))],
        [(torch.eye(4), torch.eye(4)[:3])], [(torch.eye(4), torch.zeros(4, 4))], [(torch.eye(4) * math.nan,) * 2],
        [(torch.eye(4),)], [(torch.eye(4).int(), torch.eye(4))], [(torch.eye(0),) * 2], [("é", "é")],
    ],
)  # fmt: skip
def test_what_is_no_rotations(given):
    with pytest.raises(PolicyError, match=r"^rotations "):
        Rotations(given)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "rotations.json"
    written = {"format": "kvprune.rotations", "version": 1, "layers": [["QUJD", "QUJD"]], "model": {}}
    for damaged in (
        "", "{", "[]", json.dumps(written), json.dumps({**written, "layers": None}),
        json.dumps({**written, "version": 2}), json.dumps({**written, "layers": random_rotations(), "model": None}),
    ):  # fmt: skip
        path.write_text(damaged)
        with pytest.raises(CacheError, match="cannot be loaded"):
            OSCAR(rotations=str(path))
    with pytest.raises(CacheError, match="cannot be loaded"):
        OSCAR(rotations=str(tmp_path / "none"))
    with pytest.raises(PolicyError, match="names a file"):
        registry.from_description({"policy": "oscar", "settings": {"rotations": str(path)}})


@pytest.mark.parametrize(
    ("family", "rotations", "said"),
    [
        ("llama", random_rotations(3), "3 layers of keys and values of 8 numbers, .* 2 layers of keys and values of 8"),
        ("llama", random_rotations(dims=(16, 16)), "values of 16 numbers, and LlamaForCausalLM has 2 layers .* of 8"),
        ("llama", random_rotations(dims=(8, 16)), "2 layers of keys of 8 and values of 16 numbers"),
        ("mistral-sliding", random_rotations(), "MistralForCausalLM has no layers to prune"),
        ("qwen3-hybrid", random_rotations(3), "Qwen3ForCausalLM has 2 layers"),
    ],
    ids=["layers", "keys", "values", "none", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*no layer with full attention")
def test_rotations_of_other_shapes_are_refused(family, rotations, said):
    """Before anything has changed, with what is wanted."""
    model = build(family)
    before = model.config._attn_implementation
    for policy in (OSCAR(rotations=rotations), H2O(64) | OSCAR(rotations=rotations)):
        with pytest.raises(PolicyError, match=said):
            PrunedCache(model, policy)
    assert model.config._attn_implementation == before


# -- in caches ---------------------------------------------------------------------------------------------------------


def assert_turned(cache: PrunedCache, rotations: Rotations) -> None:
    """Every head of every sequence has the layer's rotations."""
    for layer, each in enumerate(cache.layers):
        for part, expected in zip((each.table.basis.keys, each.table.basis.values), rotations[layer], strict=True):
            one = Rotations([(expected, expected)]).basis(0, (1, 1), torch.device("cpu")).keys
            assert torch.equal(part.matrix, one.matrix.expand_as(part.matrix))
            assert torch.equal(part.span, one.span.expand_as(part.span))
            assert not part.mean.any()
            assert part.widths(2, part.span.shape[:2], part.span.device).unique().tolist() == [2]


@pytest.mark.parametrize("sizes", [[10] + [1] * 50, [40, 20], [1] * 60], ids=["short", "turns", "generated"])
def test_rows_are_turned_by_them_from_the_first_on(sizes):
    """However short the prompt is, and whatever comes later."""
    batch, cache, exact = left_padded([60, 60]), PrunedCache(shared(), FEW), PrunedCache(shared(), Full())
    feed(shared(), batch, cache, sizes[:1])
    assert_turned(cache, FEW.rotations)
    first = cache.layers[0].table.basis
    feed(shared(), batch, cache, sizes[1:], begin=sizes[0])
    feed(shared(), batch, exact, [60])
    assert cache.layers[0].table.basis is first
    # Keys and values of the first layer do not depend on what attention has lost.
    table, known = cache.layers[0].table, exact.layers[0].table
    (tier,), count = table.packed, table.packed_length
    assert count == 32
    assert table.positions[0, 0, :count].tolist() == list(range(1, 33))
    expected = RotatedRows.encode_in(
        FEW.codec(0, LAYERS), FEW.rotations.basis(0, (2, 2), torch.device("cpu")),
        known.keys[:, :, 1:33], known.values[:, :, 1:33],
    )  # fmt: skip
    for name, tensor in expected.tensors.items():
        if tensor.dtype == torch.uint8:
            assert (
                tier.tensors[name] == tensor
            ).float().mean() > 0.99  # what lies between two codes may fall otherwise
        else:
            torch.testing.assert_close(tier.tensors[name], tensor, atol=2e-3, rtol=2e-3)


def test_a_batch_is_each_of_its_sequences_alone():
    """Padding changes nothing, nor do the others: rotations do not depend on what is read."""
    batch, sizes = left_padded((60, 44, 9), width=64), [40, 1, 1, 20, 2]
    together = PrunedCache(shared(), FEW)
    logits = list(stepwise(shared(), batch, together, sizes))
    for row in range(3):
        alone, real = PrunedCache(shared(), FEW), batch["attention_mask"][row].bool()
        parts = [int(part.sum()) for part in real.split(sizes) if part.any()]
        expected = list(stepwise(shared(), sequence(batch, row), alone, parts))
        torch.testing.assert_close(logits[-1][row, -1], expected[-1][0, -1], atol=2e-3, rtol=1e-3)
    together.batch_select_indices(torch.tensor([2, 0]))
    assert_turned(together, FEW.rotations)
    assert together.nbytes == storage_nbytes(together)


@pytest.mark.parametrize("sequences", [1, 2])
def test_beams_go_on_with_them(sequences):
    cache = PrunedCache(shared(), FEW)
    generate(shared(), left_padded([50, 30][:sequences]), 12, num_beams=2, **cache_argument(cache))
    assert_turned(cache, FEW.rotations)


@pytest.mark.parametrize(
    "policy",
    [FEW, H2O(40, recent=8, share=Adaptive()) | replace(FEW, bits=3, value_bits=2, residual=0, sinks=0)],
    ids=str,
)
def test_forks_and_files_go_on_alike(policy, tmp_path):
    """The same tokens follow, from ragged tables too; a saved cache needs no file of rotations, then or ever after."""
    model, batch, path = shared(), left_padded([90, 70], seed=3), tmp_path / "cache.safetensors"
    cache = PrunedCache(model, policy)
    generate(model, batch, 4, **cache_argument(cache))
    assert all(layer.table.packed for layer in cache.layers)
    assert cache.nbytes == storage_nbytes(cache)
    cache.save(path)
    loaded, fork = PrunedCache.load(path, model), cache.fork()
    assert loaded.policy == policy
    assert PrunedCache.load(path, model, policy=policy).policy is policy
    more = token_ids(2, 3, seed=5)
    with torch.no_grad():
        one, two, three = (model(more, **cache_argument(each)).logits for each in (cache, loaded, fork))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(three, one, atol=1e-4, rtol=1e-4)
    anew = PrunedCache(model, loaded.policy)
    generate(model, batch, 2, **cache_argument(anew))
    for each in (*cache.layers, *loaded.layers, *anew.layers):
        assert each.table.basis.estimated
    other = OSCAR(residual=4, sinks=1, rotations=random_rotations(seed=1))
    with pytest.raises(CacheError, match=r"its policy is .*Rotations\(2 layers\).*, and not "):
        PrunedCache.load(path, model, policy=other)


def test_layers_that_pack_nothing_hold_none():
    """Of three layers the middle one is packed, by its own rotations."""
    model, rotations = build("llama", num_hidden_layers=3), random_rotations(3)
    cache = PrunedCache(model, OSCAR(residual=4, sinks=1, edge_layers=1, edge_bits=16, rotations=rotations))
    generate(model, left_padded([50]), 2, **cache_argument(cache))
    bases = [layer.table.basis for layer in cache.layers]
    assert bases[0] is bases[2] is None
    expected = rotations.basis(1, (1, 2), torch.device("cpu"))
    assert all(torch.equal(found, expected.tensors()[name]) for name, found in bases[1].tensors().items())
