"""A conversation on one cache: the answers are those to what the template says, whatever it says of earlier ones."""

from __future__ import annotations

import threading
import warnings
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

from kvprune import CacheError, Chat, HistoryWarning, KVPruneError, PrunedCache, QuestionWarning, ask
from kvprune.cache.models import cache_argument
from kvprune.chat.templates import around
from kvprune.chat.terminal import Terminal
from kvprune.demo import load
from kvprune.demo.task import RecallGenerator, decode
from kvprune.policies import A2SF, KIVI, Full, KVzip, SnapKV

PLAIN = (
    "{{ bos_token }} {% for message in messages %}{{ message['content'] }}"
    "{{ ' ' if message['role'] == 'user' else ' a ' }}{% endfor %}"
)
"""Shows every message as it is."""
FORGETFUL = PLAIN.replace(
    "{{ message['content'] }}",
    "{{ message['content'] if message['role'] == 'user' or loop.last else message['content'].split()[-1] }}",
).replace("{% for", "{% set unused = '<think>' %}{% for")
"""Shows the last word of earlier answers, as templates that leave out what was thought."""
COUNTING = PLAIN.replace("{% for", "{{ 'old ' * (messages | length) }}{% for")
"""Changes what stands first in every turn."""


@cache
def embedded():
    """The embedded model, a document, and questions about it."""
    model, _ = load()
    recall = RecallGenerator(7).document(300, 8)
    return SimpleNamespace(
        model=model,
        document=decode(recall.document[1:]),
        questions=[decode(recall.question(note)) for note in range(4)],
        answers=[decode(recall.values[note]) for note in range(4)],
    )


def speaking(template):
    tokenizer = load()[1]
    tokenizer.chat_template = template
    return tokenizer


def a_chat(template=PLAIN, policy=None, **settings):
    return Chat(embedded().model, speaking(template), policy or Full(), **settings)


