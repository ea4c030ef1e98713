"""The stage contract: a verb over files, in a process of its own.

Enters: typed config, input artifacts and sources, an empty or half-filled folder. Leaves: one artifact in that folder.
Refuses: to know any framework; the function behind a stage is imported only where it runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TextIO

from fmops.artifacts import (
    Artifact,
    Benchmarks,
    Checkpoint,
    Conversations,
    Corpus,
    EvalReport,
    GateDecision,
    Preferences,
    Release,
)


@dataclass(frozen=True)
class Stage:
    """One room's verb.

    `function` is `module:name`; it is called as
    `function(config, *, <inputs by name>, out: Path, context: StageContext) -> Artifact`, is pure but for files under
    `out`, and finds its own resume state there when it was killed before.
    """

    name: str
    function: str
    output: type[Artifact]
    in_ranks: bool = False
    """Whether `runtime.processes` run it together, as ranks of one process group."""
    version: int = 1
    """Raised when the same config and inputs would give another artifact; part of the fingerprint."""

    def load(self) -> Callable[..., Artifact]:
        module, _, name = self.function.partition(":")
        function: Callable[..., Artifact] = getattr(import_module(module), name)
        return function


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("import", "fmops.pretraining.base:import_base", Checkpoint),
        Stage("benchmarks", "fmops.evaluation.benchmarks:prepare_benchmarks", Benchmarks, version=4),
        Stage("curate", "fmops.data.curate:curate", Corpus, version=4),
        Stage("conversations", "fmops.data.conversations:prepare_conversations", Conversations, version=4),
        Stage("preferences", "fmops.data.preferences:prepare_preferences", Preferences, version=5),
        Stage("pretrain", "fmops.pretraining.pretrain:pretrain", Checkpoint, in_ranks=True, version=2),
        Stage("instruct", "fmops.finetuning.instruct:instruct", Checkpoint, in_ranks=True, version=2),
        Stage("align", "fmops.finetuning.align:align", Checkpoint, version=3),
        Stage("evaluate", "fmops.evaluation.evaluate:evaluate", EvalReport, version=6),
        Stage("gate", "fmops.evaluation.gate:gate", GateDecision, version=4),
        Stage("release", "fmops.deployment.release:release", Release, version=2),
    )
}


@dataclass
class StageContext:
    """What a stage may know beside its inputs: seed, threads, processes, precision, and where to report.

    Reports are JSON lines: {"event": "progress"|"metrics"|"note"|…}. The parent draws progress bars and logs metrics
    to the tracker from them; a stage run by hand prints them.
    """

    seed: int = 0
    threads: int = 1
    processes: int = 1
    """Processes that share a training or an evaluation, of `threads` threads each (runtime, no identity)."""
    launcher: str = "torchrun"
    """`torchrun` or `ray`: who starts processes that train together (runtime, no identity)."""
    sharding: str = "auto"
    """`ddp`, `fsdp2` or `auto`: whether each training process holds the whole model (runtime, no identity)."""
    precision: str = "float32"
    """`auto`, `float32` or `bfloat16`: training arithmetic (runtime, no identity)."""
    micro_batch_parts: int = 1
    """Training cuts each micro-batch into so many; raised after the memory ran out. The global batch stays."""
    cost: dict[str, float] = field(default_factory=dict)
    """Figures of this attempt that differ from run to run (tokens/s); they go into the record's cost, never into an
    artifact."""
    environment: dict[str, str] = field(default_factory=dict)
    """What this attempt chose by measurement (precision); it goes into the record's environment."""
    still_mine: Callable[[], None] = lambda: None
    """Raises when another process has taken the stage over. Asked before anything of it is changed that lasts."""
    told_to_leave: Callable[[], bool] = lambda: False
    """Whether who started this process wants it to leave; asked after each step, where no signal reaches it (Ray)."""
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    clock: Callable[[], float] = time.monotonic
    _last_progress: float = field(default=-1e9, repr=False)

    def progress(self, done: float, total: float, *, unit: str, **shown: float) -> None:
        """Report how far the stage is (at most ten lines a second); `shown` are figures to show beside the bar."""
        now = self.clock()
        if done < total and now - self._last_progress < 0.1:
            return
        self._last_progress = now
        self._emit({"event": "progress", "done": done, "total": total, "unit": unit, "shown": shown})

    def metrics(self, step: int, **values: float) -> None:
        """Report numbers at a step, for the tracker and the report's curves."""
        self._emit({"event": "metrics", "step": step, "values": values})

    def note(self, text: str) -> None:
        """Say one thing that a person should read."""
        self._emit({"event": "note", "text": text})

    def checkpoint_failed(self, reason: str) -> None:
        """Report that a resume state could not be written, for the run's metrics; `reason` is one word, as errno's."""
        self._emit({"event": "checkpoint-failed", "reason": reason})

    def _emit(self, event: dict[str, Any]) -> None:
        self.stream.write(json.dumps(event) + "\n")
        self.stream.flush()
