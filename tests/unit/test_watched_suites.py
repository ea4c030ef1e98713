"""Suites scored while a model trains: on items that the gate never asks, kept out of the data, and without a trace."""

from __future__ import annotations

import json
import operator
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_inputs import (
    SUITE,
    a_checkpoint,
    a_corpus,
    questions_of,
    some_benchmarks,
    some_conversations,
    some_preferences,
    some_prompts,
    some_rewards,
    some_votes,
)
from training_run import digests

from fmops.adapters import trainer
from fmops.adapters.guarded import generators
from fmops.adapters.model_files import add_lora, load_model
from fmops.adapters.packing import plan_training
from fmops.adapters.watched_suites import read_watched, with_suites
from fmops.data.contamination import read_contamination
from fmops.errors import FmopsError, SpecMistake
from fmops.evaluation.evaluate import evaluate
from fmops.finetuning.align import align
from fmops.finetuning.instruct import instruct
from fmops.integrity import read_lines
from fmops.jobs import BenchmarksJob, EvaluateJob
from fmops.lifecycle import Align, Instruct, Lifecycle, Pretrain
from fmops.orchestration.graph import build
from fmops.pretraining.pretrain import pretrain
from fmops.stage import StageContext


@pytest.fixture
def benchmarks(tmp_path):
    return some_benchmarks(tmp_path / "pinned", BenchmarksJob(suites=("words.yaml",), watched={"words.yaml": 12}))


def questions(path: Path) -> set[str]:
    return {row["question"] for row in read_lines(path)}


def passages(path: Path) -> set[int]:
    return {row["passage"] for row in read_lines(path)}


def test_no_item_and_no_passage_is_both_watched_and_asked(benchmarks):
    watched, asked = (benchmarks.path / folder / "words-words.jsonl" for folder in ("watched", "items"))
    assert benchmarks.watched == {"words-words": 12}
    assert benchmarks.items == {"words-words": 48}
    assert not passages(watched) & passages(asked)


def test_the_same_items_under_another_task_are_not_asked_either(tmp_path):
    job = BenchmarksJob(suites=("asked.yaml",), watched={"watched.yaml": 12})
    both = some_benchmarks(tmp_path / "pinned", job)
    watched = questions(both.path / "watched" / "watched-words.jsonl")
    assert len(watched) == 12
    assert not watched & questions(both.path / "items" / "asked-words.jsonl")
    assert [entry["task"] for entry in json.loads((both.path / "tasks.json").read_text())] == ["asked-words"]


def test_half_of_few_items_stays_the_gates_and_too_few_are_refused(tmp_path):
    few = some_benchmarks(
        tmp_path / "few", BenchmarksJob(suites=("words.yaml",), watched={"words.yaml": 100}), rows=questions_of(20)
    )
    assert (few.watched, few.items) == ({"words-words": 10}, {"words-words": 10})
    with pytest.raises(FmopsError, match=r"task words-words has 6 items in 3 clusters: too few to set some apart"):
        some_benchmarks(tmp_path / "none", BenchmarksJob(suites=(), watched={"words.yaml": 100}), rows=questions_of(6))


def test_more_items_hold_the_fewer_ones(tmp_path):
    found = [
        questions(
            some_benchmarks(tmp_path / str(n), BenchmarksJob(suites=(), watched={"words.yaml": n})).path
            / "watched/words-words.jsonl"
        )
        for n in (8, 16)
    ]
    assert found[0] < found[1]


def test_watched_items_are_kept_out_of_the_training_data(benchmarks):
    known = read_contamination(benchmarks.path)
    for folder in ("watched", "items"):
        row = read_lines(benchmarks.path / folder / "words-words.jsonl")[0]
        assert known.find(f"Somebody wrote: {row['question']} and so on.") == "words-words"


def test_a_suite_named_like_a_column_of_the_curve_is_refused(tmp_path):
    (tmp_path / "loss.yaml").write_text(SUITE.format(name="loss"))
    with pytest.raises(SpecMistake, match="the suite loss has the name of a column of the curve"):
        graph(tmp_path, pretrain={"tokens": 9, "suites": "loss.yaml"})


SPEC = {
    "name": "watched",
    "base": "base",
    "data": {
        "corpora": {"docs": {"source": "docs"}},
        "conversations": {"source": "talk.jsonl"},
        "preferences": {"source": "pairs.jsonl"},
    },
}


def graph(root: Path, **parts: object):
    (root / "words.yaml").write_text(SUITE.format(name="words"))
    return build(Lifecycle.model_validate({**SPEC, **parts}), root)


