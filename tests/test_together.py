"""Many caches that read a prompt together do what each does alone."""

import families
import pytest
import torch
from transformers import DynamicCache

from kvprune import CacheError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.evaluation.contenders import Held
from kvprune.evaluation.decoding import Reader, fed, greedy
from kvprune.evaluation.together import Together, shareable
from kvprune.passes import replay
from kvprune.policy.registry import names, parse

PROMPT, QUESTION, NEW = 60, 52, 12


def policies():
    """Every registered policy that works in the layers alone, and chains."""
    texts = [name for name in names() if name not in ("full", "kivi", "kvcrush")]
    texts += [
        "a2sf:kernel_size=5,interval=4",
        "kivi:bits=2,residual=32",
        "a2sf:budget=0.8 | zipcache:buffer=8",
        "a2sf | kvcrush",
        "a2sf:share=everywhere",
        "bits:score=kvzip",
    ]
    found = {text: parse(text, budget=0.7) for text in texts}
    return {text: policy for text, policy in found.items() if shareable(PrunedCache(families.shared(), policy))}


@pytest.fixture(scope="module")
def model():
    return families.shared()


@pytest.fixture(scope="module")
def ids():
    return families.token_ids(1, PROMPT)


def kept(cache):
    return [cache.kept_positions(layer) for layer in cache.pruned_layers]


def alone(model, cache, *prompts):
    """What one cache keeps of prompts that come one after another, and the tokens it writes."""
    with torch.inference_mode():
        for number, ids in enumerate(prompts):
            output = model(ids, **cache_argument(cache))
            if number + 1 < len(prompts):
                cache.end_prompt()
        held, written = kept(cache), [output.logits[0, -1].argmax().item()]
        while len(written) < NEW:
            output = model(torch.tensor([written[-1:]]), **cache_argument(cache))
            written.append(output.logits[0, -1].argmax().item())
    return held, written


def test_what_is_kept_and_written_is_what_each_would_have_by_itself(model, ids):
    chosen = list(policies().values())
    known, unknown = ([PrunedCache(model, policy) for policy in chosen] for _ in range(2))
    reader = Reader(model, known, unknown)
    logits = reader.read(ids, QUESTION)
    held = [kept(cache) for cache in reader.caches]
    written = greedy(reader, logits, max_new_tokens=NEW)
    assert written[0] == alone(model, PrunedCache(model, "full"), ids)[1]
    for row, policy in enumerate(chosen):
        for place, prompts in ((1 + row, [ids]), (1 + len(chosen) + row, [ids[:, :QUESTION], ids[:, QUESTION:]])):
            expected, answer = alone(model, PrunedCache(model, policy), *prompts)
            assert all(torch.equal(*pair) for pair in zip(held[place], expected, strict=True)), policy
            assert written[place] == answer, policy


def test_nothing_of_one_cache_reaches_another(model, ids):
    """Rows that are overwritten in place are those of their own cache: forks and twins stay equal."""
    policy = parse("tova", budget=40)
    reader = Reader(model, [PrunedCache(model, policy) for _ in range(2)])
    reader.read(ids)
    before = [layer.table.keys.clone() for layer in reader.caches[2].layers]
    for token in range(5):
        reader.feed(torch.tensor([token]), rows=[1])
    after = [layer.table.keys for layer in reader.caches[2].layers]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert reader.caches[1].seen_tokens == reader.caches[2].seen_tokens + 5


def test_a_prompt_is_replayed_once_for_all_that_ask_alike(model, ids, monkeypatch):
    """By number of tokens that run again, two replays each: the document, the whole prompt, and each its question."""
    read, own = [], replay._Chunk.run

    def noted(chunk, *arguments):
        read.append(chunk.inputs.shape[1])
        own(chunk, *arguments)

    monkeypatch.setattr(replay._Chunk, "run", noted)
    texts = ["kvzip", "bits:score=kvzip", "kvzip:share=uniform", "kvzip_plus"]
    known, unknown = ([PrunedCache(model, parse(text, budget=0.5)) for text in texts] for _ in range(2))
    reader = Reader(model, known, unknown)
    reader.read(ids, QUESTION)
    for cache in reader.caches:
        cache.end_prompt()
    assert sorted(read) == [PROMPT - QUESTION] * 4 + [QUESTION] * 2 + [PROMPT] * 2


@pytest.mark.parametrize("text", ["a2sf", "bits:score=kvzip", "kivi:residual=16"])
def test_caches_may_hold_another_type_than_the_model(model, ids, text):
    """In half the bytes, what is written is finite, and what they go on with is of that type too."""
    policy = parse(text, budget=0.7)
    wide, half = (PrunedCache(model, policy) for _ in range(2))
    Reader(model, [wide]).read(ids)
    reader = Reader(model, [half], dtype=torch.bfloat16)
    reader.read(ids)
    logits = reader.feed(torch.tensor([3, 5]))
    assert logits.isfinite().all()
    assert logits.dtype == model.dtype
    assert {layer.table.dims[2] for layer in half.layers} == {torch.bfloat16}
    assert text.startswith("bits") or half.nbytes < 0.8 * wide.nbytes  # whose budget is of bytes at 16 bits
    held = Held.by(half, model)
    assert (
        held.half_nbytes
        == held.dense_nbytes
        == 2 * 2 * sum(layer.seen * layer.table.kv_heads * layer.table.dims[0] for layer in half.layers)
    )


def test_the_first_row_is_the_stock_cache(model, ids):
    reader = Reader(model, [PrunedCache(model, parse("a2sf", budget=0.7))])
    found = [reader.read(ids[:, :QUESTION]), *fed(reader, ids[0, QUESTION:])]
    with torch.inference_mode():
        expected = model(ids, **cache_argument(DynamicCache(config=model.config))).logits[0, QUESTION - 1 :]
    torch.testing.assert_close(torch.stack([logits[0] for logits in found]), expected, atol=1e-4, rtol=1e-4)


def test_answers_end_where_they_are_done(model, ids):
    reader = Reader(model)
    logits = reader.read(ids)
    first = logits.argmax(-1).item()
    assert greedy(reader, logits, max_new_tokens=5, ends=[first]) == [[first]]
    assert greedy(reader, logits, max_new_tokens=5, done=lambda written: len(written) == 3)[0][0] == first
    (written,) = greedy(reader, logits, max_new_tokens=1, min_new_tokens=1, ends=[first])
    assert written != [first]


def test_a_cache_that_does_more_than_its_layers_is_refused(model):
    others = [PrunedCache(families.shared("gemma3"), "tova")]
    others += [PrunedCache(model, parse(name, budget=40)) for name in ("gemfilter", "lazyllm")]
    for other in others:
        assert not shareable(other)
        with pytest.raises(CacheError, match="in their layers"):
            Together([PrunedCache(model, "tova"), other])
    with pytest.raises(CacheError, match="in their layers"):
        Together([])
