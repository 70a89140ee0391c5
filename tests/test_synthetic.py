"""Synthetic tasks: length, depth and answers, checked by solvers that read nothing but the prompt."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvprune.demo import MODEL_PATH, load
from kvprune.errors import EvaluationError
from kvprune.evaluation.synthetic import FAMILIES, NOTES_FAMILIES, Synthetic, plot_depths
from kvprune.evaluation.synthetic.draft import most_that_fit
from kvprune.evaluation.synthetic.filler import Filler, scatter

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

seeds = st.integers(0, 1000)


def tokens(tokenizer, text):
    return len(tokenizer(text, verbose=False)["input_ids"])


def embedded():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def subwords():
    """A byte-level BPE that has seen some filler."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(Filler.markov(capitals=True).sentences[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def stories():
    if not (DATA / "stories260K").exists():
        pytest.skip(f"the tokenizer of stories260K is not in {DATA}")
    return AutoTokenizer.from_pretrained(DATA / "stories260K")


@pytest.fixture(scope="module", params=[embedded, subwords, stories], ids=lambda make: make.__name__)
def any_tokenizer(request):
    return request.param()


@pytest.fixture(scope="module")
def tokenizer():
    return subwords()


@pytest.fixture(scope="module")
def notes_tokenizer():
    return embedded()


def one(tokenizer, task, **settings):
    (example,) = Synthetic(tokenizer, tasks=task, count=1, **settings).examples()
    return example


def halves(example):
    """The prompt before the question, and the question."""
    return example.prompt[: example.question_at], example.prompt[example.question_at :]


# Length


@given(limit=st.integers(0, 2000), steps=st.lists(st.integers(1, 30), min_size=1), fewest=st.integers(0, 5))
def test_the_search_finds_the_largest_number_that_fits(limit, steps, fewest):
    def size(n):
        return sum(steps[place % len(steps)] for place in range(n))

    limit = max(limit, size(fewest))
    assert most_that_fit(size, limit, fewest) == max(n for n in range(fewest, limit + 1) if size(n) <= limit)


@given(length=st.integers(1500, 6000), seed=seeds)
def test_prompts_fill_their_length_to_the_sentence_and_never_exceed_it(any_tokenizer, length, seed):
    longest_prose = max(tokens(any_tokenizer, text) for text in Filler.markov(capitals=True).sentences[:300])
    for example in Synthetic(any_tokenizer, lengths=length, count=1, seed=seed, distractors=3).examples():
        own = halves(example)[0].split(". ") if example.task == "qa" else []  # names make longer sentences
        longest = max(longest_prose, *(tokens(any_tokenizer, sentence) for sentence in own), 0)
        if example.task == "frequent_words":
            # floor(n / k^2) grows with n for every square that divides it, of which numbers in question have up to 9.
            longest = 9 * max(tokens(any_tokenizer, word) for word in halves(example)[0].split())
        assert length - longest - 5 <= tokens(any_tokenizer, example.prompt) <= length, example.task


@pytest.mark.parametrize("task", FAMILIES)
def test_the_least_length_that_an_error_names_works(tokenizer, task):
    with pytest.raises(EvaluationError, match="write a length of at least") as error:
        list(Synthetic(tokenizer, tasks=task, lengths=10).examples())
    least = int(re.search(r"at least ([\d,]+)", str(error.value))[1].replace(",", ""))
    assert len(list(Synthetic(tokenizer, tasks=task, lengths=least).examples())) == 20
    with pytest.raises(EvaluationError, match="write a length of at least"):
        list(Synthetic(tokenizer, tasks=task, lengths=least - 1).examples())


def test_a_task_that_does_not_fit_is_refused_before_the_first_example(tokenizer):
    suite = Synthetic(tokenizer, tasks=["needle_single", "common_words"], lengths=[2000, 300])
    with pytest.raises(EvaluationError, match="common_words does not fit 300 tokens"):
        next(suite.examples())


# Answers


def solve_needles(text, question):
    wanted = set(re.findall(r"[a-z]+-[a-z]+", question))
    return {value for key, value in re.findall(r"The code of (\S+) is (\S+)\.", text) if key in wanted}


def solve_variables(text, question):
    value = dict(re.findall(r"Let ([A-Z]+) = (\w+)\.", text))
    wanted = re.search(r"value (\d+)\?", question)[1]

    def follow(name):
        return follow(value[name]) if name in value else name

    return {name for name in value if follow(name) == wanted}


