"""The server, as clients see it: the answers of `generate()`, prefixes that are read once, mistakes that are told."""

import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
import uvicorn
from families import build
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvprune import CacheError, KVPruneError, PrunedCache, cli, demo
from kvprune.cache.models import cache_argument
from kvprune.demo.task import RecallGenerator, decode
from kvprune.policy.registry import parse
from kvprune.serving.app import Options, Server, application
from kvprune.serving.batch import Batches, _Writing, fits
from kvprune.serving.command import amount
from kvprune.serving.jobs import Job, Settings
from kvprune.serving.metrics import Metrics
from kvprune.serving.prefixes import Prefixes
from kvprune.serving.prompts import Prompt
from kvprune.serving.sessions import session_of
from kvprune.serving.writing import Chance, Text, processors

CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"
KEY, NAME, POLICY = "sesame", "small", "snapkv:budget=64"
RECALL = RecallGenerator(3).document(400, 6)
DOCUMENT = decode(RECALL.document[1:])
QUESTIONS = [decode(RECALL.question(note)) for note in range(6)]


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer = demo.load()
    tokenizer.chat_template = CHAT
    return model, tokenizer


@contextmanager
def running(embedded, **options):
    """A server on a port of its own, and a client of it."""
    server = Server(NAME, *embedded, Options(policy="snapkv", budget="64", api_key=KEY, **options))
    web = uvicorn.Server(uvicorn.Config(application(server), port=0, log_level="debug"))
    thread = threading.Thread(target=web.run)
    thread.start()
    try:
        while not web.started:
            time.sleep(0.01)
        base = f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
        server.client = openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0)
        server.base = base
        yield server
    finally:
        web.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(embedded, tmp_path_factory):
    with running(embedded, folder=tmp_path_factory.mktemp("caches"), queue=1) as server:
        yield server


@pytest.fixture
def endless(embedded, monkeypatch):
    """Answers are as long as they may be."""
    monkeypatch.setattr(embedded[0].generation_config, "eos_token_id", None)


def messages(question=QUESTIONS[0]):
    return [{"role": "system", "content": DOCUMENT}, {"role": "user", "content": question}]


def chat(server, question=QUESTIONS[0], *, tokens=4, **more):
    return server.client.chat.completions.create(
        model=NAME, messages=messages(question), max_tokens=tokens, extra_body=more.pop("extra", {}), **more
    )


def generated(embedded, parts, policy=POLICY, tokens=4):
    """What `generate()` writes after a text in parts, which are read one after the other; and the cache."""
    model, tokenizer = embedded
    cache = PrunedCache(model, parse(policy))
    read = torch.tensor([[]], dtype=torch.long)
    for part in parts[:-1]:
        ids = tokenizer(part, add_special_tokens=False, return_tensors="pt")["input_ids"]
        read = torch.cat([read, ids], 1)
        with torch.no_grad():
            model(ids, **cache_argument(cache))
        cache = cache.fork()  # which ends a prompt
    last = tokenizer(parts[-1], add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([read, last], 1)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=tokens, do_sample=False
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), cache


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, "a2sf:budget=0.5 | zipcache", "full"])
def test_a_chat_is_answered_as_generate_does(server, embedded, policy):
    answer = chat(server, extra={"policy": policy} if policy else {})
    text, cache = generated(embedded, [f"{DOCUMENT} {QUESTIONS[0]} "], policy or POLICY)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason in ("length", "stop")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (cache.seen_tokens - 3, 4)
    kept = torch.stack([(cache.kept_positions(layer) >= 0).sum(-1).float() for layer in cache.pruned_layers]).mean()
    assert usage.kvprune["kept_tokens"] == pytest.approx(float(kept), abs=0.05)
    assert (usage.kvprune["bytes"], usage.kvprune["full_bytes"]) == (cache.nbytes, cache.dense_nbytes)


