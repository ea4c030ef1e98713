"""kill -9 in the middle of curation, then again: the corpus equals that of an uninterrupted run, byte for byte."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

CURATE = """
import sys
from pathlib import Path
import fmops.data.curate as room
from fmops.artifacts import Checkpoint
from fmops.jobs import CorpusPart, CurateJob
from fmops.lifecycle import Curate
from fmops.sources import resolve
from fmops.stage import StageContext

room.GROUP_BYTES = 30_000
root, model, out = map(Path, sys.argv[1:])
room.curate(
    CurateJob(curate=Curate(block_tokens=128), corpora={"new": CorpusPart()}, tokens=5_000),
    base=Checkpoint(path=model.parent, stage="base", parameters=1, trained_tokens=0),
    corpus_new=resolve("*.txt", root=root, cache=root / "cache"),
    out=out,
    context=StageContext(),
)
"""


def run(root: Path, model: Path, out: Path, *, fault: str | None = None) -> int:
    environment = {**os.environ, **({"FMOPS_FAULT": fault} if fault else {})}
    command = [sys.executable, "-c", CURATE, str(root), str(model), str(out)]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_killed_curation_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, tiny_model: Path) -> None:
    for name in sorted(topics)[:20]:
        (tmp_path / f"{name}.txt").write_text(topics[name])
    assert run(tmp_path, tiny_model, tmp_path / "whole") == 0
    expected = digests(tmp_path / "whole")
    assert "train/00000.parquet" in expected
    out = tmp_path / "killed"
    for fault in ("curate-group:2", "curate-split"):
        assert run(tmp_path, tiny_model, out, fault=fault) == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.signatures")}
    assert done
    assert run(tmp_path, tiny_model, out) == 0
    assert digests(out) == expected
    # The groups that were finished before the kill were not read again.
    assert {path: path.stat().st_mtime_ns for path in done} == done
