"""Shared prefixes change the time, never the score: equal to lm-evaluation-harness's own `hf` backend."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fmops.adapters.lm_eval_scorer import SharedPrefixLM
from fmops.errors import FmopsError

TOLERANCE = 1e-4
SENTENCE = "the class object returns a value when called with no arguments and raises an error otherwise"
WORDS = tuple(dict.fromkeys(SENTENCE.split()))


@pytest.fixture(scope="module")
def ours(tiny_model: Path) -> SharedPrefixLM:
    return SharedPrefixLM(tiny_model, threads=1)


@pytest.fixture(scope="module")
def theirs(ours: SharedPrefixLM) -> HFLM:
    return HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=4, device="cpu")


def request(kind: str, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0)


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def choices(seed: int, count: int = 24) -> list[Instance]:
    """Questions of many lengths, two to five answers each, in mixed order, one context empty."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        context = text(rng, rng.randint(1, 60)) if number else ""
        requests += [
            request("loglikelihood", context, " " + text(rng, rng.randint(1, 12))) for _ in range(rng.randint(2, 5))
        ]
    rng.shuffle(requests)
    return requests


def test_every_choice_scores_as_if_it_were_alone(ours, theirs):
    requests = choices(1)
    mine, reference = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert ours.shares
    assert max(abs(a[0] - b[0]) for a, b in zip(mine, reference, strict=True)) < TOLERANCE
    assert [a[1] for a in mine] == [b[1] for b in reference]


@pytest.mark.parametrize("pack_tokens", [1, 64, 4096])
def test_what_a_question_is_packed_with_is_nothing_to_it(ours, pack_tokens, monkeypatch):
    requests = choices(2)
    before = ours.loglikelihood(requests)
    monkeypatch.setattr(ours, "pack_tokens", pack_tokens)
    after = ours.loglikelihood(list(reversed(requests)))[::-1]
    assert max(abs(a[0] - b[0]) for a, b in zip(before, after, strict=True)) < TOLERANCE


def test_a_greedy_answer_is_known_as_greedy(ours, theirs):
    (answer,) = theirs.generate_until(
        [request("generate_until", "the class object", {"until": [], "max_gen_toks": 6})], disable_tqdm=True
    )
    requests = [request("loglikelihood", "the class object", part) for part in (answer, " zebra")]
    reference = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [score[1] for score in ours.loglikelihood(requests)] == [score[1] for score in reference]


def test_documents_roll_on_past_the_models_length(ours, theirs, monkeypatch):
    monkeypatch.setattr(SharedPrefixLM, "max_length", 64)
    monkeypatch.setattr(theirs, "_max_length", 64)
    rng = random.Random(3)
    requests = [request("loglikelihood_rolling", text(rng, words)) for words in (3, 40, 200, 90)]
    mine, reference = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    # A long document sums hundreds of tokens; the tolerance is per token.
    assert all(abs(a - b) < TOLERANCE * 10 for a, b in zip(mine, reference, strict=True))


def test_a_context_too_long_for_the_model_loses_its_beginning(ours, theirs, monkeypatch):
    monkeypatch.setattr(SharedPrefixLM, "max_length", 48)
    monkeypatch.setattr(theirs, "_max_length", 48)
    rng = random.Random(4)
    context = text(rng, 120)
    requests = [request("loglikelihood", context, " " + text(rng, words)) for words in (2, 9)]
    mine, reference = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert max(abs(a[0] - b[0]) for a, b in zip(mine, reference, strict=True)) < TOLERANCE


def test_an_answer_too_long_for_the_model_is_refused(ours, monkeypatch):
    monkeypatch.setattr(SharedPrefixLM, "max_length", 4)
    with pytest.raises(FmopsError, match=r"an answer of \d+ tokens does not fit the model's 4"):
        ours.loglikelihood([request("loglikelihood", "a", " " + text(random.Random(5), 30))])


@pytest.mark.parametrize("until", [[], [" a"], ["e", "the"]])
def test_generations_are_those_of_the_reference(ours, theirs, until):
    rng = random.Random(6)
    options = {"until": until, "max_gen_toks": 12, "do_sample": False}
    requests = [request("generate_until", text(rng, rng.randint(1, 30)), dict(options)) for _ in range(7)]
    reference = theirs.generate_until(
        [request("generate_until", each.args[0], {**options, "until": list(until)}) for each in requests],
        disable_tqdm=True,
    )
    assert ours.generate_until(requests) == reference
    assert all(each.args[1] == options for each in requests)  # the harness hands the same options out again


def test_sampling_is_refused(ours):
    with pytest.raises(FmopsError, match="generation tasks are greedy"):
        ours.generate_until([request("generate_until", "a", {"do_sample": True})])


def test_a_model_with_windows_is_read_one_request_at_a_time(ours, theirs, monkeypatch):
    monkeypatch.setattr(ours, "shares", False)
    masks = []
    forward = ours.model.forward
    monkeypatch.setattr(ours.model, "forward", lambda *a, **inputs: masks.append(inputs) or forward(*a, **inputs))
    requests = choices(7, count=3)
    mine = ours.loglikelihood(requests)
    assert len(masks) == len(requests)
    assert not any("attention_mask" in inputs for inputs in masks)
    reference = theirs.loglikelihood(requests, disable_tqdm=True)
    assert max(abs(a[0] - b[0]) for a, b in zip(mine, reference, strict=True)) < TOLERANCE
    assert ours.batch_mode == "one-by-one"


def test_each_context_is_read_once(ours, theirs, monkeypatch):
    read = []
    forward = ours.model.forward

    def counting(*args, **inputs):
        ids = inputs["input_ids"] if "input_ids" in inputs else args[0]
        read.append(ids.numel())
        return forward(*args, **inputs)

    monkeypatch.setattr(ours.model, "forward", counting)
    rng = random.Random(8)
    requests = []
    for _ in range(10):
        context = text(rng, 50)
        requests += [request("loglikelihood", context, " " + text(rng, 3)) for _ in range(4)]
    ours.loglikelihood(requests)
    mine = sum(read)
    read.clear()
    theirs.loglikelihood(requests, disable_tqdm=True)
    assert mine < sum(read) / 3


def test_scores_are_bit_equal_from_run_to_run(ours):
    requests = choices(9)
    assert ours.loglikelihood(requests) == ours.loglikelihood(requests)
    assert torch.get_num_threads() == 1
