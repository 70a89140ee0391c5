"""llama.cpp's caches generate tokens, in a process of their own: they need another environment, which has no torch.

    PYTHONPATH=bench bench/peers/.venv-llama/bin/python bench/subjects/llama_worker.py  # a request a line

A request is `{"measure": "open", "job": {...}}` with the fields of `LlamaJob`, answered by the cache's bytes and the
tokens that it holds; `{"measure": "turn", "job": {...}}` with those of `Turn`, answered by seconds of a step; or
`{"measure": "versions", "job": {...}}`. Or `{"error": why not}`. Caches that were opened stay until the process ends.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from measuring.turns import seconds_of
from subjects.pipe import serve

PIECE = 512  # tokens of a prompt that are read at once, which is llama.cpp's own default
MINE, COPY = 0, 1  # sequences of a context: what goes on, and rows on their way to it


@dataclass(frozen=True)
class LlamaJob:
    """A cache to open.

    name: what turns call it. model: a GGUF file. kind: of its keys and values, "f16", "q8_0" or "q4_0". flash: whether
    attention is llama.cpp's flash attention, which values of few bits need. prompt: token ids, which are repeated until
    there are so many tokens. room: tokens that may follow. threads, filling: threads of a step, and of the prompt.
    """

    name: str
    model: str
    kind: str
    flash: bool
    prompt: list[int]
    tokens: int
    room: int
    threads: int
    filling: int


@dataclass(frozen=True)
class Turn:
    """Steps of a cache that was opened as `name`."""

    name: str
    steps: int


class LlamaGeneration:
    """A cache that holds the rows of a prompt, over and over, and goes on from there.

    Rows are copied and their keys turned to where they stand, since what they say changes no time, and llama.cpp takes
    long to read a long prompt into few bits on one thread.
    """

    def __init__(self, job: LlamaJob) -> None:
        import llama_cpp

        self._llama = llama_cpp
        model = _model(job.model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = job.tokens + max(job.room, len(job.prompt))  # the last copy may be too long at first
        settings.n_batch = settings.n_ubatch = PIECE
        settings.n_seq_max, settings.kv_unified = 2, True  # sequences may share rows
        settings.n_threads, settings.n_threads_batch = job.threads, job.filling
        settings.type_k = settings.type_v = getattr(llama_cpp, f"GGML_TYPE_{job.kind.upper()}")
        settings.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if job.flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no {job.kind} cache{'' if job.flash else ' without flash attention'}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(PIECE, 0, 1)
        for begin in range(0, len(job.prompt), PIECE):
            self._read(job.prompt[begin : begin + PIECE], begin)
        self._token, self._seen = self._best(), job.tokens
        self._repeat(len(job.prompt), job.tokens)

    def turn(self, steps: int) -> float:
        return seconds_of(self._step, steps)

    def nbytes(self) -> int:
        """Of keys and values of the tokens so far, as llama.cpp would save them: with some bytes a token beside."""
        return int(self._llama.llama_state_seq_get_size(self._context, MINE))

    def tokens(self) -> int:
        return int(self._llama.llama_memory_seq_pos_max(self._memory, MINE)) + 1

    def _repeat(self, rows: int, tokens: int) -> None:
        """Copies of the first rows, until there are as many as tokens."""
        llama = self._llama
        size = llama.llama_state_seq_get_size(self._context, MINE)
        state = (ctypes.c_uint8 * size)()
        llama.llama_state_seq_get_data(self._context, state, size, MINE)
        for begin in range(rows, tokens, rows):
            if not llama.llama_state_seq_set_data(self._context, state, size, COPY):
                raise RuntimeError("llama.cpp does not take its own rows back")
            llama.llama_memory_seq_rm(self._memory, COPY, tokens - begin, -1)
            llama.llama_memory_seq_add(self._memory, COPY, 0, -1, begin)
            llama.llama_memory_seq_cp(self._memory, COPY, MINE, -1, -1)
            llama.llama_memory_seq_rm(self._memory, COPY, -1, -1)

    def _step(self) -> None:
        self._read([self._token], self._seen)
        self._token, self._seen = self._best(), self._seen + 1

    def _read(self, ids: list[int], position: int) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, MINE
            batch.logits[index] = index == len(ids) - 1
        if code := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode answered {code}")

    def _best(self) -> int:
        import numpy as np

        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


@cache
def _model(path: str) -> Any:
    import llama_cpp

    llama_cpp.llama_log_set(_silent(), None)
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.use_extra_bufts = False  # weights packed for AMX crash where a virtual machine only promises it (0.3.36)
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    return model


@cache
def _silent() -> Any:
    """Instead of what it logs, some lines for every tensor. Kept, since llama.cpp keeps but an address."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _versions() -> dict[str, str]:
    """Of the package, and what llama.cpp was built for."""
    import llama_cpp

    return {
        "llama-cpp-python": version("llama-cpp-python"),
        "llama.cpp": llama_cpp.llama_print_system_info().decode(),
    }


_open: dict[str, LlamaGeneration] = {}


def ask(measure: str, job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, or `{"error": why not}`."""
    try:
        if measure == "versions":
            return {"versions": _versions()}
        if measure == "turn":
            turn = Turn(**job)
            return {"seconds": _open[turn.name].turn(turn.steps)}
        generation = _open[job["name"]] = LlamaGeneration(LlamaJob(**job))
        return {"nbytes": generation.nbytes(), "tokens": generation.tokens()}
    except Exception as error:  # one cache that fails does not end a run of many
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    serve(ask)
