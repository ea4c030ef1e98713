"""The recipes of images: hadolint finds nothing in them."""

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
RECIPES = [RECIPE, *(path for stage in ("pretraining", "deployment") for path in (ROOT / stage).glob("*/Dockerfile"))]


def hadolint(page: Path) -> subprocess.CompletedProcess:
    command = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip("no hadolint: the group dev brings it, as a wheel")
    return subprocess.run([command, "--no-color", str(page)], capture_output=True, text=True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_the_linter_finds_nothing(recipe):
    done = hadolint(recipe)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_find_what_moves(tmp_path):
    careless = tmp_path / "Dockerfile"
    text = RECIPE.read_text().replace("FROM ${BASE} AS build", "FROM python AS build")
    careless.write_text(text.replace("USER 1000:1000", "USER root"))
    assert {"DL3006", "DL3002"} <= set(re.findall(r"DL\d+", hadolint(careless).stdout))
