"""Decode steps at the budget are one graph: torch.compile makes it once, and nothing it computes differs."""

import shutil

import pytest
import torch
from crossing import mostly
from families import FAMILIES, STOCK_ONLY, generate, kept_everywhere, left_padded, shared, token_ids
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from transformers import CompileConfig

from kvprune import PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Full, Keyformer, SnapKV, StreamingLLM

PROMPT, NEW = 40, 24
STATIC = {
    "a2sf": A2SF(20, recent=4),
    "a2sf-fraction": A2SF(0.4, recent=4, group="max"),
    "a2sf-bytes": A2SF("9KiB", recent=4),
    "h2o": H2O(20, recent=4),
    "tova": TOVA(20),
    "streaming": StreamingLLM(20),
    "streaming-in-the-cache": StreamingLLM(20, positions="cache"),
    "snapkv": SnapKV(20, window=8, interval=1),
    "pooled": A2SF(20, recent=4, kernel_size=5),
    "averaged": SnapKV(20, window=8, interval=1, pooling="avg"),
    "keyformer": Keyformer(20),
    "keyformer-frozen": Keyformer(20, frozen_keys=True),
}
NEVER_STATIC = {
    "full": Full(),
    "kivi": KIVI(group_size=4, residual=8),
    "snapkv": SnapKV(20, window=8),
    "interval": A2SF(20, recent=4, interval=4),
    "chain": A2SF(24, recent=4) | StreamingLLM(16),
    "quantized": A2SF(20, recent=4) | KIVI(group_size=4, residual=8),
}


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    policy = request.node.callspec.params.get("policy") if hasattr(request.node, "callspec") else None
    if getattr(policy, "positions", None) == "cache" and torch.__version__ < "2.13":
        pytest.skip("the compiler copies no object, and breaks the graph there")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2):  # what changes shapes is compiled twice, then left alone
        yield
    torch._dynamo.reset()


def compiled(model, backend="eager", fullgraph=True, **settings):
    return torch.compile(model.forward, backend=backend, fullgraph=fullgraph, **settings)


@torch.no_grad()
def decode(forward, cache, token, steps=NEW):
    """Greedy tokens `[B, steps]`, one step each, without a mask or positions."""
    tokens = []
    for _ in range(steps):
        token = forward(token, **cache_argument(cache)).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def prefilled(policy, *, sequences=1, prompt=PROMPT, model=None):
    """A cache with a prompt in it, and the token that comes next."""
    model = model or shared()
    cache = PrunedCache(model, policy)
    return cache, model(token_ids(sequences, prompt), **cache_argument(cache)).logits[:, -1:].argmax(-1)


def assert_same_state(cache, other):
    assert kept_everywhere(cache) == kept_everywhere(other)
    assert cache.seen_tokens == other.seen_tokens
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        for count in ("seen", "tokens", "generated", "prompt_tokens", "last_eviction"):
            assert getattr(mine, count) == getattr(theirs, count)


