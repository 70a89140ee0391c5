"""The grid of `quality_real.py`: which prompts there are, the most important first, and what counts as right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from kvprune.evaluation.example import Example, Suite
from kvprune.evaluation.likelihood import SEPARATOR, cut
from kvprune.evaluation.models import LanguageModel
from kvprune.evaluation.prompts import PromptMaker
from kvprune.evaluation.results import Row
from kvprune.evaluation.synthetic.suite import Synthetic

DATA = Path(__file__).parents[3] / "shared" / "data"
# Tokens of an answer of needles, and what it is made of: a token is a digit for this tokenizer.
ANSWERS: Mapping[int, Mapping[str, Any]] = {
    7: {"digits": 7}, 20: {"digits": 20}, 3: {"digits": 3}, 1: {"values": "word"},
}  # fmt: skip
NEEDLES = {"single": "needle_single", "multi-key": "needle_multikey", "multi-value": "needle_multivalue"}
# Tasks of LongBench in which the full cache of this model is above chance, see the report.
LONGBENCH = ("lcc", "repobench-p", "samsum", "multifieldqa_en")
LONGBENCH_TOKENS = 2000
TEXTS = {"WikiText-2": "wikitext2_test.txt", "Pride and Prejudice": "pride_and_prejudice_1342.txt"}
TEXT_PROMPT, TEXT_FED = 1024, 129  # 128 predictions from a compressed cache
QUICK = 300  # tokens of the prompts that only show whether everyone runs
SEED = 0


@dataclass(frozen=True)
class Prompt:
    """Token ids `[1, n]`, how many of them come before the question, and how to judge what is written.

    text: `[m]`, what follows the prompt, to be predicted; then there is nothing to judge. answers: token ids of
    needles.
    """

    task: str
    index: int
    ids: Tensor
    question: int | None
    generation: Mapping[str, Any] = field(default_factory=dict)
    judged: Callable[[list[int]], Row] = lambda written: {}
    fields: Row = field(default_factory=dict)
    text: Tensor | None = None
    answers: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Place:
    """A prompt of the grid, made when it is its turn. known_only: whether there is no question to come later."""

    task: str
    index: int
    prompt: Callable[[], Prompt]
    known_only: bool = False

    def chosen(self, who: Sequence[Any]) -> list[Any]:
        return [entry for entry in who if entry.known or not self.known_only]


@dataclass(frozen=True)
class Kind:
    """Prompts that differ in a number, of which there may be too few. Nothing is read before one is asked for."""

    task: str
    place: Callable[[int], Place | None]


def grid(
    model: LanguageModel,
    data: Path,
    *,
    quick: bool = False,
    count: int | None = None,
    cells: Sequence[str] = (),
) -> Iterator[Place]:
    """All prompts. A round of a group has one prompt of each of its kinds, so that an interrupted run has all kinds.

    quick: a needle and a text, short ones.
    """
    needles = partial(_needles, model)
    if quick:
        kinds = [needles("single", 3, QUICK), *_texts(model, data, QUICK, 17)[:1]]
        yield from filter(None, (kind.place(0) for kind in kinds))
        return
    groups = [
        (11, [needles("single", tokens, 1000) for tokens in ANSWERS]),
        (6, [needles("multi-key", 7, 1000), needles("multi-value", 7, 1000)]),
        (6, [needles("single", tokens, 2000) for tokens in (7, 20)]),
        (4, _texts(model, data, TEXT_PROMPT, TEXT_FED)),
        (10, _longbench(model, data)),
        (11, [needles("single", tokens, 2000) for tokens in (3, 1)]),
        (6, [needles(kind, 7, 2000) for kind in ("multi-key", "multi-value")]),
        (6, [needles("multi-key", tokens, 1000) for tokens in (20, 3)]),
        (6, [needles("single", tokens, 4000) for tokens in (7, 20, 3)]),
        (4, [needles(kind, 7, 4000) for kind in ("multi-key", "multi-value")]),
    ]
    for number, kinds in groups:
        wanted = [kind for kind in kinds if not cells or any(part in kind.task for part in cells)]
        for index, kind in product(range(count or number), wanted):
            place = kind.place(index)
            if place is not None:
                yield place


def _needles(model: LanguageModel, kind: str, tokens: int, length: int) -> Kind:
    task = f"{kind}, {tokens} token{'s' if tokens > 1 else ''}, {length / 1000:g}k"

    @cache
    def examples() -> tuple[Suite, list[Example]]:
        settings = {**ANSWERS[tokens], "distractors": 8, "needles": 3}
        suite = Synthetic(model.tokenizer, NEEDLES[kind], lengths=length, count=11, seed=SEED, **settings)
        return suite, list(suite.examples())

    def place(index: int) -> Place | None:
        def made() -> Prompt:
            suite, found = examples()
            order = [(4 * number) % 11 for number in range(11)]  # depths of the first few are spread over the text
            return _asked(
                model,
                task,
                index,
                suite,
                found[order[index]],
                None,
                {"length": length, "kind": kind, "answer_tokens": tokens},
            )

        return Place(task, index, made) if index < 11 else None

    return Kind(task, place)


def _asked(
    model: LanguageModel, task: str, index: int, suite: Suite, example: Example, max_length: int | None, fields: Row
) -> Prompt:
    made = PromptMaker(model, max_length)(example)
    tokenizer = model.tokenizer
    needle = "kind" in fields
    answers = [tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] for answer in example.answers]
    # The space before a number is a token of its own, which says nothing.
    answers = [ids[1:] if tokenizer.decode(ids[:1]).strip() == "" else ids for ids in answers]
    ends = [tokenizer.eos_token_id]
    if example.stop is not None:
        ends += tokenizer(example.stop, add_special_tokens=False)["input_ids"][-1:]
    stops = example.answers if needle else ()

    def said(written: list[int]) -> str:
        text: str = tokenizer.decode(written, skip_special_tokens=True)
        return text

    def done(written: list[int]) -> bool:
        return bool(stops) and all(answer in said(written) for answer in stops)

    def judged(written: list[int]) -> Row:
        shares = [_longest_run(ids, written) / len(ids) for ids in answers]
        return {
            "score": suite.score(example, said(written)),
            **({"tokens_right": sum(shares) / len(shares)} if needle else {}),
            "prediction": said(written),
            "answers": list(example.answers),
            "new_tokens": len(written),
        }

    generation = {
        "max_new_tokens": sum(map(len, answers)) + 14 if needle else min(made.max_new_tokens, 64),
        "min_new_tokens": example.min_new_tokens,
        "ends": ends,
        "done": done,
    }
    return Prompt(task, index, made.ids, made.question, generation, judged, fields, answers=answers if needle else ())


def _longest_run(answer: list[int], written: list[int]) -> int:
    """Of the answer's tokens, the most that stand one after another in what was written."""
    best, before = 0, [0] * (len(answer) + 1)
    for token in written:
        now = [0] + [before[place] + 1 if answer[place] == token else 0 for place in range(len(answer))]
        best, before = max(best, *now), now
    return best


