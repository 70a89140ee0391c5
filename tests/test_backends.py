"""Attention backends: all of them compute the same, and the one that is used is the one that was asked for."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from families import assert_same_rows, feed, generate, left_padded, shared, token_ids
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from kvprune import CacheError, PrunedCache, Scoring
from kvprune.attention.backends import BACKENDS, FLASH, SDPA, FlashAttn, choose
from kvprune.attention.softmax import causal_attention
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, GemFilter

gpu = pytest.mark.gpu


def dense(queries, keys, values, scale):
    """The same in float64, from the whole matrix. All as in `Sdpa.causal`."""
    rows, length, group = queries.shape[2], keys.shape[2], queries.shape[1] // keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, dim=1) for tensor in (keys, values))
    logits = queries.double() @ keys.transpose(2, 3) * scale
    later = torch.ones(rows, length, dtype=torch.bool, device=queries.device).triu_(length - rows + 1)
    return torch.softmax(logits.masked_fill(later, -torch.inf), dim=-1) @ values


def step(earlier, rows, *, batch=2, kv_heads=2, group=2, head_dim=8, dtype=torch.float32, device="cpu", seed=0):
    """Queries, keys and values of `rows` new tokens behind `earlier` others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (kv_heads * group, rows), (kv_heads, earlier + rows), (kv_heads, earlier + rows)
    return [
        (2 * torch.randn(batch, heads, length, head_dim, generator=generator)).to(device, dtype)
        for heads, length in shapes
    ]


class FakeFlashAttn:
    """The two functions of the package that are called, by their documented conventions, in torch."""

    def __init__(self):
        self.calls = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
    ):
        """q: `[B, L, Hq, D]`. k, v: `[B, S, Hkv, D]`. The causal mask ends at the lower right."""
        assert causal
        assert (dropout_p, window_size, softcap) == (0.0, (-1, -1), 0.0)
        self.calls.append("flash_attn_func")
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return dense(*heads_first, softmax_scale).to(q.dtype).transpose(1, 2)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        """q: `[tokens, Hq, D]`. k, v: `[tokens, Hkv, D]`. cu_seqlens: int32 `[B + 1]`, where sequences begin."""
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_k.tolist()
        assert len(q) == len(k) == len(v) == bounds[-1]
        spans = [*itertools.pairwise(bounds)]
        assert max_seqlen_q == max_seqlen_k == max(end - begin for begin, end in spans)
        parts = [
            self.flash_attn_func(
                q[None, begin:end], k[None, begin:end], v[None, begin:end], 0.0, softmax_scale, causal
            )[0]
            for begin, end in spans
        ]
        self.calls[-len(parts) :] = ["flash_attn_varlen_func"]
        return torch.cat(parts)


@pytest.fixture
def package(monkeypatch):
    """flash-attn, as if it were installed and ran on the CPU."""
    fake = FakeFlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(FlashAttn, "missing", staticmethod(lambda *_: None))
    return fake


# -- what they compute -------------------------------------------------------------------------------------------------


@given(
    earlier=st.integers(0, 40),
    rows=st.integers(1, 20),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_torch_flash_is_exact(earlier, rows, kv_heads, group, dtype):
    """New tokens behind any number of others, merged from two calls, as from the whole matrix."""
    queries, keys, values = step(earlier, rows, kv_heads=kv_heads, group=group, dtype=dtype)
    assert FLASH.takes(queries, keys, values)
    output, _ = FLASH.causal(queries, keys, values, 0.3)
    assert output.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), dense(queries, keys, values, 0.3), atol=tolerance, rtol=tolerance)


