"""lm-eval's tasks on a compressed cache: nothing changes while nothing is evicted, and what is evicted shows."""

import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from copy import deepcopy
from importlib.metadata import entry_points

import families
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune import EvaluationError, KVPruneError, Policy, PolicyError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.demo import MODEL_PATH, load
from kvprune.demo.task import RecallGenerator, decode
from kvprune.policies import A2SF, KIVI, Full, SnapKV, StreamingLLM

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

from kvprune.integrations import lm_eval as integration
from kvprune.integrations.lm_eval import KVPruneLM, read_policy

WINDOW = 512
CHOICES = 4
TASKS = ("recall_choice", "recall_generate", "recall_rolling")
NO_EVICTION = [
    {"policy": "full"},
    {"policy": "a2sf", "budget": WINDOW},
    {"policy": "h2o:interval=none", "budget": 1.0},  # of the prompt: with an interval, generated tokens evict
    {"policy": "snapkv", "budget": "100%"},
    {"policy": "kivi:residual=4096"},
]


# -- tasks -------------------------------------------------------------------------------------------------------------


def questions(documents=4, per_document=4, seed=5):
    """Documents of several lengths, questions about them, and answers of which one is right."""
    generator = RecallGenerator(seed)
    rows = []
    for document in range(documents):
        recall = generator.document(300 + 50 * document, 8)
        answers = [decode(value) for value in recall.values]
        for note in range(per_document):
            choices = [answers[(note + shift) % 8] for shift in range(CHOICES)]
            prompt = decode(recall.prompt(note)[1:])
            rows.append({"prompt": prompt, "choices": choices[::-1], "label": CHOICES - 1, "answer": answers[note]})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files as a user would write them, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions()))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
    }
    kinds = {
        "recall_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}],
        },
        "recall_generate": {
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["question"], "max_gen_toks": 3},
            "metric_list": [{"metric": "exact_match"}],
        },
        "recall_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{prompt}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for task, kind in kinds.items():
        (folder / f"{task}.yaml").write_text(yaml.safe_dump({"task": task, **common, **kind}))
    return folder


