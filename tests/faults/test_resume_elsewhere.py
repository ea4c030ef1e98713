"""A machine is taken away in the middle of training; another one goes on from the bucket, to the same weights."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import local_s3
import pytest
from training_run import digests, train

from fmops.errors import FmopsError
from fmops.shared import Shared
from fmops.states import States, mirrored

PREFIX = "project"
KEY = "pretrain-0123456789abcdef"
TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training_run import train
from fmops.errors import FmopsError
from fmops.shared import Shared
from fmops.states import mirrored

inputs, out = Path(sys.argv[2]), Path(sys.argv[3])
shared = Shared(sys.argv[4], cache=out.parent / "records")
try:
    with mirrored(shared, sys.argv[5], out / ".work", report=lambda text: print("NOTE", text), every_s=0.05):
        train("pretrain", inputs, out, sys.stdout)
except FmopsError as error:
    sys.exit(f"FmopsError: {error}")
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[local_s3.LocalS3]:
    with local_s3.serve() as served:
        yield served


@pytest.fixture
def shared(s3, tmp_path, monkeypatch) -> Iterator[Shared]:
    for name, value in {**s3.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    yield Shared(f"s3://{local_s3.BUCKET}/{PREFIX}", cache=tmp_path / "records")
    s3.faults.clear()
    for name in s3.names():
        s3.client.delete_object(Bucket=local_s3.BUCKET, Key=name)


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").symlink_to(tiny_model)
    return folder


def on_a_machine(inputs: Path, out: Path, shared: Shared, fault: str = "") -> subprocess.CompletedProcess:
    tests = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", TRAIN, tests, str(inputs), str(out), shared.address, KEY],
        capture_output=True, text=True, env={**os.environ, **({"FMOPS_FAULT": fault} if fault else {})},
    )  # fmt: skip


def index(s3: local_s3.LocalS3) -> dict[str, Any]:
    """What the bucket says of the stage's states."""
    name = f"work/{PREFIX}/{KEY}/states.json"
    if name not in s3.names():
        return {}
    found: dict[str, Any] = json.loads(s3.client.get_object(Bucket=local_s3.BUCKET, Key=name)["Body"].read())
    return found


def sealed(work: Path, step: int, content: bytes = b"weights") -> Path:
    """A checkpoint as training seals it."""
    from fmops.adapters.resume import seal

    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    seal(folder)
    return folder


def test_another_machine_goes_on_and_comes_to_the_same_weights(inputs, shared, tmp_path):
    whole = tmp_path / "whole"
    train("pretrain", inputs, whole, io.StringIO())
    # Spot: two minutes of warning. Training writes a state, and it is sent before the process ends.
    lost = tmp_path / "lost" / "out"
    ended = on_a_machine(inputs, lost, shared, fault="step:4:SIGTERM")
    assert "FmopsError" in ended.stderr
    shutil.rmtree(lost)
    other = tmp_path / "other" / "out"
    done = on_a_machine(inputs, other, shared)
    assert done.returncode == 0, done.stderr
    assert "was left in s3://fmops-artifacts/project by another machine; going on from there" in done.stdout
    assert digests(other) == digests(whole)


def test_a_machine_that_wakes_after_another_took_over_keeps_no_state(s3, inputs, shared, tmp_path):
    tests = str(Path(__file__).parents[1])
    first = tmp_path / "first" / "out"
    command = [sys.executable, "-c", TRAIN, tests, str(inputs), str(first), shared.address, KEY]
    environment = {**os.environ, "FMOPS_FAULT": "step:5:SIGSTOP"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as paused:
        try:
            assert os.WIFSTOPPED(os.waitpid(paused.pid, os.WUNTRACED)[1])
            done = on_a_machine(inputs, tmp_path / "second" / "out", shared)
            assert done.returncode == 0, done.stderr
            after = index(s3)
            paused.send_signal(signal.SIGCONT)
            said = paused.communicate(timeout=120)[0]
        finally:
            paused.kill()
    assert "NOTE resume states do not reach the store: another machine has taken over this stage" in said
    assert index(s3) == after
    assert digests(first) == digests(tmp_path / "second" / "out")


def test_who_began_last_holds_the_states_and_files_of_two_never_mix(shared, tmp_path):
    sealed(tmp_path / "one", 3, b"of one")
    sealed(tmp_path / "two", 3, b"of two")
    one, two = (States(shared, KEY, tmp_path / name) for name in ("one", "two"))
    one.take_over()
    two.take_over()
    two.send()
    with pytest.raises(FmopsError, match="another machine has taken over this stage"):
        one.send()
    States(shared, KEY, tmp_path / "three").restore()
    assert (tmp_path / "three/checkpoint-3/model.safetensors").read_bytes() == b"of two"


def test_killed_outright_what_was_sent_before_is_there(s3, shared, tmp_path):
    sealed(tmp_path / "work", 3)
    code = TRAIN.replace(
        'train("pretrain", inputs, out, sys.stdout)', "print('running', flush=True); sys.stdin.read()"
    ).replace("from training_run import train\n", "")
    command = [sys.executable, "-c", code, "", "", str(tmp_path / "out"), shared.address, KEY]
    (tmp_path / "out").mkdir()
    (tmp_path / "work").rename(tmp_path / "out" / ".work")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        deadline = time.monotonic() + 30
        while "checkpoint-3" not in index(s3).get("checkpoints", {}):
            assert time.monotonic() < deadline
        process.kill()
    assert States(shared, KEY, tmp_path / "elsewhere").restore() == "checkpoint-3"


def test_states_lie_where_the_buckets_rule_removes_them(s3, shared, tmp_path):
    sealed(tmp_path / "work", 3)
    States(shared, KEY, tmp_path / "work").send()
    assert s3.names() == [
        f"work/{PREFIX}/{KEY}/{hashlib.sha256(b'weights').hexdigest()}",
        f"work/{PREFIX}/{KEY}/states.json",
    ]


def test_only_what_is_sealed_is_sent_and_nothing_twice(s3, shared, tmp_path):
    work = tmp_path / "work"
    sealed(work, 3)
    (work / "checkpoint-5").mkdir()
    (work / "checkpoint-5" / "model.safetensors").write_bytes(b"torn")
    (work / "precision").write_text("float32")
    states = States(shared, KEY, work)
    states.send()
    s3.requests.clear()
    states.send()
    assert s3.count("PUT", "work/") == 0
    elsewhere = tmp_path / "elsewhere"
    assert States(shared, KEY, elsewhere).restore() == "checkpoint-3"
    assert sorted(path.name for path in elsewhere.iterdir()) == ["checkpoint-3", "precision"]
    assert json.loads((elsewhere / "checkpoint-3" / "manifest.json").read_text())["files"]


def test_a_newer_state_here_is_kept(shared, tmp_path):
    sealed(tmp_path / "there", 3)
    States(shared, KEY, tmp_path / "there").send()
    sealed(tmp_path / "here", 4)
    assert States(shared, KEY, tmp_path / "here").restore() is None
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["checkpoint-4"]


def test_a_bucket_that_refuses_is_said_once_and_training_goes_on(s3, shared, tmp_path):
    sealed(tmp_path / "work", 3)
    s3.faults.append(local_s3.Fault("PUT", "work/", 403, "AccessDenied", times=999))
    said: list[str] = []
    told = threading.Event()

    def report(text: str) -> None:
        said.append(text)
        told.set()

    with mirrored(shared, KEY, tmp_path / "work", report=report, every_s=0.01):
        assert told.wait(30)
    assert len(said) == 1
    assert "resume states do not reach the store: cannot write" in said[0]
