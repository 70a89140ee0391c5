"""`Recording`: the steady step of one layer as a CUDA graph, so that a GPU is not kept waiting by Python.

A decode step launches dozens of small kernels in every layer, and on a GPU to launch them takes longer than to run
them. In the steady state all of them write to the same memory at every step, and what differs is counted on the device
(see `Steady`). So the step is recorded once, as soon as a layer is steady, and from then on one launch replays it.
Nothing has to be compiled by torch.compile, which records the rest of the model as well where it is used.

Recordings end with the steady state they are of: whatever else changes a table, ends it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.table.token_table import TokenTable

logger = logging.getLogger("kvprune")

Run = Callable[..., Tensor]
Replay = Callable[[Sequence[Tensor]], Tensor]


class Recordable(Protocol):
    """A layer in its steady state."""

    table: TokenTable | None
    steady: Any
    planner: Any
    prompt_tokens: tuple[int, ...]
    incoming: tuple[Tensor, Tensor] | None
    """Keys and values of the step."""

    def steady_step(self, table: TokenTable, steady: Any, states: Tensor, scoring: Scoring) -> Tensor: ...

    def catch_up(self) -> None: ...

    def count_one(self) -> None: ...

    def tensors(self) -> list[Tensor]: ...


# A stream of its own is what is recorded; and one at a time is, as torch's generator of random numbers takes part.
_streams: dict[torch.device, Any] = {}
_recording = threading.Lock()
# Threads that attend to caches on a GPU, and when they last did. While there are several, nothing new is recorded: one
# that draws a token just as a recording begins would fail.
_lately: dict[int, float] = {}
_ALONE_AFTER = 5.0  # seconds


def note_thread(states: Tensor) -> None:
    """This thread attends to a cache, by these queries."""
    if states.is_cuda:
        _lately[threading.get_ident()] = time.monotonic()


def _is_alone() -> bool:
    """Whether no other thread has attended lately."""
    for thread, then in list(_lately.items()):
        if time.monotonic() - then > _ALONE_AFTER:
            _lately.pop(thread, None)
    return not _lately.keys() - {threading.get_ident()}


@dataclass
class _Scratch:
    """Memory to record in, on one GPU, and the first recording: a pool that has lost all takes no more."""

    pool: Any
    first: Any = None


class Graphs:
    """Makes recordings for the layers of one cache, which run one after another and share scratch memory.

    They are made where the kernels are Triton's: with `kernels="torch"` there are none.
    """

    def __init__(self, allowed: bool = True) -> None:
        self.allowed = allowed
        self._scratch: dict[torch.device, _Scratch] = {}

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs(self.allowed)

    def wanted(self, layer: Recordable, states: Tensor) -> bool:
        """Whether a layer's step should be recorded: it is on a GPU, and alone there."""
        if not self.allowed or not states.is_cuda or layer.table is None:
            return False
        on_gpu = layer.table.kernels.name == "triton"
        return on_gpu and layer.planner.heads.size == 1 and not torch.cuda.is_current_stream_capturing()

    def capture(self, run: Run, inputs: Sequence[Tensor]) -> Replay:
        """Record `run(*inputs)`, of which nothing runs yet; returns what replays it on other inputs of the same shapes.

        What it holds beside the graph is scratch memory, the size of a token's activations. Raises RuntimeError for
        what cannot be recorded.
        """
        device, given = inputs[0].device, [torch.empty_like(each) for each in inputs]
        with torch.cuda.device(device), _recording:
            if device not in self._scratch:
                self._scratch[device] = _Scratch(torch.cuda.graph_pool_handle())
            if device not in _streams:  # of high priority: torch hands out others to several who ask
                _streams[device] = torch.cuda.Stream(priority=-1)
            scratch, aside = self._scratch[device], _streams[device]
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            aside.wait_stream(current)
            try:
                with torch.cuda.stream(aside):
                    with _chance_aside():
                        # Other threads may go on; `torch.cuda.graph` would also collect garbage, and empty its cache.
                        graph.capture_begin(pool=scratch.pool, capture_error_mode="thread_local")
                    try:
                        output = run(*given)
                    except BaseException:
                        with suppress(RuntimeError):  # which is not what there is to tell
                            graph.capture_end()
                        raise
                    graph.capture_end()
            except BaseException:
                self.allowed = False  # what failed once would again, in every layer
                _abandon(device, self._scratch.pop(device))
                raise
            finally:
                current.wait_stream(aside)
            scratch.first = scratch.first or graph

        def replay(inputs: Sequence[Tensor]) -> Tensor:
            torch._foreach_copy_(given, list(inputs))
            graph.replay()
            return output.clone()  # the next replay writes there

        return replay


