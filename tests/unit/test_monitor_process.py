"""The process that looks: it says what changes, goes on after mistakes, and is healthy only while it looks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from benchmarks.simulated import RATES, Production, write_traces
from fmops.deployment.monitoring import process
from fmops.errors import FmopsError
from fmops.production import Monitor
from fmops.store import Store

POLICY = Monitor(reference=200, observations_per_false_alarm=1000)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / ".fmops")
    store.move_aliases({"champion": "release-champion"}, expected={"champion": None}, why="test")
    return store


def get(url: str) -> tuple[int, str]:
    try:
        with urlopen(url, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_it_says_what_changes_and_only_that(store):
    now, said = [0.0], []
    production = Production(seed=1, now_s=time.time() - 1000)
    write_traces(store.root, production, 300)
    looks = process.Looks(store, POLICY, say=said.append, clock=lambda: now[0])
    looks.look()
    looks.look()
    assert said == ["release-champion: no alarm"]
    production.rates = {**RATES, "empty": 0.6}
    write_traces(store.root, production, 100)
    looks.look()
    assert len(said) == 1  # answers are looked at once a minute
    now[0] = 61.0
    looks.look()
    assert "diagnosis: behaviour → instruct" in said[1]


def test_a_mistake_is_said_and_the_next_look_goes_on(tmp_path):
    now, said = [0.0], []
    store = Store(tmp_path / ".fmops")
    looks = process.Looks(store, POLICY, say=said.append, clock=lambda: now[0])
    now[0] = 200.0
    looks.look()
    assert "has no champion to watch" in said[0]
    assert looks.seconds_since() == 200
    store.move_aliases({"champion": "release-champion"}, expected={"champion": None}, why="test")
    looks.look()
    assert looks.seconds_since() == 0


def test_health_and_metrics_for_this_machine(store):
    write_traces(store.root, Production(seed=2), 10)
    process.Looks(store, POLICY, say=lambda text: None).look()
    ages = [0.0]
    with process.served(store, lambda: ages[0], 0) as url:
        assert get(f"{url}/health") == (200, '{"status": "ok"}')
        assert "fmops_monitor_answers_total 10" in get(f"{url}/metrics")[1]
        assert get(f"{url}/admin")[0] == 404
        ages[0] = 181.0
        status, body = get(f"{url}/health")
        assert (status, json.loads(body)) == (503, {"status": "failed"})
        port = int(url.rpartition(":")[2])
        with (
            pytest.raises(FmopsError, match=f"port {port} of this machine cannot be taken"),
            process.served(store, lambda: 0.0, port),
        ):
            pass


def test_it_ends_at_sigterm_and_looks_once_for_cron(store, tmp_path):
    (tmp_path / "lifecycle.yaml").write_text("name: tiny\nbase: ./model\n")
    command = [sys.executable, "-u", "-m", "fmops", "monitor", "--spec", str(tmp_path / "lifecycle.yaml")]
    once = subprocess.run([*command, "--once"], capture_output=True, text=True)
    assert once.returncode == 0, once.stderr
    assert "normal is still being measured" in once.stdout
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert child.stdout.readline() == "release-champion: no alarm\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.stdout.close()
