"""Shared prefixes change the time, never the score: equal to lm-evaluation-harness's own `hf` backend."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from fmops.adapters import pool_attention
from fmops.adapters.lm_eval import run_task
from fmops.adapters.lm_eval_scorer import BATCH_TOLERANCE, SharedPrefixLM
from fmops.artifacts import EvalReport
from fmops.errors import FmopsError
from fmops.evaluation.evidence import gather
from fmops.evaluation.protocol import Protocol, pin, prompts_digest, write_json, write_lines
from fmops.evaluation.suites import load_suite
from fmops.integrity import read_lines

TOLERANCE = 1e-4
SENTENCE = "the class object returns a value when called with no arguments and raises an error otherwise"
WORDS = tuple(dict.fromkeys(SENTENCE.split()))


@pytest.fixture(scope="module")
def ours(tiny_model: Path) -> SharedPrefixLM:
    return SharedPrefixLM(tiny_model, threads=1)


@pytest.fixture(scope="module")
def theirs(tiny_model: Path, ours: SharedPrefixLM) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa").eval()
    return HFLM(pretrained=model, tokenizer=ours.tokenizer, batch_size=4, device="cpu")


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


def few_shot(seed: int, *, items: int, own_examples: bool = False) -> list[list[Instance]]:
    """Items behind five examples: the same ones for all, or each with its own. Four answers with common beginnings."""
    rng = random.Random(seed)
    shared = " ".join(text(rng, 12) for _ in range(5))
    found = []
    for _ in range(items):
        context = (" ".join(text(rng, 12) for _ in range(5)) if own_examples else shared) + " " + text(rng, 9)
        opening = " " + text(rng, 2)
        found.append(
            [request("loglikelihood", context, opening + " " + text(rng, rng.randint(1, 4))) for _ in range(4)]
        )
    return found


def largest_gap(mine: list, reference: list) -> float:
    return max(abs(a[0] - b[0]) for a, b in zip(mine, reference, strict=True))


def tokens_read(model, run) -> int:
    """Tokens that go through the model while `run` runs."""
    read = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    try:
        run()
    finally:
        hook.remove()
    return sum(read)


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


@torch.inference_mode()
def lead(model, context: list[int], answer: list[int]) -> float:
    """Least distance between an answer's token and the likeliest other one."""
    logs = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    rows = range(len(answer))
    chosen = logs[rows, answer]
    logs[rows, answer] = -torch.inf
    return float((chosen - logs.amax(-1)).min())


def test_how_near_an_answer_is_to_another_greedy_choice_is_known(ours, theirs):
    options = {"until": [], "max_gen_toks": 6}
    (greedy,) = theirs.generate_until([request("generate_until", "the class object", options)], disable_tqdm=True)
    pairs = [("the class object", part) for part in (greedy, greedy + " zebra", " value", " returns a value when")]
    scored = ours.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (context, answer), score in zip(pairs, scored, strict=True):
        wanted = lead(theirs.model, *ours._encode_pair(context, answer))
        assert score.lead == pytest.approx(wanted, abs=1e-4)
        assert score[1] == (score.lead > 0)
    assert [score[1] for score in scored[:2]] == [True, False]


def test_a_greedy_answer_that_company_could_turn_is_counted_by_the_gate(ours, tmp_path):
    write_lines(tmp_path / "words.jsonl", [{"q": text(random.Random(n), 9), "a": "value"} for n in range(6)])
    (tmp_path / "words.yaml").write_text(
        "suite: words\nfamily: words\nabout: Last words.\nmargin: 0.05\nunit: accuracy\nhigher_is_better: true\n"
        "tasks:\n  last:\n    source: words.jsonl\n    key: q\n    metrics: [acc]\n    licence: MIT-0\n"
        "    config: {output_type: loglikelihood, doc_to_text: q, doc_to_target: a}\n"
    )
    task = pin(load_suite("./words.yaml", root=tmp_path), "last", items=6)
    documents = [{"id": str(n), "cluster": str(n), **row} for n, row in enumerate(read_lines(tmp_path / "words.jsonl"))]
    rows = run_task(ours, task, documents, chat=False)
    slack = sorted(row["slack"] for row in rows)
    assert slack[0] > 0

    def report(name: str, tolerance: float) -> EvalReport:
        folder = tmp_path / name
        folder.mkdir()
        protocol = Protocol(
            tasks=(task,), engine={}, batch_tolerance=tolerance, template_sha256=None,
            prompts_sha256=prompts_digest(rows), seed=0,
        )  # fmt: skip
        write_lines(folder / "samples.jsonl", rows)
        write_json(folder / "protocol.json", protocol.model_dump(mode="json"))
        return EvalReport(path=folder, metrics=(), fingerprint=protocol.fingerprint)

    for place, tolerance in enumerate([slack[0] / 2, slack[2], slack[-1]]):
        reports = [report(f"{name}-{place}", tolerance) for name in ("before", "after")]
        assert len(gather(*reports).families["words"].fragile) == sum(each <= tolerance for each in slack)


