"""Two reports side by side: which items moved, and on which kinds of items the second model is weak."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmops.artifacts import EvalReport
from fmops.evaluation.compare import lay_side_by_side
from fmops.evaluation.protocol import PinnedTask, Protocol, prompts_digest, write_json, write_lines
from fmops.evaluation.suites import TaskConfig

SUBJECTS = ("physics", "law", "music")


def report(folder: Path, scores: list[float], *, higher: bool = True) -> EvalReport:
    folder.mkdir()
    rows = [
        {"family": "quiz", "suite": "quiz", "task": "quiz", "sample": f"quiz-{n}", "cluster": str(n), "metric": "acc",
         "score": score, "prompt_sha256": str(n), "response": f"answer {score:g}"}
        for n, score in enumerate(scores)
    ]  # fmt: skip
    task = PinnedTask(
        task="quiz", suite="quiz", family="quiz", margin=0.1, unit="accuracy", higher_is_better=higher,
        metrics=("acc",), chat=False, corpus=None, characters=None, items=len(rows), licence="MIT",
        config=TaskConfig(output_type="multiple_choice", doc_to_choice="choices", doc_to_target="label"),
    )  # fmt: skip
    protocol = Protocol(tasks=(task,), engine={}, template_sha256=None, prompts_sha256=prompts_digest(rows), seed=0)
    write_lines(folder / "samples.jsonl", rows)
    write_json(folder / "protocol.json", protocol.model_dump(mode="json"))
    return EvalReport(path=folder, metrics=(), fingerprint=protocol.fingerprint)


@pytest.fixture
def items(tmp_path) -> Path:
    folder = tmp_path / "items"
    folder.mkdir()
    write_lines(folder / "quiz.jsonl", (
        {"id": f"quiz-{n}", "cluster": str(n), "subject": SUBJECTS[n % 3], "question": f"Question {n}?"}
        for n in range(60)
    ))  # fmt: skip
    return folder


def test_moved_items_come_with_question_answers_and_direction(tmp_path, items):
    before = report(tmp_path / "a", [1.0] * 60)
    after = report(tmp_path / "b", [0.0, *[1.0] * 59])
    found = lay_side_by_side(before, after, items)
    (moved,) = found.moved
    assert "Question 0?" in moved.prompt
    assert (moved.before, moved.after, moved.difference) == ("1: answer 1", "0: answer 0", -1.0)
    (task,) = found.tasks
    assert (task.before, task.n) == (1.0, 60)
    assert task.difference == pytest.approx(-1 / 60)
    assert task.lower < task.difference < task.upper


def test_where_less_is_better_a_fall_is_a_gain(tmp_path, items):
    found = lay_side_by_side(
        report(tmp_path / "a", [2.0] * 60, higher=False), report(tmp_path / "b", [1.0] * 60, higher=False), items
    )
    assert found.tasks[0].difference == 1.0
    assert all(moved.difference == 1.0 for moved in found.moved)


def test_the_weakest_kind_of_item_comes_first_with_its_count(tmp_path, items):
    # Law fails eighteen times of twenty, the others twice of twenty.
    scores = [float(n >= 54) if SUBJECTS[n % 3] == "law" else float(n >= 6) for n in range(60)]
    found = lay_side_by_side(report(tmp_path / "a", [1.0] * 60), report(tmp_path / "b", scores), items)
    first = found.slices[0]
    assert (first.name, first.n) == ("subject: law", 20)
    assert first.value == pytest.approx(0.1)
    assert first.rest == pytest.approx(0.9)
    assert not any(each.name.startswith("subject: music") for each in found.slices)
    assert not any(each.name.startswith("question") for each in found.slices)  # names an item, no kind of them


def test_without_items_there_are_no_kinds_and_the_rest_is_told(tmp_path):
    found = lay_side_by_side(report(tmp_path / "a", [1.0] * 60), report(tmp_path / "b", [0.0] * 60), None)
    assert found.slices == ()
    assert len(found.moved) == 60
