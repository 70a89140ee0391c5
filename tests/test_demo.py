"""The recall task, the embedded model, and what the demo claims about both."""

import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune import KVPruneError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.demo import MODEL_PATH, load
from kvprune.demo.measure import Questions, measure, reference
from kvprune.demo.show import Demo
from kvprune.demo.task import ANSWER_LENGTH, QUESTION_LENGTH, RecallGenerator, decode
from kvprune.demo.words import BOS, EOS, FILLER, SENTENCES, TOKEN_ID, VOCABULARY
from kvprune.policies import A2SF, H2O, KIVI, GemFilter, Keyformer, SnapKV, StreamingLLM, ZipCache


@given(length=st.integers(120, 600), notes=st.integers(1, 9), seed=st.integers(0, 10), words=st.integers(1, 9))
def test_a_document_holds_its_notes_exactly_once(length, notes, seed, words):
    """A document has the length asked for, and every note stands where it says, under a key of its own."""
    recall = RecallGenerator(seed).document(length, notes, words)
    assert recall.values.shape == (notes, words)
    assert all(VOCABULARY[value[-1]].endswith(".") for value in recall.values)
    assert len(recall.document) == length
    assert len({tuple(key) for key in recall.keys}) == notes
    for key, value, position in zip(recall.keys, recall.values, recall.positions, strict=True):
        note = recall.document[position : position + 3 + words]
        assert note.tolist() == [TOKEN_ID["note"], *key, *value]
        starts = [i for i in range(length - 1) if tuple(recall.document[i : i + 2]) == tuple(key)]
        assert starts == [position + 1]


def test_the_same_seed_gives_the_same_document():
    first, second = (RecallGenerator(7).document(300, 5) for _ in range(2))
    assert np.array_equal(first.document, second.document)
    assert not np.array_equal(first.document, RecallGenerator(8).document(300, 5).document)


def test_sentences_walk_the_chain_as_numpy_chooses():
    """Draw by draw what `Generator.choice` gives: the embedded model and all figures are of these documents."""
    generator, random = RecallGenerator(5), np.random.default_rng(5)
    for _ in range(50):
        classes = SENTENCES[random.integers(len(SENTENCES))].split()
        words = [random.choice([TOKEN_ID[word] for word in FILLER[classes[0]]])]
        for before, after in pairwise(classes):
            followers = generator._chain[before, after][words[-1]]
            halves = 0.5 ** np.arange(len(followers))
            words.append(random.choice(followers, p=halves / halves.sum()))
        assert generator.sentence().tolist() == words


def test_documents_of_three_words_are_those_of_ever():
    """The embedded model and all figures are of these: here the sums of a document and of its values."""
    recall = RecallGenerator(3).document(2048, 24)
    assert (int(recall.document.sum()), int(recall.values.sum())) == (661241, 13130)


@pytest.mark.parametrize(
    ("length", "notes", "words"), [(10, 2, 3), (100, 0, 3), (100, 9, 9), (100, 2, 0), (100_000, 5000, 3)]
)
def test_impossible_documents_are_refused(length, notes, words):
    with pytest.raises(KVPruneError):
        RecallGenerator(0).document(length, notes, words)


def test_the_tokenizer_reads_what_the_generator_writes():
    _, tokenizer = load()
    recall = RecallGenerator(3).document(200, 4)
    prompt = recall.prompt(0)
    text = decode(prompt[1:])
    assert tokenizer(text)["input_ids"] == prompt.tolist()  # the tokenizer adds <s>
    assert tokenizer.decode(prompt[1:]) == text
    assert tokenizer.convert_ids_to_tokens(list(range(len(VOCABULARY)))) == list(VOCABULARY)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.padding_side) == (BOS, EOS, "left")


def test_the_embedded_model_is_small():
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) <= 8 << 20


@pytest.fixture(scope="module")
def model():
    return load()[0]


@pytest.fixture(scope="module")
def questions():
    return Questions.draw(16, tokens=2048, notes=48, seed=77)


@pytest.fixture(scope="module")
def dense(model, questions):
    return reference(model, questions)


@pytest.fixture(scope="module")
def recall(model, questions, dense):
    """Recall and measured bytes of a policy, on words predicted from its compressed cache."""
    return cache(lambda policy: measure(model, questions, dense, policy, label=""))


def test_the_full_cache_answers(recall, dense):
    held = dense.cache.get_seq_length()
    result = recall(None)
    assert result.decode_ratio > 0
    assert dense.cache.get_seq_length() == held  # what steps are timed beside forgets them
    assert result.recall >= 0.95
    assert result.agreement == 1.0


@pytest.mark.parametrize("policy", [A2SF(0.25, kernel_size=7), SnapKV(0.25)], ids=str)
def test_query_aware_policies_keep_the_answers(recall, policy):
    """With a quarter of the cache, at least 97 % of the full cache's recall."""
    assert recall(policy).recall >= 0.97 * recall(None).recall