def solve_common(text, question):
    return top(re.findall(r"\d+\. (\S+)", text), int(re.search(r"Which (\d+)", question)[1]))


def solve_frequent(text, question):
    code = text.split("\n\n")[1].replace(".", "").split()
    return top(code, int(re.search(r"Which (\d+)", question)[1]))


def top(words, count):
    """The most frequent words, which must be so without a tie."""
    ranked = Counter(words).most_common()
    assert ranked[count - 1][1] > ranked[count][1]
    return {word for word, _ in ranked[:count]}


NAMES = "([A-Z][a-z]{5}(?: [A-Z][a-z]{5})?)"
ASKED = {  # a question, and where its answer stands
    rf"Where was {NAMES} born": "{} was born in X",
    rf"Who taught {NAMES} (?:[a-z]+)": "{} learned [a-z]+ from X",
    rf"Where does {NAMES} work": "{} settled in X",
    rf"On which river does {NAMES} lie": "{} is a town .* on the river X",
    rf"Who founded {NAMES}": "{} is a town .* was founded in [0-9]+ by X",
    rf"To which port does a road lead from {NAMES}": "from {} to the port of X",
}


def solve_qa(text, question):
    for pattern, answer in ASKED.items():
        if found := re.search(pattern, question):
            (name,) = re.findall(answer.format(found[1]).replace("X", NAMES), text)
            return {name, name.split()[-1]}
    raise AssertionError(question)


SOLVERS = {
    **dict.fromkeys([family for family in FAMILIES if family.startswith("needle")], solve_needles),
    "variable_tracking": solve_variables,
    "common_words": solve_common,
    "frequent_words": solve_frequent,
    "qa": solve_qa,
}


@pytest.mark.parametrize("task", FAMILIES)
@given(length=st.integers(2000, 9000), seed=seeds)
def test_a_solver_that_reads_the_prompt_alone_finds_the_answers(tokenizer, task, length, seed):
    for example in Synthetic(tokenizer, tasks=task, lengths=length, count=2, seed=seed, chains=3).examples():
        assert SOLVERS[task](*halves(example)) == set(example.answers)


@pytest.mark.parametrize("values", ["numbers", "words", "word", "uuids"])
@pytest.mark.parametrize("task", [family for family in FAMILIES if family.startswith("needle")])
@given(seed=seeds)
def test_every_value_that_is_asked_stands_in_the_text_once(tokenizer, task, values, seed):
    example = one(tokenizer, task, values=values, lengths=2000, seed=seed)
    assert len(set(example.answers)) == len(example.answers)
    for answer in example.answers:
        assert halves(example)[0].count(answer) == 1
        assert answer not in halves(example)[1]


@pytest.mark.parametrize("digits", [1, 3, 20])
def test_numbers_have_as_many_digits_as_asked(tokenizer, digits):
    (answer,) = one(tokenizer, "needle_single", digits=digits, lengths=2000).answers
    assert re.fullmatch(rf"[1-9]\d{{{digits - 1}}}", answer)


@given(seed=seeds, distractors=st.integers(0, 30))
def test_distractors_share_no_key_and_no_value_with_what_is_asked(tokenizer, seed, distractors):
    text, _ = halves(one(tokenizer, "needle_multikey", lengths=3000, seed=seed, distractors=distractors))
    keys, values = zip(*re.findall(r"The code of (\S+) is (\S+)\.", text), strict=True)
    assert len(set(keys)) == len(set(values)) == len(keys) == distractors + 1


@pytest.mark.parametrize("kind", ["words", "numbers", "uuids"])
def test_a_text_can_be_nothing_but_needles(tokenizer, kind):
    example = one(tokenizer, "needle_multikey", lengths=3000, keys=kind, values=kind, distractors="all")
    text = halves(example)[0].split("\n\n")[1]
    assert re.fullmatch(r"(The code of \S+ is \S+\. ?)+", text)
    assert text.count(f"is {example.answers[0]}.") == 1


def test_keys_of_words_run_out_in_a_clear_error(tokenizer):
    with pytest.raises(EvaluationError, match=r"only 2,950 different words.*uuids"):
        one(tokenizer, "needle_multikey", lengths=200_000, distractors="all")


@given(seed=seeds, needles=st.integers(2, 6))
def test_as_many_values_and_keys_are_asked_as_said(tokenizer, seed, needles):
    for task in ("needle_multivalue", "needle_multiquery"):
        assert len(one(tokenizer, task, lengths=2000, seed=seed, needles=needles).answers) == needles


