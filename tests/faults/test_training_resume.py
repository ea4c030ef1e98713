"""Training is killed, its resume states are torn, corrupted or cannot be written.

Whatever happens, the weights in the end equal those of an uninterrupted run bit for bit, or the error says what to do.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import training_run
from training_run import digests, train

from fmops.adapters import resume
from fmops.errors import StageFailed
from fmops.locks import Busy, locked

STAGES = ("pretrain", "instruct", "align")


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").symlink_to(tiny_model)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    found: dict[str, dict[str, str]] = {}

    def of(stage: str) -> dict[str, str]:
        if stage not in found:
            out = tmp_path_factory.mktemp(stage) / "out"
            train(stage, inputs, out, io.StringIO())
            found[stage] = digests(out)
        return found[stage]

    return of


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose resume states are still there."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train("pretrain", inputs, out, io.StringIO())
    return out


def killed(stage: str, inputs: Path, out: Path, fault: str) -> None:
    """Train in a process of its own, which is killed at a fault site."""
    ended = subprocess.run(
        [sys.executable, training_run.__file__, stage, str(inputs), str(out)],
        env={**os.environ, "FMOPS_FAULT": fault, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]


SOURCES = Path(resume.__file__).parent
SITES = sorted(
    {
        site
        for path in SOURCES.glob("*.py")
        for site in re.findall(r'fault_site\("((?:checkpoint|step)[a-z-]*)"\)', path.read_text())
    }
)
"""Every named place of training and its resume states, read from the source: a new one is tested at once."""
KILLS = [("pretrain", f"{site}:{1 if site == 'checkpoint-prune' else 2}") for site in SITES]
KILLS += [("pretrain", "step:1"), ("instruct", "checkpoint-written:2"), ("align", "checkpoint-sealed:2")]
KILLS += [("instruct", "checkpoint-before-manifest:1"), ("align", "checkpoint-half-written:2")]


@pytest.fixture(scope="module")
def all_killed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of `KILLS` left."""
    folder = tmp_path_factory.mktemp("killed")
    ended = subprocess.run(
        [sys.executable, training_run.__file__, "killed", str(inputs), str(folder), *map("=".join, KILLS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


def test_killed_at_random_moments_it_ends_with_the_same_bytes(inputs, uninterrupted, tmp_path):
    uninterrupted("pretrain")  # Before the forks: they find everything imported.
    dice, out, kills = random.Random(31), tmp_path / "out", 0
    for _ in range(5):
        child = os.fork()
        if child == 0:
            train("pretrain", inputs, out, io.StringIO())
            os._exit(0)
        watched = os.pidfd_open(child)
        if not select.select([watched], [], [], dice.uniform(0.1, 0.6))[0]:
            os.kill(child, signal.SIGKILL)
        os.close(watched)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, -signal.SIGKILL)
        if ended == 0:
            break
        kills += 1
    assert kills
    train("pretrain", inputs, out, io.StringIO())
    assert digests(out) == uninterrupted("pretrain")


def test_the_sites_are_found():
    assert {"step", "checkpoint-begin", "checkpoint-half-written", "checkpoint-sealed", "checkpoint-prune"} <= {*SITES}


@pytest.mark.parametrize(("stage", "fault"), KILLS)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(stage, fault, inputs, uninterrupted, all_killed):
    out = all_killed / fault.replace(":", "-") / stage / "out"
    assert out.is_dir()
    assert not (out / "model").exists()
    train(stage, inputs, out, io.StringIO())
    assert digests(out) == uninterrupted(stage)


def test_a_model_that_sees_is_trained_on_from_where_it_was_killed(tmp_path):
    from tiny_vlm import write_tiny_vlm

    write_tiny_vlm(tmp_path / "model")
    train("instruct-seeing", tmp_path, tmp_path / "whole", io.StringIO())
    killed("instruct-seeing", tmp_path, tmp_path / "out", "checkpoint-sealed:2")
    train("instruct-seeing", tmp_path, tmp_path / "out", io.StringIO())
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


ALONE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training_run import train
from fmops.locks import locked

inputs, out = Path(sys.argv[2]), Path(sys.argv[3])
with locked(out.parent / "lock") as still_mine:
    train("pretrain", inputs, out, sys.stdout, still_mine=still_mine)
    still_mine()
    (out / "record.json").write_text("of the first")
"""


def test_who_is_paused_and_wakes_after_another_took_over_commits_nothing(inputs, uninterrupted, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", ALONE, str(Path(training_run.__file__).parent), str(inputs), str(out)]
    environment = {**os.environ, "FMOPS_FAULT": "step:4:SIGSTOP", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as paused:
        try:
            assert os.WIFSTOPPED(os.waitpid(paused.pid, os.WUNTRACED)[1])
            # A process that is stopped keeps its lock...
            with pytest.raises(Busy, match=f"is held by pid {paused.pid} on "), locked(tmp_path / "lock"):
                pass
            # ... until a file system loses it, or somebody removes the file.
            (tmp_path / "lock").unlink()
            with locked(tmp_path / "lock") as still_mine:
                train("pretrain", inputs, out, io.StringIO(), still_mine=still_mine)
                still_mine()
                paused.send_signal(signal.SIGCONT)
                said = paused.communicate(timeout=120)[1]
        finally:
            paused.kill()
    assert paused.returncode == 1
    assert f"Busy: lock was taken over by pid {os.getpid()} on" in said
    assert digests(out) == uninterrupted("pretrain")


@pytest.mark.parametrize("stage", STAGES)
def test_equal_inputs_give_equal_bytes(stage, inputs, uninterrupted, tmp_path):
    train(stage, inputs, tmp_path / "again", io.StringIO())
    assert digests(tmp_path / "again") == uninterrupted(stage)


def newest(out: Path) -> Path:
    found = [path for path in (out / ".work").glob("checkpoint-*") if (path / resume.MANIFEST).is_file()]
    return max(found, key=lambda path: int(path.name.split("-")[1]))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt does not match its digest"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors has 1000 bytes instead of"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
        (lambda folder: (folder / resume.MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "stray.bin").write_bytes(b"x"), "stray.bin does not belong to it"),
        (lambda folder: (folder / resume.MANIFEST).unlink(), "was torn while it was written"),
    ],
    ids=["bit-flip", "truncated", "missing", "torn-manifest", "stray", "no-manifest"],
)
def test_a_damaged_resume_state_is_passed_over_and_said(harm, said, inputs, finished, uninterrupted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / ".work", out / ".work")
    damaged = newest(out)
    harm(damaged)
    stream = io.StringIO()
    train("pretrain", inputs, out, stream)
    notes = [event["text"] for event in map(json.loads, stream.getvalue().splitlines()) if event["event"] == "note"]
    assert any(said in note for note in notes), notes
    assert any(note.startswith("going on from checkpoint") and note != damaged.name for note in notes), notes
    assert digests(out) == uninterrupted("pretrain")


def test_at_most_two_resume_states_are_kept(finished):
    assert len(list((finished / ".work").glob("checkpoint-*"))) == resume.KEPT


@pytest.mark.parametrize("where", ["optimizer.pt", resume.MANIFEST + ".tmp"])
def test_a_disk_that_fails_is_said_and_leaves_nothing_half_written(where, inputs, uninterrupted, tmp_path, monkeypatch):
    real = resume.sync

    def broken(path: Path) -> None:
        if path.name == where and path.parent.name == "checkpoint-4":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        real(path)

    monkeypatch.setattr(resume, "sync", broken)
    with pytest.raises(StageFailed, match=r"checkpoint-4 could not be written: \[Errno 5\] Input/output error"):
        train("pretrain", inputs, tmp_path / "out", stream := io.StringIO())
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["reason"] for event in events if event["event"] == "checkpoint-failed"] == ["eio"]
    assert [path.name for path in (tmp_path / "out" / ".work").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    train("pretrain", inputs, tmp_path / "out", io.StringIO())
    assert digests(tmp_path / "out") == uninterrupted("pretrain")


def test_a_full_disk_is_said_and_leaves_earlier_states_whole(inputs, uninterrupted, tmp_path):
    out = tmp_path / "out"
    killed("pretrain", inputs, out, "checkpoint-begin:2")
    before = newest(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # SIGXFSZ would kill this process; ignored, the write fails as on a full disk.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StageFailed, match=r"could not be written.*MB\s+are free.*training goes on from the newest"):
            train("pretrain", inputs, out, stream := io.StringIO())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    # safetensors says in words what failed, without errno.
    assert [event["reason"] for event in events if event["event"] == "checkpoint-failed"] == ["other"]
    assert newest(out) == before
    train("pretrain", inputs, out, io.StringIO())
    assert digests(out) == uninterrupted("pretrain")