def _longbench(model: LanguageModel, data: Path) -> list[Kind]:
    from kvprune.integrations.longbench import LongBench

    folder = data / "longbench"
    if not folder.is_dir():
        return []

    def kind(task: str) -> Kind:
        @cache
        def examples() -> tuple[Suite, list[Example]]:
            suite = LongBench(folder, tasks=[task])
            return suite, list(suite.examples())

        def place(index: int) -> Place | None:
            suite, found = examples()
            if index >= len(found):
                return None
            fields = {"length": LONGBENCH_TOKENS}
            made = partial(_asked, model, f"LongBench {task}", index, suite, found[index], LONGBENCH_TOKENS, fields)
            return Place(f"LongBench {task}", index, made)

        return Kind(f"LongBench {task}", place)

    return [kind(task) for task in LONGBENCH if any(folder.glob(f"*{task}.json*"))]


def _texts(model: LanguageModel, data: Path, prompt: int, fed: int) -> list[Kind]:
    def kind(name: str, file: Path) -> Kind:
        @cache
        def pieces() -> Tensor:
            text = file.read_text(encoding="utf-8")
            # A Gutenberg novel begins behind a header, and its pieces here in the middle of a chapter.
            documents = (document.strip() for document in text[len(text) // 20 :].split(SEPARATOR))
            return cut(documents, model.tokenizer, 8, prompt + fed)

        def place(index: int) -> Place | None:
            def made() -> Prompt:
                ids = pieces()[index]
                return Prompt(name, index, ids[None, :prompt], None, fields={"length": prompt}, text=ids[prompt:])

            return Place(name, index, made, known_only=True)

        return Kind(name, place)

    return [kind(name, data / "text" / file) for name, file in TEXTS.items() if (data / "text" / file).is_file()]