@given(seed=seeds, chains=st.integers(1, 4), hops=st.integers(1, 6))
def test_assignments_come_after_what_they_refer_to(tokenizer, seed, chains, hops):
    text, _ = halves(one(tokenizer, "variable_tracking", lengths=2500, seed=seed, chains=chains, hops=hops))
    known = set()
    statements = re.findall(r"Let ([A-Z]+) = (\w+)\.", text)
    for name, value in statements:
        assert value.isdigit() or value in known
        known.add(name)
    assert len(known) == len(statements) == chains * (hops + 1)


@given(seed=seeds)
def test_the_passages_of_a_question_name_its_answer_once(tokenizer, seed):
    example = one(tokenizer, "qa", lengths=2500, seed=seed)
    assert all(example.prompt.count(answer) == 1 for answer in example.answers)


# Depth


@given(depth=st.floats(0, 100), seed=seeds)
def test_a_needle_stands_at_its_depth(tokenizer, depth, seed):
    """Within half a sentence, in characters of everything around it."""
    example = one(tokenizer, "needle_multikey", lengths=2500, depths=depth, seed=seed)
    text = halves(example)[0].split("\n\n")[1]
    before, after = (len(part) for part in re.split(rf"The code of \S+ is {example.answers[0]}\.", text))
    longest = max(map(len, re.split(r"(?<=\.) ", text)))
    assert abs(before - depth / 100 * (before + after)) <= longest / 2 + 1
    assert example.fields["depth"] == depth


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (100, -1)])
def test_a_passage_stands_at_its_depth(tokenizer, depth, place):
    example = one(tokenizer, "qa", lengths=2000, depths=depth)
    passages = halves(example)[0].strip().split("\n\n")[1:]
    assert example.answers[0] in passages[place]


def test_depths_are_spread_evenly_and_taken_in_turn(tokenizer):
    def depths(**settings):
        suite = Synthetic(tokenizer, tasks="needle_single", lengths=500, **settings)
        return [example.fields["depth"] for example in suite.examples()]

    assert depths(count=5) == [0, 25, 50, 75, 100]
    assert depths(count=1) == [50]
    assert depths(count=25) == [10.0 * (number % 11) for number in range(25)]
    assert depths(count=5, depths=[20, 80]) == [20, 80, 20, 80, 20]


@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=20),
    hidden=st.lists(st.tuples(st.integers(0, 100), st.text("x", min_size=1)), max_size=5),
)
def test_scattering_keeps_every_piece_in_its_order(pieces, hidden):
    depths, statements = [depth for depth, _ in hidden], [text for _, text in hidden]
    text = scatter(pieces, statements, depths)
    assert [piece for piece in text if "x" not in piece] == pieces
    in_order = sorted(range(len(hidden)), key=lambda number: depths[number])
    assert [piece for piece in text if "x" in piece] == [statements[number] for number in in_order]


# The same everywhere


def test_prompts_are_the_same_on_every_machine(notes_tokenizer):
    """These sums were made once; a change of any prompt, by whatever cause, changes them."""
    notes = Synthetic(notes_tokenizer, lengths=[300, 600], count=3, seed=5)
    prose = Synthetic(CharacterCount(), lengths=9000, count=2, seed=5)
    sums = [crc32("".join(example.prompt for example in suite.examples()).encode()) for suite in (notes, prose)]
    assert sums == [3042685641, 3683752686]


class CharacterCount:
    """A tokenizer whose tokens are characters: no training, no file."""

    unk_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) for character in text]}

    def __len__(self):
        return 0x110000


def test_an_example_depends_on_no_other(tokenizer):
    def prompts(**settings):
        examples = Synthetic(tokenizer, **settings).examples()
        return {(example.task, example.fields["length"], example.index % 2): example.prompt for example in examples}

    together = prompts(lengths=[2000, 1500], count=2)
    for task in FAMILIES:
        alone = prompts(tasks=task, lengths=1500, count=2)
        assert alone == {key: prompt for key, prompt in together.items() if key[:2] == (task, 1500)}


