"""Steps that are recorded once and replayed keep what steps that are run keep.

On a GPU they are CUDA graphs (see also test_cuda.py); here a tape of the operations of torch, replayed one by one on
the same memory, which shows as well what a graph would not notice: an int that differed from step to step.
"""

import copy
import time

import pytest
import torch
from families import generate, left_padded, shared, token_ids
from test_compile import STATIC, assert_same_state, decode, prefilled
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kvprune import PrunedCache
from kvprune.cache import recording
from kvprune.cache.models import cache_argument
from kvprune.cache.recording import Graphs
from kvprune.policies import A2SF, SnapKV


class Tape(TorchDispatchMode):
    """Operations, with what they were given and what they returned."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.log.append((func, args, kwargs or {}, out))
        return out

    def replay(self, wanted):
        """Do it all again: tensors that an operation made are made anew, others are where they were."""
        made = {}

        def now(tensor):
            return made.get(id(tensor), tensor)

        for func, args, kwargs, out in self.log:
            again = func(*tree_map_only(torch.Tensor, now, args), **tree_map_only(torch.Tensor, now, kwargs))
            for old, new in zip(tensors(out), tensors(again), strict=True):
                made[id(old)] = new
        return now(wanted)


def tensors(found):
    return [each for each in (found if isinstance(found, list | tuple) else [found]) if isinstance(each, torch.Tensor)]


class Tapes(Graphs):
    """Graphs that are tapes. As on a GPU, nothing of a step has happened once it is recorded."""

    recorded = replayed = 0
    refuses = False

    def wanted(self, layer, states):
        self.layer = layer
        return self.allowed

    def capture(self, run, inputs):
        given, held = [torch.empty_like(each) for each in inputs], self.layer.tensors()
        before = [each.clone() for each in held]
        tape = Tape()
        with tape:
            output = run(*given)
            if self.refuses:
                Tapes.recorded += 1
                self.layer.incoming = None
                self.layer.table.append(*inputs[1:], 0)  # where it was interrupted, a row has been counted
        for tensor, old in zip(held, before, strict=True):
            tensor.copy_(old)
        if self.refuses:
            raise RuntimeError("this operation cannot be recorded")
        Tapes.recorded += 1

        def replay(inputs):
            Tapes.replayed += 1
            for mine, new in zip(given, inputs, strict=True):
                mine.copy_(new)
            return tape.replay(output).clone()

        return replay


@pytest.fixture
def tapes(monkeypatch):
    for name in ("wanted", "capture", "refuses"):
        monkeypatch.setattr(Graphs, name, Tapes.__dict__[name], raising=False)
    monkeypatch.setattr(Tapes, "recorded", 0)
    monkeypatch.setattr(Tapes, "replayed", 0)


@torch.no_grad()
def on_tape(policy, sequences=1):
    """A cache with a prompt in it, and the token that comes next. Compiled loops would be on no tape."""
    cache = PrunedCache(shared(), policy, kernels="torch", cuda_graphs=True)
    return cache, shared()(token_ids(sequences, 40), **cache_argument(cache)).logits[:, -1:].argmax(-1)


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("policy", STATIC.values(), ids=STATIC)
def test_replayed_steps_are_those_that_are_run(policy, sequences, tapes, monkeypatch):
    """The same tokens, rows and counts; from the third steady step on, nothing but replays."""
    with monkeypatch.context() as plain:
        plain.setattr(Graphs, "wanted", lambda *_: False)
        expected, token = on_tape(policy, sequences=sequences)
        tokens = decode(shared(), expected, token)
    cache, token = on_tape(policy, sequences=sequences)
    assert torch.equal(decode(shared(), cache, token), tokens)
    assert Tapes.recorded == len(cache.layers)
    assert Tapes.replayed > 15 * len(cache.layers)
    assert_same_state(cache, expected)


def test_whatever_ends_the_steady_state_ends_a_recording(tapes, monkeypatch):
    """Forks, batches that change, second turns, copies, and other modes, in between."""
    model, policy = shared(), A2SF(20, recent=4)

    def talk():
        cache, token = on_tape(policy)
        parts = [decode(model, cache, token, 6)]
        fork, copied = cache.fork(), copy.deepcopy(cache)
        parts += [decode(model, each, token, 5) for each in (fork, cache, copied, fork)]
        cache.batch_repeat_interleave(2)
        parts.append(decode(model, cache, token.expand(2, -1), 5))
        with torch.no_grad():
            model(token_ids(2, 7, seed=3), **cache_argument(cache))
        parts.append(decode(model, cache, token.expand(2, -1), 5))
        with torch.inference_mode():
            parts.append(decode(model, cache, token.expand(2, -1), 5))
        parts.append(decode(model, cache, token.expand(2, -1), 5))
        cache.reset()
        with torch.no_grad():
            model(token_ids(1, 30, seed=4), **cache_argument(cache))
        parts.append(decode(model, cache, token, 6))
        return parts, cache

    parts, cache = talk()
    assert Tapes.replayed > 40
    with monkeypatch.context() as plain:
        plain.setattr(Graphs, "wanted", lambda *_: False)
        expected, other = talk()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(parts, expected, strict=True))
    assert_same_state(cache, other)


def test_what_cannot_be_recorded_is_run(tapes, monkeypatch):
    """Once for every layer it is tried; the step that could not be recorded is run, and nothing is lost."""
    with monkeypatch.context() as plain:
        plain.setattr(Graphs, "wanted", lambda *_: False)
        expected, token = on_tape(A2SF(20, recent=4))
        tokens = decode(shared(), expected, token)
    monkeypatch.setattr(Graphs, "refuses", True)
    cache, token = on_tape(A2SF(20, recent=4))
    assert torch.equal(decode(shared(), cache, token), tokens)
    assert (Tapes.recorded, Tapes.replayed) == (len(cache.layers), 0)
    assert_same_state(cache, expected)


@pytest.mark.parametrize("allowed", [True, False])
def test_recorded_where_it_is_asked_for(allowed, tapes):
    """Forks and all layers are asked alike."""
    cache = PrunedCache(shared(), A2SF(20, recent=4), kernels="torch", cuda_graphs=allowed)
    with torch.no_grad():
        token = shared()(token_ids(1, 40), **cache_argument(cache)).logits[:, -1:].argmax(-1)
    decode(shared(), cache, token, 6)
    assert bool(Tapes.replayed) == allowed
    assert all(layer.graphs.allowed is allowed for layer in cache.fork().layers)


@pytest.mark.long  # a minute of compiling
def test_compiled_and_replayed_steps_take_turns(tapes):
    """A mask breaks the graph of a compiled model: that step comes to the layers eagerly, behind compiled ones."""
    model, tokens = shared(), []
    for record in (True, False):
        torch._dynamo.reset()
        cache = PrunedCache(model, A2SF(20, recent=4), kernels="torch", cuda_graphs=record)
        with torch.no_grad():
            model(token_ids(1, 40), **cache_argument(cache))
        forward, token = torch.compile(model.forward, backend="eager"), token_ids(1, 1, seed=9)
        written = []
        with torch.no_grad():
            for step in range(8):
                mask = {"attention_mask": torch.ones(1, 41 + step).long()} if step % 2 else {}
                token = forward(token, **mask, **cache_argument(cache)).logits[:, -1:].argmax(-1)
                written.append(token.item())
            assert [layer.seen for layer in cache.layers] == [48] * len(cache.layers)
            token = model(token, **cache_argument(cache)).logits[:, -1:].argmax(-1)
        tokens.append([*written, token.item()])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("lengths", [[40, 40, 40], [40, 31, 22]], ids=["alike", "different"])
def test_masks_at_every_step(lengths, tapes, monkeypatch):
    """As generate() gives them; sequences whose prompts had different lengths are not recorded."""
    batch, found = left_padded(lengths, seed=3, width=44), []
    for record in (True, False):
        with monkeypatch.context() as plain:
            if not record:
                plain.setattr(Graphs, "wanted", lambda *_: False)
            cache = PrunedCache(shared(), SnapKV(20, window=8, interval=1), kernels="torch", cuda_graphs=True)
            found.append((generate(shared(), batch, 20, **cache_argument(cache)).tolist(), cache))
    assert found[0][0] == found[1][0]
    assert_same_state(found[0][1], found[1][1])
    assert bool(Tapes.replayed) == (len({*lengths}) == 1)


def test_not_while_another_thread_attends(tapes, monkeypatch):
    """It might draw a token just as a recording begins; what is recorded is replayed all the same."""
    monkeypatch.setitem(recording._lately, -1, time.monotonic())
    cache, token = on_tape(A2SF(20, recent=4))
    tokens = decode(shared(), cache, token, 6)
    assert (Tapes.recorded, Tapes.replayed) == (0, 0)
    recording._lately[-1] -= 10
    later = decode(shared(), cache, tokens[:, -1:], 3)
    assert Tapes.recorded == len(cache.layers)
    monkeypatch.setitem(recording._lately, -1, time.monotonic())
    replayed = Tapes.replayed
    last = decode(shared(), cache, later[:, -1:], 3)
    assert Tapes.replayed > replayed
    with monkeypatch.context() as plain:
        plain.setattr(Graphs, "wanted", lambda *_: False)
        other, token = on_tape(A2SF(20, recent=4))
        expected = decode(shared(), other, token, 12)
    assert torch.equal(torch.cat([tokens, later, last], dim=1), expected)


def test_nothing_is_recorded_on_a_cpu():
    cache, token = prefilled(A2SF(20, recent=4))
    decode(shared(), cache, token, 5)
    assert all(layer.steady.recording is None for layer in cache.layers)
