"""The reference cases do what their READMEs say: each block runs, and the figures are those that are promised."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import local_s3
import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretraining", "finetuning", "evaluation", "deployment")
FOLDERS = (*STAGES, "end-to-end")
CASES = sorted(path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("*/README.md"))
SECTIONS = ("## What you will see", "## Run", "## Validate", "## Clean up")


def test_every_stage_has_a_case():
    assert {case.parts[0] for case in CASES} == set(FOLDERS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_tells_all_four_things(case):
    text = (ROOT / case / "README.md").read_text(encoding="utf-8")
    places = [text.find(section) for section in SECTIONS]
    assert places == sorted(places)
    assert -1 not in places


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """The environment of who has a bucket: an S3 API on this machine."""
    with local_s3.serve() as served:
        yield {**served.environment, "FMOPS_STORE": f"s3://{local_s3.BUCKET}"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_runs_as_its_readme_says(case, tmp_path, request):
    kept = shutil.ignore_patterns(".fmops", "data", "__pycache__")
    for folder in ("quickstart", case):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=kept)
    text = (ROOT / case / "README.md").read_text(encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for variable in re.findall(r"^Needs: `(\w+)`", text, re.MULTILINE):
        if variable == "FMOPS_STORE":
            environment |= request.getfixturevalue("bucket")
            environment["FMOPS_STORE"] += f"/{case.name}"
        elif variable.islower():
            if not shutil.which(variable) and not importlib.util.find_spec(variable):
                pytest.skip(f"{variable} is not installed: the README says how to get it")
        elif not shutil.which(os.environ.get(variable, "")):
            pytest.skip(f"{variable} names no command: the README says how to get it")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for code in blocks:
        command = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert not (tmp_path / case / ".fmops").exists()
