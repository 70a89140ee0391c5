"""Whatever a cache can do, it does on a GPU as on the CPU: the same tokens stay, and the model says the same."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import build, feed, generate, kept_everywhere, left_padded, storage_nbytes, token_ids

from kvprune import PrunedCache, Scoring
from kvprune.cache import recording
from kvprune.cache.models import cache_argument
from kvprune.cache.recording import Graphs
from kvprune.errors import KVPruneError
from kvprune.kernels.cuda import TRITON
from kvprune.policy.registry import names, parse

pytestmark = pytest.mark.gpu

PROMPT = 48
RECORDED = (
    "a2sf:recent=4", "h2o:recent=4", "tova", "streaming_llm", "snapkv:window=8,interval=1", "keyformer:recent=4",
    "a2sf:recent=4,kernel_size=5", "streaming_llm:positions=cache",
)  # fmt: skip
SHAPES = ((1, 8, 2, 300, 64), (2, 6, 2, 4097, 80), (1, 4, 4, 1, 128), (1, 4, 2, 1, 20))
HALVES = ("a2sf", "snapkv:window=4,share=adaptive", "kivi:bits=4,residual=8,group_size=8", "bits")
FORKED = ("a2sf", "a2sf | zipcache:buffer=4", "snapkv:window=4,share=adaptive", "spectral:bits=4")
CHAINS = (
    "a2sf:kernel_size=5,ahead=4", "snapkv:window=4,share=adaptive", "snapkv:window=4,share=everywhere",
    "a2sf:share=pyramid", "a2sf:interval=4", "a2sf | zipcache:buffer=4", "snapkv:window=4 | kivi:bits=2",
    "snapkv:window=4,share=adaptive | kivi:bits=2", "a2sf | kvcrush", "a2sf | spectral:bits=4", "zipcache:buffer=4",
    "kivi:bits=2,residual=8,group_size=8", "kivi:bits=4,residual=8,group_size=8", "streaming_llm | kivi",
    "tova:share=adaptive", "keyformer:seed=3,share=adaptive", "kvzip:share=everywhere",
)  # fmt: skip


@pytest.fixture(scope="module")
def models():
    """The same weights here and there; three layers, as cascades want some."""
    here = build("llama", num_hidden_layers=3)
    there = build("llama", num_hidden_layers=3).to("cuda")
    return here, there


@pytest.fixture(autouse=True)
def no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def made(text, models):
    """A cache here and one there, or a skip where the policy cannot be on such a model."""
    found = []
    for model in models:
        try:
            found.append(PrunedCache(model, parse(text, budget=0.5)))
        except KVPruneError as error:
            pytest.skip(str(error))
    return found


def to(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def same(here, there, rows=1):
    """What is kept, and that the bytes that a cache tells are those that are there."""
    for row in range(rows):
        assert kept_everywhere(there, row) == kept_everywhere(here, row)
    assert there.nbytes == storage_nbytes(there)
    assert there.seen_tokens == here.seen_tokens
    str(there.report())


@pytest.mark.parametrize("text", [*names(), *CHAINS])
def test_every_policy_keeps_the_same(text, models):
    """A prompt in one step or in two, then tokens one by one."""
    batch = {"input_ids": token_ids(1, PROMPT + 12), "attention_mask": torch.ones(1, PROMPT + 12).long()}
    here, there = made(text, models)
    sizes = [PROMPT] + [1] * 12
    try:
        expected = feed(models[0], batch, here, sizes)
    except KVPruneError as error:
        pytest.skip(str(error))
    logits = feed(models[1], to(batch, "cuda"), there, sizes).cpu()
    torch.testing.assert_close(logits[:, -12:], expected[:, -12:], atol=2e-3, rtol=2e-3)
    same(here, there)


@pytest.mark.parametrize("text", [*names(), *CHAINS])
def test_padded_batches_and_second_turns(text, models):
    batch = left_padded([PROMPT, PROMPT - 9], seed=3)
    here, there = made(text, models)
    try:
        expected = feed(models[0], batch, here, [PROMPT - 8, 1, 1, 6])
    except KVPruneError as error:
        pytest.skip(str(error))
    logits = feed(models[1], to(batch, "cuda"), there, [PROMPT - 8, 1, 1, 6]).cpu()
    torch.testing.assert_close(logits[:, -6:], expected[:, -6:], atol=2e-3, rtol=2e-3)
    same(here, there, 2)


@pytest.mark.parametrize(
    "text", ["a2sf", "a2sf | zipcache:buffer=4", "snapkv:window=4,share=adaptive", "spectral:bits=4"]
)
def test_forks_selections_and_files(text, models, tmp_path):
    """Rows of a batch are repeated and chosen; a fork goes its own way; a file brings back what was saved."""
    here, there = made(text, models)
    batch = {"input_ids": token_ids(1, PROMPT), "attention_mask": torch.ones(1, PROMPT).long()}
    more = token_ids(3, 4, seed=5)
    logits = []
    for model, cache in zip(models, (here, there), strict=True):
        with torch.no_grad():
            ids = batch["input_ids"].to(model.device)
            model(ids, **cache_argument(cache))
            cache.save(tmp_path / f"{model.device.type}.safetensors")
            again = PrunedCache.load(tmp_path / f"{model.device.type}.safetensors", model)
            forked = cache.fork()
            for each in (cache, again, forked):
                if "share" not in text:
                    each.batch_repeat_interleave(3)
                    each.batch_select_indices(torch.tensor([2, 0], device=model.device))
                rows = 1 if "share" in text else 2
                logits.append(model(more[:rows].to(model.device), **cache_argument(each)).logits.cpu())
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=2e-3, rtol=2e-3)
    same(here, there)


@pytest.mark.parametrize(
    "text", ["a2sf", "snapkv:window=4,share=adaptive", "kivi:bits=4,residual=8,group_size=8", "bits"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(text, dtype):
    """Rounding decides some tokens otherwise; what is generated must be there, and finite."""
    model = build("llama", dtype=dtype).to("cuda")
    cache = PrunedCache(model, parse(text, budget=0.5))
    ids = generate(model, {"input_ids": token_ids(1, PROMPT).cuda()}, 8, **cache_argument(cache))
    assert ids.shape == (1, PROMPT + 8)
    with torch.no_grad():
        assert model(ids[:, -1:], **cache_argument(cache)).logits.isfinite().all()


@pytest.mark.parametrize(
    "shape", [(1, 8, 2, 300, 64), (2, 6, 2, 4097, 80), (1, 4, 4, 1, 128), (1, 4, 2, 1, 20)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_single_queries(shape, dtype):
    """With and without probabilities, over rows of a table that has spare slots."""
    batch, heads, kv_heads, length, dim = shape
    queries = torch.randn(batch, heads, 1, dim, device="cuda", dtype=dtype)
    keys, values = (torch.randn(batch, kv_heads, length + 3, dim, device="cuda", dtype=dtype) for _ in range(2))
    keys, values = keys[:, :, :length], values[:, :, :length]
    wide = (tensor.double().repeat_interleave(heads // kv_heads, dim=1) for tensor in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(queries.double(), *wide)
    for with_probabilities in (False, True):
        output, found = TRITON.single_query(queries, keys, values, Scoring(dim**-0.5), None, with_probabilities)
        torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)
        assert (found is not None) == with_probabilities


@pytest.mark.parametrize("text", RECORDED)
def test_recorded_steps_are_those_that_are_run(text, models):
    """As a CUDA graph: the same tokens, rows and counts as step by step, also when forks and others take turns."""
    model, ids = models[1], token_ids(2, PROMPT).cuda()
    found = []
    for kernels in ("triton", "torch"):
        cache = PrunedCache(model, parse(text, budget=20), kernels=kernels)
        with torch.no_grad():
            token = model(ids, **cache_argument(cache)).logits[:, -1:].argmax(-1)
            written = []
            for step in range(24):
                if step == 12:
                    other = cache.fork()
                    for each in (other, cache, other):
                        model(token, **cache_argument(each))
                    cache.batch_select_indices(torch.tensor([1, 0]).cuda())
                logits = model(token, **cache_argument(cache)).logits[:, -1:]
                token = logits.argmax(-1)
                written.append(token.tolist())
        recorded = [layer.steady.recording is not None and layer.steady.recording._replay for layer in cache.layers]
        assert all(recorded) if kernels == "triton" else not any(recorded)
        assert cache.nbytes == storage_nbytes(cache)
        found.append((written, kept_everywhere(cache), kept_everywhere(other, 1), cache.seen_tokens))
    assert found[0] == found[1]


def test_chance_goes_on_beside_a_recording():
    """Other threads draw while a step is recorded, the numbers that come next, and go on after one that failed."""
    graphs, given = Graphs(), torch.arange(4.0, device="cuda")
    torch.cuda.manual_seed(7)
    expected = [torch.rand(1, device="cuda").item() for _ in range(5)]
    torch.cuda.manual_seed(7)
    drawn = [torch.rand(1, device="cuda")]

    def doubled(tensor):
        with ThreadPoolExecutor(1) as other:
            drawn.append(other.submit(torch.rand, 1, device="cuda").result())
        return tensor * 2

    def waits(tensor):
        return tensor * tensor.sum().item()

    def fails(tensor):
        raise KeyboardInterrupt

    replay = graphs.capture(doubled, [given])
    for failing, error in ((waits, RuntimeError), (fails, KeyboardInterrupt)):
        with pytest.raises(error):
            graphs.capture(failing, [given])
        assert not graphs.allowed
    drawn += [torch.rand(1, device="cuda")]
    again = graphs.capture(lambda tensor: tensor + 1, [given])
    drawn += [torch.rand(1, device="cuda")]
    assert replay([given]).tolist() == [0, 2, 4, 6]
    assert again([given + 1]).tolist() == [2, 3, 4, 5]
    drawn += [torch.rand(1, device="cuda")]
    assert torch.cat(drawn).tolist() == expected


def test_recordings_of_several_threads():
    """One after another, from streams of their own."""
    given = torch.arange(4.0, device="cuda")

    def record(number):
        graphs = Graphs()
        with torch.cuda.stream(torch.cuda.Stream()):
            mine = given + number
            replays = [graphs.capture(lambda tensor: tensor * 2 + number, [mine]) for _ in range(20)]
            return [replay([mine]).tolist() for replay in replays]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(record, range(4)))
    for number, rows in enumerate(found):
        assert rows == [[2.0 * (place + number) + number for place in range(4)]] * 20


def test_threads_that_sample(models, monkeypatch):
    """Nothing is recorded while others may draw; alone again, it is."""
    model, ids = models[1], token_ids(1, PROMPT).cuda()

    def talk(new_tokens=24):
        cache = PrunedCache(model, parse("tova", budget=20))
        model.generate(
            ids, do_sample=True, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **cache_argument(cache)
        )
        return [layer.steady.recording is not None and layer.steady.recording._replay for layer in cache.layers]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: talk(), range(6)))
    monkeypatch.setattr(recording, "_ALONE_AFTER", 0.0)
    assert all(talk())


@pytest.mark.parametrize("family", ["qwen3-hybrid", "gemma3", "gpt-oss", "gpt2", "gpt-neox"])
def test_families(family):
    """Hybrids, sinks, and models without grouped heads."""
    here, there = build(family), build(family).to("cuda")
    batch = left_padded([PROMPT, PROMPT - 9], seed=3)
    found = []
    for model in (here, there):
        cache = PrunedCache(model, parse("a2sf:recent=4", budget=20))
        tokens = generate(model, to(batch, model.device), 6, **cache_argument(cache))
        found.append((tokens.tolist(), kept_everywhere(cache)))
    assert found[0] == found[1]
