"""Two replicas on one machine: every prefix with the replica that has it, and answers as of the server alone."""

import os
import time

import httpx
import openai
import pytest
import torch

from kvprune import KVPruneError, PrunedCache, demo
from kvprune.cache.models import cache_argument
from kvprune.demo.task import RecallGenerator, decode
from kvprune.policy.registry import parse
from kvprune.serving.app import Options
from kvprune.serving.metrics import Metrics

ray = pytest.importorskip("ray", reason="needs Ray: make test-ray")
from ray import serve  # noqa: E402

from kvprune.integrations.ray_serve import app, deployment  # noqa: E402

KEY, POLICY, PORT = "sesame", "kivi:bits=4", 18321
RECALLS = [RecallGenerator(seed).document(120, 6) for seed in range(6)]
DOCUMENTS = [decode(each.document[1:]) for each in RECALLS]


def question(document, note):
    return decode(RECALLS[document].question(note)) + " "


@pytest.fixture(scope="module")
def client():
    new = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "num_cpus": 2, "include_dashboard": False}
    ray.init(log_to_driver=False, **new)
    try:
        serve.start(http_options={"port": PORT})
        serve.run(deployment("demo", Options(policy=POLICY, api_key=KEY, max_new_tokens=2048), name="small"))
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key=KEY, max_retries=0, timeout=120)
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(client, document, note, **more):
    prefix = len(DOCUMENTS[document]) + 1
    return client.completions.create(
        model="small", prompt=f"{DOCUMENTS[document]} {question(document, note)}", extra_body={"prefix": prefix},
        **({"max_tokens": 4} | more),
    )  # fmt: skip


def generated(document, note):
    model, tokenizer = demo.load()
    cache = PrunedCache(model, parse(POLICY))
    read = tokenizer(f"{DOCUMENTS[document]} ", return_tensors="pt")["input_ids"]
    rest = tokenizer(question(document, note), add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(read, **cache_argument(cache))
    ids = torch.cat([read, rest], 1)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=4)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def counts():
    return serve.get_deployment_handle("Replica", "default").broadcast("counts").results()


def test_a_prefix_is_read_by_one_replica_and_questions_about_it_go_there(client):
    first = [ask(client, document, 0) for document in range(6)]
    again = [ask(client, document, 1) for document in range(6)]
    assert [each.usage.prompt_tokens_details.cached_tokens > 0 for each in [*first, *again]] == [False] * 6 + [True] * 6
    assert [each.choices[0].text for each in first[:2]] == [generated(document, 0) for document in range(2)]
    apart = counts()
    assert len(apart) == 2
    assert all(each["prefills_total", "read"] for each in apart)  # both have something to do
    together = Metrics.added_up(apart)
    assert together.value("prefills_total", "read") == together.value("prefills_total", "memory") == 6
    assert httpx.get(f"http://127.0.0.1:{PORT}/metrics", timeout=60).text == str(together)


def test_answers_stream_and_who_hangs_up_is_not_waited_for(client):
    pieces = list(ask(client, 0, 2, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == ask(client, 0, 2).choices[0].text
    assert len(pieces) > 2
    off = Metrics.added_up(counts()).value("requests_total", "called off")
    stream = client.completions.create(
        model="small", prompt=DOCUMENTS[0], max_tokens=2048, temperature=2, stream=True, extra_body={"policy": "full"}
    )
    next(iter(stream))
    stream.close()
    for _ in range(200):
        now = Metrics.added_up(counts())
        if now.value("requests_total", "called off") > off:
            break
        time.sleep(0.1)
    assert now.value("requests_total", "called off") == off + 1
    assert now.value("running") == 0


def test_what_is_wrong_is_said_by_a_replica(client):
    with pytest.raises(openai.BadRequestError, match="there is no policy named"):
        client.completions.create(model="small", prompt=DOCUMENTS[0], extra_body={"policy": "a3sf"})
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"), 0, 0)
    assert httpx.get(f"http://127.0.0.1:{PORT}/nowhere").status_code == 404
    assert "kvprune" in httpx.get(f"http://127.0.0.1:{PORT}/").text


def test_arguments_of_a_config_are_those_of_the_server():
    assert app({"model": "demo", "replicas": "3", "batch": "2", "policy": "kivi"})
    with pytest.raises(ValueError, match="polcy"):
        app({"model": "demo", "polcy": "kivi"})
    with pytest.raises(KVPruneError, match="there is no policy named"):
        app({"model": "demo", "policy": "kivy"})
