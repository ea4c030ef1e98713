"""A workspace on a disk that is too small: each failure is told without a traceback, and nothing finished is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import fmops, write_project


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_and_a_larger_one_finishes_the_run(small_disk, tmp_path):
    spec = write_project(tmp_path / "project")
    text = spec.read_text(encoding="utf-8")
    # Short: base, corpus, pretraining and release are enough to fill a disk.
    kept = [line for line in text.splitlines() if not line.startswith(("instruct", "align", "evaluate", "gate"))]
    spec.write_text("\n".join(kept) + "\n", encoding="utf-8")
    told = []
    for megabytes in (2, 9, 14, 200):
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", str(small_disk)], check=True)
        done = fmops("run", "--workspace", str(small_disk / "ws"), spec=spec)
        assert "Traceback" not in done.stderr, done.stderr
        told.append((done.returncode, done.stderr))
    counted = (small_disk / "ws" / "metrics" / "runs.prom").read_text(encoding="utf-8")
    assert 'fmops_checkpoint_failures_total{reason="enospc"}' in counted
    for code, error in told[:-1]:
        assert code == 1
        assert "disk full" in error or "could not be written" in error
    assert told[-1][0] == 0, told[-1][1]