@torch.no_grad()
def answered_anew(tokenizer, messages, said, count=4):
    """What the model says to a whole conversation that it reads for the first time, in a stock cache."""
    messages = [*messages, {"role": "user", "content": said}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    output = embedded().model.generate(
        ids, **cache_argument(DynamicCache()), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return ids.shape[1], tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture
def fed(monkeypatch):
    """How many tokens every forward pass of the model was given."""
    counts = []

    def count(_, args, kwargs):
        counts.append((args[0] if args else kwargs["input_ids"]).shape[1])

    hook = embedded().model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    hook.remove()


def opening():
    return f"{embedded().document} {embedded().questions[0]}"


@pytest.mark.parametrize("template", [PLAIN, FORGETFUL, COUNTING], ids=["plain", "forgetful", "counting"])
def test_answers_are_to_what_the_template_says(template):
    """Where history stays, where answers are shortened in it, and where it changes from the start."""
    chat, said = a_chat(template), [opening(), *embedded().questions[1:3], "the old mill"]
    for text in said:
        expected = answered_anew(chat.tokenizer, chat.messages, text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HistoryWarning)
            assert chat.say(text, max_new_tokens=4) == expected[1]
        assert chat.last.prompt_tokens == expected[0]
    assert [each["role"] for each in chat.messages] == ["user", "assistant"] * len(said)
    assert chat.messages[0]["content"] == said[0]


def test_a_turn_reads_only_what_is_new(fed):
    chat = a_chat()
    chat.say(opening(), max_new_tokens=3)
    assert chat.last.read_tokens == chat.last.prompt_tokens == fed[0]
    assert chat.last.note is None
    fed.clear()
    chat.say(embedded().questions[1], max_new_tokens=3)
    new = fed[0]
    assert new == chat.last.read_tokens < 12
    assert fed[1:] == [1] * (chat.last.new_tokens - 1)


def test_a_template_that_shortens_answers_costs_one_answer_not_the_conversation(fed):
    """The cache goes back to before the answer; of the first, the template was found out beforehand or not."""
    chat = a_chat(FORGETFUL)
    chat._rewrites = True  # as templates are told that leave out what stands in <think>
    chat.say(opening(), max_new_tokens=4)
    assert "otherwise from the next turn on" in chat.last.note
    assert chat.cache.seen_tokens == chat.last.prompt_tokens
    fed.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", HistoryWarning)
        chat.say(embedded().questions[1], max_new_tokens=4)
    assert fed[0] < 12
    unwarned = a_chat(FORGETFUL)
    unwarned._rewrites = False
    unwarned.say(opening(), max_new_tokens=4)
    with pytest.warns(HistoryWarning, match=r"differently from token \d+ of \d+ on"):
        unwarned.say(embedded().questions[1], max_new_tokens=4)
    assert unwarned.messages == chat.messages
    assert unwarned.cache.seen_tokens == chat.cache.seen_tokens


def test_templates_that_leave_out_thoughts_are_found_out():
    thinking = PLAIN.replace(
        "{{ message['content'] }}",
        "{{ message['content'].split('</think>')[-1] if message['role'] == 'assistant' else message['content'] }}",
    )
    assert a_chat(thinking)._rewrites
    assert not a_chat(PLAIN)._rewrites
    assert not a_chat("{{ raise_exception('no') if messages | length > 1 else messages[0]['content'] }}")._rewrites


@pytest.mark.parametrize("policy", [KVzip(0.5), A2SF(0.5, kernel_size=7), KIVI(), SnapKV(0.5, kernel_size=7)], ids=str)
def test_turns_are_compressed_as_on_a_cache_by_hand(policy):
    chat, tokenizer, ids = a_chat(policy=policy), speaking(PLAIN), None
    own, texts = PrunedCache(embedded().model, policy), []
    for text in (opening(), *embedded().questions[1:3]):
        texts.append(chat.say(text, max_new_tokens=4))
        prompt = tokenizer(text if ids is not None else f"<s> {text}", add_special_tokens=False,
                           return_tensors="pt").input_ids  # fmt: skip
        between = tokenizer(" a ", add_special_tokens=False, return_tensors="pt").input_ids
        ids = prompt if ids is None else torch.cat([ids, between, prompt], 1)
        begin = ids.shape[1]
        with torch.no_grad():
            ids = embedded().model.generate(ids, **cache_argument(own), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(ids[0, begin:], skip_special_tokens=True).strip() == texts[-1]
        if int(ids[0, -1]) == tokenizer.eos_token_id:
            ids = ids[:, :-1]  # the template does not show what ended it
    assert chat.report.to_dict() == own.report().to_dict()
    assert chat.report.kept_tokens == pytest.approx(
        sum((own.kept_positions(layer) >= 0).sum(-1).double().mean().item() for layer in own.pruned_layers)
        / len(own.pruned_layers)
    )


def test_a_document_is_compressed_before_the_question():
    """What is read is what ask() compresses, and its answers are the same; another document may follow."""
    chat = a_chat(policy=KVzip(0.5))
    count = chat.read(f" {embedded().document}\n")
    assert not any(chat.cache.layers[layer].waiting for layer in chat.cache.pruned_layers)  # it is compressed now
    asked = ask(embedded().model, chat.tokenizer, embedded().document, embedded().questions[:1], KVzip(0.5),
                chat=True, max_new_tokens=4)  # fmt: skip
    assert chat.cache.seen_tokens == count == asked.document_tokens
    assert chat.report.to_dict() == asked.report.to_dict()
    assert (
        ask(cache=chat.cache, tokenizer=chat.tokenizer, questions=asked.questions, max_new_tokens=4).texts
        == asked.texts
    )
    assert chat.say(embedded().questions[0], max_new_tokens=4) == asked.texts[0] == embedded().answers[0]
    assert chat.messages[0]["content"] == f"{embedded().document}\n\n{embedded().questions[0]}"
    assert chat.read("note bold fox: oak bell one.") < 10
    chat.read("the old mill")
    assert chat.say("question bold fox:", max_new_tokens=4) == "oak bell one."
    with pytest.raises(KVPruneError, match="holds a conversation"):
        ask(cache=chat.cache, tokenizer=chat.tokenizer, questions=["why?"])
    with pytest.warns(QuestionWarning) as caught:
        a_chat(policy=SnapKV(0.5)).read(embedded().document)
    assert caught[0].filename == __file__


def test_without_a_template_turns_follow_one_another():
    chat = a_chat(None)
    chat.read(embedded().document)
    assert chat.say(embedded().questions[0], max_new_tokens=4) == embedded().answers[0]
    assert chat.say(embedded().questions[1], max_new_tokens=4) == embedded().answers[1]
    assert chat.last.read_tokens < 8


# -- as it comes -------------------------------------------------------------------------------------------------------


def test_answers_come_in_pieces():
    chat, pieces = a_chat(), []
    text = chat.say(opening(), max_new_tokens=4, write=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces).strip() == text
    other = a_chat()
    assert list(other.stream(opening(), max_new_tokens=4)) == pieces
    assert other.messages == chat.messages
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(other.stream("the old mill", max_new_tokens=-1))
    assert other.messages == chat.messages


def test_an_answer_may_be_stopped(fed):
    """What had come of it was said; the conversation goes on behind it, and reads nothing again."""
    chat = a_chat()
    chat.model.generation_config.eos_token_id, ends = None, chat.model.generation_config.eos_token_id
    try:
        stream = chat.stream(opening(), max_new_tokens=5000)
        first = next(stream)
        stream.close()
        assert chat.messages[-1]["content"].strip().startswith(first.strip())
        assert chat.last.new_tokens < 5000
        expected = answered_anew(chat.tokenizer, chat.messages, embedded().questions[1])
        fed.clear()
        assert chat.say(embedded().questions[1], max_new_tokens=4) == expected[1]
        assert fed[0] < 12
    finally:
        chat.model.generation_config.eos_token_id = ends


def test_one_answer_is_written_at_a_time(tmp_path):
    """What would change the conversation meanwhile is refused, and nothing is lost."""
    chat = a_chat()
    chat.model.generation_config.eos_token_id, ends = None, chat.model.generation_config.eos_token_id
    try:
        stream = chat.stream(opening(), max_new_tokens=5000)
        next(stream)
        for change in (
            lambda: chat.say(embedded().questions[1], max_new_tokens=4),
            lambda: next(chat.stream(embedded().questions[1])),
            lambda: chat.read("the old mill"),
            lambda: chat.save(tmp_path / "chat"),
            lambda: setattr(chat, "policy", "kivi"),
        ):
            with pytest.raises(KVPruneError, match="still being written"):
                change()
        assert chat.policy == Full()
        stream.close()
        assert len(chat.messages) == 2
        expected = answered_anew(chat.tokenizer, chat.messages, embedded().questions[1])
        assert chat.say(embedded().questions[1], max_new_tokens=4) == expected[1]
    finally:
        chat.model.generation_config.eos_token_id = ends


def test_who_interrupts_twice_waits_until_the_answer_has_stopped(monkeypatch):
    haste = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            if haste:
                haste.pop()
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Event", Event)
    chat = a_chat()
    monkeypatch.setattr(chat.model.generation_config, "eos_token_id", None)
    stream = chat.stream(opening(), max_new_tokens=5000)
    next(stream)
    haste.append("now")
    stream.close()
    assert not haste
    assert len(chat.messages) == 2
    chat.policy = "full"  # nothing is being written


def test_an_interrupted_command_ends_itself_alone(tmp_path, monkeypatch, capsys):
    chat = a_chat()
    terminal = Terminal(chat, Console(), max_new_tokens=2)
    (tmp_path / "text").write_text("the old mill")

    def stop(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chat, "read", stop)
        terminal.serve(f"/read {tmp_path / 'text'}")
    assert "(stopped)" in capsys.readouterr().out
    terminal.serve("hello")
    assert chat.messages[-2]["content"] == "hello"


def test_a_document_that_is_read_before_a_stream_begins_is_part_of_it():
    chat = a_chat()
    stream = chat.stream("question bold fox:", max_new_tokens=4)
    chat.read("note bold fox: oak bell one.")
    list(stream)
    assert chat.messages[0]["content"].startswith("note bold fox")
    assert chat.last.note is None


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_a_turn_that_is_interrupted_has_not_been(layer):
    chat = a_chat(policy=KVzip(0.5))
    chat.say(opening(), max_new_tokens=4)
    messages = chat.messages
    modules = [each for each in chat.model.modules() if getattr(each, "layer_idx", None) == layer]

    def stop(*_):
        raise KeyboardInterrupt

    hook = modules[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        chat.say(embedded().questions[1], max_new_tokens=4)
    hook.remove()
    assert chat.messages == messages
    expected = Chat(chat.model, chat.tokenizer, KVzip(0.5))
    expected.messages = messages
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HistoryWarning)
        found = chat.say(embedded().questions[1], max_new_tokens=4)
    assert any("interrupted" in str(each.message) for each in caught) == (layer > 0)
    if layer:
        assert found == expected.say(embedded().questions[1], max_new_tokens=4)


def test_what_cannot_be_said():
    chat = a_chat()
    for text in ("", "  ", None):
        with pytest.raises(KVPruneError, match="what is said is empty"):
            chat.say(text)
        with pytest.raises(KVPruneError, match="what is said is empty"):
            chat.stream(text)
        with pytest.raises(KVPruneError, match="the document is empty"):
            chat.read(text)
    with pytest.raises(KVPruneError, match="one answer: leave num_beams out"):
        chat.say("hello", num_beams=2)
    with pytest.raises(KVPruneError, match="message of the system is empty"):
        a_chat(system="")
    with pytest.raises(KVPruneError, match=r"refuses these messages \(system\): no system"):
        a_chat("{{ raise_exception('no system') }}", system="Be brief.")
    with pytest.raises(KVPruneError, match="template changes the document"):
        a_chat("{{ messages[0]['content'] | upper }}").read("a text")
    assert chat.cache.seen_tokens == 0
    assert chat.messages == ()


def test_a_template_of_one_turn_gives_its_one_answer():
    chat = a_chat("{{ raise_exception('one turn') if messages | length > 1 else messages[0]['content'] }}")
    text = chat.say(opening(), max_new_tokens=4)
    assert chat.messages[-1]["content"].strip() == text
    messages = chat.messages
    with pytest.raises(KVPruneError, match="one turn"):
        chat.say("and now?")
    assert chat.messages == messages


@pytest.mark.parametrize("said", ["is it?", "said: oak bell one. true?", "oak bell one.\n\nwhat?", "oak bell one.\n\n"])
def test_a_document_ends_where_it_ends_whatever_is_said_of_it(said):
    tokenizer, document = speaking("<u>{{ messages[0]['content'] | trim }}</u>"), "oak bell one."
    before, rest = around(tokenizer, (), document, said, tokenizer.chat_template)
    assert (before, rest) == (f"<u>{document}", f"\n\n{said.rstrip()}</u>")


def test_a_message_of_the_system_comes_first():
    chat = a_chat(system="the old mill")
    expected = answered_anew(chat.tokenizer, chat.messages, opening())
    assert chat.say(opening(), max_new_tokens=4) == expected[1]
    assert chat.messages[0] == {"role": "system", "content": "the old mill"}


def test_another_policy_reads_the_conversation_again():
    chat = a_chat()
    chat.say(opening(), max_new_tokens=4)
    chat.policy = "kvzip:budget=0.5"
    assert chat.policy == KVzip(0.5)
    expected = answered_anew(chat.tokenizer, chat.messages, embedded().questions[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", HistoryWarning)
        assert chat.say(embedded().questions[1], max_new_tokens=4) == expected[1]
    assert chat.last.read_tokens == chat.last.prompt_tokens == expected[0]
    assert chat.report.ratio < 0.8
    with pytest.raises(KVPruneError, match="no policy named"):
        chat.policy = "kvzap"
    assert chat.policy == KVzip(0.5)


# -- saved and loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PLAIN, FORGETFUL, None], ids=["plain", "forgetful", "none"])
def test_a_saved_conversation_goes_on(template, tmp_path, fed):
    chat, path = a_chat(template, KVzip(0.5)), tmp_path / "chat"
    chat._rewrites = True
    chat.say(opening(), max_new_tokens=4)
    chat.read("note bold fox: oak bell one.")
    chat.save(path)
    others = Chat.load(path, chat.model, speaking("another")), Chat.of(chat.cache.fork(), chat.tokenizer)
    for other in others:
        assert other.messages == chat.messages
    fed.clear()
    said = [chat.say("question bold fox:", max_new_tokens=4)]
    once = list(fed)
    for other in others:
        fed.clear()
        said.append(other.say("question bold fox:", max_new_tokens=4))
        assert fed == once
    assert len(set(said)) == 1


def test_a_cache_whose_model_is_gone_has_no_conversation(monkeypatch):
    chat = a_chat()
    chat.say(opening(), max_new_tokens=2)
    held = chat.cache.fork()
    monkeypatch.setattr(held, "_model", lambda: None)
    with pytest.raises(CacheError, match="model of this cache is gone"):
        Chat.of(held, chat.tokenizer)


def test_what_was_saved_of_nothing_and_of_a_document(tmp_path):
    chat = a_chat(policy=KVzip(0.5), system="the old mill")
    chat.save(tmp_path / "empty")
    loaded = Chat.load(tmp_path / "empty", chat.model, chat.tokenizer)
    assert loaded.messages == chat.messages
    assert loaded.say(opening(), max_new_tokens=4) == chat.say(opening(), max_new_tokens=4)
    found = ask(
        embedded().model, speaking(None), embedded().document, embedded().questions[:1], Full(), max_new_tokens=4
    )
    found.cache.save(tmp_path / "document")
    about = Chat.load(tmp_path / "document", chat.model, speaking(PLAIN))  # it was read without a template
    assert about.say(embedded().questions[0], max_new_tokens=4) == found.texts[0]
    assert about.last.read_tokens < 8
    unknown = PrunedCache(embedded().model, Full())
    with torch.no_grad():
        embedded().model(torch.tensor([[5, 6]]), **cache_argument(unknown))
    unknown.save(tmp_path / "cache")
    with pytest.raises(CacheError, match="not what it has read"):
        Chat.load(tmp_path / "cache", chat.model, chat.tokenizer)
    with pytest.raises(CacheError, match="does not know"):
        Chat.of(unknown, chat.tokenizer)