@pytest.mark.parametrize("policy", [H2O(0.25), StreamingLLM(0.25)], ids=str)
def test_others_visibly_do_not(recall, policy):
    """The task tells methods apart: neither early nor late tokens are what the question asks for."""
    assert recall(policy).recall <= 0.7 * recall(None).recall


@pytest.mark.parametrize(
    "policy", [ZipCache(group_size=32), KIVI(4), A2SF(0.5, kernel_size=7) | ZipCache(kernel_size=7)], ids=str
)
def test_quantized_caches_keep_the_answers(recall, policy):
    """At less than half the bytes of a 16-bit cache, at least 95 % of the full cache's recall."""
    result = recall(policy)
    assert result.recall >= 0.95 * recall(None).recall
    assert result.half_ratio < 0.5


def test_bits_decide_what_is_recalled(recall):
    """Two bits for everything, and one range per key channel, cost answers; eight bits cost none."""
    assert recall(ZipCache(salient=0.0)).recall < recall(ZipCache(salient=1.0, high_bits=8)).recall
    assert recall(ZipCache(salient=1.0, high_bits=8)).recall >= recall(None).recall


def test_keyformer_recalls_what_h2o_does(model, questions):
    """With the same sinks and window, both keep what was attended to most in all."""
    first = Questions(questions.prompts[:8], questions.answers[:8])  # of one document: noise takes its time
    dense = reference(model, first)
    policies = Keyformer(0.25), H2O(0.25, sinks=0, recent=0.3)
    keyformer, h2o = (measure(model, first, dense, policy, label="").recall for policy in policies)
    assert keyformer == pytest.approx(h2o, abs=0.1)


def test_the_layer_that_finds_things_filters_best(recall):
    """By the last layer of three GemFilter keeps most answers, by the first few."""
    last, first = (recall(GemFilter(0.25, layer=layer, keep_last=QUESTION_LENGTH)).recall for layer in (2, 0))
    assert last >= 0.6 * recall(None).recall
    assert last >= 2 * first


def test_a_quarter_is_a_quarter(model, questions):
    """Keys, values and positions take at most 26 % of the dense bytes; the score column is what comes on top."""
    for policy in (A2SF(0.25, kernel_size=7), SnapKV(0.25)):
        pruned = PrunedCache(model, policy)
        tokens = model(questions.prompts[:2], **cache_argument(pruned), logits_to_keep=1).logits.argmax(-1)
        for _ in range(8):
            tokens = model(tokens, **cache_argument(pruned)).logits.argmax(-1)
        score = sum(layer.table.tensors()["column.score"].nbytes for layer in pruned.layers)
        assert pruned.nbytes - score <= 0.26 * pruned.dense_nbytes


@pytest.mark.parametrize("policy", ["a2sf:kernel_size=7", "snapkv"])
def test_generate_answers_in_words(model, policy):
    """The whole way: text in, `generate()` with a quarter of the cache, the right words out."""
    _, tokenizer = load()
    recall = RecallGenerator(11).document(1500, 24)
    right = 0
    for note in range(4):
        inputs = tokenizer(decode(recall.prompt(note)[1:]), return_tensors="pt")
        pruned = PrunedCache(model, policy)
        output = model.generate(
            **{name: inputs[name] for name in ("input_ids", "attention_mask")},
            **cache_argument(pruned),
            max_new_tokens=ANSWER_LENGTH + 1,
            do_sample=False,
        )
        said = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said == decode(recall.values[note])
    assert right >= 3


def test_results_are_plain_data(recall):
    assert json.loads(json.dumps(recall(StreamingLLM(64)).to_dict()))["ratio"] < 0.05


def test_the_model_fits_documents_of_any_batch(model):
    """A left-padded batch of documents of different lengths is answered as each alone."""
    generator = RecallGenerator(5)
    documents = [generator.document(length, 8) for length in (300, 500)]
    prompts = [torch.from_numpy(document.prompt(0)) for document in documents]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    together = model.generate(
        ids,
        attention_mask=mask,
        **cache_argument(PrunedCache(model, A2SF(0.25, kernel_size=7))),
        max_new_tokens=3,
        do_sample=False,
    )[:, width:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(
            prompt[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            **cache_argument(PrunedCache(model, A2SF(0.25, kernel_size=7))),
            max_new_tokens=3,
            do_sample=False,
        )[0, len(prompt) :]
        assert together[row].tolist() == alone.tolist()


def test_a_document_beyond_the_window_is_refused(tmp_path):
    """The model would answer at random, and the policies would look bad."""
    with pytest.raises(KVPruneError, match=r"at most 8,1\d\d tokens, not 9,000"):
        Demo(tokens=9000, out=tmp_path).run()
