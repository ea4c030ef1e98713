"""The page of a comparison in a real browser: it searches what moved, and runs nothing that a model wrote."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

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
        record("c", "gate", wealth=0.01, rounds=[{"level": 0.01, "p_value": 0.5, "promoted": False}]),
        weigh([Pair("t", f"t-{n}", str(n), "request", "short", "longer") for n in range(4)], {}, {}),
    )
    return write_page(compared, tmp_path / "page.html", name="tiny", alpha=0.05)


def test_what_a_model_wrote_is_text(page):
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    assert text.count("<script>") == 1
    assert "Weakest slices" in text
    assert "0.0100 of α 0.05 is left" in text


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
