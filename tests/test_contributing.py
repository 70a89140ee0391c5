"""The policy that CONTRIBUTING.md shows is run as it stands there."""

import ast
import re
from functools import cache
from pathlib import Path

import families
import pytest
import torch
from families import kept_everywhere, token_ids

from kvprune import Policy, PrunedCache
from kvprune.cache.models import cache_argument

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


def shown_policy() -> str:
    return re.search(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL).group(1)


@cache
def mean_attention():
    namespace = {}
    exec(compile(shown_policy(), "mean_attention.py", "exec"), namespace)
    return namespace["MeanAttention"]


@cache
def model():
    return families.build("llama", dtype=torch.float64)


def test_is_under_thirty_lines():
    assert len(shown_policy().splitlines()) < 30


def test_works_as_shown():
    """The policy evicts in prefill and decode, within its budget, and keeps the sinks."""
    cache = PrunedCache(model(), mean_attention()(budget=40, kernel_size=5))
    model().generate(token_ids(2, 100), **cache_argument(cache), max_new_tokens=10, do_sample=False)
    for layer in range(model().config.num_hidden_layers):
        positions = cache.kept_positions(layer)
        assert positions.shape[2] == 40
        assert positions[..., :4].tolist() == [[[0, 1, 2, 3]] * positions.shape[1]] * 2


def test_scores_are_mean_attention():
    """The first layer keeps the tokens whose column of the attention matrix has the highest mean below the diagonal."""
    tokens, budget = 60, 20
    stock = families.build("llama", dtype=torch.float64)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        attention = stock(token_ids(1, tokens), output_attentions=True).attentions[0]
    pruned = PrunedCache(model(), mean_attention()(budget, sinks=0, recent=1))
    with torch.no_grad():
        model()(token_ids(1, tokens), **cache_argument(pruned))
    kept = pruned.kept_positions(0)
    mass = attention.unflatten(1, (kept.shape[1], -1)).mean(2).sum(2)
    mean = mass / torch.arange(tokens, 0, -1)
    mean[..., -1] = torch.inf  # the recent window
    assert torch.equal(kept, mean.topk(budget).indices.sort().values)


@pytest.mark.parametrize("chunks", [[20, 80], [1, 2, 3, 94], [8, 8, 8, 8, 8, 60]], ids=str)
def test_chunks_keep_the_same_rows(chunks):
    """A prompt in chunks, of which none but the last exceeds the budget, keeps the rows of the prompt in one piece."""
    ids = token_ids(2, 100)
    kept = []
    for sizes in ([100], chunks):
        cache = PrunedCache(model(), mean_attention()(budget=40, kernel_size=5))
        for piece in ids.split(sizes, dim=1):
            with torch.no_grad():
                model()(piece, **cache_argument(cache))
        kept.append([kept_everywhere(cache, row) for row in range(2)])
    assert kept[0] == kept[1]


def test_the_table_has_all_properties_with_their_defaults():
    """The page lists what the base class says of itself."""
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", CONTRIBUTING.read_text(), re.MULTILINE))
    properties = [name for name, value in vars(Policy).items() if isinstance(value, property)]
    assert {name: ast.literal_eval(default) for name, default in listed.items()} == {
        name: getattr(Policy(), name) for name in properties
    }
