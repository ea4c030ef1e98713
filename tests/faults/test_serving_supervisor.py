"""What `fmops up` started stays up: engines that die or hang start again; nobody else's process is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fmops.deployment.serving.routes import Routes, RoutesFile, Target
from fmops.deployment.serving.supervisor import (
    PROBE_S,
    PROBES,
    STATE,
    Running,
    State,
    Supervisor,
    end_left_over,
    is_running,
    read_state,
)
from fmops.errors import FmopsError

FAKE = Path(__file__).resolve().parents[1] / "fake_engine.py"


def engine(release: str, port: int) -> list[str]:
    return [sys.executable, str(FAKE), str(port), release]


class House:
    """A supervisor over fake engines whose clock the test moves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 0.0
        self.routes = RoutesFile(folder / "routes.json")
        self.routes.compare_and_swap(Routes(champion=Target(release="old")), expected=self.routes.current().version)
        self.children: list[subprocess.Popen] = []
        self.supervisor = self.another()

    def another(self) -> Supervisor:
        """The next supervisor; the one before has died."""
        if hasattr(self, "supervisor"):
            self.children += [one.child for one in self.supervisor._watched.values() if one.child]
        self.supervisor = Supervisor(self.folder, self.routes, engine=engine, services={}, clock=lambda: self.now)
        self.supervisor.adopt()
        return self.supervisor

    def until(self, condition):
        """Tick, as time goes by, until it is so."""
        deadline = time.monotonic() + 30
        while not (found := condition()):
            assert time.monotonic() < deadline, "it never happened"
            self.now += 0.3
            self.supervisor.tick()
            time.sleep(0.01)
        return found

    def process(self, release: str) -> Running | None:
        state = read_state(self.folder)
        return next((one for one in state.processes if one.release == release), None) if state else None

    def healthy(self, release: str) -> Running:
        return self.until(lambda: (one := self.process(release)) and one.healthy and one)


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    yield made
    made.supervisor.stop()
    made.supervisor._end_all()
    for child in made.children:
        child.wait(20)


def test_an_engine_gets_its_traffic_once_it_answers(house):
    house.supervisor.tick()
    assert house.routes.current().champion.url is None
    running = house.healthy("old")
    house.until(lambda: house.routes.current().champion.url == running.url)
    assert psutil.Process(running.pid).is_running()


def test_an_engine_killed_by_minus_nine_comes_back_at_its_place_after_a_pause_that_grows(house):
    first = house.healthy("old")
    pauses = []
    for _ in range(3):
        running = house.healthy("old")
        house.until(lambda: house.routes.current().champion.url)
        os.kill(running.pid, signal.SIGKILL)
        house.until(lambda: house.process("old") is None)
        dead_at = house.now
        house.until(lambda: house.process("old"))
        pauses.append(house.now - dead_at)
        # The failures of a dead engine are evidence: its place in the routes stays.
        assert house.routes.current().champion.url == first.url
    again = house.healthy("old")
    assert (again.url, again.restarts) == (first.url, 3)
    assert pauses == sorted(pauses)
    assert 0.3 <= pauses[0] < 1.0
    assert pauses[2] >= 1.8


def test_an_engine_that_hangs_is_killed_and_started_again(house):
    running = house.healthy("old")
    os.kill(running.pid, signal.SIGSTOP)
    stopped_at = house.now
    house.until(lambda: (one := house.process("old")) is None or one.pid != running.pid)
    assert house.now - stopped_at >= PROBE_S * (PROBES - 1)
    assert house.healthy("old").pid != running.pid


def test_a_challenger_is_started_and_after_its_promotion_the_old_engine_ends(house):
    old = house.healthy("old")
    house.until(lambda: house.routes.current().champion.url)
    now = house.routes.current()
    house.routes.compare_and_swap(now.model_copy(update={"challenger": Target(release="new")}), expected=now.version)
    new = house.healthy("new")
    house.until(lambda: house.routes.current().challenger.url == new.url)
    now = house.routes.current()
    house.routes.compare_and_swap(Routes(champion=now.challenger), expected=now.version)
    house.until(lambda: not is_running(old.pid, old.created))
    assert house.process("new").pid == new.pid
    assert house.routes.current().champion == Target(release="new", url=new.url)


def test_after_a_crash_the_next_supervisor_takes_over_what_still_runs(house):
    running = house.healthy("old")
    house.until(lambda: house.routes.current().champion.url)
    house.another()
    for _ in range(3):
        house.supervisor.tick()
    assert house.process("old").pid == running.pid
    os.kill(running.pid, signal.SIGKILL)
    house.until(lambda: (one := house.process("old")) and one.pid != running.pid)


def test_after_a_reboot_stale_numbers_belong_to_others(house, tmp_path):
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        stale = Running(
            name="engine old", pid=bystander.pid, created=1.0, command=("x",), url="http://127.0.0.1:9", release="old"
        )
        house.folder.joinpath(STATE).write_text(State(pid=1, created=1.0, processes=(stale,)).model_dump_json())
        now = house.routes.current()
        house.routes.compare_and_swap(
            Routes(champion=Target(release="old", url="http://127.0.0.1:1")), expected=now.version
        )
        house.another()
        house.supervisor._ports.clear()
        house.supervisor.tick()
        assert house.routes.current().champion.url is None, "nobody is sent to where nobody answers"
        assert house.healthy("old").pid != bystander.pid
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n", timeout=20)


def test_two_supervisors_on_one_workspace_are_one_too_many(house):
    from fmops.locks import locked

    with locked(house.folder / "lock"), pytest.raises(FmopsError, match="is held by pid"):
        house.another().run()


def test_what_a_dead_supervisor_left_is_ended_by_its_number_and_start(house):
    running = house.healthy("old")
    assert end_left_over(house.folder) == ["engine old"]
    assert not is_running(running.pid, running.created)
    assert read_state(house.folder) is None
    # The double has no child of its own any more.
    house.another()
