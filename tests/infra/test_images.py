"""The recipe of the image of the stages: hadolint finds nothing in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "infra/images/stages/Dockerfile"


def hadolint(page: Path) -> subprocess.CompletedProcess:
    command = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip("no hadolint: the group dev brings it, as a wheel")
    return subprocess.run([command, "--no-color", str(page)], capture_output=True, text=True)


def test_the_linter_finds_nothing_and_would_find_what_moves(tmp_path):
    done = hadolint(RECIPE)
    assert (done.returncode, done.stdout) == (0, "")
    careless = tmp_path / "Dockerfile"
    text = RECIPE.read_text().replace("FROM ${BASE} AS build", "FROM python AS build")
    careless.write_text(text.replace("USER 1000:1000", "USER root"))
    assert {"DL3006", "DL3002"} <= set(re.findall(r"DL\d+", hadolint(careless).stdout))