@mostly(
    "policy", STATIC, "a2sf-fraction", "a2sf-bytes", "streaming-in-the-cache", "pooled", "averaged", "keyformer-frozen"
)
@pytest.mark.parametrize("sequences", [2, pytest.param(1, marks=pytest.mark.long)])
def test_compiled_steps_are_those_of_eager_decoding(policy, sequences):
    """Without a graph break: the same tokens, the same rows, the same counts, and one compilation for all steps.

    A new cache and one that was forked use the graph that is there. Under a budget of so many tokens, the length of the
    prompt is in no shape and in no guard, but where keys are frozen with the prompt.
    """
    expected, token = prefilled(policy, sequences=sequences)
    tokens = decode(shared(), expected, token)
    cache, token = prefilled(policy, sequences=sequences)
    assert cache.is_compileable
    forward = compiled(shared())
    assert torch.equal(decode(forward, cache, token), tokens)
    assert cache.is_compileable
    assert counters["stats"]["unique_graphs"] == 1
    assert_same_state(cache, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        any_length = isinstance(policy.budget, int) and not getattr(policy, "frozen_keys", False)
        for prompt in (30, 55) if any_length else (PROMPT,):
            expected = decode(shared(), *prefilled(policy, sequences=sequences, prompt=prompt))
            cache, token = prefilled(policy, sequences=sequences, prompt=prompt)
            for one in (cache.fork(), cache):
                assert torch.equal(decode(forward, one, token), expected)


@mostly("policy", STATIC, "streaming-in-the-cache", "keyformer")
def test_compiled_steps_in_inference_mode(policy):
    """In one graph as well; and a cache that was filled there goes on outside, eagerly at first, then compiled."""
    expected, token = prefilled(policy)
    tokens = decode(shared(), expected, token)
    more = decode(shared(), expected, tokens[:, -1:])
    with torch.inference_mode():
        cache, token = prefilled(policy)
        assert torch.equal(decode(compiled(shared()), cache, token), tokens)
        assert counters["stats"]["unique_graphs"] == 1
    assert not cache.is_compileable
    first = decode(shared(), cache, tokens[:, -1:], 1)
    assert cache.is_compileable
    rest = decode(compiled(shared()), cache, first, more.shape[1] - 1)
    assert torch.equal(torch.cat([first, rest], dim=1), more)
    assert_same_state(cache, expected)


@mostly("policy", {name: STATIC[name] for name in ("a2sf", "snapkv", "keyformer")}, "snapkv", "keyformer")
def test_eager_and_compiled_steps_take_turns(policy):
    """Steps that were not compiled may come in between, in any order."""
    expected = prefilled(policy)
    tokens = decode(shared(), *expected, 3 * NEW)
    cache, token = prefilled(policy)
    forward, pieces = compiled(shared()), []
    for step, turn in [(5, shared()), (7, forward), (1, shared()), (3, forward), (3, forward), (53, shared())]:
        pieces.append(decode(turn, cache, token, step))
        token = pieces[-1][:, -1:].clone(memory_format=torch.contiguous_format)  # torch.compile guards on strides
    assert torch.equal(torch.cat(pieces, dim=1), tokens)
    assert counters["stats"]["unique_graphs"] == 1
    assert_same_state(cache, expected[0])


@mostly("name", ["a2sf", "streaming", "snapkv", "keyformer"], "a2sf", "keyformer")
def test_what_a_step_writes_to_stays_where_it_is(name):
    """CUDA graphs write to nothing else. Ahead-of-time autograd runs here, which makes a step without side effects."""
    written: list[set[int]] = []

    def look(graph, _):
        metadata = TracingContext.get().fw_metadata
        written.append({*metadata.mutated_inp_runtime_indices} - {*metadata.static_input_indices})
        return graph.forward

    policy = STATIC[name]
    tokens = decode(shared(), *prefilled(policy))
    forward = compiled(shared(), aot_autograd(fw_compiler=look))
    assert torch.equal(decode(forward, *prefilled(policy)), tokens)
    assert written == [set()]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("policy", [A2SF(20, recent=4), Keyformer(20)], ids=str)
def test_inductor(policy):
    """Keyformer's noise is integer arithmetic that wraps around, which a compiler is tempted to take for numbers."""
    model = shared()
    expected, token = prefilled(policy)
    tokens = decode(model, expected, token)
    cache, token = prefilled(policy)
    assert torch.equal(decode(compiled(model, "inductor"), cache, token), tokens)
    assert_same_state(cache, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", STATIC.values(), ids=STATIC)
def test_cuda_graphs(policy):
    """mode="reduce-overhead" records the step, skips nothing, and replays it."""
    model = shared().to("cuda")
    try:
        prompt = token_ids(1, PROMPT).cuda()

        @torch.no_grad()
        def run(forward):
            cache = PrunedCache(model, policy)
            token = model(prompt, **cache_argument(cache)).logits[:, -1:].argmax(-1)
            return decode(forward, cache, token)

        tokens = run(model)
        assert torch.equal(run(compiled(model, "inductor", mode="reduce-overhead")), tokens)
        assert counters["inductor"]["cudagraph_skips"] == 0
    finally:
        model.cpu()


# -- is_compileable ----------------------------------------------------------------------------------------------------


def test_is_compileable_at_the_budget_alone():
    """False while a cache is empty or below its budget, true from the first step that evicts."""
    cache = PrunedCache(shared(), A2SF(20, recent=4))
    assert not cache.is_compileable
    with torch.no_grad():
        shared()(token_ids(1, 18), **cache_argument(cache))
        for length in range(18, 24):
            assert cache.is_compileable == (length > 20)
            shared()(token_ids(1, 1), **cache_argument(cache))
    cache.reset()
    assert not cache.is_compileable


@pytest.mark.parametrize("policy", NEVER_STATIC.values(), ids=NEVER_STATIC)
def test_policies_whose_steps_change_shapes(policy):
    """Caches that grow, evict now and then, or pack rows, are never compileable."""
    cache, token = prefilled(policy)
    for _ in range(6):
        assert not cache.is_compileable
        decode(shared(), cache, token, 1)


@pytest.mark.parametrize("name", ["snapkv", "interval", "quantized"])
def test_compiled_models_serve_every_policy(name):
    """Where a step changes shapes, the graph breaks, and the cache's part of it runs as it is."""
    policy = NEVER_STATIC[name]
    tokens = decode(shared(), *prefilled(policy), 10)
    assert torch.equal(decode(compiled(shared(), fullgraph=False), *prefilled(policy), 10), tokens)


def test_what_ends_the_steady_state():
    """Recording the past and a batch that changes make shapes change; a step makes the latter steady again."""
    cache, token = prefilled(A2SF(20, recent=4))
    recording = cache.fork()
    recording.activate_past_recording()
    assert not recording.is_compileable
    cache.batch_repeat_interleave(2)
    assert not cache.is_compileable
    decode(shared(), cache, token.expand(2, -1), 1)
    assert cache.is_compileable
    cache.reset()
    assert not cache.is_compileable


def test_sequences_that_keep_different_numbers_of_rows():
    """Shares of prompts of different lengths leave empty slots, which a graph would not know of."""
    for policy, expected in ((A2SF(0.5, recent=4), False), (A2SF(16, recent=4), True)):
        cache = PrunedCache(shared(), policy)
        generate(shared(), left_padded([PROMPT, 25]), 4, **cache_argument(cache))
        assert cache.is_compileable == expected


@pytest.mark.parametrize("family", ["qwen3-hybrid", "gemma3"])
def test_hybrid_models(family):
    """Layers with a sliding window grow and roll: such a cache is not compileable, and a compiled model serves it."""
    policy, model = A2SF(12, recent=4), shared(family)
    tokens = decode(model, *prefilled(policy, model=model))
    cache, token = prefilled(policy, model=model)
    assert not cache.is_compileable
    assert torch.equal(decode(compiled(model, fullgraph=False), cache, token), tokens)


# -- generate() --------------------------------------------------------------------------------------------------------


def compile_on_the_cpu(**settings):
    config = CompileConfig(backend="eager", mode=None, **settings)
    config._compile_all_devices = True  # generate() compiles on accelerators alone otherwise
    return config


def two_turns(model, policy, lengths, **settings):
    """A turn that fills the cache, and another with these settings; its ids, and the cache."""
    cache, batch = PrunedCache(model, policy), left_padded(lengths)
    ids = generate(model, batch, 6, **cache_argument(cache))
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    model.__dict__.pop("_compiled_call", None)
    return generate(model, batch | {"input_ids": ids}, NEW, **cache_argument(cache), **settings), cache


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in STOCK_ONLY])
def test_generate_compiles_what_is_compileable(family):
    """generate() compiles its decode steps into one graph, with padding too, where the cache is at its budget."""
    policy, model, lengths = A2SF(16, recent=4), shared(family), [PROMPT, 33, 21]
    expected, reference = two_turns(model, policy, lengths)
    ids, cache = two_turns(model, policy, lengths, compile_config=compile_on_the_cpu())
    assert torch.equal(ids, expected)
    assert_same_counts_and_rows(cache, reference)
    if family != "opt":  # which slices its position ids at the cache's length (5.23), or makes masks of its own (5.17)
        assert counters["stats"]["unique_graphs"] == (0 if cache.is_hybrid else 1)


