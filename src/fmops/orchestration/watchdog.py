"""Whether a stage process still lives, seen from outside: a stopped or dead-locked one cannot say so itself.

Enters: a process id. Leaves: seconds without a sign of life; whether the kernel killed something for want of memory.
Refuses: to judge by wall time alone: a stage that computes, in itself or in a child, lives.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, Self

IDLE_S = 300.0
"""Without an event and without processor time for so long, a stage hangs. A slow disk or download stalls for less."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BREATH_S = 0.05
"""Processor time between two looks that counts as life; an idle interpreter's threads use less."""
OVERSLEPT = 3
MEMORY_EVENTS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))
"""Where the kernel counts what it killed for want of memory: on the machine, in this container."""


class Process(Protocol):
    """A stage's process, as `subprocess.Popen` would show it."""

    @property
    def pid(self) -> int: ...

    @property
    def stdout(self) -> IO[str] | None: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


@dataclass
class Pulse:
    """When a process last showed life: an event, or processor time of its own or of its children."""

    pid: int
    period_s: float = 5.0
    """Between two looks."""
    clock: Callable[[], float] = time.monotonic
    cpu_seconds: Callable[[int], float] = field(default=lambda pid: cpu_seconds(pid))
    _last: float = field(init=False)
    _looked: float = field(init=False)
    _used: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._last = self._looked = self.clock()

    def beat(self) -> None:
        """It has said something."""
        self._last = self.clock()

    def idle_s(self) -> float:
        """Seconds since it last showed life, as of now."""
        used, now = self.cpu_seconds(self.pid), self.clock()
        # Who did not look in time was stopped itself (Ctrl-Z stops a whole job); that says nothing about the stage.
        if abs(used - self._used) >= BREATH_S or now - self._looked > OVERSLEPT * self.period_s:
            self.beat()
        self._used, self._looked = used, now
        return now - self._last


@contextmanager
def killed_when_idle(process: Process, pulse: Pulse, *, idle_s: float) -> Iterator[threading.Event]:
    """Kill `process` once it has been idle for `idle_s` seconds; the event that is yielded tells that it was."""
    hung, done = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(pulse.period_s):
            if pulse.idle_s() >= idle_s and process.poll() is None:
                hung.set()
                process.kill()
                return

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield hung
    finally:
        done.set()
        thread.join()


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its living descendants; 0 where the system does not say."""
    total, todo = 0.0, [pid]
    while todo:
        one = todo.pop()
        try:
            # After the command in parentheses, which may hold spaces: state, then utime and stime at 12 and 13.
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS_PER_S
            todo += children(one)
        except (OSError, IndexError):
            # It ended between two looks, or this system has no /proc.
            continue
    return total


def children(pid: int) -> Iterator[int]:
    """Processes that a process has started and that live.

    Raises:
        OSError: it ended, or this system has no /proc.
    """
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def memory_kills() -> int:
    """How many processes the kernel has killed for want of memory, here or in this container."""
    found = 0
    for path in MEMORY_EVENTS:
        lines = path.read_text().splitlines() if path.is_file() else []
        found += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return found
