"""From findings to the stage that mends it: every line of the table is reached, and says how to check it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmops.artifacts import Alarm
from fmops.deployment.monitoring.diagnosis import FACT_OF, FACTS, RULES, Findings, diagnose, table
from fmops.deployment.monitoring.watch import MEASURES, RATES


def alarm(signal: str) -> Alarm:
    kind = "shift" if signal in MEASURES else "harm"
    return Alarm(
        signal=signal, kind=kind, at_s=1.0, level=2e5, threshold=1e5, answers=500, reference=0.04, now=0.2,
        examples=(f"trace-{signal}",),
    )  # fmt: skip


def found(*signals: str, **facts):
    return diagnose(Findings(alarms=tuple(alarm(signal) for signal in signals), **facts))


@pytest.mark.parametrize(
    ("signals", "facts", "cause", "stage"),
    [
        (("failed",), {}, "infrastructure", "alert"),
        (("slow", "failed"), {"golden_agree": True}, "infrastructure", "alert"),
        (("repeated",), {"golden_agree": False}, "release fault", "rollback"),
        (("refused",), {"worse_than_before": ("refused",)}, "release fault", "rollback"),
        (("topic", "disliked"), {}, "knowledge gap", "pretrain"),
        (("topic", "refused"), {}, "knowledge gap", "pretrain"),
        (("topic", "log_probability"), {}, "knowledge gap", "pretrain"),
        (("truncated",), {}, "behaviour", "instruct"),
        (("invalid_json", "words"), {}, "behaviour", "instruct"),
        (("secret",), {}, "unsafe answers", "align"),
        (("topic", "secret", "disliked"), {}, "unsafe answers", "align"),
        (("refused",), {}, "over-refusal", "align"),
        (("disliked",), {}, "preference", "align"),
        (("topic",), {}, "traffic changed", "evaluate"),
        (("prompt_words", "words"), {}, "traffic changed", "evaluate"),
        (("words",), {}, "answers changed", "none"),
        (("failed", "disliked", "empty"), {}, "infrastructure", "alert"),
        (("failed",), {"worse_than_before": ("failed",)}, "release fault", "rollback"),
    ],
)  # fmt: skip
def test_each_finding_leads_to_its_stage(signals, facts, cause, stage):
    diagnosis = found(*signals, **facts)
    assert (diagnosis.cause, diagnosis.stage) == (cause, stage)
    assert diagnosis.because
    assert diagnosis.confirm
    assert diagnosis.refute


def test_nothing_found_is_no_diagnosis():
    assert found() is None
    assert found(golden_agree=True) is None


def test_it_names_examples_figures_and_what_else_it_may_be():
    diagnosis = found("topic", "disliked")
    assert diagnosis.examples == ("trace-topic", "trace-disliked")
    assert "more thumbs down (disliked 4.0% → 20.0%)" in diagnosis.because
    assert diagnosis.also_possible == ("preference", "traffic changed")


def test_examples_are_those_of_the_facts_that_decided():
    assert found("secret", "words").examples == ("trace-secret",)


@pytest.mark.parametrize("machine", [("slow",), ("failed",), ("slow", "failed")])
@pytest.mark.parametrize("doubt", ["log_probability", "refused", "judged_bad"])
def test_a_slow_machine_does_not_hide_what_the_model_does_not_know(machine, doubt):
    diagnosis = found(*machine, "topic", doubt, "disliked")
    assert [(one.cause, one.stage) for one in diagnosis.every] == [
        ("infrastructure", "alert"),
        ("knowledge gap", "pretrain"),
    ]
    told, gap = diagnosis.every
    assert told.examples == tuple(f"trace-{signal}" for signal in machine)
    assert gap.examples == ("trace-topic", f"trace-{doubt}")
    # The wait may explain the thumbs: they are no evidence of the gap, and no preference stands beside.
    assert not any("thumbs" in reason for one in diagnosis.every for reason in one.because)
    assert told.also_possible[0] == ("over-refusal" if doubt == "refused" else "preference")


def test_thumbs_of_people_who_wait_say_nothing_of_the_model():
    diagnosis = found("slow", "topic", "disliked")
    assert [one.cause for one in diagnosis.every] == ["infrastructure", "traffic changed"]
    assert diagnosis.also_possible == ("knowledge gap", "preference")
    assert found("slow", "disliked").beside is None


def test_a_fault_of_the_release_explains_everything():
    assert found("slow", "topic", "log_probability", golden_agree=False).beside is None
    assert found("topic", "secret").beside is None


def test_the_table_asks_only_for_facts_that_exist_and_every_signal_says_something():
    asked = {fact for rule in RULES for fact in (*rule.all_of, *rule.any_of)}
    assert {fact for rule in RULES for fact in rule.explains or ()} <= asked
    assert asked == set(FACTS), "a fact that no rule asks for would never matter"
    assert set(FACT_OF.values()) <= set(FACTS)
    assert {signal for signal, _ in FACT_OF} == {*RATES, *MEASURES}


def test_the_docs_show_this_table():
    page = Path(__file__).resolve().parents[2] / "docs" / "diagnosis.md"
    assert table() in page.read_text(encoding="utf-8")