def test_a_stream_is_the_same_answer_in_pieces(server):
    stream = list(chat(server, stream=True, stream_options={"include_usage": True}, tokens=8))
    whole = chat(server, tokens=8)
    pieces = [piece.choices[0].delta.content or "" for piece in stream if piece.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) == len(whole.choices[0].message.content.split())
    assert stream[-1].usage == whole.usage
    assert stream[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_text_and_strings_that_end_it(server, embedded):
    prompt = f"{DOCUMENT} {QUESTIONS[1]}"
    whole, _ = generated(embedded, [prompt], tokens=8)
    words = whole.split()
    create = server.client.completions.create
    assert create(model=NAME, prompt=prompt, max_tokens=8).choices[0].text == whole
    ended = create(model=NAME, prompt=prompt, max_tokens=8, stop=[words[2][1:], "no such"]).choices[0]
    assert (ended.text, ended.finish_reason) == (whole[: whole.index(words[2][1:])], "stop")


def test_seeds_decide_what_is_sampled(server, endless):
    texts = [chat(server, temperature=1.5, seed=seed, tokens=12).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_clients_get_their_own_answers(embedded):
    with running(embedded, parallel=3, queue=64) as server, ThreadPoolExecutor(8) as clients:
        alone = [generated(embedded, [f"{DOCUMENT} {question} "])[0] for question in QUESTIONS]
        together = clients.map(lambda at: chat(server, QUESTIONS[at % 6]).choices[0].message.content, range(12))
        assert list(together) == [alone[at % 6] for at in range(12)]
        assert len(set(alone)) > 1


# -- prefixes ----------------------------------------------------------------------------------------------------------


def test_a_document_that_came_before_is_not_read_again(server, embedded):
    saved = server.metrics.value("prefill_tokens_saved_total")
    answers = [chat(server, question, extra={"prefix": 1, "policy": "keydiff"}) for question in QUESTIONS[:3]]
    for question, answer in zip(QUESTIONS, answers, strict=False):
        expected, _ = generated(embedded, [f"{DOCUMENT} ", f"{question} "], "keydiff:budget=0.25")
        assert answer.choices[0].message.content == expected
    read = len(embedded[1](f"{DOCUMENT} ", add_special_tokens=False)["input_ids"])
    assert [answer.usage.prompt_tokens_details.cached_tokens for answer in answers] == [0, read, read]
    assert server.metrics.value("prefill_tokens_saved_total") - saved == 2 * read
    assert "warning" in chat(server, extra={"prefix": 1}).usage.kvprune  # SnapKV looks for a question in it


def test_a_server_finds_prefixes_of_one_that_is_gone(embedded, tmp_path):
    answers = []
    for _ in range(2):
        with running(embedded, folder=tmp_path) as server:
            answers.append(chat(server, extra={"prefix": 1, "policy": "kivi:bits=4"}))
            source = "read" if len(answers) == 1 else "disk"
            assert server.metrics.value("prefills_total", source) == 1
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[1].usage.prompt_tokens_details.cached_tokens > 0


KEYDIFF = parse("keydiff", budget=0.5)


def documents(number):
    return [tuple(range(10 + at, 90 + at)) for at in range(number)]


def test_the_least_recently_used_leave_memory_and_disk(embedded, tmp_path):
    metrics = Metrics()
    one = Prefixes(embedded[0], Metrics(), memory=2**30).take(KEYDIFF, documents(1)[0])[0].nbytes
    first = Prefixes(embedded[0], metrics, memory=2 * one, folder=tmp_path, disk=2**30)
    for ids in (*documents(3)[:2], documents(3)[0], documents(3)[2]):  # the second is the least recent one
        first.take(KEYDIFF, ids)
    first.close()
    assert metrics.value("evictions_total", "memory") == 1
    assert metrics.value("kept_bytes", "memory") == 2 * one
    file = max(path.stat().st_size for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 3

    second = Prefixes(embedded[0], metrics, memory=0, folder=tmp_path, disk=2 * file)
    assert len(list(tmp_path.iterdir())) == 2
    assert metrics.value("evictions_total", "disk") == 1
    taken = [second.take(KEYDIFF, ids) for ids in reversed(documents(3))]
    assert [source for _, source in taken] == ["disk", "disk", "read"]  # the first was written first
    second.close()
    assert metrics.value("kept_bytes", "disk") <= 2 * file


def test_files_of_others_stay_where_they_are(embedded, tmp_path):
    others = [tmp_path / name for name in ("talk.safetensors", f"{'0' * 63}g.safetensors", f"{'0' * 64}.json")]
    ours = tmp_path / f"{'0' * 64}.safetensors"
    for path in (*others, ours):
        path.write_bytes(b"something")
    metrics = Metrics()
    Prefixes(embedded[0], metrics, memory=0, folder=tmp_path, disk=0).close()
    assert sorted(tmp_path.iterdir()) == sorted(others)
    assert metrics.value("kept_bytes", "disk") == metrics.value("prefixes", "disk") == 0


def test_what_cannot_be_removed_is_left(embedded, tmp_path):
    (tmp_path / f"{'0' * 64}.safetensors").mkdir()  # no unlink removes a folder
    Prefixes(embedded[0], Metrics(), memory=0, folder=tmp_path, disk=0).close()
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_taken_is_a_fork(embedded):
    prefixes = Prefixes(embedded[0], Metrics(), memory=2**30)
    first, _ = prefixes.take(KEYDIFF, documents(1)[0])
    with torch.no_grad():
        embedded[0](torch.tensor([[5, 6, 7]]), **cache_argument(first))
    again, source = prefixes.take(KEYDIFF, documents(1)[0])
    assert source == "memory"
    assert again.seen_tokens == 80
    assert prefixes.take(parse("keydiff", budget=0.4), documents(1)[0])[1] == "read"
    assert prefixes.take(KEYDIFF, documents(1)[0][:-1])[1] == "read"


def test_one_reads_while_others_wait(embedded):
    prefixes = Prefixes(embedded[0], Metrics(), memory=2**30)
    with ThreadPoolExecutor(4) as pool:
        taken = pool.map(lambda _: prefixes.take(KEYDIFF, documents(1)[0]), range(4))
    assert sorted(source for _, source in taken) == ["memory"] * 3 + ["read"]


def test_a_damaged_file_is_read_anew(embedded, tmp_path):
    def take():
        prefixes = Prefixes(embedded[0], Metrics(), memory=0, folder=tmp_path, disk=2**30)
        cache, source = prefixes.take(KEYDIFF, documents(1)[0])
        prefixes.close()
        return cache.kept_positions(0).tolist(), source

    kept, _ = take()
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert take() == (kept, "read")
    assert take() == (kept, "disk")


def test_a_file_that_cannot_be_read_now_is_not_removed(embedded, tmp_path, monkeypatch):
    def no_more_files(*_, **__):
        raise CacheError("too many open files")

    Prefixes(embedded[0], Metrics(), memory=0, folder=tmp_path, disk=2**30).take(KEYDIFF, documents(1)[0])
    wait_for(lambda: [each for each in tmp_path.iterdir() if each.suffix == ".safetensors"])
    prefixes = Prefixes(embedded[0], Metrics(), memory=0, folder=tmp_path, disk=2**30)
    with monkeypatch.context() as patched:
        patched.setattr(PrunedCache, "load", no_more_files)
        patched.setattr(PrunedCache, "save", no_more_files)
        assert prefixes.take(KEYDIFF, documents(1)[0])[1] == "read"
        prefixes.close()
    again = Prefixes(embedded[0], Metrics(), memory=0, folder=tmp_path, disk=2**30)
    assert again.take(KEYDIFF, documents(1)[0])[1] == "disk"


def test_a_slow_disk_holds_the_model_up(embedded, tmp_path, monkeypatch, caplog):
    """No more copies wait for their file than two, whatever else goes wrong with them."""
    goes_on, forks, fork = threading.Event(), [], PrunedCache.fork

    def slow(*_, **__):
        assert goes_on.wait(60)
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(PrunedCache, "save", slow)
    monkeypatch.setattr(PrunedCache, "fork", lambda cache: (forks.append(1), fork(cache))[1])
    prefixes = Prefixes(embedded[0], Metrics(), memory=0, folder=tmp_path, disk=2**30)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(lambda: [prefixes.take(KEYDIFF, ids) for ids in documents(5)])
        wait_for(lambda: len(forks) == 4)  # two that were taken, and two to be written
        time.sleep(0.2)
        assert len(forks) == 4
        goes_on.set()
        assert len(taken.result(60)) == 5
    prefixes.close()
    assert caplog.text.count("could not be saved: RuntimeError") == 5


def test_who_is_gone_when_the_prefix_is_read_costs_no_answer(server, monkeypatch):
    batches, job, ended = server.engine._batches, Job(0, Prompt((5, 6), (7,)), KEYDIFF, Settings(4), None), []
    take = batches._prefixes.take

    def leaves(*asked):
        job.called_off.set()
        return take(*asked)

    monkeypatch.setattr(batches._prefixes, "take", leaves)
    monkeypatch.setattr(batches._model, "generate", lambda *_, **__: pytest.fail("it was answered"))
    batches.answer([job], lambda job, outcome: ended.append((job, outcome)))
    assert ended == [(job, "called off")]


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_by_one(embedded):
    """A server that answers one batch at a time."""
    with running(embedded, parallel=1, queue=64) as server:
        yield server


@contextmanager
def held_up(server, waiting):
    """Clients whose requests wait until there are so many of them, and are then looked at together."""
    goes_on = threading.Event()
    server.engine._pool.submit(goes_on.wait)
    with ThreadPoolExecutor(waiting) as clients:
        asked = []

        def ask(function, *args, **more):
            asked.append(clients.submit(function, *args, **more))
            wait_for(lambda: server.metrics.value("waiting") == len(asked))  # they come in this order
            return asked[-1]

        try:
            yield ask
        finally:
            goes_on.set()


def batched(server):
    sizes = {str(size): server.metrics.value("batches_total", str(size)) for size in range(1, 9)}
    return {int(size): count for size, count in sizes.items() if count}


def newly_batched(server, before):
    return {size: count - before.get(size, 0) for size, count in batched(server).items() if count != before.get(size)}


def test_what_waits_with_the_same_policy_is_answered_together_as_alone(one_by_one, embedded):
    """Different lengths and ends of the answers; other policies and budgets have a batch of their own."""
    more = ["", " note" * 20, " and" * 3]
    cases = [
        (QUESTIONS[at] + more[at % 3], policy, tokens)
        for at, (policy, tokens) in enumerate(
            [(None, 4), ("a2sf:budget=0.5 | zipcache", 3), (None, 9), (None, 1), ("a2sf:budget=0.5 | zipcache", 6)]
        )
    ]
    before = batched(one_by_one)
    with held_up(one_by_one, len(cases)) as ask:
        asked = [
            ask(chat, one_by_one, question, tokens=tokens, extra={"policy": policy} if policy else {})
            for question, policy, tokens in cases
        ]
    for (question, policy, tokens), each in zip(cases, asked, strict=True):
        text, cache = generated(embedded, [f"{DOCUMENT} {question} "], policy or POLICY, tokens)
        answer = each.result()
        assert answer.choices[0].message.content == text
        assert answer.usage.total_tokens == cache.seen_tokens + 1
        assert answer.usage.kvprune["full_bytes"] == cache.dense_nbytes
        kept = torch.stack([(cache.kept_positions(at) >= 0).sum(-1).float() for at in cache.pruned_layers]).mean()
        assert answer.usage.kvprune["kept_tokens"] == pytest.approx(float(kept), abs=0.06)
    assert newly_batched(one_by_one, before) == {3: 1, 2: 1}
    assert one_by_one.metrics.value("kept_bytes", "running") == one_by_one.metrics.value("running") == 0


@pytest.mark.parametrize("policy", ["kvzip:budget=0.4", "a2sf:budget=0.6b,share=adaptive,sinks=2,recent=4"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_caches_whose_heads_differ_are_answered_together_as_alone(one_by_one, embedded, policy, prefix):
    """Copies of one document with a question each, or other documents, of other lengths."""
    asked = [QUESTIONS[at] + " of" * at for at in range(3)]
    documents = [DOCUMENT if prefix else DOCUMENT[40 * at :].partition(" ")[2] for at in range(3)]
    before = batched(one_by_one)
    with held_up(one_by_one, 3) as ask:
        answers = [
            ask(
                one_by_one.client.chat.completions.create, model=NAME, max_tokens=6,
                messages=[{"role": "system", "content": text}, {"role": "user", "content": question}],
                extra_body={"policy": policy, **({"prefix": prefix} if prefix else {})},
            )
            for text, question in zip(documents, asked, strict=True)
        ]  # fmt: skip
    assert newly_batched(one_by_one, before) == {3: 1}
    for text, question, answer in zip(documents, asked, answers, strict=True):
        parts = [f"{text} ", f"{question} "] if prefix else [f"{text} {question} "]
        expected, cache = generated(embedded, parts, policy, 6)
        assert answer.result().choices[0].message.content == expected
        assert any(cache.layers[layer].table.is_ragged for layer in cache.pruned_layers)
        rows = [(cache.kept_positions(layer) >= 0).sum(-1).float().mean() for layer in cache.pruned_layers]
        kept = answer.result().usage.kvprune["kept_tokens"]
        assert kept == pytest.approx(float(torch.stack(rows).mean()), abs=0.06)


def test_questions_on_one_prefix_are_answered_together_and_stream(one_by_one, embedded):
    def ask_all(stream):
        before = batched(one_by_one)
        with held_up(one_by_one, 3) as ask:
            how = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            asked = [
                ask(lambda at=at: list(chat(one_by_one, QUESTIONS[at] + " of" * at, extra=extra, **how)))
                for at in range(3)
            ]
        assert newly_batched(one_by_one, before) == {3: 1}
        return [each.result() for each in asked]

    extra = {"prefix": 1, "policy": "kivi:bits=4"}
    read = len(embedded[1](f"{DOCUMENT} ", add_special_tokens=False)["input_ids"])
    for first in (0, read):
        for at, pieces in enumerate(ask_all(stream=True)):
            expected, _ = generated(embedded, [f"{DOCUMENT} ", QUESTIONS[at] + " of" * at + " "], "kivi:bits=4")
            assert "".join(each.choices[0].delta.content or "" for each in pieces if each.choices) == expected
            assert pieces[-1].usage.prompt_tokens_details.cached_tokens == (read if at else first)


def test_each_of_a_batch_is_sampled_by_its_own_seed_and_ends_at_its_own_string(one_by_one, endless):
    def text(seed, **more):
        return chat(one_by_one, temperature=1.5 * bool(seed), seed=seed, tokens=12, **more).choices[0].message.content

    alone = [text(seed) for seed in (1, 2, 0)]
    stop = alone[1].split()[3]
    with held_up(one_by_one, 4) as ask:
        asked = [ask(text, seed) for seed in (1, 2, 0)] + [ask(text, 2, stop=stop)]
    assert [each.result() for each in asked] == [*alone, alone[1][: alone[1].index(stop)]]


def test_who_hangs_up_leaves_the_batch(one_by_one, endless, embedded):
    off = one_by_one.metrics.value("requests_total", "called off")
    with held_up(one_by_one, 2) as ask:
        leaves = ask(chat, one_by_one, stream=True, tokens=1024)
        stays = ask(chat, one_by_one, QUESTIONS[1], tokens=300, stream=True)
    stays = iter(stays.result())
    begun = [next(stays) for _ in range(3)]
    both = one_by_one.metrics.value("kept_bytes", "running")
    leaves.result().close()
    wait_for(lambda: one_by_one.metrics.value("requests_total", "called off") == off + 1)
    assert one_by_one.metrics.value("running") == 1
    text = "".join(piece.choices[0].delta.content or "" for piece in [*begun, *stays])
    assert text == generated(embedded, [f"{DOCUMENT} {QUESTIONS[1]} "], tokens=300)[0]
    assert both > 0
    settled(one_by_one)


def test_who_hangs_up_while_another_answer_ends_is_not_forgotten(one_by_one, endless, monkeypatch):
    batches, end = one_by_one.engine._batches, type(one_by_one.engine._batches)._end

    def ends(over, rows, *args):
        end(batches, over, rows, *args)
        for row in rows:
            row.job.called_off.set()

    off = one_by_one.metrics.value("requests_total", "called off")
    monkeypatch.setattr(batches, "_end", ends)
    with held_up(one_by_one, 2) as ask:
        done, left = ask(chat, one_by_one, tokens=3), ask(chat, one_by_one, stream=True, tokens=1024)
    assert done.result().usage.completion_tokens == 3
    wait_for(lambda: one_by_one.metrics.value("requests_total", "called off") == off + 1)
    left.result().close()
    settled(one_by_one)


def test_what_one_brings_about_costs_the_others_nothing(one_by_one, monkeypatch):
    batches, write = one_by_one.engine._batches, type(one_by_one.engine._batches)._write

    def fails(rows, *args):
        if any(row.job.settings.max_new_tokens == 3 for row in rows):
            raise KVPruneError("three is none of ours")
        write(batches, rows, *args)

    monkeypatch.setattr(batches, "_write", fails)
    with held_up(one_by_one, 3) as ask:
        asked = [ask(chat, one_by_one, tokens=tokens) for tokens in (2, 3, 4)]
    assert [asked[at].result().usage.completion_tokens for at in (0, 2)] == [2, 4]
    with pytest.raises(openai.BadRequestError, match="three is none of ours"):
        asked[1].result()
    settled(one_by_one)


def test_a_batch_that_is_tried_again_is_counted_once(embedded, monkeypatch):
    """Whatever is counted of requests whose batch failed is what is counted when each comes alone."""

    def counted(*, together):
        with running(embedded, parallel=1, queue=64) as server:
            batches, extra = server.engine._batches, {"prefix": 1, "policy": "kivi:bits=4"}
            write = type(batches)._write

            def fails(rows, *args):
                if len(rows) > 1:
                    raise RuntimeError("a batch is too much")
                write(batches, rows, *args)

            monkeypatch.setattr(batches, "_write", fails)
            if together:
                with held_up(server, 3) as ask:
                    asked = [ask(chat, server, question, extra=extra) for question in QUESTIONS[:3]]
                assert [each.result().usage.completion_tokens for each in asked] == [4] * 3
            else:
                for question in QUESTIONS[:3]:
                    chat(server, question, extra=extra)
            settled(server)
            lines = str(server.metrics).splitlines()
        return [line for line in lines if not line.startswith("kvprune_first_token_seconds_sum")]

    alone = counted(together=False)
    assert 'kvprune_batches_total{requests="1"} 3' in alone
    assert 'kvprune_prefills_total{source="read"} 1' in alone
    assert counted(together=True) == alone


def test_what_failed_after_its_first_token_is_not_tried_again(one_by_one, endless, embedded, monkeypatch):
    """Though nobody was told of a text: it may be the beginning of a string that ends the answer."""
    call, tried = _Writing.__call__, []

    def fails(writing, input_ids, scores, **more):
        call(writing, input_ids, scores, **more)
        tried.append(len(writing.rows))
        raise RuntimeError("no second token")

    monkeypatch.setattr(_Writing, "__call__", fails)
    first = generated(embedded, [f"{DOCUMENT} {QUESTIONS[0]} "], tokens=1)[0]
    before = one_by_one.metrics.value("first_token_seconds_count"), batched(one_by_one)
    with held_up(one_by_one, 2) as ask:
        asked = [ask(chat, one_by_one, stop=f"{first} and no more") for _ in range(2)]
    for each in asked:
        with pytest.raises(openai.InternalServerError):
            each.result()
    assert tried == [2]
    assert one_by_one.metrics.value("first_token_seconds_count") == before[0] + 2
    assert newly_batched(one_by_one, before[1]) == {2: 1}
    settled(one_by_one)


def test_what_fits_in_a_batch(embedded, one_by_one):
    def job(length, policy=KEYDIFF, prefix=()):
        return Job(0, Prompt(prefix, (5,) * length), policy, Settings(4), None)

    assert fits([job(500)], job(1000), 2000)  # a quarter of it is padding
    assert not fits([job(500)], job(1000), 1999)
    assert not fits([job(300)], job(1000), 2000)  # more than a third
    assert fits([job(1)], job(200), 2000)  # of short ones it costs nothing
    assert not fits([job(9)], job(9, parse("keydiff", budget=0.4)), 2000)
    assert not fits([job(9)], job(9, prefix=(1,)), 2000)
    can_be = one_by_one.engine._batches.can_be
    assert can_be(KEYDIFF)
    assert not can_be(parse("full | keydiff:budget=1MiB"))
    assert can_be(parse("keydiff:budget=0.05b"))  # of each sequence's own prompt
    hybrid, moving = build("mistral-sliding"), build("llama")
    assert not Batches(hybrid, None, None, Metrics()).can_be(KEYDIFF)
    moving.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4}  # by the longest text of a batch
    assert not Batches(moving, None, None, Metrics()).can_be(KEYDIFF)


# -- what is refused ---------------------------------------------------------------------------------------------------

WRONG = {
    "there is no model 'big'": {"model": "big"},
    "did you mean 'policy'": {"polcy": "a2sf"},
    "there is no policy named 'a3sf'": {"policy": "a3sf"},
    "there is no policy named 'os'": {"policy": "os:path"},  # a module is never imported for a request
    "a fraction must lie in": {"budget": 1.5},
    "KIVI(bits=2) takes no other budget": {"policy": "kivi", "budget": 0.5},
    "A2SF(budget=0.1) takes no other budget": {"policy": "a2sf:budget=0.1", "budget": 0.5},
    "heads names a file of the server": {"policy": "full | kvzip:level=head, Heads = x,heads =/etc/hostname"},
    "heads names a file": {"policy": "KVzip-plus:heads=/etc/hostname", "budget": 0.5},
    "leave at least the last one out": {"prefix": 2},
    "temperature: Input should be less than": {"temperature": 3},
    "n is not served here": {"n": 2},
    "tools is not served here": {"tools": [{"type": "function"}]},
    "messages: List should have at least 1": {"messages": []},
    "messages.0.role": {"messages": [{"role": "wizard", "content": "hi"}]},
    "this server writes up to 1024": {"max_tokens": 5000},
    "more than the 8192": {"messages": [{"role": "user", "content": "note " * 8200}]},
    "are more than the 8192 that this model was made for: shorten them.": {
        "messages": [{"role": "user", "content": "note " * 8200}],
        "policy": "streaming_llm:positions=cache",
    },
    "bytes hold": {"budget": "1KiB"},
    "up to 16 strings": {"stop": [""]},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_mistake_is_answered_with_what_to_write(server, message):
    body = {"model": NAME, "messages": messages(), "max_tokens": 2, "stream": "budget" in WRONG[message]} | WRONG[
        message
    ]
    answer = httpx.post(f"{server.base}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == (404 if "model" in WRONG[message] else 400)
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "path", "key", "status"),
    [
        (b"{", "/v1/completions", KEY, 400),
        (b"[]", "/v1/completions", KEY, 400),
        (b"[" * 200_000, "/v1/completions", KEY, 400),
        (rb'{"\ud800": 1}', "/v1/completions", KEY, 400),
        (rb'{"model": "small", "prompt": "\ud800"}', "/v1/completions", KEY, 400),
        (b" " * (17 * 2**20), "/v1/completions", KEY, 413),
        (b"{}", "/v1/completions", "wrong", 401),
        (b"{}", "/v1/embeddings", KEY, 404),
        (b"{}", "/v1/models", KEY, 405),
    ],
)
def test_what_is_no_request_is_refused(server, content, path, key, status):
    answer = httpx.post(server.base + path, content=content, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def wait_for(happens):
    for _ in range(1000):
        if happens():
            return
        time.sleep(0.02)
    pytest.fail("it never happened")


def settled(server):
    wait_for(lambda: not server.metrics.value("running") and not server.metrics.value("waiting"))


def test_more_than_may_wait_are_refused_and_who_hangs_up_frees_the_place(server, endless):
    off = server.metrics.value("requests_total", "called off")
    streams = [chat(server, stream=True, tokens=1024, temperature=1.0) for _ in range(2)]  # both run
    held = server.metrics.value("kept_bytes", "running")
    assert held > 0
    with pytest.raises(openai.APITimeoutError):  # who hangs up while waiting frees the place as well
        chat(server, timeout=0.3)
    wait_for(lambda: not server.metrics.value("waiting"))
    assert server.metrics.value("running") == 2
    with ThreadPoolExecutor(2) as clients:
        waits = clients.submit(chat, server)
        wait_for(lambda: server.metrics.value("waiting"))
        with pytest.raises(openai.RateLimitError, match="try again later"):
            chat(server)
        for stream in streams:
            stream.close()
        assert waits.result(timeout=60).choices[0].message.content
    settled(server)
    assert server.metrics.value("requests_total", "called off") == off + 3
    assert server.metrics.value("kept_bytes", "running") == 0


def test_a_full_server_prepares_no_prompt(server, monkeypatch):
    monkeypatch.setattr(server.engine, "_room", 0)
    monkeypatch.setattr(server, "_prepared", lambda _: pytest.fail("it was prepared"))
    with pytest.raises(openai.RateLimitError):
        chat(server)


def test_who_hangs_up_before_the_answer_calls_it_off(server, endless):
    off = server.metrics.value("requests_total", "called off")
    with pytest.raises(openai.APITimeoutError):
        chat(server, tokens=1024, timeout=0.3)
    settled(server)
    assert server.metrics.value("requests_total", "called off") == off + 1
    assert server.metrics.value("kept_bytes", "running") == 0


def test_logs_hold_nothing_of_prompts(server, caplog, monkeypatch):
    secret = "walnut kettle nineteen"
    caplog.set_level(logging.DEBUG)
    for name in ("uvicorn", "uvicorn.access", "uvicorn.error"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    ask = {"model": NAME, "messages": [{"role": "user", "content": secret}], "max_tokens": 2}
    headers = {"Authorization": f"Bearer {KEY}"}
    for more in ({}, {"stream": True}, {"policy": secret}, {"prefix": 9}):
        httpx.post(f"{server.base}/v1/chat/completions", json=ask | more, headers=headers)

    def fail(*_, **__):
        raise RuntimeError(secret)

    monkeypatch.setattr(type(server.engine._batches._model), "generate", fail)
    answer = httpx.post(f"{server.base}/v1/chat/completions", json=ask, headers=headers)
    assert answer.status_code == 500
    assert secret not in answer.text
    monkeypatch.setattr(server, "tokenizer", fail)
    ask = {"model": NAME, "prompt": secret}
    assert httpx.post(f"{server.base}/v1/completions", json=ask, headers=headers).status_code == 500
    ours = [record for record in caplog.records if record.name.startswith(("kvprune", "uvicorn", "asyncio"))]
    written = "\n".join(logging.Formatter().format(record) for record in ours)
    assert "request" in written
    assert "RuntimeError" in written
    assert "walnut" not in written


# -- what it says of itself --------------------------------------------------------------------------------------------


def test_models_health_metrics_and_the_page(server):
    assert [model.id for model in server.client.models.list()] == [NAME]
    assert server.client.models.retrieve(NAME).window == 8192
    assert httpx.get(f"{server.base}/health").json() == {"status": "ok", "model": NAME}
    page = httpx.get(server.base)
    assert "text/html" in page.headers["content-type"]
    assert "v1/chat/completions" in page.text
    chat(server)
    lines = httpx.get(f"{server.base}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r'kvprune_[a-z_]+(\{[a-z]+="[a-z0-9 ]+"\})?', name) for name in values)
    assert float(values['kvprune_requests_total{outcome="answered"}']) >= 1
    assert float(values["kvprune_completion_tokens_total"]) >= 4


# -- several servers ---------------------------------------------------------------------------------------------------


def test_what_goes_to_the_same_server():
    chat = '{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "%s"}]%s}'

    def chats(question, more="", prefix=1):
        return session_of("/v1/chat/completions", (chat % (question, more)).encode(), prefix)

    assert chats("b") == chats("c") != chats("b", ', "policy": "full"')
    assert chats("b", prefix=0) is None
    assert chats("b", ', "prefix": 0') is None
    assert chats("b", ', "prompt_cache_key": "k"', 0) == chats("c", ', "prompt_cache_key": "k", "policy": "full"')
    assert "a" * 9 not in str(session_of("/v1/completions", b'{"prompt": "aaaaaaaaaa", "prefix": 9}', 0))
    for wrong in (b"", b"[]", b"{}", b'{"messages": 3}', b'{"messages": [1], "prefix": "x"}', b"[" * 100_000):
        assert session_of("/v1/chat/completions", wrong, 1) is None


def test_metrics_add_up_but_a_folder_that_is_shared():
    several = [Metrics() for _ in range(2)]
    for number, each in enumerate(several, 1):
        each.add("requests_total", number, "answered")
        each.add("evictions_total", number, "disk")
        each.put("kept_bytes", 10 * number, "memory")
        each.put("kept_bytes", 10 * number, "disk")
        each.put("prefixes", number, "disk")
    together = Metrics.added_up(each.values() for each in several)
    assert together.value("requests_total", "answered") == together.value("evictions_total", "disk") == 3
    assert together.value("kept_bytes", "memory") == 30
    assert (together.value("kept_bytes", "disk"), together.value("prefixes", "disk")) == (20, 2)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_serves_what_it_is_told(monkeypatch, tmp_path):
    served = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **where: served.update(app=app, **where))
    (tmp_path / "chat.jinja").write_text(CHAT)
    options = "--policy kivi --port 1234 --cache-memory 1MiB".split()
    result = CliRunner().invoke(
        cli.app, ["serve", "--model", "demo", "--chat-template", str(tmp_path / "chat.jinja"), *options]
    )
    assert result.exit_code == 0, result.output
    assert (served["host"], served["port"], served["app"].title) == ("127.0.0.1", 1234, "kvprune")


@pytest.mark.parametrize(
    ("options", "environment", "told"),
    [
        (["--api-key", ""], {}, "the API key is empty"),
        (["--api-key", " "], {}, "the API key is empty"),
        ([], {"KVPRUNE_API_KEY": ""}, "the API key is empty"),
        ([], {"KVPRUNE_LOG": "verbose"}, "KVPRUNE_LOG is 'VERBOSE'"),
        (["--policy", "a2sf:budget=0.1", "--budget", "0.5"], {}, "takes no other budget"),
        (["--cache-dir", __file__], {}, "which is no folder"),
    ],
)
def test_the_command_refuses_what_it_could_not_keep(monkeypatch, options, environment, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: pytest.fail("it was served"))
    result = CliRunner().invoke(cli.app, ["serve", "--model", "demo", *options])
    assert result.exit_code != 0
    assert told in str(result.exception) + result.output


def test_bytes_are_written_with_a_unit():
    assert amount("2GiB", "--cache-memory") == 2**31
    with pytest.raises(KVPruneError, match="--cache-memory is 'much'"):
        amount("much", "--cache-memory")


# -- writing -----------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters may take several."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


@given(st.text("aäb€\U0001f600", max_size=12), st.lists(st.text("aäb€", min_size=1, max_size=3), max_size=3))
def test_pieces_make_the_text_up_to_a_stop(text, stop):
    writing, pieces = Text(Bytes(), stop), []
    for byte in text.encode():
        pieces.append(writing.add(byte))
        if writing.stopped:
            break
    pieces.append(writing.end())
    # Read from the left, a text ends where the first stop string is complete, and the earliest of those that are.
    ends = min((text.find(each) + len(each) for each in stop if each in text), default=len(text))
    seen = text[:ends]
    assert "".join(pieces) == seen[: min((seen.find(each) for each in stop if each in seen), default=len(seen))]
    assert writing.stopped == any(each in text for each in stop)


def test_next_to_no_temperature_is_none():
    assert processors(0.0, 1.0, 1) == processors(1e-30, 0.5, 1) == []
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    chosen = logits
    for each in processors(1e-5, 0.9, 1):
        chosen = each(None, chosen)
    assert int(chosen.argmax()) == 1
    assert not chosen.isnan().any()


def test_samples_have_the_probabilities_of_the_logits():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    chance = Chance(7)
    drawn = torch.tensor([int(chance(None, logits).argmax()) for _ in range(4000)])
    assert drawn.bincount(minlength=4) / 4000 == pytest.approx(logits[0].softmax(0).numpy(), abs=0.03)