def test_another_seed_gives_other_prompts(tokenizer):
    first, second = (list(Synthetic(tokenizer, lengths=2000, count=1, seed=seed).examples()) for seed in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert one.prompt != other.prompt
        assert one.answers != other.answers


def test_an_example_asks_the_same_at_every_length(tokenizer):
    short, long = (list(Synthetic(tokenizer, lengths=length, count=1).examples()) for length in (2000, 10_000))
    for one, other in zip(short, long, strict=True):
        assert one.answers == other.answers
        assert halves(one)[1] == halves(other)[1]


# Examples and their score


def test_examples_come_task_by_task_and_are_numbered_in_it(any_tokenizer):
    suite = Synthetic(any_tokenizer, lengths=[1500, 2000, 1500], count=3, distractors=3)
    named = [(example.task, example.index, example.fields["length"]) for example in suite.examples()]
    tasks = list(dict.fromkeys(task for task, _, _ in named))
    assert named == [(task, number, 1500 if number < 3 else 2000) for task in tasks for number in range(6)]


def test_the_answer_has_room(any_tokenizer):
    for example in Synthetic(any_tokenizer, lengths=1500, count=1, distractors=3).examples():
        assert example.max_new_tokens >= len(
            any_tokenizer(", ".join(example.answers), add_special_tokens=False).input_ids
        )


@pytest.mark.parametrize(
    ("task", "prediction", "score"),
    [
        ("needle_multivalue", "They are Red, 12 and blue.", 0.75),
        ("needle_multivalue", "red 12 BLUE 7", 1.0),
        ("needle_multivalue", "", 0.0),
        ("qa", "It was RED.", 1.0),
        ("qa", "It was green.", 0.0),
    ],
)
def test_the_score_is_the_share_of_answers_and_any_for_questions(tokenizer, task, prediction, score):
    suite = Synthetic(tokenizer, tasks=task, lengths=1000, count=1)
    (example,) = suite.examples()
    object.__setattr__(example, "answers", ("red", "12", "Blue", "7"))
    assert suite.score(example, prediction) == score


def test_the_right_answers_score_fully_and_those_of_another_example_do_not(tokenizer):
    suite = Synthetic(tokenizer, lengths=2000, count=2)
    examples = list(suite.examples())
    for one, other in zip(examples[::2], examples[1::2], strict=True):
        assert suite.score(one, ", ".join(one.answers)) == 1
        assert suite.score(one, ", ".join(other.answers)) == 0


# The language of the embedded model


def test_the_embedded_tokenizer_is_recognised(notes_tokenizer, tokenizer):
    assert {example.task for example in Synthetic(notes_tokenizer, count=1).examples()} == set(NOTES_FAMILIES)
    assert {example.task for example in Synthetic(tokenizer, count=1).examples()} == set(FAMILIES)


@given(length=st.integers(150, 1500), seed=seeds)
def test_notes_have_only_words_that_the_embedded_model_knows(notes_tokenizer, length, seed):
    for example in Synthetic(notes_tokenizer, lengths=length, count=1, seed=seed).examples():
        assert notes_tokenizer.unk_token_id not in notes_tokenizer(example.prompt).input_ids
        text, question = halves(example)
        assert text.count(f"note {question.removeprefix('question ')} {example.answers[0]} ") == 1


def test_the_embedded_model_finds_the_notes_with_the_full_cache():
    model, tokenizer = load()
    suite = Synthetic(tokenizer, lengths=1000, count=11)
    scores = []
    for example in suite.examples():
        ids = tokenizer(example.prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        written = model.generate(ids, attention_mask=mask, max_new_tokens=example.max_new_tokens, do_sample=False)
        scores.append(suite.score(example, tokenizer.decode(written[0, ids.shape[1] :])))
    assert np.mean(scores) >= 0.9


# Filler from a file


def test_a_text_file_is_read_in_order_sentence_by_sentence(tokenizer, tmp_path):
    file = tmp_path / "filler.txt"
    file.write_text("\n".join(f"This is\nsentence {number}." for number in range(200)) + "<|endoftext|>\n\nThe end\n\n")
    text, _ = halves(one(tokenizer, "needle_single", lengths=2000, filler=file))
    found = [int(number) for number in re.findall(r"This is sentence (\d+)\.", text)]
    assert len(found) > 50
    assert all((after - before) % 200 == 1 for before, after in pairwise(found))
    assert "<|endoftext|>" not in text


@pytest.mark.parametrize("content", [b"", b" \n\n ", b"\xff\xfe\xfa", None])
def test_a_filler_file_without_text_is_refused(tokenizer, tmp_path, content):
    file = tmp_path / "filler.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"filler\.txt"):
        Synthetic(tokenizer, filler=file)


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "needle_singel"}, "Did you mean 'needle_single'"),
        ({"tasks": []}, "at least one task"),
        ({"lengths": []}, "at least one task, one length"),
        ({"lengths": 1e5}, "lengths is 100000.0"),
        ({"lengths": "4096"}, "whole number"),
        ({"lengths": [500, -1]}, "lengths is -1"),
        ({"count": 0}, "count is 0: write a whole number of at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"depths": 101}, "depths go from 0 to 100"),
        ({"depths": [50, float("nan")]}, "depths go from 0 to 100"),
        ({"depths": "50"}, "depths go from 0 to 100"),
        ({"depths": []}, "one depth"),
        ({"style": "verse"}, "no style 'verse'"),
        ({"values": "letters"}, "choose from words, word, numbers, uuids"),
        ({"keys": "letters"}, "choose from words, numbers, uuids"),
        ({"distractors": -1}, "distractors is -1"),
        ({"distractors": "many"}, "distractors is 'many'"),
        ({"needles": 0}, "needles is 0"),
        ({"chains": 0}, "chains is 0"),
        ({"hops": 0}, "hops is 0"),
    ],
)
def test_settings_without_meaning_are_refused(tokenizer, settings, message):
    with pytest.raises(EvaluationError, match=re.escape(message)):
        Synthetic(tokenizer, **settings)


