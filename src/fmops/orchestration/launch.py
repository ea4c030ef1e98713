"""Launching a stage on this machine, in a process of its own.

Enters: a project, a node and its fingerprint. Leaves: the committed record, and every report on the way.
Refuses: to call a stage done whose record is not there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fmops.errors import StageFailed
from fmops.orchestration.execute import PARENT
from fmops.orchestration.project import Project
from fmops.store import Record

Event = dict[str, Any]


def launch_local(
    project: Project, name: str, *, fingerprint: str, log: Path, on_event: Callable[[Event], None]
) -> Record:
    """Run `fmops stage` for one node and follow it.

    Raises:
        StageFailed: with the stage's own error, or how its process ended and where its log lies.
    """
    stage = project.graph.nodes[name].stage.name
    command = [
        sys.executable, "-m", "fmops", "stage", name,
        "--spec", str(project.spec_path), "--workspace", str(project.store.root), "--fingerprint", fingerprint,
    ]  # fmt: skip
    failure: Event | None = None
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("ab") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(project.threads)
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event: Event = json.loads(line)
                if event["event"] == "failed":
                    failure = event
                elif event["event"] != "finished":
                    on_event(event)
        except BaseException:
            process.kill()
            raise
    if failure:
        error = StageFailed(f"{name}: {failure['error']}")
        error.exit_code = int(failure["code"])
        raise error
    record = project.store.find(stage, fingerprint)
    if process.returncode or record is None:
        raise StageFailed(f"{name}: {_ending(process.returncode)} Its log: {log}{_tail(log)}")
    return record


def _environment(threads: int) -> dict[str, str]:
    # Libraries read these once, at import; results are equal bit for bit only at an equal thread count.
    pinned = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **pinned, "TOKENIZERS_PARALLELISM": "false", PARENT: str(os.getpid())}


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed (SIGKILL), by hand or for want of memory. Run again to go on from where it was."
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}. Run again to go on from where it was."
    return f"its process failed with exit code {code}."


def _tail(log: Path, lines: int = 3) -> str:
    text = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return "".join(f"\n  {line}" for line in text[-lines:])
