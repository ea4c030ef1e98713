"""Stages as forks of one server: the same artifacts, the same endings, and nothing that stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from fmops.errors import EXIT_TERMINATED, StageFailed
from fmops.orchestration import fork_server, launch
from fmops.orchestration.fork_server import ForkServer
from fmops.orchestration.project import Project
from fmops.store import Record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel must end forks with their server")

SPEC = """\
name: forked
base: base
data:
  corpora:
    docs: {source: "docs/*.txt"}
curate: {block_tokens: 128, min_characters: 50, held_out: 0.2}
pretrain: {tokens: 2048, learning_rate: 3e-3, batch_tokens: 512, evaluations: 1}
runtime: {threads: 1, precision: float32}
"""


def run(project: Project, name: str, server: ForkServer | None, on_event=lambda _: None) -> Record:
    start = server.start if server else launch.start_alone
    fingerprint = project.planner().plan()[name].fingerprint
    assert fingerprint
    log = project.store.root / f"{name}.log"
    return launch.launch_local(project, name, fingerprint=fingerprint, log=log, on_event=on_event, start=start)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A project whose stages before pretraining have run on one server; and that server's number after each."""
    from offline_data import write_offline_data

    folder = tmp_path_factory.mktemp("forked")
    write_offline_data(folder)
    (folder / "lifecycle.yaml").write_text(SPEC)
    project, servers = Project.open(folder / "lifecycle.yaml"), []
    with ForkServer() as server:
        for name in ("base", "corpus"):
            run(project, name, server)
            servers.append(server._server.pid)
    return folder, servers


@pytest.fixture
def project(made: tuple[Path, list[int]], tmp_path: Path) -> Project:
    """That project, with a workspace that the test may fill."""
    shutil.copytree(made[0], tmp_path / "project")
    return Project.open(tmp_path / "project" / "lifecycle.yaml")


@pytest.fixture(scope="module")
def server():
    before = set(psutil.Process().children(recursive=True))
    with ForkServer() as server:
        yield server
    assert set(psutil.Process().children(recursive=True)) <= before


def test_one_server_makes_what_processes_of_their_own_make(made, project, server):
    assert len(set(made[1])) == 1
    (forked,) = [record for record in project.store.records() if record.node == "corpus"]
    project.store.quarantine(forked)
    alone = run(project, "corpus", None)
    assert alone.digest == forked.digest
    commands = [each.environment.pop("command") for each in (alone, forked)]
    assert alone.environment == forked.environment
    assert [command.split("--spec")[0] for command in commands] == ["__main__.py stage corpus "] * 2


def test_a_stage_of_another_environment_takes_another_server(project, server, monkeypatch):
    monkeypatch.setenv("FMOPS_FAULT", "commit-before-record:1")
    for record in project.store.records():
        project.store.quarantine(record)
    with pytest.raises(StageFailed, match=r"was killed \(SIGKILL\)"):
        run(project, "base", server)
    first = server._server.pid
    monkeypatch.delenv("FMOPS_FAULT")
    assert run(project, "base", server).stage == "import"
    assert server._server.pid != first


def at_first_progress(act):
    """Calls `act` when a stage first says how far it is."""
    done = []

    def on_event(event):
        if event["event"] == "progress" and not done:
            done.append(event)
            act()

    return on_event


def test_told_to_leave_while_a_stage_trains_the_stage_leaves_in_order(project, server):
    with pytest.raises(StageFailed) as stopped:
        run(project, "pretrain", server, at_first_progress(partial(os.kill, os.getpid(), signal.SIGTERM)))
    assert stopped.value.exit_code == EXIT_TERMINATED
    assert "told to leave (SIGTERM)" in str(stopped.value)


def test_a_signal_to_the_whole_group_does_not_take_the_server_from_its_stage(project, server):
    made = run(project, "pretrain", server, at_first_progress(lambda: os.kill(server._server.pid, signal.SIGTERM)))
    assert made.stage == "pretrain"


def test_a_stage_ends_with_its_server_and_the_next_one_starts_another(project, server):
    stages = []

    def kill() -> None:
        stages.extend(psutil.Process(server._server.pid).children())
        server._server.kill()

    with pytest.raises(StageFailed, match=r"was killed \(SIGKILL\)"):
        run(project, "pretrain", server, at_first_progress(kill))
    assert len(stages) == 1
    assert psutil.wait_procs(stages, timeout=30)[1] == []
    assert run(project, "pretrain", server).stage == "pretrain"


def test_what_a_stage_imports_in_vain_is_told_by_the_stage(project, server, monkeypatch):
    monkeypatch.setitem(fork_server.IMPORTS, "import", "fmops.adapters.no_such_module")
    for record in project.store.records():
        project.store.quarantine(record)
    assert run(project, "base", server).stage == "import"
