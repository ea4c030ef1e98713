"""A small real lifecycle, run once: documents, dialogues, preferences and a quiz of one's own around the tiny model."""

from __future__ import annotations

import json
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
curate: {block_tokens: 128, min_characters: 50}
pretrain: {tokens: 16384, learning_rate: 3e-3, batch_tokens: 1024, old_domain_ceiling: 5.0, evaluations: 2}
instruct: {adapter: lora, block_tokens: 128, batch_tokens: 1024}
align: {method: dpo, max_pairs: 8, batch_pairs: 4, max_tokens: 128}
evaluate: {suites: [quiz.yaml, domain, forgetting], limit: 10}
gate: {primary: [domain], margins: {quiz: 0.95, forgetting: 5.0}}
runtime: {threads: 1, precision: float32}
"""
QUIZ = """\
suite: quiz
family: quiz
about: Sums, to see that a suite of one's own is asked and scored.
margin: 0.5
unit: accuracy
higher_is_better: true
tasks:
  sums:
    source: quiz.jsonl
    key: question
    metrics: [acc]
    config:
      output_type: multiple_choice
      doc_to_text: "{{question}}"
      doc_to_choice: choices
      doc_to_target: label
"""


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_project(folder: Path, model: Path) -> Path:
    """A spec over files that a user could have written; returns its path."""
    from pydoc_data.topics import topics

    shutil.copytree(model, folder / "base")
    (folder / "docs").mkdir()
    names = sorted(topics, key=lambda name: (len(topics[name]), name))
    for name in names[5:45]:
        (folder / "docs" / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    # The old domain: documents of another kind.
    write_rows(folder / "general.jsonl", [{"text": topics[name]} for name in names[45:65]])
    ask = [("What is {0} plus {1}?", "{0} plus {1} is {2}."), ("Add {0} and {1}.", "The sum of {0} and {1} is {2}.")]
    chats = [
        {"messages": [turn("user", q.format(a, b)), turn("assistant", r.format(a, b, a + b))]}
        for a in range(2, 8)
        for b in range(2, 8)
        for q, r in ask
    ]
    write_rows(folder / "conversations.jsonl", chats)
    pairs = [
        {"prompt": f"How do I break lock number {n}?", "chosen": f"I can't help with breaking lock {n}.",
         "rejected": f"Take a hammer and hit lock {n} hard."} for n in range(30)
    ]  # fmt: skip
    write_rows(folder / "preferences.jsonl", pairs)
    quiz = [
        {"question": f"The number after {n} is", "choices": [str(n + 1), str(n + 5)], "label": 0} for n in range(20, 40)
    ]
    write_rows(folder / "quiz.jsonl", quiz)
    (folder / "quiz.yaml").write_text(QUIZ, encoding="utf-8")
    (folder / "lifecycle.yaml").write_text(SPEC, encoding="utf-8")
    return folder / "lifecycle.yaml"


def fmops(*arguments: str, spec: Path, fault: str | None = None, **options) -> subprocess.CompletedProcess:
    """Run the command line on a spec, as a user would."""
    environment = {**os.environ, **({"FMOPS_FAULT": fault} if fault else {})}
    command = [sys.executable, "-m", "fmops", *arguments, "--spec", str(spec)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, subprocess.CompletedProcess]:
    """A spec whose whole lifecycle has run, and what that printed. Read only."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    folder.mkdir()
    spec = write_project(folder, tiny_model)
    return spec, fmops("run", spec=spec)


@pytest.fixture
def copied(finished: tuple[Path, subprocess.CompletedProcess], tmp_path: Path) -> Path:
    """A copy of the finished project that a test may change; returns its spec."""
    folder = tmp_path / "project"
    shutil.copytree(finished[0].parent, folder)
    return folder / "lifecycle.yaml"
