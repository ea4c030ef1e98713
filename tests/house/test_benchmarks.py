"""The commands behind the figures in the docs still run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.training import _add, _least, _Table

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_training_is_compared_with_its_peers(tmp_path):
    command = [sys.executable, "-m", "benchmarks.training", "--quick", "--results", str(tmp_path)]
    command += ["--ratios", "lora_vs_full", "cpt_vs_trainer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [written] = tmp_path.glob("training-*.json")
    assert {"lora_vs_full", "cpt_vs_trainer"} <= json.loads(written.read_text())["ratios"].keys()


def test_a_run_is_added_to_figures_and_what_stands_beside_them_stays(tmp_path):
    # Not each has figures of older code beside its own.
    results = sorted((ROOT / "benchmarks" / "results").glob("training-*.json"))
    newest = [path for path in results if "earlier" in json.loads(path.read_text())][-1]
    held = json.loads(newest.read_text())
    assert held["ratios"] == _least(held["earlier"]) | _least(held["tables"])
    target = tmp_path / newest.name
    target.write_text(newest.read_text())
    measured = {"cpu_s": 2.0, "wall_s": 2.0, "peak_gb": 1.0, "mfu": 0.2, "units": 8, "unit": "tokens", "steps": 1}
    measured |= {"last_loss": 1.0, "gemm_gflops": 1100.0, "precision": "bfloat16", "load": 0.0}
    for arm, seconds in (("sft_bfloat16", 2.0), ("sft", 1.0)):
        table = _add(target, measured | {"arm": arm, "pair": 1.0, "cpu_s": seconds}, _Table("other", 1, "float32"))
    assert table["ratios"]["bfloat16_vs_float32"]["median"] == 0.5
    added = json.loads(target.read_text())
    assert added["tables"][:-1] == held["tables"]
    assert [added[key] for key in ("earlier", "earlier_is")] == [held[key] for key in ("earlier", "earlier_is")]
    assert added["ratios"] == held["ratios"] | {"bfloat16_vs_float32": 0.5}
    assert added["machine"]["processor"] not in ("", "x86_64")


def test_an_arm_is_set_beside_the_product_of_its_own_precision(monkeypatch):
    import torch

    from benchmarks.training import _gemm_gflops

    made = []
    plain = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **named: made.append(named["dtype"]) or plain(*size, **named))
    assert _gemm_gflops("bfloat16", size=8) > 0
    assert _gemm_gflops("float32", size=8) > 0
    assert made == [torch.bfloat16] * 2 + [torch.float32] * 2
