"""The page of a comparison in a real browser: it searches what moved, and runs nothing that a model wrote."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fmops.artifacts import FamilyResult, GuardResult
from fmops.evaluation.compare import Comparison, Moved, Slice, TaskDifference
from fmops.evaluation.gate import Decision
from fmops.evaluation.judge import Pair, weigh
from fmops.orchestration.compare import Compared
from fmops.orchestration.comparison_page import write_page
from fmops.store import Record

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here; `apt-get install chromium` brings it")
EVIL = "<script>document.body.dataset.ran = 1</script>"


def record(fingerprint: str, kind: str = "evaluation", **artifact) -> Record:
    return Record(
        node="x", stage=kind, kind=kind, version=1, fingerprint=fingerprint * 20, digest="d", seed=0, config={},
        inputs={}, files={}, artifact=artifact, created="1",
    )  # fmt: skip


def decided(rounds: int) -> Record:
    """The gate's record after so many rounds; each one lost a little more."""
    family = {
        "family": "capability", "lower": -0.2 * rounds, "difference": -0.1 * rounds, "upper": 0.1, "margin": 0.05,
        "verdict": "undecided",
    }  # fmt: skip
    tested = [{"candidate": str(n), "level": 0.01 / n, "p_value": 0.5, "promoted": False} for n in range(1, rounds + 1)]
    return record(
        "c", "gate", wealth=0.01, alpha=0.05, verdict="need more data", p_value=0.5, families=[family], rounds=tested
    )


def refused(rounds: int) -> Record:
    """A later decision about evidence that could not be paired: no round of its own."""
    artifact = decided(rounds).artifact | {"verdict": "reject", "p_value": None, "families": []}
    return record("d", "gate", **artifact)


@pytest.fixture
def page(tmp_path) -> Path:
    moved = [
        Moved("quiz", f"quiz-{place}", f"What is {place} + 1? {EVIL}", "0: four", f"1: {word}", 1.0)
        for place, word in enumerate(("two", "three", "four"))
    ]
    compared = Compared(
        record("a"),
        record("b"),
        Decision("reject", ("quiz regressed: by much",)),
        Comparison(
            (TaskDifference("quiz", "quiz", "acc", 30, 0.1, 0.2, 0.1, -0.1, 0.3),),
            tuple(moved),
            (Slice("quiz", f"length: long {EVIL}", 12, 0.1, 0.05, 0.4),),
        ),
        (decided(1), decided(2), refused(2)),
        weigh([Pair("t", f"t-{n}", str(n), "request", "short", "longer") for n in range(4)], {}, {}),
    )
    return write_page(compared, tmp_path / "page.html", name="tiny", alpha=0.05)


def test_late_tasks_are_on_the_page_and_what_is_not_shown_is_counted(tmp_path):
    moved = tuple(
        Moved(task, f"{task}-{n}", f"{task} asks {n}", "0", "1", 1.0) for task in ("a", "b", "z") for n in range(500)
    )
    compared = Compared(record("a"), record("b"), Decision("reject", ()), Comparison((), moved, ()), ())
    text = write_page(compared, tmp_path / "page.html", name="tiny", alpha=0.05).read_text(encoding="utf-8")
    assert all(f"{task} asks 0" in text for task in ("a", "b", "z"))
    assert "1500 items with another score" in text
    assert "1000 are shown, the largest changes of each task, and 500 are not, nor searched" in text


def test_what_a_model_wrote_is_text(page):
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    assert text.count("<script>") == 1
    assert "Weakest slices" in text
    assert "0.0100 of α 0.05 is left" in text
    assert "20 % of the error budget is left" in text


def test_every_round_shows_what_became_of_each_family(page):
    rows = page.read_text(encoding="utf-8").split('aria-label="Rounds"')[1].split("</table>")[0].split("<tr>")[2:]
    assert len(rows) == 2
    for place, row in enumerate(rows, start=1):
        assert "need more data" in row
        assert f"−{0.1 * place:.3f}" in row
        assert f"{0.01 / place:.5f}" in row


def test_a_benchmark_past_its_guard_stands_beside_its_family(tmp_path):
    family = FamilyResult(
        family="capability", n=1500, clusters=1500, difference=-0.03, standard_error=0.01, lower=-0.045, upper=-0.015,
        margin=0.05, minimum_detectable=0.03, verdict="non-inferior",
    )  # fmt: skip
    fallen, held = (
        GuardResult(
            task=task, family="capability", n=250, clusters=250, difference=difference, lower=difference - 0.05,
            upper=difference + 0.05, guard=0.1, fallen=difference < -0.15,
        )
        for task, difference in (("boolq", -0.3), ("piqa", 0.0))
    )  # fmt: skip
    decision = Decision("reject", ("boolq fell",), (family,), guards=(fallen, held))
    compared = Compared(record("a"), record("b"), decision, None, ())
    text = write_page(compared, tmp_path / "page.html", name="tiny", alpha=0.05).read_text(encoding="utf-8")
    assert '<small class="bad">boolq −0.300, guard 0.100</small>' in text
    assert "piqa" not in text


@pytest.mark.parametrize(("verdict", "code"), [("promote", 0), ("reject", 3), ("need more data", 4)])
def test_a_pipeline_reads_the_verdict_from_the_exit_code(verdict, code):
    assert Compared(record("a"), record("b"), Decision(verdict, ()), None, ()).exit_code == code


@needs_browser
@pytest.mark.parametrize(("wanted", "shown"), [("three", 1), ("four", 3), ("quiz", 3), ("nothing", 0)])
def test_the_search_shows_what_matches(page, wanted, shown):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", f"{page.as_uri()}#{wanted}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f">{shown} of 3</span>" in done.stdout
    assert "data-ran" not in done.stdout
