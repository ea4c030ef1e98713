"""Engines and gateway of one machine, kept alive.

Enters: what should run (the gateway, an engine for each arm of the routes) and what did run (the state on disk).
Leaves: processes that run, restarted with growing pauses when they die or hang; the engines' URLs in the routes.
Refuses: to be two on one workspace, and to touch a process that only shares a number with one of its own.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
from pydantic import Field

from fmops.artifacts import Frozen
from fmops.deployment.serving.routes import Routes, RoutesFile, RoutesMoved, Target
from fmops.errors import FmopsError
from fmops.locks import locked
from fmops.store import write_atomically

FOLDER, STATE = "up", "state.json"
"""In the workspace: `state.json`, the supervisor's lock, a log of each process."""
TICK_S = 0.25
PAUSE_S = (0.5, 60.0)
"""First and longest pause before a restart; it doubles, and starts over after a quiet minute."""
QUIET_S = 60.0
START_S = 600.0
"""Longest time to the first answer of /health: a large model is read from disk."""
PROBES = 5
"""Failed looks at /health in a row before a running process counts as hung."""
PROBE_S = 2.0
GRACE_S = 25.0
"""From SIGTERM to SIGKILL: the servers' own 20 s for running answers, and some."""
log = logging.getLogger("fmops.up")


class Running(Frozen):
    """One process as the state remembers it. Pid and start time together name it: pids are used again."""

    name: str
    pid: int
    created: float = Field(description="Start of the process, as the kernel tells it.")
    command: tuple[str, ...]
    url: str
    release: str | None = None
    restarts: int = 0
    healthy: bool = False


