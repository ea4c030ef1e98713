"""A small real lifecycle, run once: documents, dialogues, preferences and a quiz of one's own around the tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = """\
name: tiny
base: base
data:
  corpora:
    docs: {source: "docs/*.txt"}
    general: {source: general.jsonl, role: replay, weight: 0.25}
  conversations: {source: conversations.jsonl}
  preferences: {source: preferences.jsonl}
curate: {block_tokens: 128, min_characters: 50, held_out: 0.2}
pretrain: {tokens: 16384, learning_rate: 3e-3, batch_tokens: 1024, old_domain_ceiling: 5.0, evaluations: 2}
instruct: {adapter: lora, block_tokens: 128, batch_tokens: 1024}
align: {method: dpo, max_pairs: 8, batch_pairs: 4, max_tokens: 128}
evaluate: {suites: [quiz.yaml, domain, forgetting], limit: 10}
gate: {primary: [domain], margins: {quiz: 0.95, forgetting: 5.0}}
runtime: {threads: 1, precision: float32}
"""


def write_project(folder: Path) -> Path:
    """A spec over files that a user could have written; returns its path."""
    from offline_data import write_offline_data

    write_offline_data(folder)
    (folder / "lifecycle.yaml").write_text(SPEC, encoding="utf-8")
    return folder / "lifecycle.yaml"


def fmops(*arguments: str, spec: Path, fault: str | None = None, **options) -> subprocess.CompletedProcess:
    """Run the command line on a spec, as a user would."""
    environment = {**os.environ, **({"FMOPS_FAULT": fault} if fault else {})}
    command = [sys.executable, "-m", "fmops", *arguments, "--spec", str(spec)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A spec whose whole lifecycle has run, and what that printed. Read only."""
    spec = write_project(tmp_path_factory.mktemp("finished") / "project")
    return spec, fmops("run", spec=spec)


@pytest.fixture
def copied(finished: tuple[Path, subprocess.CompletedProcess], tmp_path: Path) -> Path:
    """A copy of the finished project that a test may change; returns its spec."""
    folder = tmp_path / "project"
    shutil.copytree(finished[0].parent, folder)
    return folder / "lifecycle.yaml"
