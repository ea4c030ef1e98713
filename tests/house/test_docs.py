"""Every code block of the docs runs: `bash` and `python` blocks in page order; `text` blocks are output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUNNABLE = ("bash", "python")
SHOWN = ("text", "yaml", "json", "console", "")


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_say_what_they_are(page):
    kinds = {kind for kind, _ in blocks(page)}
    assert kinds <= {*RUNNABLE, *SHOWN, "make"}, f"unknown block kind in {page.name}; known: {RUNNABLE + SHOWN}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(kind in RUNNABLE for kind, _ in blocks(p))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_blocks_run(page, tmp_path):
    # In a folder of its own: a page must not depend on what another left, nor write into the repository.
    for name in ("quickstart", "pretraining", "finetuning", "evaluation", "deployment", "end-to-end", "docs"):
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns(".fmops", "data", "__pycache__")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for kind, code in blocks(page):
        if kind not in RUNNABLE:
            continue
        command = ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stdout}\n{done.stderr}"
