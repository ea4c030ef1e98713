"""What went wrong in the runs of a workspace, counted for Prometheus.

Enters: events of stages, one at a time. Leaves: `metrics/runs.prom`, for a textfile collector or `fmops monitor`.
Refuses: nothing; a file that cannot be read is begun again, and on a full disk the count waits for the next one.

Series stand there from the first run on, at zero: Prometheus sees no increase in one that begins at one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fmops.store import write_atomically

FILE = Path("metrics") / "runs.prom"
CHECKPOINT_FAILURES = "fmops_checkpoint_failures_total"
STAGE_FAILURES = "fmops_stage_failures_total"
HELP = {
    CHECKPOINT_FAILURES: "Resume states that could not be written, by errno.",
    STAGE_FAILURES: "Times that a stage ended without its artifact.",
}
EXPECTED = ("enospc", "eio", "other")
_UNFIT = re.compile(r"[^\w.-]")
_SAMPLE = re.compile(r"^(\w+\{[^}]*\}) (\d+)$")


class RunMetrics:
    """The counters of one workspace; whoever counts holds its lock."""

    def __init__(self, workspace: Path, *, stages: Iterable[str]) -> None:
        self._path = workspace / FILE
        self._counts = _read(self._path)
        for reason in EXPECTED:
            self._counts.setdefault(_series(CHECKPOINT_FAILURES, reason=reason), 0)
        for stage in stages:
            self._counts.setdefault(_series(STAGE_FAILURES, stage=stage), 0)
        self._write()

    def count(self, stage: str, event: Mapping[str, Any]) -> None:
        """Count an event if it is one of those that went wrong."""
        match event["event"]:
            case "checkpoint-failed":
                series = _series(CHECKPOINT_FAILURES, reason=event["reason"])
            case "failed":
                series = _series(STAGE_FAILURES, stage=stage)
            case _:
                return
        self._counts[series] = self._counts.get(series, 0) + 1
        self._write()

    def text(self) -> str:
        """The counters in Prometheus' text format."""
        lines = []
        for name, text in HELP.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} counter"]
            lines += [f"{series} {n}" for series, n in sorted(self._counts.items()) if series.startswith(name + "{")]
        return "\n".join(lines) + "\n"

    def _write(self) -> None:
        with suppress(OSError):
            write_atomically(self._path, self.text())


def _series(name: str, **labels: str) -> str:
    inner = ",".join(f'{key}="{_UNFIT.sub("_", value)}"' for key, value in labels.items())
    return f"{name}{{{inner}}}"


def _read(path: Path) -> dict[str, int]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {found[1]: int(found[2]) for line in lines if (found := _SAMPLE.match(line))}
