"""The LM Evaluation Harness on a compressed cache: a model `kvprune` that answers all of lm-eval's tasks.

    kvprune eval lm-eval --model kvprune --tasks hellaswag,gsm8k \\
        --model_args "pretrained=NAME,policy=a2sf:kernel_size=7;forgetting_factor=0.9,budget=0.25"

That is lm-eval's own command line, once this module has registered the model. lm-eval 0.4.13 knows its own models only;
releases after it read the entry points of the group `lm_eval.models`, and then `lm_eval --model kvprune` does as well.
In Python, importing this module registers the model.

A prompt attends to everything while it is prefilled, so the logits of that pass say nothing about the compressed cache.
Therefore every score here is read from a cache that has been compressed:

    generate_until          a fresh cache per batch goes into `generate()`. The first token is the prefill's own, as in
                            any use of the cache; all others are read from the compressed cache.
    loglikelihood           the context without its last token is prefilled, which compresses it. Its last token and the
    (multiple choice)       continuation follow in one chunk: every token of the continuation is predicted from the
                            compressed context and the chunk up to it. Nothing is evicted within the chunk, so a
                            continuation is exact and may exceed the budget by its own length. Continuations of one
                            context share its prefill, each reading a copy of the compressed cache.
    loglikelihood_rolling   a window is fed in chunks of `rolling_chunk` tokens, and the cache is compressed after each:
                            tokens are predicted from the compressed chunks before theirs and their own up to them. A
                            fraction as a budget is one of the tokens fed so far. The first chunk reads no cache yet.

A context of a single token (lm-eval makes one of an empty context) leaves nothing to compress. With `policy=full` all
of this runs on transformers' DynamicCache and gives the numbers of lm-eval's own `hf` model, up to rounding.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache

from kvprune.cache import stock
from kvprune.cache.models import cache_argument
from kvprune.cache.report import human_bytes
from kvprune.errors import EvaluationError, KVPruneError, PolicyError, UnsupportedModelError
from kvprune.kernels import check_name
from kvprune.policies import Full
from kvprune.policy.base import Policy
from kvprune.policy.registry import parse
from kvprune.policy.settings import check_count
from kvprune.saving import PrunedCache

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise EvaluationError(f"lm-eval cannot be imported ({error}): pip install 'kvprune[lm-eval]'.") from error

T = TypeVar("T")
Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would have written it."""

log = logging.getLogger("lm_eval.kvprune")  # lm-eval shows what is logged below its own name


def read_policy(policy: Any, budget: Any = None) -> Policy:
    """A policy from model arguments: a Policy, or text as `registry.parse` reads it, where ";" may stand for ",".

    budget: for every link of the text that has a budget and does not give it itself. Raises PolicyError, BudgetError.
    """
    if not isinstance(policy, str | Policy):
        raise PolicyError(
            f"policy={policy!r} is no policy: write policy=a2sf,budget=0.25, or policy=a2sf:kernel_size=7;sinks=8, or "
            "policy=full for the stock cache."
        )
    if budget is None:
        return parse(policy.replace(";", ",")) if isinstance(policy, str) else policy
    if isinstance(policy, Policy):
        raise PolicyError(f"budget={budget!r} does not change {policy}, which is a policy already: leave it out.")
    chosen = parse(policy.replace(";", ","), budget=budget)
    if all(field.name != "budget" for part in chosen.parts() for field in fields(part)):
        raise PolicyError(f"budget={budget!r} means nothing to {chosen}, which has no budget: leave it out.")
    return chosen


@dataclass
class Measured:
    """Bytes of the caches that answers were read from, summed over `sequences`; dense: of a DynamicCache instead."""

    nbytes: int = 0
    dense_nbytes: int = 0
    sequences: int = 0

    @property
    def ratio(self) -> float | None:
        """Bytes held for every byte of a dense cache; None before the first answer."""
        return self.nbytes / self.dense_nbytes if self.dense_nbytes else None

    def add(self, cache: Cache, sequences: int) -> None:
        if isinstance(cache, PrunedCache):
            nbytes, dense = cache.nbytes, cache.dense_nbytes
        else:
            nbytes = dense = sum(map(stock.dense_nbytes, cache.layers))
        self.nbytes += nbytes
        self.dense_nbytes += dense
        self.sequences += sequences


@dataclass(frozen=True)
class Request:
    """A continuation to score, as token ids.

    index: its place among the requests. context: what comes before its last token. tokens: the last token of the
    context and the continuation; those from the second on are predicted.
    """

    index: int
    context: tuple[int, ...]
    tokens: tuple[int, ...]