def test_documents_roll_on_past_the_models_length(ours, theirs, monkeypatch):
    monkeypatch.setattr(SharedPrefixLM, "max_length", 64)
    monkeypatch.setattr(theirs, "_max_length", 64)
    rng = random.Random(3)
    requests = [request("loglikelihood_rolling", text(rng, words)) for words in (3, 40, 200, 90)]
    mine, reference = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    # A long document sums hundreds of tokens; the tolerance is per token.
    assert all(abs(a - b) < TOLERANCE * 10 for a, b in zip(mine, reference, strict=True))


def test_long_answers_score_as_the_reference_and_near_to_float64(ours, theirs, tiny_model):
    """Over hundreds of tokens float32's rounding adds up; it must be the reference's own, and no further from truth."""
    rng = random.Random(19)
    requests = [request("loglikelihood", text(rng, 20), " " + text(rng, 400)) for _ in range(6)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa").eval()
    exact = []
    for each in requests:
        context, answer = (ours.tok_encode(part) for part in each.args)
        ids = torch.tensor([context + answer])
        with torch.inference_mode():
            logs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], dim=-1)
        places = range(len(context) - 1, ids.shape[1] - 1)
        exact.append((sum(float(logs[place, ids[0, place + 1]]) for place in places), False))
    mine, reference = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert largest_gap(mine, reference) < TOLERANCE
    assert largest_gap(mine, exact) < largest_gap(reference, exact) + TOLERANCE


def test_a_context_too_long_for_the_model_loses_its_beginning(ours, theirs, monkeypatch):
    monkeypatch.setattr(SharedPrefixLM, "max_length", 48)
    monkeypatch.setattr(theirs, "_max_length", 48)
    rng = random.Random(4)
    context = text(rng, 120)
    requests = [request("loglikelihood", context, " " + text(rng, words)) for words in (2, 9)]
    before = ours.truncated
    mine, reference = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert ours.truncated == before + 2
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


def test_a_model_that_shares_nothing_is_read_one_request_at_a_time(ours, theirs, monkeypatch):
    monkeypatch.setattr(ours, "shares", False)
    inputs = []
    forward = ours.model.forward
    monkeypatch.setattr(ours.model, "forward", lambda *a, **given: inputs.append(given) or forward(*a, **given))
    requests = choices(7, count=3)
    assert largest_gap(ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)) < TOLERANCE
    assert len(inputs) == len(requests)
    assert not any("tree" in given for given in inputs)
    prompts = [request("generate_until", text(random.Random(n), 5), {"max_gen_toks": 6}) for n in range(3)]
    alone = ours.generate_until(prompts)
    assert ours.batch_mode == "one-by-one"
    monkeypatch.setattr(ours, "shares", True)
    assert ours.generate_until(prompts) == alone


@pytest.mark.parametrize("own_examples", [False, True])
def test_few_shot_items_score_as_the_reference_scores_them(ours, theirs, own_examples):
    requests = [each for item in few_shot(10, items=12, own_examples=own_examples) for each in item]
    mine, reference = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert largest_gap(mine, reference) < TOLERANCE
    assert [a[1] for a in mine] == [b[1] for b in reference]


def test_examples_that_all_items_share_are_read_once(ours):
    items = few_shot(11, items=30)
    encoded = [[ours.tok_encode(" ".join(each.args)) for each in item] for item in items]
    columns = zip(*(tokens for item in encoded for tokens in item), strict=False)
    shared = next(place for place, column in enumerate(columns) if len(set(column)) > 1)
    own = sum(len(tokens) - shared for item in encoded for tokens in item)
    read = tokens_read(ours.model, lambda: ours.loglikelihood([each for item in items for each in item]))
    assert shared > 40
    assert read < shared + own
    # Without sharing, the examples alone are read 120 times.
    assert read < 0.3 * 120 * shared


def test_one_letter_answers_cost_no_tokens_of_their_own(ours):
    questions = [text(random.Random(n), 20) for n in range(12)]
    one = [request("loglikelihood", question, " a") for question in questions]
    many = [request("loglikelihood", question, " " + word) for question in questions for word in ("a", "no", "the")]
    lengths = {len(ours.tok_encode(each.args[1])) for each in many}
    assert lengths == {1}
    read = tokens_read(ours.model, lambda: ours.loglikelihood(one))
    assert tokens_read(ours.model, lambda: ours.loglikelihood(many)) == read


def test_the_last_feed_forward_runs_only_where_something_is_scored(ours):
    questions = [request("loglikelihood", text(random.Random(n), 20), " a") for n in range(12)]
    mlp, rows = ours.model.model.layers[-1].mlp, []
    hook = mlp.down_proj.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    try:
        assert tokens_read(ours.model, lambda: ours.loglikelihood(questions)) > 100
    finally:
        hook.remove()
    assert sum(rows) == len(questions)
    assert not mlp._forward_hooks


