"""The commands behind the figures in the docs still run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_training_is_compared_with_its_peers(tmp_path):
    command = [sys.executable, "-m", "benchmarks.training", "--quick", "--results", str(tmp_path)]
    command += ["--ratios", "lora_vs_full", "cpt_vs_trainer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [written] = tmp_path.glob("training-*.json")
    assert {"lora_vs_full", "cpt_vs_trainer"} <= json.loads(written.read_text())["ratios"].keys()
