"""One look of the loop, with what the monitor says given: which step follows, and what is said of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from fmops.artifacts import Diagnosis, DriftReport
from fmops.feedback.gather import held_out
from fmops.orchestration.events import LineView
from fmops.orchestration.loop import LoopRunner, asked
from fmops.orchestration.project import Project
from fmops.orchestration.rounds import Round, Trigger
from fmops.store import Store
from fmops.traces import FEEDBACK, TRACES, DayLog, Feedback, Trace

NOW = 1_800_000_000.0
SPEC = """\
name: assistant
base: base
data: {corpora: {docs: {source: "docs/*.txt"}}}
pretrain: {tokens: 4096}
loop: {new_files: 100}
"""


class Says:
    """A monitor that has come to a diagnosis, or to none."""

    def __init__(self, cause: str, stage: str) -> None:
        because = ("users ask about other things",)
        found = Diagnosis(cause=cause, stage=stage, because=because, confirm="", refute="") if cause else None
        self.diagnosis = found

    def look(self) -> DriftReport:
        return DriftReport(
            path=Path(), release="release-1", at_s=NOW, answers=900, rates={}, reference={}, levels={}, pictures={},
            golden=None, golden_error=None, alarms=(), diagnosis=self.diagnosis,
        )  # fmt: skip


@pytest.fixture
def project(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "old.txt").write_text("An old text.")
    (tmp_path / "lifecycle.yaml").write_text(SPEC)
    Store(tmp_path / ".fmops").move_aliases({"champion": "release-1"}, expected={}, why="test")
    return tmp_path


def runner(project: Path, cause: str = "", stage: str = "") -> LoopRunner:
    opened = Project.open(project / "lifecycle.yaml")
    return LoopRunner(opened, LineView(io.StringIO()), clock=lambda: NOW, watcher=Says(cause, stage))


def correct(project: Path, count: int, *, users: int) -> None:
    """Corrections of answers to prompts that may be trained on."""
    traces, votes = DayLog(project / ".fmops" / TRACES, Trace), DayLog(project / ".fmops" / FEEDBACK, Feedback)
    prompts = [text for n in range(2000) if not held_out(text := f"What does the part with number {n} do?")]
    for number, prompt in enumerate(prompts[:count]):
        user, at_s = f"u{number % users}", NOW + 900 * number
        trace = Trace(
            id=f"chatcmpl-c{number}", started_s=at_s, tenant="team", user=user, arm="champion", release="release-1",
            operation="chat", status=200, finish_reason="stop", duration_s=1.0, prompt=prompt, response="No idea.",
        )  # fmt: skip
        traces.append(trace, at_s=NOW)
        said = Feedback(id=trace.id, at_s=at_s, tenant="team", user=user, correction=f"Part {number} holds a lamp.")
        votes.append(said, at_s=NOW)


def praise(project: Path, count: int) -> None:
    """Answers to prompts of the hold-out, each praised by somebody else."""
    traces, votes = DayLog(project / ".fmops" / TRACES, Trace), DayLog(project / ".fmops" / FEEDBACK, Feedback)
    prompts = [text for n in range(2000) if held_out(text := f"What does the part with number {n} do?")]
    for number, prompt in enumerate(prompts[:count]):
        trace = Trace(
            id=f"chatcmpl-{number}", started_s=NOW + 900 * number, tenant="team", user=f"u{number}", arm="champion",
            release="release-1", operation="chat", status=200, finish_reason="stop", duration_s=1.0, prompt=prompt,
            response=f"It holds the {number} others.",
        )  # fmt: skip
        traces.append(trace, at_s=NOW)
        votes.append(Feedback(id=trace.id, at_s=NOW + number, tenant="team", user=trace.user, thumb="up"), at_s=NOW)


def test_changed_traffic_leaves_items_that_can_be_evaluated_and_begins_no_round(project):
    praise(project, 34)
    said = runner(project, "traffic changed", "evaluate").look()
    path = project / ".fmops" / "evaluation" / "traffic.yaml"
    assert f"evaluation: 34 items of the new traffic in {path}: `fmops evaluate champion --suite {path}`" in said
    assert len(path.with_suffix(".jsonl").read_text().splitlines()) == 34
    assert said[-1] == "no round: nothing asks for a round"


def test_too_few_held_out_answers_are_counted_until_they_are_enough(project):
    praise(project, 8)
    said = runner(project, "traffic changed", "evaluate").look()
    assert "evaluation: 8 of the 30 held-out answers that new items are made from" in said
    assert not (project / ".fmops" / "evaluation").exists()


def test_a_knowledge_gap_does_not_go_round_in_circles_over_documents_that_were_in_vain(project):
    looking = runner(project, "knowledge gap", "pretrain")
    looking.look()
    (project / "docs" / "new.txt").write_text("A new text.")
    folder = looking.rounds.path(1)
    (folder / "data" / "new" / "docs").mkdir(parents=True)
    (folder / "data" / "new" / "docs" / "new.txt").write_text("A new text.")
    (folder / "feedback").mkdir(exist_ok=True)
    (folder / "feedback" / "counts.json").write_text("{}")
    each = Round(
        number=1, trigger=Trigger(cause="alarm", stage="pretrain", why="knowledge gap"), champion="release-1",
        began_s=NOW, changed_s=NOW - 30 * 3600, phase="ended", outcome="rolled back",
    )  # fmt: skip
    looking.rounds.save(each)
    looking.learnt.ended(each, "rolled back")
    said = looking.look()
    assert said[-1] == "no round: nothing asks for a round"
    assert any(
        line.startswith("documents: round 1 learnt from the 1 new files and ended, rolled back") for line in said
    )


# A test project has no champion to train from: what asks for a round is told all the same.
WHY = "no round: {}. But no artifact 'release-1'"


def test_a_person_asks_and_that_comes_before_every_alarm(project):
    said = runner(project, "behaviour", "instruct").look(ask=asked("align", "people complain"))
    assert said[-1].startswith(WHY.format("people complain"))


def test_an_alarm_of_behaviour_asks_for_tuning_once_two_people_gave_examples(project):
    correct(project, 4, users=1)
    said = runner(project, "behaviour", "instruct").look()[-1]
    assert said.endswith("but one identity wrote all of it: a person decides")
    correct(project, 4, users=2)
    said = runner(project, "behaviour", "instruct").look()[-1]
    assert said.startswith(WHY.format("behaviour: users ask about other things"))


def test_corrections_ask_for_tuning_when_there_are_enough(project):
    correct(project, 49, users=40)
    assert runner(project).look()[-1] == "no round: nothing asks for a round"
    correct(project, 50, users=40)
    assert runner(project).look()[-1].startswith(WHY.format("50 new examples from 40 identities"))


def test_new_files_ask_for_pretraining_and_the_calendar_does_when_anything_is_new(project):
    spec = project / "lifecycle.yaml"
    runner(project).look()
    (project / "docs" / "new.txt").write_text("A new text.")
    assert runner(project).look()[-1] == "no round: nothing asks for a round"
    spec.write_text(SPEC.replace("new_files: 100", "new_files: 100, every_days: 7"))
    assert runner(project).look()[-1].startswith(WHY.format("7 days have passed"))
    spec.write_text(SPEC.replace("new_files: 100", "new_files: 1"))
    assert runner(project).look()[-1].startswith(WHY.format("new files: 1 in docs"))


def test_one_user_with_nearly_all_thumbs_down_starts_nothing(project):
    """Case A12: 95 of 100 votes are one user's, all down, and he corrects each."""
    correct(project, 95, users=1)
    praise(project, 5)
    said = runner(project, "preference", "align").look()
    assert said[-1].endswith("but one identity wrote all of it: a person decides")
    assert "feedback: 91 of 100 rows are set aside: 91 identity-cap" in said


def test_what_stands_beside_infrastructure_begins_its_round(project):
    look = runner(project, "infrastructure", "alert")
    gap = Diagnosis(
        cause="knowledge gap", stage="pretrain", because=("users ask about other things",), confirm="", refute=""
    )
    look.watcher.diagnosis = look.watcher.diagnosis.model_copy(update={"beside": gap})
    said = look.look()
    assert "infrastructure → alert; knowledge gap → pretrain" in said[0]
    assert said[-1].startswith(WHY.format("knowledge gap: users ask about other things"))