@register_model("kvprune")
class KVPruneLM(HFLM):
    """lm-eval's Hugging Face model, answering from a `PrunedCache`.

    Args:
        pretrained: a hub name, a folder, or a model (with `tokenizer`), as for `HFLM`.
        policy: a name such as "a2sf", with settings "a2sf:kernel_size=7;sinks=8", a chain made with "|", or a Policy.
            "full" is the stock DynamicCache.
        budget: of every policy in the text that does not give its own: a fraction of the prompt tokens (0.25), tokens
            per KV head (1024), or bytes ("512MiB"). None for the policy's default.
        kernels, attention: as for `PrunedCache`.
        rolling_chunk: tokens that `loglikelihood_rolling` feeds between two compressions.
        settings: all else that `HFLM` takes: device, dtype, batch_size, max_length, ...

    `measured` holds the bytes of the caches that were read: after the context for loglikelihood, and at the end of a
    generation or a window. In a batch, padding counts as tokens. `get_model_info` puts them into lm-eval's results; of
    several processes, those of the first.

    Raises PolicyError, BudgetError, CacheError and UnsupportedModelError, as `PrunedCache` does, before any task runs.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: Policy | str | None = None,
        budget: float | int | str | None = None,
        kernels: str = "auto",
        attention: str = "auto",
        rolling_chunk: int = 128,
        **settings: Any,
    ) -> None:
        self.policy = read_policy(policy, budget)  # before the model loads: a typing mistake should not cost minutes
        check_name(kernels)
        check_count("rolling_chunk", rolling_chunk, least=1)
        self.kernels, self.attention, self.rolling_chunk = kernels, attention, rolling_chunk
        self.measured = Measured()
        super().__init__(pretrained, **settings)
        if self.backend != "causal":
            raise UnsupportedModelError(
                f"{type(self.model).__name__} is an encoder-decoder model, and kvprune compresses decoder-only models: "
                "use --model hf."
            )
        self.new_cache()  # raises for a model or an attention that cannot be had

    def new_cache(self) -> Cache:
        """An empty cache of this model's policy."""
        if self.policy == Full():
            return DynamicCache(config=self.model.config)
        return PrunedCache(self.model, self.policy, kernels=self.kernels, attention=self.attention)

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the results beside the scores; bytes are per sequence."""
        measured = self.measured
        info = {
            **super().get_model_info(),
            "kv_policy": str(self.policy),
            "kv_ratio": measured.ratio,
            "kv_nbytes": measured.nbytes / max(measured.sequences, 1),
            "kv_dense_nbytes": measured.dense_nbytes / max(measured.sequences, 1),
        }
        if measured.ratio is not None:
            log.info(
                "%s: the cache took %.1f%% of a dense one, %s of %s per sequence",
                self.policy,
                100 * measured.ratio,
                human_bytes(info["kv_nbytes"]),
                human_bytes(info["kv_dense_nbytes"]),
            )
        return info

    # -- what HFLM calls -------------------------------------------------------------------------------------------

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        cache = self.new_cache()
        output = super()._model_generate(context, max_length, stop, **cache_argument(cache), **generation_kwargs)
        self.measured.add(cache, len(context))
        return output

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        if not requests:
            return []
        asked = self._requests(requests)
        rolling = any(texts is None for texts, *_ in requests)  # so HFLM hands over the windows of a text
        score = self._score_windows if rolling else self._score_continuations
        answers: dict[int, Answer] = {}
        hidden = disable_tqdm or rolling or self.rank != 0  # windows come one batch at a time
        with tqdm(total=len(asked), disable=hidden, desc="Running loglikelihood requests") as bar:
            for request, answer in score(asked, override_bs or self._rows(requests)):
                answers[request.index] = answer
                if not rolling:
                    self.cache_hook.add_partial("loglikelihood", requests[request.index][0], answer)
                bar.update()
        return [answers[index] for index in range(len(asked))]

    def _requests(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[Request]:
        asked, cut = [], 0
        for index, (_, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise EvaluationError(
                    f"a continuation of {len(continuation)} tokens cannot be scored in a window of {self.max_length}: "
                    "it takes 1 to as many, and max_length is the window."
                )
            tokens = tuple(context + continuation)[-self.max_length - 1 :]
            split = len(tokens) - len(continuation) - 1
            asked.append(Request(index, tokens[:split], tokens[split:]))
            cut += len(tokens) < len(context) + len(continuation)
        if cut:
            log.warning(
                "%d of %d contexts were cut from the left to fit into %d tokens", cut, len(asked), self.max_length
            )
        return asked

    def _rows(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> int:
        """Sequences of a batch."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
        return int(self._detect_batch_size([longest]))

    # -- scores ----------------------------------------------------------------------------------------------------

    def _score_continuations(self, asked: list[Request], rows: int) -> Iterator[tuple[Request, Answer]]:
        by_context: dict[tuple[int, ...], list[Request]] = defaultdict(list)
        for request in asked:
            by_context[request.context].append(request)
        nothing: list[tuple[int, ...]] = [()] if () in by_context else []
        longest_first = sorted(filter(None, by_context), key=len, reverse=True)  # out of memory at once, if at all
        for contexts in [*_batches(longest_first, rows), *_batches(nothing, 1)]:
            cache = self.new_cache()
            ids, mask = _padded(contexts, side="left")
            if ids.numel():
                self._forward(cache, ids, mask, logits_to_keep=1)
                self.measured.add(cache, len(contexts))
            reads = [(row, request) for row, context in enumerate(contexts) for request in by_context[context]]
            reads.sort(key=lambda read: len(read[1].tokens), reverse=True)
            batches = list(_batches(reads, rows))
            for batch in batches:
                mine = cache if batch is batches[-1] else _fork(cache)
                yield from self._read(mine, mask, batch)

    def _read(self, cache: Cache, mask: Tensor, reads: list[tuple[int, Request]]) -> Iterator[tuple[Request, Answer]]:
        """Score continuations of rows of the cache, which is used up. mask: of the contexts, bool `[B, S]`."""
        of_rows = torch.tensor([row for row, _ in reads])
        requests = [request for _, request in reads]
        cache.batch_select_indices(of_rows.to(self.device))
        if isinstance(cache, PrunedCache):
            # A draft is not compressed, and no prompt filter shortens it: all its predictions are needed.
            cache.activate_past_recording()
        tokens, real = _padded([request.tokens for request in requests], side="right")
        real = real[:, 1:]  # where there is a token to predict
        logits = self._forward(cache, tokens[:, :-1], torch.cat([mask[of_rows], real], dim=1))
        yield from zip(requests, self._answers(*self._scores(logits, tokens[:, 1:], real)), strict=True)

    def _score_windows(self, asked: list[Request], rows: int) -> Iterator[tuple[Request, Answer]]:
        if self.policy.filters_prompt:
            raise PolicyError(
                f"{self.policy} shortens prompts, and a text whose tokens are all to be predicted has none: "
                "loglikelihood_rolling takes a policy that evicts or quantizes."
            )
        by_length: dict[int, list[Request]] = defaultdict(list)
        for request in asked:
            by_length[len(request.context + request.tokens)].append(request)
        for length, requests in by_length.items():
            for batch in _batches(requests, rows):
                tokens = torch.tensor([request.context + request.tokens for request in batch])
                contexts = torch.tensor([len(request.context) for request in batch])
                real = torch.arange(length - 1) >= contexts[:, None]
                cache = self.new_cache()
                likelihood, greedy = torch.zeros(len(batch)), torch.ones(len(batch), dtype=torch.bool)
                for chunk in torch.arange(length - 1).split(self.rolling_chunk):
                    logits = self._forward(cache, tokens[:, chunk])
                    more, as_greedy = self._scores(logits, tokens[:, chunk + 1], real[:, chunk])
                    likelihood += more
                    greedy &= as_greedy
                self.measured.add(cache, len(batch))
                yield from zip(batch, self._answers(likelihood, greedy), strict=True)

    def _forward(self, cache: Cache, ids: Tensor, mask: Tensor | None = None, logits_to_keep: int = 0) -> Tensor:
        """Logits `[B, L, vocab]` of new tokens `[B, L]`. mask: bool, of cached and new tokens; None if all count."""
        inputs: dict[str, Tensor] = {"input_ids": ids}
        if mask is not None and not mask.all():
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - ids.shape[1] :]
            inputs |= {"attention_mask": mask.long(), "position_ids": positions}
        precision = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, precision, enabled=precision is not None):
            output = self.model(
                **{name: tensor.to(self.device) for name, tensor in inputs.items()},
                **cache_argument(cache),
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        return output.logits

    def _scores(self, logits: Tensor, targets: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihood of the real targets `[B, L]`, float32 `[B]`, and whether all are greedy, bool `[B]`."""
        targets, real = targets.to(logits.device), real.to(logits.device)
        likelihood = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype).gather(2, targets[:, :, None]).squeeze(2)
        greedy = (logits.argmax(-1) == targets) | ~real
        return likelihood.float().where(real, 0).sum(1).cpu(), greedy.all(1).cpu()

    @staticmethod
    def _answers(likelihood: Tensor, greedy: Tensor) -> Iterator[Answer]:
        return zip(likelihood.tolist(), greedy.tolist(), strict=True)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = list(items)
    return (items[start : start + size] for start in range(0, len(items), size))


def _padded(sequences: Sequence[tuple[int, ...]], *, side: str) -> tuple[Tensor, Tensor]:
    """Token ids `[B, L]`, 0 where padded, and which are real, bool `[B, L]`."""
    ids = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    real = [torch.ones(len(sequence), dtype=torch.bool) for sequence in sequences]
    return tuple(pad_sequence(each, batch_first=True, padding_side=side) for each in (ids, real))  # type: ignore[return-value]


def _fork(cache: Cache) -> Cache:
    return cache.fork() if isinstance(cache, PrunedCache) else copy.deepcopy(cache)


def main() -> None:
    """lm-eval's command line; mistakes in the model's arguments end in one clear sentence, not in a traceback."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except KVPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