def test_logits_that_overflow_nothing():
    """The parts are merged by differences of log-sum-exps, so huge logits stay finite, and exact."""
    queries, keys, values = step(9, 5)
    output, _ = FLASH.causal(100 * queries, keys, values, 10.0)
    torch.testing.assert_close(output.double(), dense(100 * queries, keys, values, 10.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("earlier", [0, 7])
def test_flash_attn_is_called_by_its_conventions(package, earlier):
    queries, keys, values = step(earlier, 6)
    output, _ = BACKENDS["flash-attn"].causal(queries, keys, values, 0.3)
    torch.testing.assert_close(output, dense(queries, keys, values, 0.3).float())
    assert package.calls == ["flash_attn_func"]


def test_flash_attn_takes_padded_sequences_in_one_call(package):
    """What padding returns is zero."""
    queries, keys, values = step(0, 9, batch=3)
    spans = [(0, 9), (4, 9), (2, 7)]
    output = BACKENDS["flash-attn"].spans(queries, keys, values, 0.3, spans)
    assert package.calls == ["flash_attn_varlen_func"]
    expected = torch.zeros_like(output)
    for row, (begin, end) in enumerate(spans):
        own = (tensor[row : row + 1, :, begin:end] for tensor in (queries, keys, values))
        expected[row, :, begin:end] = dense(*own, 0.3)[0].float()
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize(
    "scoring", [Scoring(0.3, softcap=2.0), Scoring(0.3, sinks=torch.ones(4))], ids=["cap", "sinks"]
)
def test_what_no_kernel_does_goes_past_them(package, backend, scoring):
    """Soft caps and attention sinks are computed exactly, whatever the backend."""
    states = step(5, 6)
    assert torch.equal(causal_attention(*states, scoring, backend)[0], causal_attention(*states, scoring, SDPA)[0])
    assert package.calls == []


def test_values_of_another_size(package):
    """Flash kernels want values as wide as keys; others are attended to with a mask."""
    queries, keys, _ = step(5, 6)
    values = torch.randn(2, 2, 11, 5)
    for backend in BACKENDS.values():
        output, _ = causal_attention(queries, keys, values, Scoring(0.3), backend)
        torch.testing.assert_close(output, dense(queries, keys, values, 0.3).float())
    assert package.calls == []


# -- in a cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [A2SF(20, recent=4), GemFilter(24) | A2SF(20, recent=4)], ids=str)
@pytest.mark.parametrize("attention", ["flash", "flash-attn"])
@pytest.mark.parametrize("lengths", [[40], [40, 25]], ids=str)
def test_caches_are_the_same_on_every_backend(package, policy, attention, lengths):
    """A prompt, decode steps, a second prompt in two pieces: the logits and the rows of attention="sdpa"."""
    batch = left_padded([length + 30 for length in lengths])
    caches = [PrunedCache(shared(), policy, attention=name) for name in ("sdpa", attention)]
    expected, logits = (feed(shared(), batch, cache, [40, 1, 1, 20, 8]) for cache in caches)
    torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
    for row in range(len(lengths)):
        assert_same_rows(*caches, row, row, atol=1e-4, rtol=1e-4)
    assert bool(package.calls) == (attention == "flash-attn")


# -- which one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["auto", "flash", "sdpa"])
def test_the_report_names_the_backend(attention):
    cache = PrunedCache(shared(), A2SF(20, recent=4), attention=attention)
    feed(shared(), left_padded([40]), cache, [40])
    name = "flash" if attention == "auto" else attention
    assert cache.report().attention == cache.report().to_dict()["attention"] == name
    assert f"attention over prompts: {name}" in str(cache.report())


@pytest.mark.parametrize(
    ("attention", "match"),
    [
        ("flash-attn", r'runs on CUDA, and the model is on the cpu\. Write attention="auto"'),
        ("flash2", r'no attention backend: write one of "auto", "flash-attn", "flash", "sdpa"'),
    ],
)
def test_backends_that_cannot_be_had(attention, match):
    with pytest.raises(CacheError, match=match):
        PrunedCache(shared(), A2SF(20, recent=4), attention=attention)


CUDA, CPU, XPU = torch.device("cuda"), torch.device("cpu"), torch.device("xpu")


@pytest.mark.parametrize(
    ("model", "auto"),
    [
        ((CPU, torch.float32, 128), "flash"),
        ((CPU, torch.bfloat16, 80), "flash"),
        ((CUDA, torch.float16, 128), "flash-attn"),
        ((CUDA, torch.float32, 128), "sdpa"),
        ((CUDA, torch.bfloat16, 512), "sdpa"),
        ((CUDA, torch.bfloat16, 100), "sdpa"),
        ((XPU, torch.bfloat16, 128), "sdpa"),
    ],
    ids=str,
)
def test_auto_is_the_fastest_that_serves_the_model(monkeypatch, model, auto):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # no question of which GPU
    assert choose("auto", *model).name == auto


def test_without_the_package(monkeypatch):
    """Under "auto" torch's kernels take its place; asked for by name, its absence and the remedy are told."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = CUDA, torch.float16, 64
    assert choose("auto", *model).name == "flash"
    with pytest.raises(CacheError, match="pip install flash-attn"):
        choose("flash-attn", *model)


@pytest.mark.parametrize("length", [1, 300])
def test_single_queries_that_no_flash_kernel_takes(length):
    """Whatever the number of keys: heads that are not in eights, other types, values of another size."""
    for dtype, dim, value_dim in ((torch.float32, 64, 64), (torch.float16, 20, 20), (torch.float16, 192, 128)):
        with FakeTensorMode():
            queries, keys, values = (
                torch.empty(1, heads, rows, width, dtype=dtype, device="cuda")
                for heads, rows, width in ((4, 1, dim), (2, length, dim), (2, length, value_dim))
            )
        assert not FLASH.takes_single(queries, keys, values)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("name", ["flash", "flash-attn"])
@pytest.mark.parametrize(("earlier", "rows"), [(0, 64), (100, 64), (257, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_on_a_gpu(name, earlier, rows, dtype):
    states = step(earlier, rows, head_dim=64, dtype=dtype, device="cuda")
    backend = BACKENDS[name]
    if (missing := backend.missing(torch.device("cuda"), dtype, 64)) is not None:
        pytest.skip(missing)
    assert backend.takes(*states)
    output, _ = backend.causal(*states, 0.125)
    torch.testing.assert_close(output.double(), dense(*states, 0.125), atol=2e-2, rtol=2e-2)


@gpu
def test_padded_sequences_on_a_gpu():
    backend = BACKENDS["flash-attn"]
    if (missing := backend.missing(torch.device("cuda"), torch.float16, 64)) is not None:
        pytest.skip(missing)
    queries, keys, values = step(0, 64, head_dim=64, dtype=torch.float16, device="cuda")
    output = backend.spans(queries, keys, values, 0.125, [(0, 64), (17, 64)])
    expected = dense(queries[1:, :, 17:], keys[1:, :, 17:], values[1:, :, 17:], 0.125)
    torch.testing.assert_close(output[1:, :, 17:].double(), expected, atol=2e-2, rtol=2e-2)
    assert not output[1, :, :17].any()


@gpu
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_generate_on_a_gpu(attention):
    """Half precision decides some tokens otherwise; what is generated must be there, and finite."""
    model = shared().to("cuda", torch.bfloat16)
    try:
        cache = PrunedCache(model, A2SF(20, recent=4), attention=attention)
        ids = generate(model, {"input_ids": token_ids(2, 40).cuda()}, 8, **cache_argument(cache))
        assert ids.shape == (2, 48)
        assert all(layer.table.values.isfinite().all() for layer in cache.layers)
    finally:
        model.to("cpu", torch.float32)
