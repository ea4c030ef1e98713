"""Sampled answers have Transformers' distribution, and depend on seed, item, repeat and weights alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from scipy.stats import chisquare, kstest
from transformers import AutoModelForCausalLM

from fmops.adapters.lm_eval_sampling import Sampling, answer_key, noise
from fmops.adapters.lm_eval_scorer import SharedPrefixLM
from fmops.errors import FmopsError
from fmops.evaluation.journal import Journal
from tests.invariant.test_scorer_equality import run_harness_task, text, write_harness_task

SAMPLED = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 0.9}


@pytest.fixture(scope="module")
def ours(tiny_model: Path) -> SharedPrefixLM:
    return SharedPrefixLM(tiny_model, threads=1, seed=7)


@pytest.fixture(scope="module")
def reference(tiny_model: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa").eval()


def asked(prompts: list[str], **changed) -> list[Instance]:
    return [
        Instance("generate_until", {}, (prompt, {**SAMPLED, **changed}), 0, metadata=("t", number, 1))
        for number, prompt in enumerate(prompts)
    ]


def prompts(seed: int, count: int, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [text(rng, rng.randint(1, longest)) for _ in range(count)]


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7}, {"temperature": 1.0, "top_k": 0}, {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 0, "top_p": 0.6}, {"temperature": 1.5, "top_k": 5, "min_p": 0.15},
    {"temperature": 0.5, "top_k": 0, "min_p": 0.02}, {"temperature": 2.0, "top_k": 5000, "top_p": 0.95, "min_p": 0.1},
])  # fmt: skip
def test_warped_probabilities_are_those_that_transformers_samples_from(ours, reference, settings):
    for prompt in prompts(1, 4):
        ids = torch.tensor([ours.tok_encode(prompt)])
        found = reference.generate(
            ids, do_sample=True, max_new_tokens=3, output_scores=True, output_logits=True, return_dict_in_generate=True,
            pad_token_id=0, **settings,
        )  # fmt: skip
        for logits, scores in zip(found.logits, found.scores, strict=True):
            # Logits of random weights are nearly flat; spread, so that each setting cuts somewhere.
            tokens, warped = Sampling.of({"do_sample": True, **settings}).warp(logits)
            mine = torch.softmax(warped, -1)
            whole = mine if tokens is None else torch.zeros_like(logits).scatter(1, tokens, mine)
            torch.testing.assert_close(whole, torch.softmax(scores.float(), -1), atol=1e-5, rtol=0)
            assert ((whole > 0) == (scores > -torch.inf)).all()


def test_equals_of_the_least_likely_kept_token_are_kept_as_transformers_keeps_them():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    tokens, scores = Sampling(1.0, top_k=2).warp(logits)
    kept = [set(tokens[row][scores[row] > -torch.inf].tolist()) for row in range(2)]
    assert kept == [{0, 1, 2, 3}, {0, 1}]


def test_two_tokens_in_a_row_have_the_model_s_probabilities(ours, reference):
    """3,000 repeats of one item against the nine pairs of tokens that top_k leaves, by the model itself."""
    (prompt,) = prompts(2, 1)
    options = {"max_gen_toks": 2, "top_k": 3, "temperature": 0.4}
    sampling = Sampling(0.4, top_k=3)
    ids = ours.tok_encode(prompt)

    def chances(tokens: list[int]) -> dict[int, float]:
        with torch.inference_mode():
            logits = reference(input_ids=torch.tensor([tokens])).logits[:, -1]
        kept, scores = sampling.warp(logits)
        return dict(zip(kept[0].tolist(), torch.softmax(scores[0].double(), -1).tolist(), strict=True))

    expected = {
        ours.tokenizer.decode([first, second]): one * two
        for first, one in chances(ids).items() for second, two in chances([*ids, first]).items()
    }  # fmt: skip
    answers = ours.generate_until(asked([prompt], **options) * 3000)
    assert set(answers) <= set(expected)
    counts = [answers.count(each) for each in expected]
    assert chisquare(counts, [3000 * chance for chance in expected.values()]).pvalue > 1e-3


def test_noise_is_standard_gumbel_and_differs_by_key_place_and_token():
    import numpy as np

    drawn = noise(["a", "b"], [0, 0], np.arange(50_000)[None])
    assert drawn.shape == (2, 50_000)
    for row in drawn:
        assert kstest(np.exp(-np.exp(-row)), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.02
    assert abs(np.corrcoef(noise(["a", "a"], [0, 1], np.arange(50_000)[None]))[0, 1]) < 0.02
    places = noise(["a"] * 20_000, range(20_000), np.array([[17]]))
    assert kstest(np.exp(-np.exp(-places[:, 0])), "uniform").pvalue > 1e-3
    assert (noise(["a"], [3], np.array([[5, 9]])) == noise(["a"], [3], np.arange(10)[None])[:, [5, 9]]).all()


def test_a_sample_is_the_same_alone_in_any_company_and_on_two_threads(ours, monkeypatch):
    requests = asked(prompts(3, 40), top_p=0.95)
    together = ours.generate_until(requests)
    assert len(set(together)) > 30
    assert [ours.generate_until([each])[0] for each in requests[::4]] == together[::4]
    assert ours.generate_until(requests[9:23]) == together[9:23]
    assert ours.generate_until(requests[::-1]) == together[::-1]
    monkeypatch.setattr(ours, "pack_tokens", 64)
    assert ours.generate_until(requests) == together
    torch.set_num_threads(2)
    try:
        assert ours.generate_until(requests) == together
    finally:
        torch.set_num_threads(1)


def test_a_model_that_shares_nothing_draws_the_same(ours, tiny_model):
    requests = asked(prompts(4, 8))
    alone = SharedPrefixLM(tiny_model, threads=1, seed=7)
    alone.shares = False
    assert alone.generate_until(requests) == ours.generate_until(requests)


def test_repeats_differ_and_another_seed_gives_others(ours, tiny_model):
    (request,) = asked(prompts(5, 1))
    answers = ours.generate_until([request] * 8)
    assert len(set(answers)) == 8
    assert ours.generate_until([request] * 3) == answers[:3]
    other = SharedPrefixLM(tiny_model, threads=1, seed=8).generate_until([request] * 8)
    assert not set(other) & set(answers)
    assert SharedPrefixLM(tiny_model, threads=1, seed=7).generate_until([request] * 8) == answers
    # Greedy repeats are one answer.
    assert len(set(ours.generate_until([*asked(prompts(5, 1), do_sample=False)] * 3))) == 1


class _Stopped(Exception):
    """Stands for a kill between two finished answers."""


def test_a_killed_run_goes_on_with_the_same_samples(ours, tmp_path, monkeypatch):
    requests = asked(prompts(6, 12)) + asked(prompts(6, 1)) * 3
    whole = ours.generate_until(requests)
    journal = Journal(tmp_path / "j.jsonl")
    kept = 0
    add = journal.add

    def stop_after_five(key, value):
        nonlocal kept
        if kept == 5:
            raise _Stopped
        kept += 1
        add(key, value)

    monkeypatch.setattr(journal, "add", stop_after_five)
    monkeypatch.setattr(ours, "journal", journal)
    with pytest.raises(_Stopped):
        ours.generate_until(requests)
    journal.close()
    monkeypatch.setattr(ours, "journal", Journal(tmp_path / "j.jsonl"))
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 5
    assert ours.generate_until(requests) == whole


def test_models_that_nearly_agree_draw_nearly_the_same(ours, tiny_model):
    """Common random numbers: of 60 answers of one token, far more are equal than by seeds of their own."""
    requests = asked(prompts(7, 60), max_gen_toks=1, top_k=0, temperature=1.0)
    before = ours.generate_until(requests)
    near = SharedPrefixLM(tiny_model, threads=1, seed=7)
    with torch.no_grad():
        for weight in near.model.parameters():
            weight.add_(0.01 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    shared = sum(a == b for a, b in zip(before, near.generate_until(requests), strict=True))
    near.seed = 8
    independent = sum(a == b for a, b in zip(before, near.generate_until(requests), strict=True))
    assert shared > 45
    assert independent < 15


def test_a_cold_sample_is_greedy(ours):
    requests = prompts(8, 10)
    assert ours.generate_until(asked(requests, temperature=1e-4)) == ours.generate_until(
        asked(requests, do_sample=False)
    )


@pytest.mark.parametrize(("changed", "told"), [
    ({"temperature": 0}, "temperature is 0; it is above 0, to 100. For greedy decoding say do_sample: false"),
    ({"temperature": "hot"}, "could not convert string to float: 'hot'. Temperature and most tokens are numbers"),
    ({"temperature": None}, "do_sample needs a temperature"), ({"top_p": 1.5}, "top_p is 1.5; it is above 0, to 1"),
    ({"top_k": 2.5}, "top_k is 2.5; it is a whole number, 0 for all tokens"),
    ({"min_p": "some"}, "min_p is 'some'; it is from 0 to 1"),
    ({"num_beams": 2}, "num_beams is not decoded here. Drop it. Options: do_sample, max_gen_toks"),
    ({"typical_p": 0.9}, "typical_p is not decoded here"),
])  # fmt: skip
def test_settings_that_are_not_understood_are_refused(ours, changed, told):
    with pytest.raises(FmopsError, match=told):
        ours.generate_until(asked(["a"], **changed))


def test_repeats_of_a_harness_task_are_voted_on_by_its_filters(ours, tmp_path):
    rng = random.Random(9)
    rows = [{"q": text(rng, 8), "gold": " the"} for _ in range(6)]
    write_harness_task(
        tmp_path,
        "votes",
        rows,
        """
