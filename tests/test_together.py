"""Many caches that read a prompt together do what each does alone."""

import families
import pytest
import torch
from transformers import DynamicCache

from kvprune import CacheError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.evaluation.decoding import Reader, fed, greedy
from kvprune.evaluation.together import Together, shareable
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
        for ids in prompts:
            output = model(ids, **cache_argument(cache))
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
    others += [PrunedCache(model, parse(name, budget=40)) for name in ("gemfilter", "kvzip")]
    for other in others:
        assert not shareable(other)
        with pytest.raises(CacheError, match="in their layers"):
            Together([PrunedCache(model, "tova"), other])
    with pytest.raises(CacheError, match="in their layers"):
        Together([])