@pytest.fixture(scope="module")
def evaluate(folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def evaluate(model, tasks=TASKS, limit=None, **arguments):
        """Scores by task, what the model said by task, and the part of the results that describes the run."""
        results = simple_evaluate(
            model=model,
            model_args={"pretrained": str(MODEL_PATH), "max_length": WINDOW, **arguments},
            tasks=list(tasks),
            task_manager=manager,
            batch_size=4,
            device="cpu",
            limit=limit,
            bootstrap_iters=0,
        )
        scores = {task: next(iter(metrics(results["results"][task]))) for task in tasks}
        said = {task: [sample["filtered_resps"] for sample in results["samples"][task]] for task in tasks}
        return scores, said, results["config"]

    return evaluate


def metrics(results):
    return (value for name, value in results.items() if name.endswith(",none") and "stderr" not in name)


@pytest.fixture(scope="module")
def stock(evaluate):
    """What lm-eval's own model says."""
    return evaluate("hf")


def numbers(said):
    """The log-likelihoods in what a model said, in order."""
    if isinstance(said, list | tuple):
        return [number for part in said for number in numbers(part)]
    return [said] if isinstance(said, float) else []


# -- nothing is evicted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", NO_EVICTION, ids=lambda arguments: arguments["policy"])
def test_without_eviction_every_number_is_that_of_the_stock_model(evaluate, stock, arguments):
    scores, said, config = evaluate("kvprune", **arguments)
    assert scores == pytest.approx(stock[0], rel=1e-6)
    assert said["recall_generate"] == stock[1]["recall_generate"]
    for task in ("recall_choice", "recall_rolling"):
        assert len(numbers(said[task])) > 0
        assert numbers(said[task]) == pytest.approx(numbers(stock[1][task]), abs=2e-3, rel=1e-6)
    assert config["kv_ratio"] == 1 if arguments["policy"] == "full" else 1 < config["kv_ratio"] < 1.2


def test_the_stock_model_knows_the_answers(stock):
    assert stock[0]["recall_choice"] == 1
    assert stock[0]["recall_generate"] > 0.9


# -- something is evicted ----------------------------------------------------------------------------------------------


def test_a_good_policy_answers_and_a_bad_one_does_not(evaluate):
    tasks = ("recall_choice", "recall_generate")
    good, _, kept = evaluate("kvprune", tasks, policy="snapkv", budget=0.25)
    bad, _, lost = evaluate("kvprune", tasks, policy="streaming_llm", budget=0.05)
    for task in tasks:
        assert good[task] > 0.7
        assert bad[task] < 0.5
    assert lost["kv_ratio"] < kept["kv_ratio"] < 0.4


def test_a_small_budget_shows_in_every_kind_of_request(evaluate, stock):
    _, said, config = evaluate("kvprune", policy="streaming_llm:recent=16", budget=0.1)
    assert said["recall_generate"] != stock[1]["recall_generate"]
    for task in ("recall_choice", "recall_rolling"):
        change = [abs(a - b) for a, b in zip(numbers(said[task]), numbers(stock[1][task]), strict=True)]
        assert max(change) > 1
    assert config["kv_ratio"] < 0.2
    assert config["kv_policy"] == str(StreamingLLM(0.1, recent=16))
    assert config["kv_nbytes"] == pytest.approx(config["kv_ratio"] * config["kv_dense_nbytes"])


# -- how scores are read -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return load()


def lm(embedded, policy, **settings):
    model, tokenizer = embedded
    return KVPruneLM(model, policy, tokenizer=tokenizer, **{"max_length": WINDOW, "batch_size": 8, **settings})


def ask(model, kind, *arguments):
    requests = [Instance(kind, {}, each, index, ("task", index, 1)) for index, each in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


def choices(count=8):
    """Contexts and continuations of several lengths; contexts come several times, and one is empty."""
    pairs = []
    for row in questions(documents=2, per_document=2)[:count]:
        pairs += [(row["prompt"], f" {choice}") for choice in row["choices"]]
        pairs.append((row["prompt"], f" {row['answer'].split()[0]}"))
    return [*pairs, ("", f" {row['answer']}"), ("", f" {row['prompt']}")]


@torch.no_grad()
def one_by_one(embedded, policy, context, continuation):
    """The log-likelihood of a continuation whose tokens are fed one by one, as in decoding, and if it is greedy."""
    model, tokenizer = embedded
    before = tokenizer(context)["input_ids"]
    after = tokenizer(context + continuation)["input_ids"][len(before) :]
    cache = PrunedCache(model, policy)
    if before[:-1]:
        model(torch.tensor([before[:-1]]), **cache_argument(cache))
    total, greedy = 0.0, True
    for fed, expected in zip([before[-1], *after], after, strict=False):
        logits = model(torch.tensor([[fed]]), **cache_argument(cache)).logits[0, -1]
        total += logits.log_softmax(-1)[expected].item()
        greedy &= logits.argmax().item() == expected
    return total, greedy


@pytest.mark.parametrize("policy", [SnapKV(0.25), A2SF(0.3, interval=None)], ids=str)
def test_a_continuation_is_scored_as_decoding_would(embedded, policy):
    """Where decoding evicts nothing, one chunk and single tokens read the same cache."""
    pairs = choices()
    found = ask(lm(embedded, policy), "loglikelihood", *pairs)
    for (context, continuation), (likelihood, greedy) in zip(pairs, found, strict=True):
        expected = one_by_one(embedded, policy, context, continuation)
        assert likelihood == pytest.approx(expected[0], abs=2e-3)
        assert greedy == expected[1]


@pytest.mark.parametrize("policy", ["full", "a2sf", "kivi:bits=4,residual=64,group_size=32", "gemfilter:budget=0.5"])
def test_the_batch_size_changes_nothing(embedded, policy):
    small, large = (lm(embedded, read_policy(policy), batch_size=rows) for rows in (1, 8))
    alone, together = (ask(model, "loglikelihood", *choices()) for model in (small, large))
    assert numbers(alone) == pytest.approx(numbers(together), abs=2e-3)
    assert [greedy for _, greedy in alone] == [greedy for _, greedy in together]


@pytest.mark.parametrize("policy", ["full", "a2sf", "kivi:bits=4,residual=64,group_size=32"])
def test_the_batch_size_changes_nothing_in_rolling_texts(embedded, policy):
    """Windows of one length come together, whatever text they are of."""
    texts = [(row["prompt"],) for row in questions()[::4]]
    small, large = (lm(embedded, read_policy(policy), batch_size=rows, max_length=200) for rows in (1, 8))
    alone, together = (ask(model, "loglikelihood_rolling", *texts) for model in (small, large))
    assert alone == pytest.approx(together, abs=2e-3)


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "gpt2", "opt"])
def test_families_of_models_give_the_numbers_of_the_stock_model(embedded, family):
    """Sliding windows, attention sinks and learned positions, in batches padded on both sides and in windows."""
    ids = families.token_ids(100).tolist()
    asked = [(("", ""), ids[start:40], ids[40 : 41 + start]) for start in (0, 3, 3, 17)]
    windows = [(None, ids[:1], ids[1:60]), (None, ids[5:25], ids[25:65]), (None, ids[:1], ids[1:30])]
    with torch.no_grad():
        greedy = families.stock(family)(torch.tensor([ids[3:40]])).logits[0, -1].argmax().item()
    asked.append((("", ""), ids[3:40], [greedy]))
    settings = {"tokenizer": embedded[1], "max_length": 64}
    stock = HFLM(pretrained=families.stock(family), **settings)
    pruned = KVPruneLM(families.shared(family), A2SF(64), batch_size=8, rolling_chunk=16, **settings)
    for requests in (asked, windows):
        found, expected = (model._loglikelihood_tokens(requests, disable_tqdm=True) for model in (pruned, stock))
        assert numbers(found) == pytest.approx(numbers(expected), abs=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_continuations_of_one_context_share_its_prefill(embedded):
    row = questions()[0]
    lengths = []
    hook = embedded[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        ask(lm(embedded, A2SF(0.25)), "loglikelihood", *((row["prompt"], f" {choice}") for choice in row["choices"]))
    finally:
        hook.remove()
    prompt = len(embedded[1](row["prompt"])["input_ids"])
    assert lengths == [(1, prompt - 1), (CHOICES, 3)]


def test_long_contexts_are_cut_from_the_left(embedded):
    """As the stock model does it: the window holds all but the last token of context and continuation."""
    pairs = choices()[:6]
    cut = ask(lm(embedded, Full(), max_length=100), "loglikelihood", *pairs)
    stock = HFLM(pretrained=embedded[0], tokenizer=embedded[1], max_length=100)
    assert numbers(cut) == pytest.approx(numbers(ask(stock, "loglikelihood", *pairs)), abs=2e-3)


@pytest.mark.parametrize("words", [0, 101])
def test_a_continuation_must_fit_the_window(embedded, words):
    with pytest.raises(EvaluationError, match=f"of {words} tokens .* in a window of 100"):
        lm(embedded, Full(), max_length=100)._loglikelihood_tokens([(("", ""), [1], [5] * words)])


def test_a_rolling_text_reads_the_cache_from_the_second_chunk_on(embedded):
    text = (questions()[0]["prompt"],)
    policy = StreamingLLM(0.1, recent=8)
    whole, *chunked = (
        ask(lm(embedded, policy, rolling_chunk=chunk), "loglikelihood_rolling", text)[0] for chunk in (WINDOW, 128, 16)
    )
    assert whole == pytest.approx(ask(lm(embedded, Full()), "loglikelihood_rolling", text)[0], rel=1e-6)
    assert abs(chunked[0] - whole) > 0.1
    assert abs(chunked[1] - whole) > 0.1


@torch.no_grad()
def test_windows_of_a_long_text_are_scored_one_after_another(embedded):
    """Each token is predicted once; the last window begins in the one before, and predicts only what is new."""
    model, tokenizer = embedded
    policy, window, chunk = StreamingLLM(24, recent=8), 64, 16
    text = questions()[0]["prompt"]
    ids = tokenizer(text)["input_ids"]
    expected, done = 0.0, 0
    for start in [*range(0, len(ids) - window, window), len(ids) - window]:
        inputs = [tokenizer.bos_token_id, *ids][start : start + window]
        cache = PrunedCache(model, policy)
        pieces = torch.tensor([inputs]).split(chunk, dim=1)
        logits = torch.cat([model(piece, **cache_argument(cache)).logits for piece in pieces], dim=1)[0]
        likelihood = logits.log_softmax(-1)
        expected += sum(likelihood[place - start, ids[place]].item() for place in range(done, start + window))
        done = start + window
    found = ask(lm(embedded, policy, max_length=window, rolling_chunk=chunk), "loglikelihood_rolling", (text,))
    assert found == [pytest.approx(expected, abs=5e-3)]


def test_a_prompt_filter_has_no_prompt_in_a_rolling_text(embedded):
    with pytest.raises(PolicyError, match="loglikelihood_rolling takes a policy"):
        ask(lm(embedded, read_policy("gemfilter")), "loglikelihood_rolling", (questions()[0]["prompt"],))


def test_measured_bytes_are_those_of_the_caches(embedded):
    policy = KIVI(bits=2, group_size=32, residual=32)
    model = lm(embedded, policy)
    assert model.measured.ratio is None
    context, continuation = choices()[0]
    ask(model, "loglikelihood", (context, continuation))
    cache = PrunedCache(embedded[0], policy)
    embedded[0](torch.tensor([embedded[1](context)["input_ids"][:-1]]), **cache_argument(cache))
    assert (model.measured.nbytes, model.measured.dense_nbytes) == (cache.nbytes, cache.dense_nbytes)
    assert model.measured.sequences == 1


def test_every_answer_is_kept_as_soon_as_it_is_there(embedded):
    """For lm-eval's --use_cache, which goes on where an evaluation was interrupted."""

    class Kept(dict):
        def add_partial(self, kind, arguments, answer):
            self[kind, arguments] = answer

    model, kept = lm(embedded, A2SF(0.25)), Kept()
    model.set_cache_hook(kept)
    pairs, texts = choices()[:6], [(questions()[0]["prompt"],)]
    answers = ask(model, "loglikelihood", *pairs) + ask(model, "loglikelihood_rolling", *texts)
    asked = [("loglikelihood", pair) for pair in pairs] + [("loglikelihood_rolling", text) for text in texts]
    assert kept == dict(zip(asked, answers, strict=True))


def test_the_batch_size_can_be_found(embedded):
    pairs = choices()[:6]
    found = ask(lm(embedded, Full(), batch_size="auto", max_batch_size=2), "loglikelihood", *pairs)
    assert numbers(found) == pytest.approx(numbers(ask(lm(embedded, Full()), "loglikelihood", *pairs)), abs=2e-3)


def test_chat_templates_are_applied(embedded, folder):
    model, tokenizer = embedded[0], deepcopy(embedded[1])
    tokenizer.chat_template = "{% for message in messages %}upstairs {{ message['content'] }} today{% endfor %}"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = [
        simple_evaluate(
            model=lm,
            tasks=["recall_choice"],
            task_manager=manager,
            limit=3,
            bootstrap_iters=0,
            apply_chat_template=True,
        )["samples"]["recall_choice"]
        for lm in (HFLM(pretrained=model, tokenizer=tokenizer), KVPruneLM(model, A2SF(1.0), tokenizer=tokenizer))
    ]
    stock, pruned = ([sample["filtered_resps"] for sample in samples] for samples in results)
    assert results[1][0]["arguments"][0][0].startswith("upstairs ")
    assert numbers(pruned) == pytest.approx(numbers(stock), abs=2e-3)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "policy"),
    [
        ("policy=a2sf,budget=0.5", A2SF(0.5)),
        ("policy=a2sf,budget=64", A2SF(64)),
        ("policy=a2sf,budget=512MiB", A2SF("512MiB")),
        ("policy=a2sf", A2SF()),
        ("policy=a2sf:kernel_size=7;forgetting_factor=0.9,budget=0.5", A2SF(0.5, kernel_size=7, forgetting_factor=0.9)),
        ("policy=a2sf:budget=0.5|streaming_llm,budget=0.25", A2SF(0.5) | StreamingLLM(0.25)),
        ("policy=snapkv:interval=none;pooling=avg", SnapKV(pooling="avg")),
        ("policy=full", Full()),
    ],
)
def test_policies_are_read_from_model_arguments(arguments, policy):
    read = simple_parse_args_string(arguments)
    assert read_policy(read["policy"], read.get("budget")) == policy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("policy=a2fs", "Did you mean 'a2sf'"),
        ("policy=a2sf,budget=12 parsecs", "12 parsecs"),
        ("policy=a2sf,budget=2.5", "fraction"),
        ("policy=a2sf:gamma=1", "no setting 'gamma'"),
        ("policy=kivi,budget=0.25", "no budget"),
        ("policy=7", "policy=7 is no policy"),
        ("budget=0.25", "write policy=a2sf"),
        ("policy=a2sf,kernels=cuda", "kernels"),
        ("policy=a2sf,attention=eager", "attention"),
        ("policy=a2sf,rolling_chunk=0", "rolling_chunk"),
        ("policy=gemfilter:layer=9", "layer 9"),
    ],
)
def test_mistakes_in_model_arguments_are_told(arguments, message):
    with pytest.raises(KVPruneError, match=message):
        KVPruneLM.create_from_arg_string(f"pretrained={MODEL_PATH},{arguments}", {"device": "cpu"})


