"""Two reports side by side: which items moved, and on which kinds of items the second model is weak."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmops.artifacts import EvalReport
from fmops.errors import IntegrityError
from fmops.evaluation.compare import Moved, fairly, lay_side_by_side
from fmops.evaluation.protocol import PinnedTask, Protocol, prompts_digest, write_json, write_lines
from fmops.evaluation.suites import TaskConfig
from fmops.integrity import sha256
from fmops.orchestration.compare import compare
from fmops.orchestration.project import Project
from fmops.store import FileEntry, InputRef, Record

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


def test_where_no_right_or_wrong_item_moved_the_interval_is_as_wide_as_a_family_s(tmp_path, items):
    found = lay_side_by_side(report(tmp_path / "a", [1.0] * 60), report(tmp_path / "b", [1.0] * 60), items)
    (task,) = found.tasks
    # Tango's with no discordant pair: ±z²/(n + z²).
    assert (task.lower, task.upper) == (pytest.approx(-0.0602, abs=1e-4), pytest.approx(0.0602, abs=1e-4))


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


@pytest.mark.parametrize("higher", [True, False])
def test_the_weakest_kind_comes_first_whichever_way_the_scores_run(tmp_path, items, higher):
    # Law is far off the others, music a little; more is worse or better, as the task says.
    off = {"physics": 0.0, "music": 0.3, "law": 3.0}
    sign = -1 if higher else 1
    scores = [5.0 + sign * off[SUBJECTS[n % 3]] + 0.1 * (n % 7) for n in range(60)]
    before, after = (report(tmp_path / name, scores, higher=higher) for name in ("a", "b"))
    found = lay_side_by_side(before, after, items)
    assert found.slices[0].name == "subject: law"


def test_no_task_hides_the_moved_items_of_another():
    moved = [Moved(task, f"{task}-{n}", "", "0", "1", size * (n + 1)) for task, size in (("a", 1.0), ("z", 0.001))
             for n in range(20)]  # fmt: skip
    shown = fairly(moved, 10)
    assert [each.sample for each in shown] == [f"{task}-{n}" for task in "az" for n in (19, 18, 17, 16, 15)]
    few = [each for each in moved if each.task == "a" or each.sample == "z-3"]
    assert [each.task for each in fairly(few, 10)] == ["a"] * 9 + ["z"]


def test_without_items_there_are_no_kinds_and_the_rest_is_told(tmp_path):
    found = lay_side_by_side(report(tmp_path / "a", [1.0] * 60), report(tmp_path / "b", [0.0] * 60), None)
    assert found.slices == ()
    assert len(found.moved) == 60


def keep(project: Project, folder: Path, kind: str, *, artifact: dict, **inputs: str) -> None:
    """Commit a folder of the store as what a stage left."""
    stage, _, letter = folder.name.partition("-")
    project.store.commit(Record(
        node=f"{stage}-{letter[0]}", stage=stage, kind=kind, version=1, fingerprint=letter * 4, digest="d", seed=0,
        config={}, artifact=artifact, created=letter,
        files={path.name: FileEntry(sha256=sha256(path), bytes=path.stat().st_size) for path in folder.iterdir()},
        inputs={name: InputRef(kind="artifact", ref=ref, digest="d") for name, ref in inputs.items()},
    ))  # fmt: skip


@pytest.fixture
def project(tmp_path) -> Project:
    """Two evaluations of equal scores by the suite `quiz` alone, where the spec asks for a gain in domain."""
    (tmp_path / "lifecycle.yaml").write_text(
        "name: tiny\nbase: base\ndata: {corpora: {docs: {source: docs.txt}}}\npretrain: {tokens: 1000}\n"
        "evaluate: {suites: [domain]}\ngate: {}\n", encoding="utf-8",
    )  # fmt: skip
    opened = Project.open(tmp_path / "lifecycle.yaml")
    data = opened.store.artifacts / f"conversations-{'c' * 16}"
    data.mkdir(parents=True)
    write_lines(data / "contaminated.jsonl", [])
    keep(opened, data, "conversations", artifact={"conversations": 1, "held_out": 0})
    for letter in "ab":
        made = report(opened.store.artifacts / f"evaluate-{letter * 16}", [1.0] * 100)
        artifact = made.model_dump(mode="json", exclude={"path"})
        keep(opened, made.path, "evaluation", artifact=artifact, checkpoint=data.name)
    return opened


def test_a_primary_family_that_was_not_measured_rejects_as_in_the_gate(project):
    compared = compare(project, "evaluate-a", "evaluate-b")
    assert compared.exit_code == 3
    assert compared.decision.reasons == (
        "the primary family domain was not measured: add a suite for it, or change gate.primary",
    )
    assert compared.comparison is not None, "what was measured is shown"


def test_a_spec_without_a_gate_asks_for_no_gain(project):
    path = project.spec_path
    path.write_text(path.read_text(encoding="utf-8").replace("gate: {}\n", ""), encoding="utf-8")
    assert compare(Project.open(path), "evaluate-a", "evaluate-b").exit_code == 0


def test_an_altered_evaluation_is_not_compared(project):
    path = project.store.artifacts / f"evaluate-{'b' * 16}" / "samples.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"score": 1.0', '"score": 0.9', 1), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"samples\.jsonl is not what its record says"):
        compare(project, "evaluate-a", "evaluate-b")


def test_nobody_leaves_items_out_by_an_altered_list_of_those_that_were_trained_on(project):
    listed = [{"task": "quiz", "sample": f"quiz-{n}"} for n in range(50)]
    write_lines(project.store.artifacts / f"conversations-{'c' * 16}" / "contaminated.jsonl", listed)
    with pytest.raises(IntegrityError, match=r"contaminated\.jsonl is not what its record says"):
        compare(project, "evaluate-a", "evaluate-b")
