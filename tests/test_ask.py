"""Many questions about a document that is compressed once: the answers are those of a cache for each question."""

from __future__ import annotations

import warnings
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from kvprune import (
    Adaptive,
    CacheError,
    Chain,
    Everywhere,
    KVPruneError,
    PolicyError,
    PrunedCache,
    QuestionWarning,
    ask,
)
from kvprune.cache.models import cache_argument
from kvprune.demo import load
from kvprune.demo.task import RecallGenerator, decode
from kvprune.policies import (
    A2SF,
    H2O,
    KIVI,
    TOVA,
    Bits,
    Full,
    GemFilter,
    Keyformer,
    KVzip,
    SnapKV,
    StreamingLLM,
    ZipCache,
)

NEEDING = [A2SF(0.5), SnapKV(0.5), TOVA(0.5), GemFilter(256), H2O(0.5) | TOVA(0.5), GemFilter(256) | KIVI()]
BLIND = [Full(), H2O(0.5), Keyformer(0.5), StreamingLLM(0.5), KIVI(), ZipCache(), A2SF(0.5, forgetting_factor=1.0)]


@cache
def embedded():
    """The embedded model, its tokenizer, a document, questions about it, and their answers."""
    model, tokenizer = load()
    recall = RecallGenerator(7).document(400, 8)
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        document=decode(recall.document[1:]),  # the tokenizer begins texts itself
        questions=[decode(recall.question(note)) for note in range(4)],
        answers=tuple(decode(recall.values[note]) for note in range(4)),
    )


def asked(policy, **settings):
    given = {"questions": embedded().questions, "max_new_tokens": 6, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuestionWarning)
        return ask(embedded().model, embedded().tokenizer, embedded().document, policy=policy, **given)


@torch.no_grad()
def answered_alone(policy, question):
    """The document, then the question, then token by token, in a cache that no other question has seen."""
    model, tokenizer = embedded().model, embedded().tokenizer
    own, ids = PrunedCache(model, policy), []
    model(tokenizer(embedded().document, return_tensors="pt").input_ids, **cache_argument(own))
    given = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
    while len(ids) < 6 and tokenizer.eos_token_id not in ids:
        ids.append(int(model(given, **cache_argument(own)).logits[0, -1].argmax()))
        given = torch.tensor([[ids[-1]]])
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), own


@pytest.mark.parametrize("policy", [*BLIND, *NEEDING], ids=str)
def test_answers_are_those_of_a_cache_for_each_question(policy):
    """Reading the document once changes no answer, and a question leaves nothing for the next."""
    found = asked(policy, questions=embedded().questions[:2])
    assert found.texts == tuple(answered_alone(policy, question)[0] for question in found.questions)


@pytest.mark.parametrize("policy", [Full(), KIVI(bits=4, group_size=16, residual=16)], ids=str)
def test_the_embedded_model_knows_the_answers(policy):
    assert asked(policy).texts == embedded().answers


def test_the_result_holds_the_compressed_document():
    """What was kept of the document alone, to look at and to ask again."""
    found = asked("kivi")
    assert found.questions == tuple(embedded().questions)
    assert found.document_tokens == found.cache.seen_tokens == 400
    assert found.report.seen_tokens == 400
    assert found.report.ratio < 1
    again = asked("kivi", questions=embedded().questions[2:])
    assert again.texts == found.texts[2:]


