"""`fmops up` and `fmops down` on a real release of the tiny model: up, asked, crashed, up again, down."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gateway_process import until

from fmops.deployment.serving.supervisor import FOLDER, is_running, read_state
from fmops.traces import DayLog, Trace


def fmops(*arguments: str, spec: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fmops", *arguments, "--spec", str(spec)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def spec(tiny_model, tmp_path):
    """A spec whose base is released, on a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path / "lifecycle.yaml"
    path.write_text(
        f"name: tiny\nbase: {tiny_model}\nserve: {{port: {port}, max_tokens: 256}}\nruntime: {{threads: 1}}\n"
    )
    assert (none := fmops("up", spec=path)).returncode == 2
    assert "no champion" in none.stderr
    assert fmops("run", spec=path).returncode == 0
    yield path
    fmops("down", spec=path)


def test_up_survives_the_death_of_its_supervisor_and_down_leaves_nothing(spec):
    folder = spec.parent / ".fmops"
    done = fmops("up", spec=spec)
    assert done.returncode == 0, done.stderr
    assert "(champion)" in done.stdout
    address, token = re.search(r"^open +(http://\S+)/#(\S+)", done.stdout, re.MULTILINE).groups()
    first = read_state(folder / FOLDER)

    asked = fmops("chat", "--prompt", "hello", spec=spec)
    assert (asked.returncode, bool(asked.stdout.strip())) == (0, True), asked.stderr
    url = next(one.url for one in first.processes if one.name == "gateway")
    engine = next(one for one in first.processes if one.release)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{engine.url}/v1/models").status_code == 401, "nobody goes round the gateway"
    until(lambda: all(one.healthy for one in read_state(folder / FOLDER).processes))
    assert "not answering" not in fmops("status", spec=spec).stdout
    assert httpx.get(f"{address}/api/state").status_code == 401
    with httpx.Client(base_url=address, headers={"x-fmops-console": "1"}) as console:
        assert console.post("/api/session", json={"token": token}).status_code == 200
        state = console.get("/api/state").json()
        assert (state["serving"]["gateway"], state["problems"]) == ("ok", [])
        hello = console.post("/api/chat", json={"messages": [{"role": "user", "content": "hello"}]}, timeout=60)
        assert hello.headers["x-fmops-release"] == engine.release

    os.kill(first.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(first.pid)] if psutil.pid_exists(first.pid) else [], timeout=20)
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}, "clients do not notice"
    up_again = fmops("up", spec=spec)
    assert up_again.returncode == 0
    assert token not in up_again.stdout, "it is shown once"
    again = read_state(folder / FOLDER)
    assert again.pid != first.pid
    assert {one.pid for one in again.processes} == {one.pid for one in first.processes}

    secrets = [(folder / name).read_text().strip() for name in ("local.key", "gateway.secret")]
    secrets.append(token)
    for one in again.processes:
        process = psutil.Process(one.pid)
        shown = " ".join([*process.cmdline(), *process.environ().values()])
        assert not [secret for secret in secrets if secret in shown], "no secret in arguments or environment"
    logs = "".join(path.read_text() for path in (folder / FOLDER).glob("*.log"))
    assert not [secret for secret in secrets if secret in logs]

    ended = fmops("down", spec=spec)
    assert ended.stdout.startswith("ended: gateway, monitor, console, engine release-")
    assert not [one.pid for one in again.processes if is_running(one.pid, one.created)]
    traces = DayLog(folder / "traces", Trace).read()[0]
    assert [(trace.tenant, trace.release, trace.arm) for trace in traces] == [("local", engine.release, "champion")] * 2
    assert fmops("down", spec=spec).stdout == "nothing is up\n"
