"""Forward passes that do not come to their end: Ctrl-C, no memory left, an error in a policy, a hook of somebody's.

Wherever it happens, the model serves other caches as before. The cache goes on as if the pass had not been, or had been
complete, or it says that it cannot, until reset() makes it new.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from families import assert_same_rows, feed, generate, left_padded, linear_hybrid, shared
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvprune import CacheError, Policy, PrunedCache, Step, TokenTable
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, KIVI, GemFilter, SnapKV, ZipCache

MODELS = {
    "llama": lambda: shared("llama"),
    "gemma3": lambda: shared("gemma3"),  # a sliding window below, full attention above
    "qwen3-hybrid": lambda: shared("qwen3-hybrid"),  # a sliding window between
    "linear": linear_hybrid,
}
A = A2SF(12, sinks=2, recent=3)
POLICIES = {
    "a2sf": A,
    "snapkv": SnapKV(12, sinks=2, window=4, kernel_size=3, interval=1),
    "a2sf-zipcache": A | ZipCache(buffer=3),
    "gemfilter-kivi": GemFilter(14) | KIVI(group_size=4, residual=2),
}
REFUSED = r"call reset\(\)|new PrunedCache"
STEPS = [20, 1, 1, 6, 1]
"""A prompt, generated tokens, a second turn."""


class InterruptionError(Exception):
    """No memory left, and the like."""


@dataclass(frozen=True)
class Trap(Policy):
    """Keeps everything, and raises where it is told to: (layer, method, exception)."""

    armed: list[tuple[int, str, type[BaseException]]] = field(default_factory=list, compare=False)

    def _spring(self, step: Step, method: str) -> None:
        for layer, armed, exception in self.armed:
            if (layer, armed) == (step.layer, method):
                raise exception

    def row_weights(self, step: Step) -> None:
        self._spring(step, "row_weights")

    def observe(self, table: TokenTable, step: Step) -> None:
        self._spring(step, "observe")

    def decide(self, table: TokenTable, step: Step) -> None:
        self._spring(step, "decide")


@contextmanager
def interruption(
    model: PreTrainedModel, pruned: PrunedCache, layer: int, place: str, exception: type[BaseException]
) -> Iterator[None]:
    """Whatever comes to this place of a layer raises."""

    def stop(*_: Any, **__: Any) -> None:
        raise exception

    def stop_after(update: Any) -> Any:
        def stopped(*args: Any, **kwargs: Any) -> Any:
            result = update(*args, **kwargs)
            if next(value for value in (*args, *kwargs.values()) if isinstance(value, int)) == layer:
                raise exception
            return result

        return stopped

    block = model.model.layers[layer]
    updates = [name for name in ("update", "update_conv_state", "update_recurrent_state") if place == name]
    with ExitStack() as stack:
        if place == "before":
            stack.callback(block.register_forward_pre_hook(stop).remove)
        elif place == "after":
            stack.callback(block.register_forward_hook(stop).remove)
        for name in updates:
            setattr(pruned, name, stop_after(getattr(pruned, name)))
            stack.callback(vars(pruned).pop, name)
        trap = pruned.policy.parts()[-1]
        trap.armed.append((layer, place, exception))
        stack.callback(trap.armed.clear)
        yield


PLACES = ["before", "update", "row_weights", "observe", "decide", "after"]
LINEAR_PLACES = ["before", "update_conv_state", "update_recurrent_state", "after"]


def prompts() -> dict[str, Tensor]:
    return left_padded([36, 28])


def is_linear(model: PreTrainedModel, layer: int) -> bool:
    return (getattr(model.config, "layer_types", None) or {layer: ""})[layer] == "linear_attention"


def stock_logits(model: PreTrainedModel) -> Tensor:
    return feed(model, prompts(), DynamicCache(config=model.config), [20, 1, 4])


def interrupted(
    model: PreTrainedModel, policy: Policy, step: int, layer: int, place: str, exception: type[BaseException]
) -> tuple[PrunedCache, PrunedCache] | None:
    """A cache whose step of this number was interrupted, and a fork made before; None if nothing came to the place."""
    pruned, begin = PrunedCache(model, policy | Trap()), sum(STEPS[:step])
    if step:
        feed(model, prompts(), pruned, STEPS[:step])
    before = pruned.fork()
    with interruption(model, pruned, layer, place, exception):
        try:
            feed(model, prompts(), pruned, STEPS[step : step + 1], begin=begin)
        except exception:
            return pruned, before
    return None


def goes_on(model: PreTrainedModel, pruned: PrunedCache, before: PrunedCache) -> bool:
    """Whether a cache goes on; if so, it does what the fork does, on which no pass was interrupted."""
    seen, begin = pruned.seen_tokens, before.seen_tokens
    try:
        logits = feed(model, prompts(), pruned, [2, 1], begin=seen)
    except CacheError as error:
        assert re.search(REFUSED, str(error))  # noqa: PT017  or else it goes on
        return False
    complete = before.fork()
    expected = feed(model, prompts(), complete, [*[seen - begin] * (seen > begin), 2, 1], begin=begin)
    assert torch.equal(logits, expected[:, -3:])
    assert_same_rows(pruned, complete)
    return True


def assert_as_new(model: PreTrainedModel, pruned: PrunedCache) -> None:
    """After reset(), a cache does what a new one does, and holds what it holds; for another batch, too."""
    for batch in (prompts(), left_padded([30, 12, 25])):
        pruned.reset()
        new = PrunedCache(model, pruned.policy)
        assert (pruned.nbytes, pruned.seen_tokens) == (0, 0)
        assert torch.equal(feed(model, batch, pruned, STEPS), feed(model, batch, new, STEPS))
        assert pruned.nbytes == new.nbytes
        assert_same_rows(pruned, new)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@given(data=st.data())
def test_an_interrupted_pass_leaves_nothing_half_done(name, policy, data):
    """In any layer, before, within or after its attention, in any method of a policy, in a prompt or a later step."""
    model = MODELS[name]()
    expected = stock_logits(model)
    step = data.draw(st.integers(0, len(STEPS) - 1), "step")
    layer = data.draw(st.integers(0, model.config.num_hidden_layers - 1), "layer")
    place = data.draw(st.sampled_from(LINEAR_PLACES if is_linear(model, layer) else PLACES), "place")
    exception = data.draw(st.sampled_from([KeyboardInterrupt, InterruptionError]), "exception")
    caches = interrupted(model, policy, step, layer, place, exception)
    assert torch.equal(stock_logits(model), expected)
    if caches is None:
        return  # a sliding window has no policy, and a single token updates a convolution in place
    pruned, before = caches
    if not goes_on(model, pruned, before) and not goes_on(model, pruned, before):  # a step may be refused once alone
        for use in (pruned.fork, lambda: pruned.crop(-1), pruned.fork):
            with pytest.raises(CacheError, match=REFUSED):
                use()
        assert not goes_on(model, pruned, before)
    assert_as_new(model, pruned)


@pytest.mark.parametrize("method", ["row_weights", "observe", "decide"])
def test_the_last_layer_is_no_exception(method):
    """Its rows are there, so all layers have seen as many tokens; and yet its policy has not."""
    caches = interrupted(shared(), A, 1, 1, method, InterruptionError)
    assert caches is not None
    assert caches[0].lengths == {21}
    assert not goes_on(shared(), *caches)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_states_without_a_length_are_no_exception(layer, step):
    """Linear attention below the layers that can be pruned has changed, and no length tells so."""
    caches = interrupted(linear_hybrid(), A, step, layer, "after", InterruptionError)
    assert caches is not None
    for _ in range(3):
        assert not goes_on(linear_hybrid(), *caches)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("place", ["row_weights", "observe", "decide"])
def test_who_gives_the_same_text_again_is_told_of_the_interruption(name, policy, place):
    """And not that its mask does not fit the cache, some layers of which have seen the new tokens already."""
    model = MODELS[name]()
    for step in range(len(STEPS)):
        caches = interrupted(model, policy, step, 1, place, KeyboardInterrupt)
        assert caches is not None
        with pytest.raises(CacheError, match=r"was interrupted.*call reset.*fork"):
            feed(model, prompts(), caches[0], STEPS[step : step + 1], begin=sum(STEPS[:step]))


def test_an_interruption_between_two_tokens_costs_nothing():
    """Ctrl-C in a streamer: generate() is over, and the next one goes on from what the cache has seen."""

    class Impatient:
        tokens = 0

        def put(self, ids: Tensor) -> None:
            self.tokens += 1
            if self.tokens == 5:
                raise KeyboardInterrupt

    batch = left_padded([30])
    whole = generate(shared(), batch, 10, **cache_argument(PrunedCache(shared(), A)))
    pruned = PrunedCache(shared(), A)
    with pytest.raises(KeyboardInterrupt):
        generate(shared(), batch, 10, **cache_argument(pruned), streamer=Impatient())
    so_far = {"input_ids": whole[:, : pruned.seen_tokens + 1]}
    more = whole.shape[1] - so_far["input_ids"].shape[1]
    assert 0 < more < 10
    assert torch.equal(generate(shared(), so_far, more, **cache_argument(pruned)), whole)
