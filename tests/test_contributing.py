"""The policy that CONTRIBUTING.md shows is run as it stands there."""

import re
from pathlib import Path

import families
import torch

from kvprune import PrunedCache

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


def shown_policy() -> str:
    return re.search(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL).group(1)


def test_is_under_thirty_lines():
    assert len(shown_policy().splitlines()) < 30


def test_works_as_shown(tmp_path):
    """The policy evicts in prefill and decode, within its budget, by the largest mass that any step gave."""
    namespace = {}
    exec(compile(shown_policy(), "peak.py", "exec"), namespace)
    model = families.build("llama")
    cache = PrunedCache(model, namespace["Peak"](budget=40, kernel_size=5))
    prompt = torch.randint(1, model.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    model.generate(prompt, past_key_values=cache, max_new_tokens=10, do_sample=False)
    for layer in range(model.config.num_hidden_layers):
        positions = cache.kept_positions(layer)
        assert positions.shape[2] == 40
        assert positions[..., :4].tolist() == [[[0, 1, 2, 3]] * positions.shape[1]] * 2
        score = cache.layers[layer].table["score"]
        assert (score >= 0).all()
        assert score.max() > 1 / 100
