"""The report in a real browser: it renders without a network, in both colour schemes, on paper and on a telephone."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from example_run import write_example

from fmops.orchestration.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here; `apt-get install chromium` brings it")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")


def browse(page: Path, *options: str) -> str:
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [BROWSER, *OPTIONS, profile, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout + done.stderr


def size(png: Path) -> tuple[int, int]:
    return struct.unpack(">II", png.read_bytes()[16:24])


@pytest.fixture
def page(tmp_path) -> Path:
    return write_report(*write_example(tmp_path))


def test_the_browser_sees_every_section_and_no_script(page):
    document = browse(page, "--dump-dom")
    for title in ("Learning", "Scores", "Gate", "Before and after", "Data", "Release", "Stages", "Make it again"):
        assert f"<h2>{title}</h2>" in document
    assert "<script" not in document


def test_a_script_that_gets_into_the_page_does_not_run(page):
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<main>", "<main><script>document.body.dataset.ran = 1</script>"), encoding="utf-8")
    document = browse(page, "--dump-dom")
    assert "<script>" in document
    assert "data-ran" not in document


@pytest.mark.parametrize("scheme", ["0", "1"])
def test_it_draws_in_both_colour_schemes(page, tmp_path, scheme):
    shot = tmp_path / "shot.png"
    browse(page, f"--screenshot={shot}", "--window-size=1280,900", f"--blink-settings=preferredColorScheme={scheme}")
    assert size(shot) == (1280, 900)
    assert shot.stat().st_size > 30_000


def test_it_prints(page, tmp_path):
    paper = tmp_path / "report.pdf"
    browse(page, f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
    assert paper.stat().st_size > 30_000


def test_a_narrow_screen_never_scrolls_sideways(page):
    # Measured in a frame as wide as a telephone: the window itself has a least width.
    frame = page.with_name("frame.html")
    probe = "parent.document.title = document.documentElement.scrollWidth"
    text = page.read_text(encoding="utf-8").replace(
        "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
    )
    page.with_name("narrow.html").write_text(
        text.replace("</body>", f"<script>{probe}</script></body>"), encoding="utf-8"
    )
    frame.write_text(
        '<title>none</title><iframe src="narrow.html" width="360" height="800"></iframe>', encoding="utf-8"
    )
    document = browse(frame, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=3000")
    width = document.partition("<title>")[2].partition("</title>")[0]
    assert width != "none", "the probe did not run"
    assert int(width) <= 360
