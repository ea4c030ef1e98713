"""When a round begins by itself, when it waits, and from what it learns."""

from __future__ import annotations

import pytest

from fmops.errors import FmopsError
from fmops.lifecycle import read_lifecycle
from fmops.orchestration.learnt import Learnt
from fmops.orchestration.project import Project
from fmops.orchestration.round_spec import EARLIER, trained, write_round
from fmops.orchestration.rounds import WEEK_S, Round, Rounds, Trigger, decide
from fmops.production import Loop
from fmops.sources import resolve
from fmops.store import Store, write_atomically

NOW = 1_800_000_000.0
HOUR = 3600.0
NEW_DATA = Trigger(cause="new data", stage="pretrain", why="new files: 3 in docs")
FEEDBACK = Trigger(cause="feedback", stage="instruct", why="60 new examples", identities=12)
PERSON = Trigger(cause="person", stage="align", why="asked for")
SPEC = """\
name: assistant
base: base
data:
  corpora:
    docs: {source: "docs/*.txt"}
    general: {source: general.jsonl, role: replay, weight: 0.2}
  conversations: {source: conversations.jsonl}
pretrain: {tokens: 4096, learning_rate: 2e-3}
instruct: {adapter: lora, epochs: 2}
evaluate: {suites: [quiz.yaml, domain], limit: 10}
gate: {alpha: 0.1, primary: [domain]}
"""
PLAIN = SPEC.replace("quiz.yaml, ", "")
"""The same without a suite file of its own."""


def ended(number: int, *, hours_ago: float, cause: str = "new data") -> Round:
    at = NOW - hours_ago * HOUR
    trigger = NEW_DATA.model_copy(update={"cause": cause})
    return Round(
        number=number, trigger=trigger, champion="release-1", began_s=at, changed_s=at, phase="ended",
        outcome="promoted",
    )  # fmt: skip


def test_new_data_begin_a_round():
    assert decide((NEW_DATA, FEEDBACK), (), Loop(), NOW).trigger == NEW_DATA


def test_without_a_reason_there_is_no_round():
    assert decide((), (), Loop(), NOW).reason == "nothing asks for a round"


@pytest.mark.parametrize("phase", ["waiting for approval", "training", "rolling out"])
def test_one_round_at_a_time_whoever_asks(phase):
    open_round = ended(4, hours_ago=1).model_copy(update={"phase": phase, "outcome": None})
    decision = decide((PERSON,), (open_round,), Loop(), NOW)
    assert (decision.trigger, decision.reason) == (None, f"round 4 is {phase}")


def test_it_cools_down_after_a_round_and_says_for_how_long():
    decision = decide((NEW_DATA,), (ended(1, hours_ago=20),), Loop(), NOW)
    assert decision.trigger is None
    assert decision.reason == "new files: 3 in docs, but it cools down for another 4.0 h"
    assert decide((NEW_DATA,), (ended(1, hours_ago=25),), Loop(), NOW).trigger == NEW_DATA


def test_automatic_rounds_have_a_weekly_budget_that_a_persons_do_not_spend():
    rounds = (ended(1, hours_ago=100), ended(2, hours_ago=60), ended(3, hours_ago=30, cause="person"))
    assert "the budget is spent: 2 of 2 automatic rounds" in decide((NEW_DATA,), rounds, Loop(), NOW).reason
    assert decide((NEW_DATA,), rounds, Loop(rounds_per_week=3), NOW).trigger == NEW_DATA
    assert decide((NEW_DATA,), rounds, Loop(), NOW + WEEK_S).trigger == NEW_DATA
    assert decide((NEW_DATA,), (), Loop(rounds_per_week=0), NOW).trigger is None


def test_a_person_passes_budget_and_cool_down():
    rounds = (ended(1, hours_ago=2), ended(2, hours_ago=1))
    assert decide((PERSON, NEW_DATA), rounds, Loop(), NOW).trigger == PERSON


def test_one_voice_alone_starts_nothing():
    alone = FEEDBACK.model_copy(update={"identities": 1})
    assert decide((alone,), (), Loop(), NOW).reason.endswith("one identity wrote all of it: a person decides")


def test_rounds_are_kept_in_order_and_a_broken_one_is_named(tmp_path):
    rounds = Rounds(tmp_path)
    for number in (2, 1):
        rounds.save(ended(number, hours_ago=1))
    assert [each.number for each in rounds.all()] == [1, 2]
    (rounds.path(1) / "round.json").write_text("{}")
    with pytest.raises(FmopsError, match=r"0001/round.json is no round: .* Move the folder 0001 away"):
        rounds.all()


