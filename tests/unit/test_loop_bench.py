"""The loop's benchmark without its engines: how answers are judged, how users vote, what the page shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmops.orchestration.bench.facts import KNOWN, NEW, facts_of, likeness
from fmops.orchestration.bench.picture import picture, table
from fmops.orchestration.bench.result import Results, merged
from fmops.orchestration.bench.users import Mix, Users
from fmops.orchestration.bench.world import QUICK, World

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"mean": 0.9, "half_width": 0.02, "n": 100}
ROW = {
    "seed": 0, "name": "topic drift", "about": "new questions", "quiet_requests": 40, "detected_after_requests": 16,
    "detected_by": "harm of disliked", "diagnosis": "behaviour", "diagnosis_right": False, "false_triggers": 1,
    "false_triggers_are": ["round instruct"], "recovered": False, "recovered_after_requests": None,
    "recovery_cpu_s": 12.4, "quality_before": QUIET, "quality_during": {**QUIET, "mean": 0.4},
    "quality_after": {**QUIET, "n": 0}, "forgetting_bits_per_byte": None, "curve": [[20, 0.9], [40, 0.8], [60, 0.4]],
}  # fmt: skip
MENDED = {
    **ROW, "seed": 1, "detected_after_requests": 48, "diagnosis_right": True, "false_triggers": 0,
    "false_triggers_are": [], "recovered": True, "recovered_after_requests": 900, "recovery_cpu_s": 60.0,
    "quality_after": {**QUIET, "n": 50}, "forgetting_bits_per_byte": 0.12, "recovery_wall_s": 70.5,
}  # fmt: skip


@pytest.fixture
def users() -> Users:
    known, new = tuple(facts_of(KNOWN, most=20)), tuple(facts_of(NEW, most=20))
    return Users(World(folder=Path(), size=QUICK, known=known, new=new), seed=1)


@pytest.mark.parametrize(
    ("answer", "found"),
    [("Return the mean of data.", 1.0), ("return the MEAN of data", 1.0), ("Return the", 4 / 7), ("", 0.0)],
)
def test_an_answer_is_as_good_as_the_words_it_shares_with_the_right_one(answer, found):
    assert likeness(answer, "Return the mean of data.") == pytest.approx(found)


def test_the_two_domains_share_no_fact_and_the_manual_is_this_python_s():
    known, new = facts_of(KNOWN, most=80), facts_of(NEW, most=80)
    assert len(known) == len(new) == 80
    assert not {fact.name for fact in known} & {fact.name for fact in new}
    assert "Return the sample arithmetic mean of data." in {fact.says for fact in known}


def test_night_and_day_ask_otherwise_and_drift_brings_the_new_domain(users):
    day = [users.ask(Mix(), at_s=9 * 3600.0) for _ in range(300)]
    night = [users.ask(Mix(), at_s=20 * 3600.0) for _ in range(300)]
    drift = [users.ask(Mix(new_share=0.6), at_s=9 * 3600.0) for _ in range(300)]
    assert {question.domain for question in day} == {"known", "harmful"}
    assert not {q.wanted for q in day if q.domain == "known"} & {q.wanted for q in night if q.domain == "known"}
    assert 0.45 < sum(question.domain == "new" for question in drift) / 300 < 0.65


def test_users_praise_good_answers_and_mostly_blame_others(users):
    question = users.ask(Mix(), at_s=0.0)
    said = [users.judge(question, question.wanted) for _ in range(1000)]
    blamed = [users.judge(question, "no idea at all") for _ in range(1000)]
    votes, down = [one for one in said if one], [one for one in blamed if one]
    assert 0.9 < sum(one.thumb == "up" for one in votes) / len(votes) < 0.99
    assert 0.9 < sum(one.thumb == "down" for one in down) / len(down) < 0.99
    assert any(one.correction == question.wanted for one in down)


def test_what_was_missed_and_what_was_wrong_stands_in_table_and_picture():
    event = merged([ROW])
    text = table([event])
    assert (
        "| topic drift | 1 | 16 | harm of disliked | behaviour (**wrong**) | 1 (round instruct) | **not** | 12 |"
        in text
    )
    assert "0.90 ± 0.02 → 0.40 ± 0.02 |" in text
    assert "behaviour, which is wrong; false triggers: 1" in picture([event])


def test_runs_of_several_seeds_are_told_by_median_and_range_and_one_miss_is_a_miss():
    event = merged([ROW, MENDED])
    assert (event["n"], event["diagnosis_right"], event["recovered"], event["recovered_runs"]) == (2, False, False, 1)
    assert event["recovery_wall_s"] == 70.5
    assert event["quality_before"] == {"mean": 0.9, "half_width": 0.014, "n": 200}
    text = table([event])
    assert "| topic drift | 2 | 48 (16 to 48) | harm of disliked | behaviour (**wrong** in 1 of 2) |" in text
    assert "| 1 (round instruct) | **not** in 1 of 2; 900 | 60 (12 to 60) |" in text
    assert text.endswith("| +0.120 |")


def test_the_file_grows_run_by_run_and_its_curves_take_one_line(tmp_path):
    out = tmp_path / "loop.json"
    for row in (MENDED, ROW):
        Results(out, quick=False, order=["topic drift"], clock=lambda: 0.0).add(row)
    text = out.read_text()
    assert '"curve": [[20, 0.9], [40, 0.8], [60, 0.4]]' in text
    event = json.loads(text)["events"][0]
    assert [run["seed"] for run in event["runs"]] == event["seeds"] == [0, 1]
    Results(out, quick=False, order=["topic drift"], clock=lambda: 0.0).add({**ROW, "recovered": True})
    assert json.loads(out.read_text())["events"][0]["n"] == 2
    Results(out, quick=True, order=["topic drift"], clock=lambda: 0.0).add(ROW)
    assert json.loads(out.read_text())["events"][0]["n"] == 1


def test_the_docs_show_the_newest_figures():
    newest = max((ROOT / "benchmarks" / "results").glob("loop-*.json"))
    events = json.loads(newest.read_text(encoding="utf-8"))["events"]
    page = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
    assert table(events) in page
    assert picture(events) == (ROOT / "docs" / "images" / "loop-bench.svg").read_text(encoding="utf-8")