def test_a_saved_document_answers_like_the_one_that_was_read(tmp_path):
    """Saved and loaded, the cache of the result gives a question the same logits."""
    found = asked(KIVI())
    found.cache.save(tmp_path / "document")
    loaded = PrunedCache.load(tmp_path / "document", embedded().model)
    ids = embedded().tokenizer(embedded().questions[0], return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = [embedded().model(ids, **cache_argument(each)).logits for each in (loaded, found.cache)]
    assert torch.equal(*logits)
    loaded = PrunedCache.load(tmp_path / "document", embedded().model)
    again = ask(cache=loaded, questions=embedded().questions, max_new_tokens=6)  # of the file alone
    assert again.texts == found.texts
    assert again.cache is loaded
    assert loaded.seen_tokens == found.document_tokens
    for wrong in ({"cache": loaded, "policy": Full()}, {}, {"cache": loaded, "kernels": "torch"}):
        with pytest.raises(KVPruneError, match=r"one of them|settings of a cache"):
            ask(embedded().model, embedded().tokenizer, embedded().document, embedded().questions, **wrong)
    with pytest.raises(KVPruneError, match="the cache has seen 400"):
        ask(embedded().model, embedded().tokenizer, "slowly", embedded().questions, cache=loaded)


def test_a_cache_knows_what_it_has_read_until_more_comes():
    """A fork does too; where somebody else filled it, the document is given, and has to be of as many tokens."""
    found, one = asked("full", questions=["question"], max_new_tokens=1), {"questions": ["question"]}
    cache = found.cache.fork()
    assert ask(cache=cache, **one, max_new_tokens=1).texts == found.texts
    assert torch.equal(
        cache.transcript.ids[None], embedded().tokenizer(embedded().document, return_tensors="pt").input_ids
    )
    with pytest.raises(KVPruneError, match="other tokens of the document"):
        ask(tokenizer=lambda *_, **__: {"input_ids": torch.zeros(1, 3)}, cache=cache, **one)
    with torch.no_grad():
        embedded().model(torch.tensor([[7]]), **cache_argument(cache))
    assert cache.transcript is None
    with pytest.raises(KVPruneError, match="or has read more since"):
        ask(cache=cache, **one)
    cache.crop(-1)
    assert cache.transcript is not None
    cache.crop(-1)
    with torch.no_grad():
        embedded().model(torch.tensor([[7]]), **cache_argument(cache))
    assert cache.transcript is None  # as many tokens, but another one
    with pytest.raises(KVPruneError, match="or has read more since"):
        ask(cache=cache, **one)
    by_hand = PrunedCache(embedded().model, Full())
    with torch.no_grad():
        embedded().model(found.cache.transcript.ids[None], **cache_argument(by_hand))
    assert ask(document=embedded().document, cache=by_hand, **one, max_new_tokens=1).texts == found.texts
    with pytest.raises(KVPruneError, match="give the model and its tokenizer"):
        ask(document="text", policy=Full(), **one)


@pytest.mark.parametrize(
    "policy",
    [
        Full(), KIVI(), KVzip(0.5), A2SF(0.5), GemFilter(256), H2O(0.5) | TOVA(0.5), H2O("64KiB"), KVzip("0.5b"),
        A2SF("0.7b", share=Adaptive()), H2O(0.5, share=Everywhere()) | KIVI(), Bits("0.2b", score=KVzip()),
    ],
    ids=str,
)  # fmt: skip
def test_questions_of_a_batch_are_answered_as_each_alone(policy, monkeypatch):
    """Padding stands between the document and what is shorter; where that could not be, they go one by one."""
    sizes, generate = [], embedded().model.generate
    monkeypatch.setattr(
        embedded().model, "generate", lambda ids, **given: (sizes.append(len(ids)), generate(ids, **given))[1]
    )
    longer = [f"{'the old baker slept ' * number}{text}" for number, text in enumerate(embedded().questions)]
    pieces = {}
    alone = asked(policy, questions=longer)
    together = asked(
        policy, questions=longer, batch_size=3, write=lambda number, piece: pieces.setdefault(number, []).append(piece)
    )
    assert together.texts == alone.texts
    assert sizes == [1] * 4 + ([1] * 4 if policy == H2O("64KiB") else [3, 1])
    assert tuple("".join(pieces[number]).strip() for number in range(4)) == alone.texts
    assert len(pieces[0]) > 1
    assert together.cache.seen_tokens == 400


def test_numbers_of_questions_that_are_none():
    with pytest.raises(KVPruneError, match="batch_size is a number of questions"):
        asked(Full(), batch_size=0)


def test_answers_end_where_they_are_told():
    assert all(len(text.split()) == 2 for text in asked(Full(), max_new_tokens=2).texts)


def test_settings_of_the_cache_are_passed_on():
    assert asked(Full(), kernels="torch", attention="sdpa").report.kernels == "torch"
    with pytest.raises(CacheError, match="no attention backend"):
        asked(Full(), attention="none")
    with pytest.raises(PolicyError, match="no policy named"):
        asked("fulll")


# -- policies that look for a question ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", NEEDING, ids=str)
def test_policies_that_need_the_question_warn(policy):
    """Whoever keeps what the last queries look at is told that there are none yet, where ask() was called."""
    assert policy.needs_question
    with pytest.warns(QuestionWarning, match=r"before there is any question.*KIVI") as caught:
        ask(embedded().model, embedded().tokenizer, embedded().document, ["question"], policy, max_new_tokens=1)
    assert [warning.filename for warning in caught if warning.category is QuestionWarning] == [__file__]


@pytest.mark.parametrize("policy", [*BLIND, Chain((H2O(0.5), KIVI()))], ids=str)
def test_policies_that_do_not_are_quiet(policy):
    assert not policy.needs_question
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuestionWarning)
        ask(embedded().model, embedded().tokenizer, embedded().document, ["question"], policy, max_new_tokens=1)


# -- chat templates ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chatting():
    """A tokenizer with a template that trims what it is given, as most do."""
    tokenizer = load()[1]
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %} note {{ message['content'] | trim }} the {% endfor %}"
        "{% if add_generation_prompt %}question{% endif %}"
    )
    return tokenizer


def test_a_chat_template_goes_around_document_and_question(chatting):
    """What comes before the document is read with it, once; what comes after it follows each question."""
    document, questions = f"  {embedded().document}\n", embedded().questions[:2]
    found = ask(embedded().model, chatting, document, questions, Full(), max_new_tokens=4, chat=True)
    assert found.document_tokens == 401  # the document without <s>, and "<s> note"
    written = f"note {embedded().document}"
    plain = ask(embedded().model, chatting, written, [f"{q} the question" for q in questions], Full(), max_new_tokens=4)
    assert found.texts == plain.texts
    chatting.chat_template = "another"  # the cache knows that of then
    assert (
        ask(embedded().model, chatting, cache=found.cache, questions=questions, max_new_tokens=4).texts == found.texts
    )


def test_templates_that_are_missing_or_change_the_document(chatting):
    text = ("one word", ["two words"], Full())
    with pytest.raises(KVPruneError, match="no chat template"):
        ask(embedded().model, embedded().tokenizer, *text, chat=True)
    chatting.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(KVPruneError, match="template changes the document"):
        ask(embedded().model, chatting, *text, chat=True)


# -- nothing to ask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "questions", "reason"),
    [
        ("", ["why?"], "document is empty"),
        (" \n", ["why?"], "document is empty"),
        (None, ["why?"], "document is empty"),
        ("text", [], "no questions"),
        ("text", ["why?", "  "], "question 1 is empty"),
        ("text", [None], "question 0 is empty"),
        ("text", "why?", r"write \['why\?'\]"),
    ],
)
def test_nothing_to_read_and_nothing_to_ask(document, questions, reason):
    with pytest.raises(KVPruneError, match=reason):
        ask(embedded().model, embedded().tokenizer, document, questions, Full())