def assert_same_counts_and_rows(cache, other):
    assert cache.seen_tokens == other.seen_tokens
    for row in range(cache.layers[cache.pruned_layers[0]].table.batch_size):
        assert kept_everywhere(cache, row) == kept_everywhere(other, row)


def test_a_prompt_that_was_read_beforehand():
    """The recipe for a first turn: all of the prompt but its last token goes in, and generate() compiles the rest."""
    model, batch, ids = shared(), left_padded([PROMPT]), []
    for settings in ({}, {"compile_config": compile_on_the_cpu(fullgraph=True)}):
        cache = PrunedCache(model, A2SF(0.4, recent=4))
        with torch.no_grad():
            model(batch["input_ids"][:, :-1], **cache_argument(cache))
        model.__dict__.pop("_compiled_call", None)
        ids.append(generate(model, batch, NEW, **cache_argument(cache), **settings))
        assert cache.seen_tokens == PROMPT + NEW - 1
    assert torch.equal(*ids)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [(10, {"prefill_chunk_size": 4}), (PROMPT, {"num_beams": 3}), (PROMPT, {"prompt_lookup_num_tokens": 3})],
    ids=["chunks", "beams", "drafts"],
)
def test_a_model_that_was_compiled_generates_the_same(prompt, settings):
    """model.forward compiled by hand: prefill, steps below the budget, beams and drafts are served uncompiled."""
    policy, model = A2SF(20, recent=4), shared()

    def run():
        torch.manual_seed(0)
        cache = PrunedCache(model, policy)
        ids = generate(model, left_padded([prompt]), 16, **cache_argument(cache), **settings)
        return ids, kept_everywhere(cache), cache.seen_tokens

    expected = run()
    model.forward = compiled(model, fullgraph=False)
    try:
        ids, rows, seen = run()
    finally:
        del model.forward
    assert torch.equal(ids, expected[0])
    assert (rows, seen) == expected[1:]