num_fewshot: 0
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: gold
generation_kwargs: {until: ["Q:"], do_sample: true, temperature: 0.3, top_k: 4, max_gen_toks: 1}
repeats: 9
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: maj, filter: [{function: majority_vote}, {function: take_first}]}
metric_list: [{metric: exact_match}]
""",
    )
    found = run_harness_task(ours, tmp_path, "votes")
    samples = found["samples"]["votes"]
    assert {key for key in found["results"]["votes"] if key.startswith("exact_match,")} == {
        "exact_match,first", "exact_match,maj",
    }  # fmt: skip
    by_name = {(sample["doc_id"], sample["filter"]): sample for sample in samples}
    for number, row in enumerate(rows):
        (drawn,) = by_name[number, "first"]["resps"]
        assert len(drawn) == 9
        assert len(set(drawn)) > 1
        options = {"until": ["Q:"], "do_sample": True, "temperature": 0.3, "top_k": 4, "max_gen_toks": 1}
        request = Instance("generate_until", {}, (row["q"], options), 0, metadata=("votes", number, 9))
        assert ours.generate_until([request] * 9) == drawn
        most = max(drawn.count(each) for each in drawn)
        assert drawn.count(by_name[number, "maj"]["filtered_resps"][0]) == most


def test_the_key_of_an_answer_is_its_seed_item_and_repeat():
    keys = {answer_key(seed, item, repeat) for seed in (1, 2) for item in ("a", "b") for repeat in (0, 1)}
    assert len(keys) == 8
