"""`fmops ui`: Dagster's lineage page and MLflow over this workspace, until Ctrl-C.

Enters: a project and a port. Leaves: two local servers while it lasts, none after.
Refuses: a port that is taken; anything but this machine as a client. The lineage page is for looking, not for running.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fmops.errors import FmopsError
from fmops.orchestration.code_location import SPEC, WORKSPACE
from fmops.orchestration.project import Project

HOST = "127.0.0.1"
START_S, STOP_S, LOOK_S = 120.0, 10.0, 0.1


@dataclass(frozen=True)
class Server:
    """One local server: how it is started and where it answers."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    url: str
    health: str
    log: Path


def serve_ui(project: Project, *, port: int, say: Callable[[str], None] = print) -> None:
    """Serve both pages on 127.0.0.1, `port` and the one after it (0: two free ones), until Ctrl-C or SIGTERM.

    Raises:
        FmopsError: a port is taken, or a server did not come up; names its log.
    """
    from fmops.adapters import dagster, mlflow

    servers = ui_servers(project, _ports(port))
    print("starting Dagster's page and MLflow's …", file=sys.stderr, flush=True)
    # A run that was killed left records that neither database knows.
    dagster.rebuild(project.store, dagster_home=project.store.root / "dagster")
    mlflow.rebuild(project.store)
    with _terminated_is_interrupted(), suppress(KeyboardInterrupt), _running(servers) as processes:
        for server, process in zip(servers, processes, strict=True):
            _wait_until_up(server, process)
        runs = sum(1 for _ in project.store.runs.glob("*/run.json"))
        say(f"lineage    {servers[0].url}/asset-groups")
        say(f"tracking   {servers[1].url}")
        artifacts = len(project.store.records())
        say(f"Both show {runs} run{'s' * (runs != 1)} and {artifacts} artifacts of {project.store.root}. Ctrl-C ends.")
        while all(process.poll() is None for process in processes):
            time.sleep(LOOK_S)
        ended = next(server for server, process in zip(servers, processes, strict=True) if process.poll() is not None)
        raise FmopsError(f"{ended.name} ended by itself. Its log: {ended.log}{_tail(ended.log)}")


def ui_servers(project: Project, ports: tuple[int, int]) -> tuple[Server, Server]:
    """Dagster's web server on the first port, MLflow's on the second."""
    root = project.store.root
    database, artifacts = f"sqlite:///{root / 'mlflow.db'}", (root / "mlflow-artifacts").as_uri()
    lineage, tracking = (f"http://{HOST}:{port}" for port in ports)
    return (
        Server(
            name="dagster-webserver",
            command=(
                *(sys.executable, "-m", "dagster_webserver", "--host", HOST, "--port", str(ports[0]), "--read-only"),
                *("--module-name", "fmops.orchestration.code_location", "--code-server-log-level", "warning"),
            ),
            environment={
                "DAGSTER_HOME": str(root / "dagster"),
                "DAGSTER_DISABLE_TELEMETRY": "1",
                SPEC: str(project.spec_path),
                WORKSPACE: str(root),
            },
            url=lineage,
            health=f"{lineage}/server_info",
            log=root / "logs" / "ui-dagster.log",
        ),
        Server(
            name="mlflow server",
            command=(
                *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(ports[1])),
                *("--workers", "1", "--backend-store-uri", database, "--default-artifact-root", artifacts),
            ),
            environment={"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            url=tracking,
            health=f"{tracking}/health",
            log=root / "logs" / "ui-mlflow.log",
        ),
    )


@contextmanager
def _running(servers: tuple[Server, ...]) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for server in servers:
            server.log.parent.mkdir(parents=True, exist_ok=True)
            with server.log.open("wb") as log:
                # A session of its own: Ctrl-C reaches only this process, which then ends the children in order.
                processes.append(subprocess.Popen(
                    server.command, env={**os.environ, **server.environment}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                ))  # fmt: skip
        yield processes
    finally:
        _stop(processes)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """End each process with the workers it started; those that do not listen are killed."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_up(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise FmopsError(f"{server.name} did not start. Its log: {server.log}{_tail(server.log)}")
        try:
            with urllib.request.urlopen(server.health, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(LOOK_S)
    raise FmopsError(f"{server.name} did not answer within {START_S:.0f} s. Its log: {server.log}{_tail(server.log)}")


def _ports(port: int) -> tuple[int, int]:
    """Two ports that are free now."""
    wanted = (0, 0) if port == 0 else (port, port + 1)
    with socket.socket() as first, socket.socket() as second:
        found = []
        for number, listener in zip(wanted, (first, second), strict=True):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, number))
            except OSError as error:
                raise FmopsError(
                    f"port {number} on {HOST} cannot be used ({error.strerror}). "
                    "Name another with --port; 0 takes free ones."
                ) from None
            found.append(int(listener.getsockname()[1]))
        return found[0], found[1]


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tail(log: Path, lines: int = 5) -> str:
    text = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return "".join(f"\n  {line}" for line in text[-lines:])