def _abandon(device: torch.device, scratch: _Scratch) -> None:
    """After a recording that could not be ended, torch 2.11 would go on to take memory for it."""
    with suppress(RuntimeError):  # where it has not begun, or has been ended
        torch._C._cuda_endAllocateToPool(device.index, scratch.pool)
        torch._C._cuda_releasePool(device.index, scratch.pool)


@contextmanager
def _chance_aside() -> Iterator[None]:
    """What begins here takes another state of chance for this GPU's: none is drawn from while a step is recorded.

    torch hands the state of its generator to a recording that begins, so that another thread that drew meanwhile would
    fail, and so would everyone after a recording that failed (torch 2.11). Here it is handed a copy: only who draws
    just then is in its way.
    """
    chance = torch.cuda.default_generators[torch.cuda.current_device()]
    own = chance.graphsafe_get_state()
    chance.graphsafe_set_state(chance.clone_state())
    try:
        yield
    finally:
        chance.graphsafe_set_state(own)


class Recording:
    """The step of one layer in one steady state: run once as it is, then recorded, then replayed."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._refused = False
        self._replay: Replay | None = None
        self._known: tuple[Any, ...] = ()
        self._scoring: Scoring | None = None  # whose sinks the graph reads

    def __deepcopy__(self, memo: Any) -> Recording:
        return Recording(self._graphs)  # of tensors of its own, and not recorded yet

    def step(self, layer: Recordable, states: Tensor, scoring: Scoring) -> Tensor | None:
        """The output of a steady step `[B, 1, Hq, Dv]`; None where this one has to be run in the ordinary way.

        states: `[B, Hq, 1, D]`, beside the incoming keys and values of the layer.
        """
        if self._refused or len({*layer.prompt_tokens}) > 1:  # counts by sequence are in tensors that nobody keeps
            return None
        layer.catch_up()  # with compiled steps, before this one is counted on the device
        inputs = (states, *layer.incoming)  # type: ignore[misc]
        known = _facts(layer, inputs, scoring)
        if known != self._known:  # kernels are compiled, and handles made, before anything is recorded
            self._known, self._replay, self._scoring = known, None, scoring
            output = _run(layer, scoring, *inputs)
        elif self._replay is None and not _is_alone():
            return None
        else:
            self._replay = self._replay or self._recorded(layer, inputs, scoring)
            if self._replay is None:
                self._refused = True
                return None
            output = self._replay(inputs)
        layer.incoming = None
        layer.count_one()
        return output

    def _recorded(self, layer: Recordable, inputs: Sequence[Tensor], scoring: Scoring) -> Replay | None:
        table: TokenTable = layer.table  # type: ignore[assignment]
        incoming, length = layer.incoming, table.length
        try:
            return self._graphs.capture(lambda *given: _run(layer, scoring, *given), inputs)
        except BaseException as error:  # with counts of what has not run
            table.drop_newest(table.length - length)
            layer.incoming = incoming
            if not isinstance(error, RuntimeError):
                raise
            logger.info("decode steps go on unrecorded: %s", error)
            return None


def _run(layer: Recordable, scoring: Scoring, states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    layer.incoming = keys, values
    steady = layer.steady
    steady.in_graph = True
    try:
        return layer.steady_step(layer.table, steady, states, scoring)  # type: ignore[arg-type]
    finally:
        steady.in_graph = False


def _facts(layer: Recordable, inputs: Sequence[Tensor], scoring: Scoring) -> tuple[Any, ...]:
    """What has to be as it was when the step was recorded."""
    shapes = tuple((each.shape, each.stride(), each.dtype) for each in inputs)
    sinks = [] if scoring.sinks is None else [scoring.sinks]
    places = tuple((each.data_ptr(), each.dtype) for each in (*layer.tensors(), *sinks))
    return shapes, places, scoring.scale, scoring.softcap, layer.prompt_tokens
