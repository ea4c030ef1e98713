"""`fmops loop bench --quick`: real faults in a real small model's traffic, found and mended by the real loop."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.xdist_group("lifecycle"), pytest.mark.slow]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "loop.json"
    command = [sys.executable, "-m", "fmops", "loop", "bench", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout, {row["name"]: row for row in json.loads(out.read_text())["events"]}, out


def test_poisoned_feedback_is_set_aside_said_and_trains_nothing(played):
    row = played[1]["feedback poisoning"]
    assert row["diagnosis"] == "feedback is set aside"
    assert row["feedback"]["quarantined"]["same-target"] > 50
    assert row["feedback"]["conversations"] < 20  # what honest users corrected
    assert row["acts"] == []


def test_a_release_that_answers_in_time_with_nonsense_is_sent_back_by_its_rollout(played):
    row = played[1]["wrong but healthy"]
    assert row["recovered"] is True
    assert row["acts"] == ["rolled out back"]
    assert row["diagnosis_right"] is True
    assert row["quality_after"]["mean"] > 0.5


def test_a_killed_engine_is_told_from_a_bad_model_and_comes_back(played):
    row = played[1]["infrastructure fault"]
    assert row["detected_after_requests"] <= 32
    assert (row["diagnosis"], row["acts"]) == ("infrastructure", [])
    assert row["failed_requests"] > 10
    assert row["recovered"] is True


def test_the_table_and_the_picture_are_made_from_the_figures(played):
    said, rows, out = played
    assert f"| feedback poisoning | 1 | {rows['feedback poisoning']['detected_after_requests']} |" in said
    assert "infrastructure fault" in out.with_suffix(".svg").read_text()


def test_a_wrong_event_is_named(tmp_path):
    command = [sys.executable, "-m", "fmops", "loop", "bench", "--event", "topic drfit"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown event 'topic drfit'" in done.stderr
    assert "topic drift" in done.stderr