def test_training_and_curation_are_given_the_items(tmp_path):
    made = graph(
        tmp_path,
        pretrain={"tokens": 1000, "suites": "words.yaml", "suite_items": 30, "metric": "words", "keep": "best"},
        instruct={"suites": ["words.yaml", "grammar"], "suite_items": 50},
        align={"suites": "grammar", "suite_items": 60},
        evaluate={"suites": ["words.yaml", "capability"], "limit": 20},
    )
    job = made.nodes["benchmarks"].config
    assert isinstance(job, BenchmarksJob)
    assert job.suites == ("words.yaml", "capability")
    assert job.watched == {"words.yaml": 50, "grammar": 60}
    assert set(job.texts) == {"capability", "grammar"}
    assert made.nodes["benchmarks"].sources["suite_0"] == ("words.yaml",)
    assert {"items_words_words", "items_blimp", "items_piqa"} <= made.nodes["benchmarks"].sources.keys()
    for name in ("corpus", "conversations", "preferences", "pretrain", "instruct", "align"):
        assert made.nodes[name].artifacts["benchmarks"] == "benchmarks"
    plain = graph(tmp_path, pretrain={"tokens": 1000}, evaluate={"suites": ["words.yaml"]})
    assert "benchmarks" not in plain.nodes["pretrain"].artifacts


