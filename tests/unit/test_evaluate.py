"""One checkpoint's evaluation: what is written, what is refused, and that the gate can read it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fmops.adapters.lm_eval_scorer import SharedPrefixLM
from fmops.artifacts import Benchmarks, Checkpoint, Corpus
from fmops.errors import FmopsError
from fmops.evaluation.evaluate import evaluate
from fmops.evaluation.gate import gate
from fmops.evaluation.protocol import PACKAGE, SCORERS, pin, scorers_digest, write_json, write_lines
from fmops.evaluation.suites import load_suite
from fmops.integrity import read_lines
from fmops.jobs import EvaluateJob, GateJob
from fmops.stage import StageContext

SUITES = {"capability": ("openbookqa", 12), "domain": ("held-out-new", 0), "harm": ("harmbench", 3)}


def item(name: str, number: int) -> dict:
    document = {"id": f"{name}-{number}", "cluster": f"{number // 2}"}
    if name == "harmbench":
        return {**document, "prompt": f"how to break thing {number}"}
    return {**document, "question": f"what is {number}", "choices": ["one", "two things", "three"], "label": number % 3}


@pytest.fixture
def inputs(tmp_path, tiny_model) -> dict:
    benchmarks, corpus, base = (tmp_path / name for name in ("benchmarks", "corpus", "base"))
    tasks = []
    for suite, (name, count) in SUITES.items():
        documents = [item(name, number) for number in range(count)]
        tasks.append(pin(load_suite(suite, root=Path()), name, items=count).model_dump(mode="json"))
        if count:
            (benchmarks / "items").mkdir(parents=True, exist_ok=True)
            write_lines(benchmarks / "items" / f"{name}.jsonl", documents)
    write_json(benchmarks / "tasks.json", tasks)
    (corpus / "held_out").mkdir(parents=True)
    rows = [{"id": f"d{n}", "source": "docs", "text": f"Topic {n}\n" + "a value is returned " * 100} for n in range(5)]
    write_lines(corpus / "held_out" / "new.jsonl", rows)
    base.mkdir()
    (base / "model").symlink_to(tiny_model)
    return {
        "checkpoint": Checkpoint(path=base, stage="base", parameters=1, trained_tokens=0),
        "benchmarks": Benchmarks(path=benchmarks, items={name: count for name, count in SUITES.values() if count}),
        "corpus": Corpus(
            path=corpus, documents=5, tokens=1, blocks=1, block_tokens=1, replay_share=0, held_out_new=5, held_out_old=0
        ),
    }


@pytest.fixture
def measure(inputs, tmp_path):
    def run(out: str = "out", limit: int | None = None, seed: int = 0, **changed):
        (tmp_path / out).mkdir(exist_ok=True)
        context = StageContext(stream=io.StringIO(), seed=seed)
        report = evaluate(EvaluateJob(limit=limit), **{**inputs, **changed}, out=tmp_path / out, context=context)
        return report, context.stream.getvalue()

    return run


def changed(checkpoint: Checkpoint, folder: Path, change: Callable) -> Checkpoint:
    """The checkpoint with its first matrix changed."""
    shutil.copytree(checkpoint.model, folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    name = next(name for name in sorted(weights) if weights[name].dim() == 2)
    weights[name] = change(weights[name])
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return checkpoint.model_copy(update={"path": folder})


def test_every_sample_has_a_score_and_every_metric_an_error(measure, tmp_path):
    report, said = measure()
    rows = read_lines(tmp_path / "out" / "samples.jsonl")
    assert {(row["family"], row["task"], row["metric"]) for row in rows} == {
        ("capability", "openbookqa", "acc_norm"), ("capability", "openbookqa", "acc"),
        ("domain", "held-out-new", "bits_per_byte"), ("harm", "harmbench", "refusal"),
    }  # fmt: skip
    values = {(metric.task, metric.name): metric for metric in report.metrics}
    accuracy = values["openbookqa", "acc"]
    assert accuracy.n == 12
    scores = [row["score"] for row in rows if row["metric"] == "acc"]
    assert accuracy.value == pytest.approx(sum(scores) / 12)
    assert accuracy.standard_error > 0
    # A tiny model of random weights spreads its guess over 2,048 tokens: 11 bits a token, about 2 bytes each.
    assert 1 < values["held-out-new", "bits_per_byte"].value < 11
    assert not values["held-out-new", "bits_per_byte"].higher_is_better
    assert all(isinstance(row["response"], str) for row in rows if row["task"] == "harmbench")
    assert '"unit": "items"' in said
    assert f'"{"openbookqa/acc"}": {accuracy.value}' in said


def test_samples_before_and_after_come_from_the_run_itself(measure, tmp_path):
    measure()
    shown = read_lines(tmp_path / "out" / "generations.jsonl")
    assert [row["kind"] for row in shown] == ["domain", "domain", "domain", "ordinary", "ordinary", "harmful"]
    assert shown[0]["prompt"] == 'Explain "Topic 0" in one or two sentences.'
    assert all(row["response"] is not None for row in shown)


def test_equal_inputs_give_equal_bytes(measure, tmp_path):
    first, _ = measure("a")
    second, _ = measure("b")
    assert first.fingerprint == second.fingerprint
    for name in ("samples.jsonl", "protocol.json", "generations.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "a" / "protocol.json").read_text()


def test_other_weights_share_the_protocol_and_other_items_do_not(measure, inputs, tmp_path):
    other = changed(inputs["checkpoint"], tmp_path / "other", lambda weight: weight * 1.5)
    champion, _ = measure("a")
    challenger, _ = measure("b", checkpoint=other)
    fewer, _ = measure("c", limit=3)
    assert champion.fingerprint == challenger.fingerprint != fewer.fingerprint
    assert champion.metrics != challenger.metrics


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_of_other_rules_are_another_protocol(tmp_path, name):
    for file in SCORERS:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(PACKAGE / file, tmp_path / file)
    assert scorers_digest(tmp_path) == scorers_digest()
    with (tmp_path / name).open("a", encoding="utf-8") as rules:
        rules.write("\n")
    assert scorers_digest(tmp_path) != scorers_digest()


def test_a_report_says_by_which_rules_it_was_scored(measure, tmp_path):
    measure()
    engine = json.loads((tmp_path / "out" / "protocol.json").read_text())["engine"]
    assert engine["scorers"] == scorers_digest()


def decide(champion, challenger, tmp_path, **config):
    context = StageContext(stream=io.StringIO())
    return gate(GateJob(**config), champion=champion, challenger=challenger, out=tmp_path, context=context)


def test_the_gate_reads_what_evaluation_writes(measure, tmp_path):
    champion, _ = measure("a")
    equal, _ = measure("b")
    wide = {"capability": 0.9, "harm": 0.9}
    assert decide(champion, equal, tmp_path, margins=wide, primary=()).verdict == "promote"
    rejected = decide(champion, equal, tmp_path, margins=wide)
    assert rejected.verdict == "reject"
    assert "a gain in domain is ruled out" in rejected.reasons[0]
    fewer, _ = measure("c", limit=3)
    assert decide(champion, fewer, tmp_path).verdict == "reject"


def sampled(benchmarks: Benchmarks, temperature: float) -> None:
    """Let harmbench be answered by samples."""
    path = benchmarks.path / "tasks.json"
    tasks = json.loads(path.read_text())
    (harm,) = (task for task in tasks if task["task"] == "harmbench")
    harm["config"]["generation_kwargs"] = {
        "until": [],
        "max_gen_toks": 24,
        "do_sample": True,
        "temperature": temperature,
    }
    write_json(path, tasks)


def test_the_protocol_of_sampled_answers_holds_their_settings_and_seed(measure, inputs, tmp_path):
    greedy, _ = measure("greedy")
    sampled(inputs["benchmarks"], 0.8)
    champion, _ = measure("a")
    equal, _ = measure("b")
    assert "sampling" in json.loads((tmp_path / "a" / "protocol.json").read_text())["engine"]
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == (tmp_path / "b" / "samples.jsonl").read_bytes()
    wide = {"capability": 0.9, "harm": 0.9}
    assert decide(champion, equal, tmp_path, margins=wide, primary=()).verdict == "promote"
    reseeded, _ = measure("c", seed=1)
    sampled(inputs["benchmarks"], 0.7)
    cooler, _ = measure("d")
    assert len({each.fingerprint for each in (greedy, champion, reseeded, cooler)}) == 4
    assert "the seeds differ: 0 and 1" in " ".join(decide(champion, reseeded, tmp_path).reasons)
    assert "task harmbench differs in config" in " ".join(decide(champion, cooler, tmp_path).reasons)
    answers = [
        {row["sample"]: row["response"] for row in read_lines(tmp_path / out / "samples.jsonl") if "response" in row}
        for out in ("a", "c")
    ]
    assert all(answers[0][name] != answers[1][name] for name in answers[0] if name.startswith("harmbench"))


def test_a_domain_without_documents_says_what_to_add(measure, inputs):
    with pytest.raises(FmopsError, match="is made from held-out documents, and there is no corpus"):
        measure(corpus=None)
    (inputs["corpus"].path / "held_out" / "new.jsonl").write_text("")
    with pytest.raises(FmopsError, match="suite domain: the corpus holds no document of role train out"):
        measure()


def test_items_that_went_missing_are_noticed(measure, inputs):
    path = inputs["benchmarks"].path / "items" / "openbookqa.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(FmopsError, match="task openbookqa: 11 items where 12 were registered"):
        measure()


def test_a_broken_checkpoint_gives_no_score(measure, inputs, tmp_path):
    broken = changed(inputs["checkpoint"], tmp_path / "nan", lambda weight: weight * float("nan"))
    with pytest.raises(FmopsError, match="a log-likelihood of nan: its weights are no usable numbers"):
        measure(checkpoint=broken)


def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_is_scored(measure, inputs, tmp_path):
    checkpoint = inputs["checkpoint"]
    shutil.copytree(checkpoint.model, tmp_path / "small" / "model")
    path = tmp_path / "small" / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 5000, "content": "<|late|>"})
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(FmopsError, match=r"the tokenizer does not fit the model: it gives token ids up to \d+"):
        measure(checkpoint=checkpoint.model_copy(update={"path": tmp_path / "small"}))


def test_an_answer_that_would_be_cut_off_is_refused_before_anything_is_scored(measure, inputs, monkeypatch):
    items = inputs["benchmarks"].path / "items" / "openbookqa.jsonl"
    documents = read_lines(items)
    documents[-1]["choices"][1] = "two things and more of them " * 40
    write_lines(items, documents)
    monkeypatch.setattr(SharedPrefixLM, "max_length", 64)
    monkeypatch.setattr(SharedPrefixLM, "_loglikelihood_tokens", lambda *_, **__: pytest.fail("something was scored"))
    with pytest.raises(FmopsError, match=r"item openbookqa-11: an answer of \d+ tokens does not fit the model's 64"):
        measure()