class State(Frozen):
    """What runs, on disk."""

    pid: int = Field(description="Of the supervisor.")
    created: float
    processes: tuple[Running, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One thing that should run."""

    name: str
    url: str
    command: tuple[str, ...]
    release: str | None = None


@dataclass(eq=False)
class _Watched:
    """A process and how it does."""

    running: Running
    child: subprocess.Popen[bytes] | None
    """None where an earlier supervisor started it."""
    since: float
    served: bool = False
    """Whether it has ever answered."""
    probed: float = -1e9
    failed: int = 0
    ending: float | None = None
    """When SIGTERM was sent."""

    @property
    def alive(self) -> bool:
        if self.child is not None:
            return self.child.poll() is None
        return is_running(self.running.pid, self.running.created)


class Supervisor:
    """Runs until `stop`."""

    def __init__(
        self, folder: Path, routes: RoutesFile, *, engine: Callable[[str, int], Sequence[str]],
        services: Mapping[str, tuple[str, Sequence[str]]], clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`engine(release, port)` is the command of an engine; `services` are URL and command of all else, by name."""
        self._folder, self._routes, self._engine, self._clock = folder, routes, engine, clock
        self._services = services
        self._watched: dict[str, _Watched] = {}
        self._next_start: dict[str, float] = {}
        self._pause_s: dict[str, float] = {}
        self._restarts: dict[str, int] = {}
        self._ports: dict[str, int] = {}
        self._saved: State | None = None
        self._stopping = threading.Event()

    def stop(self, sig: int = 0, frame: FrameType | None = None) -> None:
        """End everything in order; also a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Keep everything running until `stop`, then end it.

        Raises:
            FmopsError: another supervisor runs on this workspace.
        """
        with locked(self._folder / "lock"):
            self.adopt()
            while not self._stopping.is_set():
                self.tick()
                self._stopping.wait(TICK_S)
            self._end_all()

    def adopt(self) -> None:
        """Take over what an earlier supervisor left running; what has another start time is somebody else's."""
        state = read_state(self._folder)
        for running in state.processes if state else ():
            if running.release:
                self._ports[running.release] = int(running.url.rpartition(":")[2])
            if is_running(running.pid, running.created):
                self._watched[running.name] = _Watched(running, None, self._clock(), served=running.healthy)
                log.info("took over %s, pid %d", running.name, running.pid)

    def tick(self) -> None:
        """Look once at everything, and do what is due."""
        routes = self._routes.current()
        wanted = {unit.name: unit for unit in self._units(routes)}
        for name, watched in list(self._watched.items()):
            if not watched.alive:
                self._bury(name, watched)
            elif watched.ending is not None or name not in wanted or wanted[name].command != watched.running.command:
                self._end(watched)
            else:
                self._look(watched)
        for name, unit in wanted.items():
            if name not in self._watched and self._clock() >= self._next_start.get(name, 0.0):
                self._start(unit)
        self._publish(routes)
        self._save()

    def _units(self, routes: Routes) -> Iterator[Unit]:
        """What should run now."""
        for name, (url, command) in self._services.items():
            yield Unit(name=name, url=url, command=tuple(command))
        for target in (routes.champion, routes.challenger):
            if target:
                command = tuple(self._engine(target.release, self._port(target.release)))
                name, url = engine_name_of(target.release), self._url(target.release)
                yield Unit(name=name, url=url, command=command, release=target.release)

    def _port(self, release: str) -> int:
        """An engine keeps its port over restarts: the routes stay as they are."""
        if release not in self._ports:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self._ports[release] = free.getsockname()[1]
        return self._ports[release]

    def _url(self, release: str) -> str:
        return f"http://127.0.0.1:{self._port(release)}"

    def _start(self, unit: Unit) -> None:
        with (self._folder / f"{unit.name.replace(' ', '-')}.log").open("ab") as output:
            child = subprocess.Popen(
                unit.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        running = Running(
            name=unit.name, pid=child.pid, created=psutil.Process(child.pid).create_time(), command=unit.command,
            url=unit.url, release=unit.release, restarts=self._restarts.get(unit.name, 0),
        )  # fmt: skip
        self._watched[unit.name] = _Watched(running, child, self._clock())
        # At once: killed between the start and this, the next supervisor would not know the process.
        self._save()
        log.info("started %s, pid %d", unit.name, child.pid)

    def _look(self, watched: _Watched) -> None:
        """Ask /health when it is time; kill what has hung, or says that it cannot go on."""
        now, name = self._clock(), watched.running.name
        if now - watched.probed < (PROBE_S if watched.served else TICK_S):
            return
        watched.probed = now
        found = probe(watched.running.url)
        if (found == "ok") != watched.running.healthy:
            watched.running = watched.running.model_copy(update={"healthy": found == "ok"})
        if found != "dead":
            watched.served, watched.failed = True, 0
            if now - watched.since > QUIET_S:
                self._pause_s.pop(name, None)
            return
        watched.failed += 1
        if watched.failed >= PROBES if watched.served else now - watched.since > START_S:
            log.warning("%s does not answer: it is killed", name)
            _signal(watched, signal.SIGKILL)

    def _bury(self, name: str, watched: _Watched) -> None:
        """A process has ended; by itself: plan its restart, after a pause that doubles."""
        del self._watched[name]
        if watched.ending is not None:
            return
        pause = self._pause_s.get(name, PAUSE_S[0])
        self._restarts[name] = watched.running.restarts + 1
        self._next_start[name], self._pause_s[name] = self._clock() + pause, min(2 * pause, PAUSE_S[1])
        log.warning("%s ended by itself; again in %.1f s", name, pause)

    def _end(self, watched: _Watched) -> None:
        """Ask a process to end; make it end when its grace is over."""
        now = self._clock()
        if watched.ending is None:
            watched.ending = now
            log.info("ending %s", watched.running.name)
            _signal(watched, signal.SIGTERM)
        elif now - watched.ending > GRACE_S:
            _signal(watched, signal.SIGKILL)

    def _end_all(self) -> None:
        """The gateway first: its running answers still need their engines."""
        services = [watched for watched in self._watched.values() if not watched.running.release]
        engines = [watched for watched in self._watched.values() if watched.running.release]
        for group in (services, engines):
            while any(watched.alive for watched in group):
                for watched in group:
                    if watched.alive:
                        self._end(watched)
                time.sleep(TICK_S / 5)
        (self._folder / STATE).unlink(missing_ok=True)

    def _publish(self, routes: Routes) -> None:
        """Tell the gateway where the engines are, once they have answered.

        An engine that dies keeps its place: its failures are evidence, and the gateway's circuit spares the clients.
        """
        changes = {}
        for arm in ("champion", "challenger"):
            target: Target | None = getattr(routes, arm)
            if target is None or target.url == self._url(target.release):
                continue
            watched = self._watched.get(engine_name_of(target.release))
            url = watched.running.url if watched and watched.running.healthy else None
            if url != target.url:
                changes[arm] = target.model_copy(update={"url": url})
        if changes:
            try:
                self._routes.compare_and_swap(routes.model_copy(update=changes), expected=routes.version)
            except RoutesMoved:
                log.info("the routes changed meanwhile; looking again")

    def _save(self) -> None:
        state = State(
            pid=os.getpid(), created=psutil.Process().create_time(),
            processes=tuple(watched.running for watched in self._watched.values()),
        )  # fmt: skip
        if state != self._saved:
            write_atomically(self._folder / STATE, state.model_dump_json(indent=1) + "\n")
            self._saved = state


def engine_name_of(release: str) -> str:
    """Name of the unit that serves a release."""
    return f"engine {release}"


def read_state(folder: Path) -> State | None:
    """What ran when the state was last written; None when nothing was started, or all was ended in order.

    Raises:
        FmopsError: the file is no state.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        return State.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise FmopsError(f"{path} is no state: {error}. End the processes by hand, remove the file.") from None


def is_running(pid: int, created: float) -> bool:
    """Whether the process that started then still runs: the number alone may be another's by now."""
    try:
        process = psutil.Process(pid)
        same: bool = abs(process.create_time() - created) < 0.02
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def probe(url: str) -> str:
    """`ok` (takes requests), `alive` (answers, but takes none now), or `dead`."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=1.0)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        status = json.loads(answer.read()).get("status")
    except (OSError, http.client.HTTPException, ValueError):
        return "dead"
    finally:
        connection.close()
    if answer.status == 200:
        return "ok"
    return "dead" if status == "failed" else "alive"


def end_left_over(folder: Path) -> list[str]:
    """End what a supervisor that died left running; returns the names."""
    state = read_state(folder)
    left = [one for one in (state.processes if state else ()) if is_running(one.pid, one.created)]
    for running in sorted(left, key=lambda one: one.release is not None):
        os.kill(running.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while is_running(running.pid, running.created):
            if time.monotonic() > deadline:
                os.kill(running.pid, signal.SIGKILL)
            time.sleep(TICK_S / 5)
    (folder / STATE).unlink(missing_ok=True)
    return [running.name for running in left]


def _signal(watched: _Watched, number: int) -> None:
    if watched.alive:
        os.kill(watched.running.pid, number)