def test_a_policy_object_has_its_budget():
    assert read_policy(A2SF(0.5)) == A2SF(0.5)
    with pytest.raises(PolicyError, match="leave it out"):
        read_policy(A2SF(0.5), 0.25)


words = st.sampled_from([*kvprune.policies.names(), "budget", "recent", "0.25", "none", "12", "1e400", "nan", "-1", ""])
text = st.one_of(words, st.text(max_size=6))
pieces = st.lists(st.tuples(text, st.sampled_from([":", ";", ",", "|", "=", " "])).map("".join), max_size=8)


@given(policy=st.one_of(pieces.map("".join), text), budget=text)
def test_no_text_gives_another_error_than_ours(policy, budget):
    arguments = simple_parse_args_string(f"policy={policy},budget={budget}")
    with suppress(KVPruneError):
        assert isinstance(read_policy(arguments.get("policy"), arguments.get("budget")), Policy)


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_runs_a_task_offline(folder, tmp_path, stock):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = f"pretrained={MODEL_PATH},policy=a2sf:kernel_size=7;sinks=8,budget={WINDOW},max_length={WINDOW}"
    subprocess.run(
        [
            sys.executable, "-m", "kvprune", "eval", "lm-eval", "--model", "kvprune", "--model_args", arguments,
            "--tasks", str(folder / "recall_generate.yaml"), "--device", "cpu", "--batch_size", "4",
            "--output_path", str(tmp_path / "results.json"),
        ],
        check=True,
        env={**os.environ, **offline},
        cwd=tmp_path,
    )  # fmt: skip
    (path,) = tmp_path.glob("results*.json")
    results = json.loads(path.read_text())
    assert results["results"]["recall_generate"]["exact_match,none"] == stock[0]["recall_generate"]
    assert results["config"]["kv_policy"] == str(A2SF(WINDOW, kernel_size=7, sinks=8))
    assert 1 < results["config"]["kv_ratio"] < 1.2
    assert not math.isnan(results["config"]["kv_nbytes"])


def test_mistakes_end_the_command_line_in_one_sentence(monkeypatch, capsys):
    def with_a_mistake():
        KVPruneLM("model", "a2fs")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", with_a_mistake)
    with pytest.raises(SystemExit) as stopped:
        integration.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no policy named 'a2fs'")


def test_lm_eval_can_find_the_model():
    """By the entry point that releases after 0.4.13 read."""
    (point,) = (point for point in entry_points(group="lm_eval.models") if point.name == "kvprune")
    assert point.load() is KVPruneLM
