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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import local_s3
import pytest
from training_inputs import a_checkpoint, a_corpus, some_conversations
from training_run import digests, train

from fmops.errors import FmopsError, Terminated
from fmops.shared import Shared
from fmops.stage import StageContext
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


def of_torchtitan(work: Path, step: int, *, whole: bool = True) -> Path:
    """A checkpoint as it writes one: `.metadata` last."""
    folder = work / "torchtitan" / "checkpoint" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"weights of %d" % step)
    if whole:
        (folder / ".metadata").write_bytes(b"which lie where")
    return folder


def of_llama_factory(work: Path, step: int, *, whole: bool = True) -> Path:
    """A checkpoint as its trainer writes one: its own state last."""
    folder = work / "llama-factory" / "made" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights of %d" % step)
    if whole:
        (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("write", "last"), [(of_torchtitan, ".metadata"), (of_llama_factory, "trainer_state.json")], ids=["titan", "llama"]
)
def test_of_other_frameworks_the_newest_whole_state_is_sent_and_arrives_with_its_last_file_last(
    write, last, s3, shared, tmp_path
):
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    write(work, 2)
    newest = write(work, 4)
    write(work, 6, whole=False)
    States(shared, KEY, work).send()
    name = newest.relative_to(work).as_posix()
    assert list(index(s3)["checkpoints"]) == [name]
    assert States(shared, KEY, elsewhere).restore() == name
    there = sorted((elsewhere / name).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in there][-1] == last
    assert {path.name: path.read_bytes() for path in there} == {p.name: p.read_bytes() for p in newest.iterdir()}
    # It has it now: another look fetches nothing, and a newer one here is kept.
    assert States(shared, KEY, elsewhere).restore() is None
    write(elsewhere, 5)
    assert States(shared, KEY, elsewhere).restore() is None


def test_the_curve_goes_with_the_state_to_its_last_whole_line_and_only_then(s3, shared, tmp_path):
    work = tmp_path / "work"
    of_torchtitan(work, 2)
    curve = work / "torchtitan" / "curve.jsonl"
    curve.write_text('{"step": 1}\n{"step": 2}\n{"st')
    states = States(shared, KEY, work)
    states.send()
    with curve.open("a") as lines:
        lines.write('ep": 3}\n')
    s3.requests.clear()
    states.send()
    assert s3.count("PUT", "work/") == 0
    States(shared, KEY, tmp_path / "elsewhere").restore()
    assert (tmp_path / "elsewhere/torchtitan/curve.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    of_torchtitan(work, 4)
    states.send()
    States(shared, KEY, tmp_path / "elsewhere").restore()
    assert (tmp_path / "elsewhere/torchtitan/curve.jsonl").read_text().count("\n") == 3


def test_what_arrives_damaged_of_another_framework_is_refused(s3, shared, tmp_path):
    of_torchtitan(tmp_path / "work", 2)
    States(shared, KEY, tmp_path / "work").send()
    name = f"work/{PREFIX}/{KEY}/{hashlib.sha256(b'weights of 2').hexdigest()}"
    s3.client.put_object(Bucket=local_s3.BUCKET, Key=name, Body=b"other")
    with pytest.raises(FmopsError, match=r"step-2/__0_0.distcp is not what was sent .*states.json there to begin"):
        States(shared, KEY, tmp_path / "elsewhere").restore()
    assert not (tmp_path / "elsewhere/torchtitan/checkpoint/step-2/.metadata").exists()


class Leave(io.StringIO):
    """Tells this process to leave at a step once a state is in the bucket, as a machine that is taken away does."""

    def __init__(self, s3: local_s3.LocalS3, step: int) -> None:
        super().__init__()
        self._s3, self._step = s3, step

    def write(self, text: str) -> int:
        if f'"step": {self._step}' in text and '"metrics"' in text:
            deadline = time.monotonic() + 20
            while "checkpoints" not in index(self._s3) and time.monotonic() < deadline:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def elsewhere_the_same(run: Callable[..., Any], s3: local_s3.LocalS3, shared: Shared, tmp_path: Path, step: int) -> str:
    """Train whole; lose the machine half-way and go on on another one: the same bytes. Returns what it went on from."""
    run(tmp_path / "whole", StageContext(stream=io.StringIO()))
    said: list[str] = []
    lost, other = tmp_path / "lost", tmp_path / "other"
    with (
        pytest.raises(Terminated, match="Run again to go on"),
        mirrored(shared, KEY, lost / ".work", report=said.append, every_s=0.05),
    ):
        run(lost, StageContext(stream=Leave(s3, step)))
    shutil.rmtree(lost)
    told = io.StringIO()
    with mirrored(shared, KEY, other / ".work", report=said.append, every_s=0.05):
        run(other, StageContext(stream=told))
    [gone_on] = said
    # It did not begin anew: the first step is not among those that it trained.
    steps = [each["step"] for each in map(json.loads, told.getvalue().splitlines()) if each["event"] == "metrics"]
    assert 1 not in steps
    assert steps
    assert digests(other) == digests(tmp_path / "whole")
    return gone_on


@pytest.mark.slow
@pytest.mark.skipif(
    "FMOPS_TORCHTITAN" not in os.environ, reason="FMOPS_TORCHTITAN names no torchrun: see pretraining/torchtitan"
)
def test_torchtitan_goes_on_on_another_machine_to_the_same_weights(tiny_model, s3, shared, tmp_path):
    from fmops.lifecycle import Pretrain
    from fmops.pretraining.pretrain import pretrain

    settings = {"framework": "torchtitan", "tokens": 2300, "batch_tokens": 384, "learning_rate": 1e-3}
    config = Pretrain.model_validate({**settings, "checkpoints": 3})
    base, corpus = a_checkpoint(tmp_path / "base", tiny_model), a_corpus(tmp_path / "corpus", tiny_model)

    def run(out: Path, context: StageContext) -> None:
        pretrain(config, checkpoint=base, corpus=corpus, out=out, context=context)

    assert "torchtitan/checkpoint/step-" in elsewhere_the_same(run, s3, shared, tmp_path, step=4)


@pytest.mark.slow
@pytest.mark.skipif(
    "FMOPS_LLAMAFACTORY" not in os.environ, reason="FMOPS_LLAMAFACTORY names no command: see finetuning/llama-factory"
)
def test_llama_factory_goes_on_on_another_machine_to_the_same_weights(tiny_model, s3, shared, tmp_path):
    from fmops.finetuning.instruct import instruct
    from fmops.lifecycle import Instruct

    settings = {"framework": "llama-factory", "batch_tokens": 300, "block_tokens": 150, "learning_rate": 1e-3}
    config = Instruct.model_validate({**settings, "epochs": 2, "checkpoints": 3, "adapter": "full"})
    base, talk = a_checkpoint(tmp_path / "base", tiny_model), some_conversations(tmp_path / "talk")

    def run(out: Path, context: StageContext) -> None:
        instruct(config, checkpoint=base, conversations=talk, out=out, context=context)

    assert "llama-factory/made/checkpoint-" in elsewhere_the_same(run, s3, shared, tmp_path, step=4)
