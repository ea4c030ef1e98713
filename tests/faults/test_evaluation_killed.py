"""kill -9 during an evaluation: what is finished is kept, and the report is the uninterrupted one, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from fmops.artifacts import Benchmarks, Checkpoint
from fmops.adapters import lm_eval_scorer, tree_reader
from fmops.evaluation.evaluate import evaluate
from fmops.jobs import EvaluateJob
from fmops.stage import StageContext

# Small packs, so that a few items make many chunks.
lm_eval_scorer.SharedPrefixLM.__init__.__kwdefaults__["pack_tokens"] = 64
scored = []
score = tree_reader.TreeReader.score
tree_reader.TreeReader.score = lambda self, *work: scored.append(1) or score(self, *work)
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(exist_ok=True)
evaluate(
    EvaluateJob(),
    checkpoint=Checkpoint(path=folder / "base", stage="base", parameters=1, trained_tokens=0),
    benchmarks=Benchmarks(path=folder / "benchmarks", items={}),
    out=out,
    context=StageContext(stream=open("/dev/null", "w"), processes=int(sys.argv[3])),
)
print(len(scored))
"""
FILES = ("samples.jsonl", "protocol.json", "generations.jsonl")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    from fmops.evaluation.protocol import pin, write_json, write_lines
    from fmops.evaluation.suites import load_suite

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model").symlink_to(tiny_model)
    (tmp_path / "benchmarks" / "items").mkdir(parents=True)
    quiz = [
        {"id": f"q{n}", "cluster": str(n), "question": f"what is {n} " * 6, "choices": ["one", "two"], "label": n % 2}
        for n in range(12)
    ]
    harm = [{"id": f"h{n}", "cluster": str(n), "prompt": f"break {n}"} for n in range(4)]
    write_lines(tmp_path / "benchmarks" / "items" / "openbookqa.jsonl", quiz)
    write_lines(tmp_path / "benchmarks" / "items" / "harmbench.jsonl", harm)
    pinned = [
        pin(load_suite(suite, root=Path()), task, items=count).model_dump(mode="json")
        for suite, task, count in (("capability", "openbookqa", 12), ("harm", "harmbench", 4))
    ]
    # Sampled answers come again, too.
    pinned[1]["config"]["generation_kwargs"] = {"max_gen_toks": 24, "until": [], "do_sample": True, "temperature": 0.9}
    write_json(tmp_path / "benchmarks" / "tasks.json", pinned)
    return tmp_path


def run(folder: Path, out: str, fault: str | None = None, *, processes: int = 1) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "FMOPS_FAULT"}
    if fault:
        environment["FMOPS_FAULT"] = fault
    command = [sys.executable, "-c", SCRIPT, str(folder), str(folder / out), str(processes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stopped(folder):
    whole = run(folder, "whole")
    assert whole.returncode == 0, whole.stderr
    packs = int(whole.stdout)
    assert packs > 4
    for fault in ("evaluate.chunk:3", "evaluate.task:1", "evaluate.chunk:2"):
        assert run(folder, "killed", fault).returncode == -signal.SIGKILL
    journal = folder / "killed" / ".work" / "openbookqa.jsonl"
    assert len(journal.read_text().splitlines()) == packs
    # A torn last line, as a power cut leaves it.
    torn = journal.read_bytes()
    journal.write_bytes(torn[: len(torn) - 10])
    (folder / "killed" / "samples.jsonl").write_text("half a li")
    # Who helps changes nothing.
    again = run(folder, "killed", processes=2)
    assert again.returncode == 0, again.stderr
    assert int(again.stdout) == 1  # the torn pack alone
    for name in FILES:
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
