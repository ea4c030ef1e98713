"""Launching a stage on this machine, in a process of its own, again where that helps.

Enters: a project, a node and its fingerprint. Leaves: the committed record, and every report on the way.
Refuses: to call a stage done whose record is not there; to start again what would only fail again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from fmops.errors import EXIT_MEMORY, EXIT_TERMINATED, StageFailed
from fmops.orchestration.execute import MICRO_BATCH_PARTS, PARENT, TRAINING
from fmops.orchestration.project import Project
from fmops.orchestration.watchdog import IDLE_S, Process, Pulse, killed_when_idle, memory_kills
from fmops.store import Record

Event = dict[str, Any]
RESTARTS = 3
"""Times that a stage is started again after it hung or ran out of memory."""


@dataclass(frozen=True)
class Ending:
    """How one attempt ended."""

    code: int
    failure: Event | None
    hung: bool
    """The watchdog killed it."""
    starved: bool
    """The kernel killed it, or it said so itself, for want of memory."""


class Start(Protocol):
    """Starts the process of one stage, with its reports on its standard output and all else in its log."""

    def __call__(
        self, arguments: Sequence[str], *, kind: str, environment: dict[str, str], log: IO[bytes]
    ) -> Process: ...


def start_alone(
    arguments: Sequence[str], *, kind: str, environment: dict[str, str], log: IO[bytes]
) -> subprocess.Popen[str]:
    """`fmops stage` in an interpreter of its own."""
    command = [sys.executable, "-m", "fmops", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


def launch_local(
    project: Project,
    name: str,
    *,
    fingerprint: str,
    log: Path,
    on_event: Callable[[Event], None],
    idle_s: float = IDLE_S,
    start: Start = start_alone,
) -> Record:
    """Run one node's stage in a process and follow it.

    A stage that shows no life for `idle_s` seconds is killed and started again; it goes on from its resume state. So is
    a training stage that ran out of memory, with smaller micro-batches. SIGTERM to this process reaches the stage.

    Raises:
        StageFailed: with the stage's own error, or how its process ended and where its log lies.
    """
    stage = project.graph.nodes[name].stage
    arguments = [
        "stage", name, "--spec", str(project.spec_path), "--workspace", str(project.store.root),
        "--fingerprint", fingerprint,
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = _environment(project.threads)
    parts = 1
    for attempt in range(RESTARTS + 1):
        with log.open("ab") as errors:
            process = start(arguments, kind=stage.name, environment=dict(environment), log=errors)
        ended = follow(process, on_event=on_event, idle_s=idle_s)
        smaller = ended.starved and stage.name in TRAINING
        if attempt == RESTARTS or not (ended.hung or smaller):
            break
        if smaller:
            parts *= 2
            environment[MICRO_BATCH_PARTS] = str(parts)
            why = f"out of memory; starting again with micro-batches cut into {parts}, the global batch stays"
        else:
            why = f"no sign of life for {idle_s:g} s; killed, and started again from its newest resume state"
        on_event({"event": "note", "text": why})
    record = None if ended.failure else project.store.find(stage.name, fingerprint)
    if ended.failure or ended.code or record is None:
        raise _failed(name, ended, log=log, idle_s=idle_s)
    return record


def follow(process: Process, *, on_event: Callable[[Event], None], idle_s: float) -> Ending:
    """Pass the events of a process on, wait for its end."""
    failure: Event | None = None
    kills = memory_kills()
    with process, _sigterm_passed_on(process):
        assert process.stdout is not None
        pulse = Pulse(process.pid, period_s=min(5.0, idle_s / 4))
        try:
            with killed_when_idle(process, pulse, idle_s=idle_s) as hung:
                for line in process.stdout:
                    pulse.beat()
                    event: Event = json.loads(line)
                    if event["event"] == "failed":
                        failure = event
                    elif event["event"] != "finished":
                        on_event(event)
        except BaseException:
            process.kill()
            raise
    code = process.returncode
    assert code is not None
    starved = failure["code"] == EXIT_MEMORY if failure else code == -signal.SIGKILL and memory_kills() > kills
    return Ending(code, failure, hung.is_set(), starved and not hung.is_set())


@contextmanager
def _sigterm_passed_on(process: Process) -> Iterator[None]:
    """While the stage runs, SIGTERM is its business: training writes a resume state before it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failed(name: str, ended: Ending, *, log: Path, idle_s: float) -> StageFailed:
    if ended.failure:
        error = StageFailed(f"{name}: {ended.failure['error']}")
        error.exit_code = int(ended.failure["code"])
        return error
    if ended.hung:
        text = f"its process showed no sign of life for {idle_s:g} s, {RESTARTS + 1} times."
    elif ended.starved:
        text = "its process was killed for want of memory. Free some, or lower batch_tokens and block_tokens."
    else:
        text = _ending(ended.code)
    error = StageFailed(f"{name}: {text} Its log: {log}{_tail(log)}")
    if ended.code == -signal.SIGTERM:
        error.exit_code = EXIT_TERMINATED
    elif ended.starved:
        error.exit_code = EXIT_MEMORY
    return error


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, **pinned_threads(threads), PARENT: str(os.getpid())}


def pinned_threads(threads: int) -> dict[str, str]:
    """Variables that libraries read once, at import; results are equal bit for bit only at an equal thread count."""
    pinned = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**pinned, "TOKENIZERS_PARALLELISM": "false"}


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed (SIGKILL), by hand or for want of memory. Run again to go on from where it was."
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}. Run again to go on from where it was."
    return f"its process failed with exit code {code}."


def _tail(log: Path, lines: int = 3) -> str:
    text = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return "".join(f"\n  {line}" for line in text[-lines:])