def test_long_shared_documents_are_kept_while_their_questions_are_asked(ours, theirs):
    rng = random.Random(12)
    document = text(rng, 700)
    requests = [request("loglikelihood", f"{document} {text(rng, 30)}", " " + text(rng, 3)) for _ in range(20)]
    requests += [request("loglikelihood", document, " " + text(rng, 2)), request("loglikelihood", document, " the")]
    length = len(ours.tok_encode(document))
    assert length > 2 * ours.pack_tokens
    read = tokens_read(ours.model, lambda: ours.loglikelihood(requests))
    assert read < 2 * length + 20 * 40
    assert largest_gap(ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)) < TOLERANCE


def test_an_answer_is_the_same_alone_in_any_company_and_on_two_threads(ours):
    rng = random.Random(13)
    options = {"until": [], "max_gen_toks": 16, "do_sample": False}
    prompts = [request("generate_until", text(rng, rng.randint(1, 40)), dict(options)) for _ in range(40)]
    scored = choices(13, count=8)
    together, scores = ours.generate_until(prompts), ours.loglikelihood(scored)
    assert [ours.generate_until([prompt])[0] for prompt in prompts[::5]] == together[::5]
    assert ours.generate_until(prompts[7:18]) == together[7:18]
    alone = [ours.loglikelihood([each])[0] for each in scored]
    assert largest_gap(alone, scores) < BATCH_TOLERANCE
    torch.set_num_threads(2)
    try:
        assert ours.generate_until(prompts) == together
        assert largest_gap(ours.loglikelihood(scored), scores) < BATCH_TOLERANCE
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("wasted_bytes", [0, 10**9])
def test_long_and_short_prompts_answer_side_by_side(ours, theirs, wasted_bytes, monkeypatch):
    monkeypatch.setattr(pool_attention, "WASTED_BYTES", wasted_bytes)
    rng = random.Random(15)
    options = {"until": [" the"], "max_gen_toks": 20, "do_sample": False}
    prompts = [request("generate_until", text(rng, words), options) for words in (3, 300, 40, 7, 1, 90, 2, 150)]
    reference = theirs.generate_until(
        [request("generate_until", each.args[0], {**options, "until": [" the"]}) for each in prompts], disable_tqdm=True
    )
    assert ours.generate_until(prompts) == reference
    assert [ours.generate_until([each])[0] for each in prompts] == reference


def test_answers_share_the_prompts_beginning(ours):
    rng = random.Random(14)
    opening = text(rng, 150)
    options = {"until": [], "max_gen_toks": 1}
    prompts = [request("generate_until", f"{opening} {text(rng, 20)}", options) for _ in range(40)]
    whole = sum(len(ours.tok_encode(each.args[0])) for each in prompts)
    assert tokens_read(ours.model, lambda: ours.generate_until(prompts)) < whole / 3


@pytest.mark.parametrize("option", ["num_beams", "repetition_penalty"])
def test_options_that_are_not_decoded_here_are_refused(ours, option):
    with pytest.raises(FmopsError, match=f"generation_kwargs: {option} is not decoded here"):
        ours.generate_until([request("generate_until", "a", {option: 2, "until": []})])


def test_one_beam_is_greedy_decoding(ours):
    prompt = text(random.Random(17), 9)
    plain = {"until": [], "max_gen_toks": 5}
    beam = ours.generate_until([request("generate_until", prompt, plain | {"num_beams": 1})])
    assert beam == ours.generate_until([request("generate_until", prompt, plain)])


@pytest.mark.parametrize(
    ("prompt", "tokens", "told"), [("a", 0, "max_gen_toks is 0"), ("", 4, "a prompt has no tokens")]
)
def test_what_cannot_be_continued_is_refused(ours, prompt, tokens, told):
    with pytest.raises(FmopsError, match=told):
        ours.generate_until([request("generate_until", prompt, {"until": [], "max_gen_toks": tokens})])


def test_an_answer_without_tokens_is_refused(ours):
    with pytest.raises(FmopsError, match="an answer has no tokens"):
        ours.loglikelihood([request("loglikelihood", "the class", "")])


def test_scores_are_bit_equal_from_run_to_run(ours):
    requests = choices(9)
    assert ours.loglikelihood(requests) == ours.loglikelihood(requests)
    assert torch.get_num_threads() == 1


def write_harness_task(folder: Path, name: str, rows: list[dict], rest: str) -> None:
    """A task file of lm-evaluation-harness over rows beside it."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
{rest}""")


def run_harness_task(lm, folder: Path, name: str) -> dict:
    """What the harness itself finds with its own tasks left out."""
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(lm, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=True)


def test_a_task_file_of_the_harness_runs_unchanged(ours, theirs, tmp_path):
    rng = random.Random(16)
    rows = [{"q": text(rng, 8), "options": [text(rng, 2), text(rng, 3)], "gold": n % 2} for n in range(12)]
    write_harness_task(
        tmp_path,
        "own_quiz",
        rows,
        """
fewshot_split: test
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "Q: {{q}}\\nA:"
doc_to_choice: "{{options}}"
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    )
    scores = []
    for lm in (ours, theirs):
        found = run_harness_task(lm, tmp_path, "own_quiz")
        scores.append([sample["acc"] for sample in found["samples"]["own_quiz"]])
    assert scores[0] == scores[1]
    assert len(scores[0]) == 12