@pytest.mark.parametrize(
    ("parts", "at", "said"),
    [
        (
            {"pretrain": {"tokens": 9, "metric": "grammer", "suites": "grammar"}},
            ("pretrain", "metric"),
            "unknown pretrain.metric 'grammer'. Did you mean 'grammar'? Known: grammar, new_bits_per_byte, "
            "old_bits_per_byte.",
        ),
        (
            {"instruct": {"metric": "new_bits_per_byte"}},
            ("instruct", "metric"),
            "unknown instruct.metric 'new_bits_per_byte'. Known: held_out_loss.",
        ),
        (
            {"pretrain": {"tokens": 9, "suites": "domain"}},
            ("pretrain", "suites", "domain"),
            "pretrain.suites: the suite domain is made from held-out documents, whose loss is measured in any case. "
            "Drop it.",
        ),
        (
            {"instruct": {"suites": "garak"}},
            ("instruct", "suites", "garak"),
            "instruct.suites: the suite garak is asked by an outside framework at an endpoint. Leave it to "
            "evaluate.suites.",
        ),
        (
            {"align": {"method": "kto", "metric": "preference_accuracy"}},
            ("align", "metric"),
            "unknown align.metric 'preference_accuracy'. Did you mean 'vote_accuracy'? Known: vote_accuracy.",
        ),
        (
            {"instruct": {"suites": "gramar"}},
            ("instruct", "suites", "gramar"),
            "unknown suite 'gramar'. Did you mean 'grammar'?",
        ),
    ],
)
def test_what_training_cannot_measure_is_refused_before_anything_runs(parts, at, said, tmp_path):
    with pytest.raises(SpecMistake) as caught:
        graph(tmp_path, **parts)
    assert caught.value.at == at
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"pretrain": {"tokens": 9, "framework": "torchtitan", "suites": "grammar"}}, "torchtitan has no suites"),
        ({"instruct": {"framework": "llama-factory", "suites": "grammar"}}, "llama-factory has no suites"),
    ],
)
def test_a_framework_with_a_loop_of_its_own_scores_none(parts, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        graph(tmp_path, **parts)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_score_is_that_of_evaluation_and_nothing_is_left_behind(adapter, benchmarks, tiny_model, tmp_path, context):
    from fmops.adapters.document_attention import ATTENTION, attend_by_document
    from fmops.adapters.linear_loss import learn_without_logits

    # The watched items as the ones that are evaluated.
    same = tmp_path / "same"
    (same / "items").mkdir(parents=True)
    (same / "tasks.json").write_text(
        json.dumps(json.loads((benchmarks.path / "watched.json").read_text())["words.yaml"])
    )
    (same / "items/words-words.jsonl").write_bytes((benchmarks.path / "watched/words-words.jsonl").read_bytes())
    (tmp_path / "report").mkdir()
    report = evaluate(
        EvaluateJob(),
        checkpoint=a_checkpoint(tmp_path / "base", tiny_model),
        benchmarks=benchmarks.model_copy(update={"path": same}),
        out=tmp_path / "report",
        context=context,
    )
    bare = load_model(tiny_model)
    attend_by_document(bare, note=lambda _: None)
    learn_without_logits(bare, note=lambda _: None)
    model = add_lora(bare, rank=4) if adapter == "lora" else bare
    model.train()
    config = Pretrain(tokens=1, suites=("words.yaml",), suite_items=12, metric="words")
    watch = a_watch(lambda _: {"loss": 1.0}, context, best="words")
    with_suites(watch, config, benchmarks, source=tiny_model, context=context)
    measure = watch.evaluate
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = generators()
    assert measure(model) == {"loss": 1.0, "words": report.metrics[0].value}
    assert watch.better is operator.gt
    assert model.training
    assert bare.config._attn_implementation == ATTENTION
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert (random.getstate(), torch.random.get_rng_state().tolist()) == (drawn["python"], drawn["cpu"].tolist())
    assert np.array_equal(np.random.get_state()[1], drawn["numpy"][1])  # type: ignore[call-overload]
    # Other weights give another answer: nothing is remembered of the first ones.
    with torch.no_grad():
        bare.get_output_embeddings().weight.mul_(-1.0)
    assert measure(model)["words"] != report.metrics[0].value


def a_watch(evaluate: trainer.Measure, context: StageContext, *, best: str | None) -> trainer.Watch:
    plan = plan_training([8], tokens=8, batch_tokens=8, seed=0)
    return trainer.Watch(
        plan=plan, context=context, evaluate=evaluate, evaluate_at=frozenset(), save_at=frozenset(), best=best
    )


def test_a_stage_takes_no_more_items_than_it_names(benchmarks):
    [(_, documents)] = read_watched(Instruct(suites=("words.yaml",), suite_items=5), benchmarks, seed=7)
    assert len(documents) == 5


CONFIG = Pretrain(
    tokens=1536, batch_tokens=128, learning_rate=3e-3, evaluations=12, checkpoints=12, keep="best", metric="words",
    suites=("words.yaml",), suite_items=12, tuning="full",
)  # fmt: skip


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def test_training_keeps_the_weights_that_score_best_and_a_killed_run_ends_with_the_same_bytes(
    benchmarks, tiny_model, tmp_path, context, monkeypatch
):
    given = {
        "checkpoint": a_checkpoint(tmp_path / "base", tiny_model),
        "corpus": a_corpus(tmp_path / "corpus", tiny_model),
        "benchmarks": benchmarks,
    }
    context.seed = 7
    trained = pretrain(CONFIG, **given, out=tmp_path / "whole", context=context)
    rows = curve(tmp_path / "whole")
    scores = {row["step"]: row["words"] for row in rows if "words" in row}
    assert len(scores) == 13
    assert len(set(scores.values())) > 1
    assert trained.metrics["words_after"] == max(scores.values()) > trained.metrics["words_before"]
    events = [json.loads(line) for line in context.stream.getvalue().splitlines()]
    assert [event["shown"]["words"] for event in events if event["event"] == "progress"][-1] == rows[-1]["words"]
    assert {event["step"] for event in events if event["event"] == "metrics" and "words" in event["values"]} == set(
        scores
    )
    real = trainer.Watch.on_step_end

    class Killed(Exception):
        pass

    def interrupted(self, args, state, *rest, **named):
        if state.global_step == 7:
            raise Killed
        return real(self, args, state, *rest, **named)

    monkeypatch.setattr(trainer.Watch, "on_step_end", interrupted)
    with pytest.raises(Killed):
        pretrain(CONFIG, **given, out=tmp_path / "cut", context=context)
    monkeypatch.undo()
    pretrain(CONFIG, **given, out=tmp_path / "cut", context=context)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_watching_changes_no_weight(benchmarks, tiny_model, tmp_path, context):
    given = {
        "checkpoint": a_checkpoint(tmp_path / "base", tiny_model),
        "corpus": a_corpus(tmp_path / "corpus", tiny_model),
        "context": context,
    }
    seen = CONFIG.model_copy(update={"keep": "last", "tokens": 512})
    blind = seen.model_copy(update={"suites": ()})
    watched = pretrain(seen, **given, benchmarks=benchmarks, out=tmp_path / "seen")
    alone = pretrain(blind, **given, out=tmp_path / "blind")
    assert (watched.model / "model.safetensors").read_bytes() == (alone.model / "model.safetensors").read_bytes()


def test_patience_counts_scores_the_higher_the_better(benchmarks, tiny_model, tmp_path, context, monkeypatch):
    from fmops.adapters import watched_suites

    given = iter([0.5, 0.7, 0.6, 0.7, 0.9])

    def scripted(watch: trainer.Watch, *_: object, **__: object) -> None:
        watch.evaluate, watch.better = lambda _: {"words": next(given)}, operator.gt

    monkeypatch.setattr(watched_suites, "with_suites", scripted)
    tuned = instruct(
        Instruct(
            adapter="full", batch_tokens=150, block_tokens=150, evaluations=8, keep="best", patience=2, metric="words",
            suites=("words.yaml",),
        ),
        checkpoint=a_checkpoint(tmp_path / "base", tiny_model),
        conversations=some_conversations(tmp_path / "talk"),
        benchmarks=benchmarks,
        out=tmp_path / "out",
        context=context,
    )  # fmt: skip
    rows = [row for row in curve(tmp_path / "out") if "words" in row]
    assert [row["words"] for row in rows] == [0.5, 0.7, 0.6, 0.7]
    assert (tuned.metrics["words_before"], tuned.metrics["words_after"]) == (0.5, 0.7)
    assert "it got no better" in context.stream.getvalue()


ALIGNED = {
    "dpo": (some_preferences, "preference_accuracy"),
    "orpo": (some_preferences, "preference_accuracy"),
    "kto": (some_votes, "vote_accuracy"),
    "grpo": (some_prompts, "held_out_reward"),
}


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("method", ALIGNED)
def test_alignment_scores_suites_and_keeps_the_best_weights(
    method, adapter, benchmarks, tiny_model, tmp_path, context, monkeypatch
):
    examples, own = ALIGNED[method]
    grpo = {"reward": {"rewards.py:brief": 1.0}, "answers": 2, "answer_tokens": 4} if method == "grpo" else {}
    config = Align(
        method=method, adapter=adapter, learning_rate=3e-3, batch_pairs=4, max_tokens=160, evaluations=3,
        suites=("words.yaml",), suite_items=12, keep="best", metric="words", **grpo,
    )  # fmt: skip
    given = {
        "checkpoint": a_checkpoint(tmp_path / "base", tiny_model),
        "preferences": examples(tmp_path / "examples", train=12),
        "rewards": some_rewards(tmp_path / "rewards") if grpo else None,
        "context": context,
    }
    made = align(config, **given, benchmarks=benchmarks, out=tmp_path / "seen")
    rows = [row for row in curve(tmp_path / "seen") if "words" in row]
    assert len(rows) == 4
    assert all(own in row for row in rows)
    best = max(row["words"] for row in rows)
    assert made.metrics["words_after"] == best
    assert made.metrics["words_before"] == rows[0]["words"]
    # To watch changes no weight: the last ones are those of a run that measures at its end alone.
    last = config.model_copy(update={"keep": "last", "metric": None})
    blind = last.model_copy(update={"suites": (), "evaluations": 1})
    weights = [
        align(each, **given, benchmarks=brought, out=tmp_path / name).model / "model.safetensors"
        for name, each, brought in (("last", last, benchmarks), ("blind", blind, None))
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_alignment_keeps_what_answers_held_out_pairs_best(tiny_model, tmp_path, context, monkeypatch):
    from fmops.adapters import trl_dpo

    given = iter([0.5, 0.75, 0.6, 0.7, 0.9])
    monkeypatch.setattr(trl_dpo, "preference_accuracy", lambda _: {"preference_accuracy": next(given)})
    aligned = align(
        Align(batch_pairs=2, learning_rate=1e-3, evaluations=12, keep="best", patience=2),
        checkpoint=a_checkpoint(tmp_path / "base", tiny_model),
        preferences=some_preferences(tmp_path / "pairs"),
        out=tmp_path / "out",
        context=context,
    )
    rows = [row for row in curve(tmp_path / "out") if "preference_accuracy" in row]
    assert [row["preference_accuracy"] for row in rows] == [0.5, 0.75, 0.6, 0.7]
    assert "it got no better: the weights of step 1 are kept" in context.stream.getvalue()
    assert aligned.metrics["held_out_pairs"] > 0


def test_held_out_votes_of_one_kind_can_choose_no_weights(tiny_model, tmp_path, context):
    votes = some_votes(tmp_path / "votes")
    held_out = votes.path / "held_out.jsonl"
    liked = [line for line in held_out.read_text().splitlines() if json.loads(line)["label"]]
    held_out.write_text("".join(line + "\n" for line in liked))
    with pytest.raises(FmopsError, match="too few or too alike to tell vote_accuracy"):
        align(
            Align(method="kto", keep="best"),
            checkpoint=a_checkpoint(tmp_path / "base", tiny_model),
            preferences=votes,
            out=tmp_path / "out",
            context=context,
        )
