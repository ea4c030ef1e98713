"""The protocol: how each task was asked and scored; two reports compare only when theirs agree.

Enters: suites and the versions of the engine. Leaves: frozen entries for `tasks.json` and `protocol.json`, a digest.
Refuses: nothing; it records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fmops.artifacts import Frozen
from fmops.evaluation.suites import Suite, TaskConfig
from fmops.integrity import sha256

PACKAGE = Path(__file__).parents[1]
SCORERS = (
    "refusals.py", "toxicity.py", "toxicity.json", "evaluation/checks.py", "evaluation/bbq.py",
    "evaluation/bbq_targets.json",
)  # fmt: skip
"""The files that hold the rules and tables of our own scorers."""


class PinnedTask(Frozen):
    """One task as it was asked: its suite's policy, its config, how many items it registered."""

    task: str
    suite: str
    family: str
    margin: float
    unit: str
    higher_is_better: bool
    metrics: tuple[str, ...]
    """The first one is what the gate compares."""
    chat: bool
    corpus: str | None
    characters: int | None
    form: str = "rows"
    share: float = 1.0
    examples: str = ""
    """Few-shot examples that stand before every item."""
    framework: str | None = None
    probes: tuple[str, ...] = ()
    critical: bool = False
    items: int
    licence: str
    config: TaskConfig


class Protocol(Frozen):
    """All that two evaluations must share to be comparable. Weights are no part of it."""

    tasks: tuple[PinnedTask, ...]
    engine: dict[str, str]
    """Versions of the harness and the framework, dtype, batch mode, a digest of our own scorers' rules."""
    batch_tolerance: float = 0.0
    """How far the log-likelihood of an answer may move with its company in a batch or the number of threads. A
    difference between two evaluations that is no larger shows nothing about the weights."""
    template_sha256: str | None
    """Of the chat template; None when the tokenizer has none and prompts go in as they are."""
    prompts_sha256: str
    """Over every sample's id and prompt."""
    seed: int

    @property
    def fingerprint(self) -> str:
        return digest(self.model_dump(mode="json"))


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def scorers_digest(package: Path = PACKAGE) -> str:
    """One digest over the rules of our own scorers.

    Every change of their files counts, a comment's too: nobody has to judge which one changes a score.
    """
    return digest({name: sha256(package / name) for name in SCORERS})[:16]


def prompts_digest(rows: Iterable[dict[str, Any]]) -> str:
    """One digest over which samples were asked, with which prompts, in which clusters."""
    return digest(
        sorted([row[name] for name in ("task", "sample", "metric", "prompt_sha256", "cluster")] for row in rows)
    )


def pin(suite: Suite, name: str, *, items: int) -> PinnedTask:
    """The entry of one task of a suite."""
    task = suite.tasks[name]
    return PinnedTask(
        task=name,
        suite=suite.suite,
        family=suite.family,
        margin=suite.margin,
        unit=suite.unit,
        higher_is_better=suite.higher_is_better,
        metrics=task.metrics,
        chat=task.chat,
        corpus=task.corpus,
        characters=task.characters if task.corpus else None,
        form=task.form,
        share=task.share,
        framework=task.framework,
        probes=task.probes,
        critical=task.critical,
        items=items,
        licence=task.licence,
        config=task.config,
    )


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, keys sorted, so that equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write JSON Lines and return the number of rows."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
            count += 1
    return count
