"""`fmops up`, `fmops down`: what serves the champion on this machine, as processes that outlive the command.

Enters: a project with a released champion. Leaves: a supervisor; gateway, monitor, console, an engine for each arm.
Refuses: to start twice; to say that all is up before it is.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fmops.deployment.serving.chat import LOCAL_KEY
from fmops.deployment.serving.gateway.keys import KEYS, KeyRing
from fmops.deployment.serving.routes import ROUTES, Routes, RoutesFile, Target
from fmops.deployment.serving.supervisor import (
    FOLDER,
    Running,
    State,
    Supervisor,
    end_left_over,
    is_running,
    read_state,
)
from fmops.errors import EXIT_FAILED, FmopsError
from fmops.orchestration.project import Project
from fmops.orchestration.show import find_release
from fmops.production import Serve
from fmops.store import write_atomically

LOG = "supervisor.log"
PAGES = {"gateway": "v1", "monitor": "metrics", "console": ""}
TRIES = 3
"""A process that ends so often before it ever answers will not come up."""


class UpFailed(FmopsError):
    """Something did not come up."""

    exit_code = EXIT_FAILED


def up(project: Project, *, say: Callable[[str], None] = print) -> None:
    """Start everything that is not running, and wait until the champion can be asked.

    Raises:
        FmopsError: nothing is released, the spec takes any free port, or a process does not come up (names its log).
    """
    root = project.store.root
    folder = root / FOLDER
    state = read_state(folder)
    if state is None or not is_running(state.pid, state.created):
        _prepare(project)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("ab") as output:
            child = subprocess.Popen(
                _fmops(project, "up", "--foreground"),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        _wait(project, child)
    for line in serving(root):
        say(line)
    config = project.spec.serve
    say(f"metrics   {metrics_url(config)}")
    say(f"key       in {root / LOCAL_KEY}; `fmops chat` uses it, `fmops keys add` makes more")


def supervise(project: Project) -> None:
    """Be the supervisor, until SIGTERM or SIGINT."""
    root, config = project.store.root, project.spec.serve
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def engine(release: str, port: int) -> list[str]:
        return _fmops(
            project, "serve", "--release", release, "--host", "127.0.0.1", "--port", str(port), "--for-gateway"
        )

    # What else should run beside them has its line here: its URL must answer /health.
    services = {
        "gateway": (gateway_url(config), _fmops(project, "gateway")),
        "monitor": (f"http://127.0.0.1:{config.port + 2}", _fmops(project, "monitor", "--port", str(config.port + 2))),
        "console": (console_url(config), _fmops(project, "console", "--port", str(config.port + 3))),
    }
    supervisor = Supervisor(root / FOLDER, RoutesFile(root / ROUTES), engine=engine, services=services)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.stop)
    supervisor.run()


def gateway_url(config: Serve) -> str:
    """Where this machine reaches the gateway."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    return f"http://{host}:{config.port}"


def metrics_url(config: Serve) -> str:
    """Where the gateway's counters are, for this machine only."""
    return f"http://127.0.0.1:{config.port + 1}/metrics"


def console_url(config: Serve) -> str:
    """Where `fmops up` puts the console, for this machine only."""
    return f"http://127.0.0.1:{config.port + 3}"


def down(project: Project, *, say: Callable[[str], None] = print) -> None:
    """End everything that `up` started: running answers may finish."""
    folder = project.store.root / FOLDER
    state = read_state(folder)
    if state is None:
        say("nothing is up")
        return
    if is_running(state.pid, state.created):
        os.kill(state.pid, signal.SIGTERM)
        while is_running(state.pid, state.created):
            time.sleep(0.05)
        ended = [one.name for one in state.processes]
    else:
        ended = end_left_over(folder)
    say(f"ended: {', '.join(ended) or 'nothing was left'}")


def is_up(root: Path) -> bool:
    """Whether a supervisor serves this workspace."""
    state = read_state(root / FOLDER)
    return state is not None and is_running(state.pid, state.created)


def serving(root: Path) -> list[str]:
    """A line for each process that runs, and one where the champion is not what is served."""
    state = read_state(root / FOLDER)
    if state is None or not is_running(state.pid, state.created):
        return []
    routes = RoutesFile(root / ROUTES).current()
    arms = {target.release: arm for arm in ("champion", "challenger") if (target := getattr(routes, arm))}
    return [_line(one, arms) for one in state.processes]


def _line(one: Running, arms: dict[str, str]) -> str:
    health = "up" if one.healthy else "not answering"
    again = f", restarted {one.restarts} times" if one.restarts else ""
    if one.release is None:
        return f"{one.name:9} {one.url}/{PAGES[one.name]}  {health}{again}"
    return f"engine    {one.url}  {health}{again}, {one.release} ({arms.get(one.release, 'ending')})"


def _prepare(project: Project) -> None:
    """Routes and a key, where there are none yet."""
    root = project.store.root
    record, _ = find_release(project, "champion")
    port = project.spec.serve.port
    if not 0 < port <= 65532:
        raise FmopsError(f"`fmops up` takes serve.port and the three above it: set it from 1 to 65532, not {port}.")
    routes = RoutesFile(root / ROUTES)
    now = routes.current()
    if now.champion is None:
        routes.compare_and_swap(Routes(champion=Target(release=record.key)), expected=now.version)
    if not (root / LOCAL_KEY).is_file():
        _, secret = KeyRing(root / KEYS).add("local")
        write_atomically(root / LOCAL_KEY, secret + "\n", mode=0o600)


def _fmops(project: Project, *arguments: str) -> list[str]:
    where = ["--spec", str(project.spec_path), "--workspace", str(project.store.root)]
    return [sys.executable, "-m", "fmops", *arguments, *where]


def _wait(project: Project, child: subprocess.Popen[bytes]) -> None:
    """Until gateway and champion answer."""
    folder = project.store.root / FOLDER
    while True:
        state = read_state(folder)
        if child.poll() is not None:
            raise UpFailed(f"the supervisor ended: {_tail(folder / LOG)}")
        if state and state.pid == child.pid:
            if _ready(project, state):
                return
            for one in state.processes:
                if one.restarts >= TRIES and not one.healthy:
                    log = folder / f"{one.name.replace(' ', '-')}.log"
                    child.terminate()
                    child.wait()
                    raise UpFailed(f"{one.name} does not come up: {_tail(log)}. Its log is {log}.")
        time.sleep(0.1)


def _ready(project: Project, state: State) -> bool:
    champion = RoutesFile(project.store.root / ROUTES).current().champion
    healthy = {one.name for one in state.processes if one.healthy}
    return bool(champion and champion.url) and "gateway" in healthy


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else "it said nothing"
