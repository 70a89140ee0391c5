"""A cache on Triton's kernels keeps what a cache on PyTorch's keeps."""

import pytest
import torch
from devices import on_devices
from families import build, generate, kept_everywhere, left_padded

from kvprune import Adaptive, PolicyError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.kernels import choose, gpu
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Full, Keyformer, KVzip, SnapKV, ZipCache

pytest.importorskip("triton", reason="needs Triton")

POLICIES = (
    Full(), A2SF(20, recent=4), A2SF(20, recent=4, group="max"), H2O(20, recent=4), TOVA(20), SnapKV(20, window=4),
    Keyformer(20, seed=5), KIVI(residual=8, group_size=8), ZipCache(buffer=4),
    A2SF(20, recent=4) | ZipCache(buffer=4), A2SF(20, recent=4, share=Adaptive(0)), KVzip(0.5, chunk=16),
    KVzip(0.5, softmax="chunk", chunk=16),
)  # fmt: skip


@on_devices
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_keeps_the_same_with_triton(policy, device):
    """A padded batch, prompt and decoding: the same tokens stay, and the model says the same."""
    model = build("llama").to(device)
    batch = {name: tensor.to(device) for name, tensor in left_padded([40, 31], seed=3).items()}
    found = []
    for kernels in ("triton", "torch"):
        cache = PrunedCache(model, policy, kernels=kernels)
        tokens = generate(model, batch, 6, **cache_argument(cache))
        assert cache.report().kernels == kernels
        found.append((tokens.tolist(), kept_everywhere(cache), kept_everywhere(cache, 1)))
    assert found[0] == found[1]


def test_triton_where_it_cannot_run_is_an_error(monkeypatch):
    """The message says what is missing and what to write instead."""
    monkeypatch.setattr(gpu, "available", lambda device: False)
    with pytest.raises(PolicyError, match=r'need Triton and a CUDA device.*kernels="auto"'):
        choose("triton", torch.device("cpu"))