@pytest.fixture
def project(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("old-1", "old-2", "new-1"):
        (tmp_path / "docs" / f"{name}.txt").write_text(f"Text of {name}.")
    (tmp_path / "lifecycle.yaml").write_text(SPEC)
    return tmp_path


def files(project, pattern: str):
    return list(resolve(pattern, root=project, cache=project / "cache").files)


def derive(project, stage: str, *, new: bool = True):
    folder = project / ".fmops" / "rounds" / "0001"
    folder.mkdir(parents=True, exist_ok=True)
    path = write_round(
        folder, spec=read_lifecycle(project / "lifecycle.yaml"), root=project,
        champion=project / ".fmops" / "artifacts" / "release-1" / "model", stage=stage,
        new={"docs": files(project, "docs/new-*.txt") if new else []}, seen={"docs": files(project, "docs/old-*.txt")},
    )  # fmt: skip
    return folder, read_lifecycle(path)


def test_a_round_of_pretraining_reads_what_is_new_and_some_of_what_it_knew(project):
    folder, spec = derive(project, "pretrain")
    assert spec.base == "../../artifacts/release-1/model"
    assert (spec.pretrain.tokens, spec.pretrain.learning_rate) == (4096, 2e-3)
    assert spec.data.corpora["docs"].source == ("data/new/docs",)
    assert spec.data.corpora["general"].source == ("../../../general.jsonl",)
    assert (spec.data.corpora[EARLIER].role, spec.data.corpora[EARLIER].weight) == ("replay", 0.2)
    assert [path.name for path in sorted((folder / "data").rglob("*.txt"))] == ["old-1.txt", "old-2.txt", "new-1.txt"]
    assert spec.evaluate.suites == ("../../../quiz.yaml", "domain", "forgetting")
    assert spec.curate.held_out == 0.5  # of one new file; of a hundred it would be the spec's own share
    assert spec.curate.held_out_examples == 0.1  # rehearsal loses no more than in the project
    assert (spec.gate.alpha, spec.gate.primary) == (0.1, ("domain",))


def test_a_round_of_pretraining_tunes_again_on_the_projects_dialogues_and_on_what_users_corrected(project):
    _, spec = derive(project, "pretrain")
    assert (spec.instruct.epochs, spec.instruct.documents) == (2, 0.5)
    assert spec.data.conversations.source == ("../../../conversations.jsonl",)
    corrected = project / ".fmops" / "rounds" / "0001" / "feedback" / "conversations.jsonl"
    corrected.parent.mkdir()
    corrected.write_text("{}\n")
    _, spec = derive(project, "pretrain")
    assert spec.data.conversations.source == ("feedback/conversations.jsonl", "../../../conversations.jsonl")


@pytest.mark.parametrize(
    ("stage", "follow"),
    [("pretrain", ("instruct", "align")), ("instruct", ("align",)), ("align", ())],
)
def test_every_later_stage_of_the_spec_follows_in_a_round(project, stage, follow):
    aligning(project, "{method: dpo}")
    assert trained(read_lifecycle(project / "lifecycle.yaml"), stage) == (stage, *follow)


def test_a_spec_without_tuning_gets_none_in_its_rounds(project):
    text = SPEC.replace("instruct: {adapter: lora, epochs: 2}\n", "")
    (project / "lifecycle.yaml").write_text(text)
    _, spec = derive(project, "pretrain")
    assert (spec.instruct, spec.align, spec.data.conversations) == (None, None, None)


def test_later_edits_do_not_reach_a_round(project):
    folder, _ = derive(project, "pretrain")
    (project / "docs" / "new-1.txt").write_text("changed")
    assert next((folder / "data" / "new").rglob("new-1.txt")).read_text() == "Text of new-1."


def test_pretraining_without_new_documents_says_what_is_wanted(project):
    with pytest.raises(FmopsError, match=r"no watched source has any\. Add some under docs"):
        derive(project, "pretrain", new=False)


def test_a_round_of_instruction_tuning_rehearses_and_need_not_know_the_domain_better(project):
    feedback = project / ".fmops" / "rounds" / "0001" / "feedback" / "conversations.jsonl"
    feedback.parent.mkdir(parents=True)
    feedback.write_text("{}\n")
    _, spec = derive(project, "instruct")
    assert spec.data.conversations.source == ("feedback/conversations.jsonl", "../../../conversations.jsonl")
    assert (spec.instruct.epochs, spec.pretrain, spec.align) == (2, None, None)
    assert spec.instruct.documents == 0
    assert spec.gate.primary == ()
    assert set(spec.evaluate.suites) == {"../../../quiz.yaml", "domain", "forgetting"}


def aligning(project, align: str) -> None:
    """The project's spec, with alignment by data of its own."""
    text = SPEC.replace("  conversations:", "  preferences: {source: own.jsonl}\n  conversations:")
    (project / "lifecycle.yaml").write_text(f"{text}align: {align}\n")


def test_a_round_of_kto_learns_from_thumbs_that_have_no_counterpart(project):
    feedback = project / ".fmops" / "rounds" / "0001" / "feedback" / "votes.jsonl"
    feedback.parent.mkdir(parents=True)
    feedback.write_text("{}\n")
    aligning(project, "{method: dpo}")
    with pytest.raises(FmopsError, match="a round of align needs preferences from feedback"):
        derive(project, "align")
    aligning(project, "{method: kto}")
    _, spec = derive(project, "align")
    assert spec.data.preferences.source == ("feedback/votes.jsonl", "../../../own.jsonl")


def test_a_round_finds_the_rewards_of_its_project(project):
    feedback = project / ".fmops" / "rounds" / "0001" / "feedback" / "preferences.jsonl"
    feedback.parent.mkdir(parents=True)
    feedback.write_text("{}\n")
    aligning(project, "{method: grpo, reward: rewards.py:brief}")
    _, spec = derive(project, "align")
    assert spec.align.reward == {"../../../rewards.py:brief": 1.0}


def test_finetuning_without_feedback_says_what_is_wanted(project):
    with pytest.raises(FmopsError, match="a round of align needs preferences from feedback, and there are none"):
        derive(project, "align")


@pytest.fixture
def memory(project):
    """What the loop remembers of a project whose first look is past, and to which two files came."""
    (project / "lifecycle.yaml").write_text(PLAIN)
    Store(project / ".fmops").move_aliases({"champion": "release-1"}, expected={}, why="test")
    (project / "docs" / "new-1.txt").unlink()

    def now() -> Learnt:
        return Learnt(Project.open(project / "lifecycle.yaml"), Rounds(project / ".fmops"))

    now().watched()
    for number in (1, 2):
        (project / "docs" / f"new-{number}.txt").write_text(f"Text of new {number}.")
    return now


def over(memory, project, outcome: str, *, stage: str = "pretrain") -> None:
    """A round over everything that is new ended so."""
    folder, _ = derive(project, stage)
    write_atomically(folder / "feedback" / "counts.json", '{"conversations": 30, "preferences": 12}')
    each = ended(1, hours_ago=1)
    memory().ended(each.model_copy(update={"trigger": each.trigger.model_copy(update={"stage": stage})}), outcome)


def test_documents_count_as_read_when_the_release_that_read_them_won(memory, project):
    assert memory().watched().untried == {"docs": 2}
    over(memory, project, "promoted")
    watched = memory().watched()
    assert (watched.untried, watched.in_vain, len(watched.seen["docs"])) == ({}, None, 4)


@pytest.mark.parametrize("outcome", ["rejected", "need more data", "rolled back"])
def test_documents_of_a_round_that_did_not_win_stay_new_and_ask_for_nothing_until_something_changes(
    memory, project, outcome
):
    over(memory, project, outcome)
    watched = memory().watched()
    assert len(watched.new["docs"]) == 2
    assert watched.untried == {}
    assert watched.in_vain == (
        f"round 1 learnt from the 2 new files and ended, {outcome}. They are tried again beside other files, from "
        "another champion, under another spec, or with `--round pretrain`"
    )


def test_files_beside_those_tried_in_vain_bring_all_of_them_back(memory, project):
    over(memory, project, "rolled back")
    (project / "docs" / "new-3.txt").write_text("Text of new 3.")
    watched = memory().watched()
    assert (watched.untried, watched.in_vain, len(watched.new["docs"])) == ({"docs": 1}, None, 3)


def test_another_champion_tries_again_what_was_in_vain_for_the_one_before(memory, project):
    over(memory, project, "rolled back")
    Store(project / ".fmops").move_aliases({"champion": "release-2"}, expected={"champion": "release-1"}, why="test")
    assert memory().watched().untried == {"docs": 2}


def test_another_spec_tries_again_and_another_budget_does_not(memory, project):
    over(memory, project, "rejected")
    spec = project / "lifecycle.yaml"
    spec.write_text(PLAIN + "loop: {rounds_per_week: 5}\n")
    assert memory().watched().untried == {}
    spec.write_text(PLAIN.replace("tokens: 4096", "tokens: 8192"))
    assert memory().watched().untried == {"docs": 2}


@pytest.mark.parametrize("outcome", ["failed", "refused"])
def test_a_round_that_broke_says_nothing_of_its_documents(memory, project, outcome):
    over(memory, project, outcome)
    assert memory().watched().untried == {"docs": 2}


def test_corrections_that_a_round_of_pretraining_has_learnt_from_ask_for_no_round_of_their_own(memory, project):
    counts = {"conversations": 30, "preferences": 12}
    assert memory().fresh(counts, "instruct") == 30
    over(memory, project, "rolled back")
    assert memory().fresh(counts, "instruct") == 0
    assert memory().fresh({**counts, "conversations": 34}, "instruct") == 4