def test_other_families_cannot_be_asked_in_notes(notes_tokenizer):
    with pytest.raises(EvaluationError, match="qa cannot be asked in the language of the embedded model"):
        Synthetic(notes_tokenizer, tasks="qa")


def test_a_tokenizer_that_knows_none_of_the_words_is_refused(notes_tokenizer):
    unknown = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>"))
    unknown.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for style in ("prose", "notes"):
        with pytest.raises(EvaluationError, match="unknown to the tokenizer"):
            Synthetic(PreTrainedTokenizerFast(tokenizer_object=unknown, unk_token="<unk>"), style=style)
    with pytest.raises(EvaluationError, match="write style='notes'"):
        Synthetic(notes_tokenizer, style="prose")


# Pictures


def results(labels=("full", "a2sf @ 0.25"), tasks=("needle_single",)):
    return [
        {"task": task, "label": label, "length": length, "depth": depth, "score": score}
        for task in tasks
        for label in labels
        for length in (1000, 200, 4000)
        for depth in (0.0, 50.0, 100.0)
        for score in ((0.0, 1.0, 1.0) if depth else (0.0, 0.0))
    ]


def drawn(rows, path):
    """The axes of a picture."""
    from matplotlib.figure import Figure

    with patch.object(Figure, "savefig", autospec=True) as save:
        plot_depths(rows, path)
    return [axes for axes in save.call_args.args[0].axes if axes.images]


def test_a_heat_map_shows_the_mean_score_by_depth_and_length(tmp_path):
    missing = {"task": "needle_single", "length": 4000, "depth": 50.0}
    rows = [row for row in results() if not missing.items() <= row.items()]
    panels = drawn(rows, tmp_path / "map.png")
    assert [axes.get_title() for axes in panels] == ["full", "a2sf @ 0.25"]
    for axes in panels:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["200", "1,000", "4,000"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "50%", "100%"]
        expected = np.array([[0, 0, 0], [2 / 3, 2 / 3, np.nan], [2 / 3, 2 / 3, 2 / 3]])
        np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), expected)


def test_every_model_task_and_label_has_a_panel(tmp_path):
    rows = [{**row, "model": model} for model in ("small", "large") for row in results(tasks=("needle_single", "qa"))]
    titles = [axes.get_title() for axes in drawn(rows, tmp_path / "map.png")]
    assert len(set(titles)) == len(titles) == 8
    assert titles[0] == "small\nneedle_single\nfull"


def test_a_heat_map_is_a_picture_file(tmp_path):
    path = plot_depths([*results(), {"task": "common_words", "label": "full", "score": 1.0}], tmp_path / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to draw"),
        ([{"task": "common_words", "label": "full", "length": 1000, "score": 1.0}], "nothing to draw"),
        ([{"task": "qa", "depth": 1.0, "length": 1000}], "no label and no score"),
    ],
)
def test_results_that_cannot_be_drawn_are_refused(tmp_path, rows, message):
    with pytest.raises(EvaluationError, match=message):
        plot_depths(rows, tmp_path / "map.png")
