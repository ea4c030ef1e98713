"""A training process is told to leave, hangs, or runs out of memory.

It leaves with a resume state, is killed and started again, or goes on with smaller micro-batches: the result stays.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_run
from training_run import digests, train

from fmops.adapters import resume
from fmops.errors import EXIT_MEMORY, EXIT_TERMINATED, OutOfMemory, StageFailed, Terminated
from fmops.orchestration import launch
from fmops.orchestration.watchdog import Pulse, cpu_seconds


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").symlink_to(tiny_model)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    train("pretrain", inputs, out, io.StringIO())
    return out


def attempt(inputs: Path, out: Path, fault: str, *, idle_s: float = 300.0) -> tuple[launch.Ending, list[dict]]:
    """One attempt of the launcher at a real training process."""
    events: list[dict] = []
    environment = {**os.environ, "FMOPS_FAULT": fault, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = launch._attempt(
        [sys.executable, training_run.__file__, "pretrain", str(inputs), str(out)],
        environment=environment,
        log=out.parent / "log",
        on_event=events.append,
        idle_s=idle_s,
    )
    return ended, events


def test_told_to_leave_it_writes_a_resume_state_and_ends_with_143(inputs, uninterrupted, tmp_path):
    ended, _ = attempt(inputs, tmp_path / "out", "step:3:SIGTERM")
    assert ended.code == EXIT_TERMINATED
    assert "told to leave (SIGTERM) after step 3 of 8" in (tmp_path / "log").read_text()
    # Resume states are planned after steps 2, 4 and 6: this one was written for the occasion.
    assert (tmp_path / "out" / ".work" / "checkpoint-3" / resume.MANIFEST).is_file()
    stream = io.StringIO()
    train("pretrain", inputs, tmp_path / "out", stream)
    assert "going on from checkpoint 3" in stream.getvalue()
    assert digests(tmp_path / "out") == digests(uninterrupted)


def test_a_stopped_process_is_killed_and_goes_on_from_where_it_was(inputs, uninterrupted, tmp_path):
    ended, _ = attempt(inputs, tmp_path / "out", "step:4:SIGSTOP", idle_s=6.0)
    assert ended.hung
    assert ended.code == -signal.SIGKILL
    assert not ended.starved
    train("pretrain", inputs, tmp_path / "out", io.StringIO())
    assert digests(tmp_path / "out") == digests(uninterrupted)


def test_a_process_that_computes_or_whose_child_does_is_alive():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", child], text=True, start_new_session=True) as process:
        try:
            before = cpu_seconds(process.pid)
            deadline = time.monotonic() + 60
            # A spinning grandchild: the child itself only waits.
            while cpu_seconds(process.pid) < before + 0.5:
                assert time.monotonic() < deadline, "the grandchild's time is not seen"
                os.sched_yield()
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_idleness_is_counted_from_the_last_event_or_computation():
    now, used = [0.0], [1.0]
    pulse = Pulse(1, period_s=5.0, clock=lambda: now[0], cpu_seconds=lambda _: used[0])
    assert pulse.idle_s() == 0
    now[0], used[0] = 10.0, 1.01
    assert pulse.idle_s() == 10  # a hundredth of a second is an idle interpreter, no life
    pulse.beat()
    now[0] = 15.0
    assert pulse.idle_s() == 5
    now[0], used[0] = 20.0, 2.0
    assert pulse.idle_s() == 0
    now[0] = 620.0
    assert pulse.idle_s() == 0  # nobody looked for ten minutes: the launcher was stopped, too
    now[0] = 630.0
    assert pulse.idle_s() == 10


def starve(monkeypatch: pytest.MonkeyPatch, *, rows: int) -> None:
    """Steps whose row holds more than `rows` blocks ask the allocator for more than any machine has."""
    from fmops.adapters import transformers_pretrain

    original = transformers_pretrain.PretrainTrainer.compute_loss

    def hungry(self, model, inputs, *args, **kwargs):
        if inputs["input_ids"].shape[1] > rows * 128:
            torch.empty(1 << 60)
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(transformers_pretrain.PretrainTrainer, "compute_loss", hungry)


def wide(parts: int):
    """Training whose steps read four blocks, together if it may."""
    from fmops.lifecycle import Pretrain
    from fmops.pretraining.pretrain import pretrain
    from fmops.stage import StageContext

    config = Pretrain(tokens=2500, batch_tokens=512, learning_rate=1e-3, checkpoints=1)
    return lambda **given: pretrain(
        config, context=StageContext(seed=7, stream=io.StringIO(), micro_batch_parts=parts), **given
    )


def test_out_of_memory_goes_on_with_smaller_micro_batches_and_the_same_steps(tiny_model, tmp_path, monkeypatch):
    from training_inputs import a_checkpoint, a_corpus

    given = {
        "checkpoint": a_checkpoint(tmp_path / "base", tiny_model),
        "corpus": a_corpus(tmp_path / "corpus", tiny_model),
    }
    wide(1)(**given, out=tmp_path / "whole")
    starve(monkeypatch, rows=2)
    with pytest.raises(
        OutOfMemory, match=r"out of memory with 4 examples at a time\. `fmops run` tries fewer"
    ) as error:
        wide(1)(**given, out=tmp_path / "cut")
    assert error.value.exit_code == EXIT_MEMORY
    wide(2)(**given, out=tmp_path / "cut")
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "curve.jsonl").read_text().splitlines()[1:]]
        for name in ("whole", "cut")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    starve(monkeypatch, rows=0)
    with pytest.raises(StageFailed, match=r"out of memory with one example at a time\. Lower block_tokens"):
        wide(4)(**given, out=tmp_path / "never")


STAGE_THAT_STARVES = """#!{python}
import json, os, sys
from pathlib import Path
tries = Path({folder!r}) / "tries"
with tries.open("a") as log:
    print(os.environ.get("FMOPS_MICRO_BATCH_PARTS", "1"), file=log)
print(json.dumps({{"event": "failed", "error": "out of memory with 4 examples at a time.", "code": {code}}}))
sys.exit({code})
"""


@pytest.mark.parametrize(
    ("node", "code", "tries"),
    [("pretrain", EXIT_MEMORY, ["1", "2", "4", "8"]), ("corpus", EXIT_MEMORY, ["1"]), ("pretrain", 1, ["1"])],
)
def test_the_launcher_cuts_micro_batches_of_training_alone_and_not_for_ever(node, code, tries, tmp_path, monkeypatch):
    from example_run import write_example

    from fmops.orchestration.project import Project

    write_example(tmp_path, ends="empty")
    script = tmp_path / "python"
    script.write_text(STAGE_THAT_STARVES.format(python=sys.executable, folder=str(tmp_path), code=code))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    notes: list[str] = []
    with pytest.raises(StageFailed, match=f"{node}: out of memory with 4 examples at a time") as error:
        launch.launch_local(
            Project.open(tmp_path / "lifecycle.yaml"),
            node,
            fingerprint="0" * 64,
            log=tmp_path / "log",
            on_event=lambda event: notes.append(event["text"]),
        )
    assert error.value.exit_code == code
    assert (tmp_path / "tries").read_text().split() == tries
    assert [f"cut into {parts}" in note for parts, note in zip(tries[1:], notes, strict=True)] == [True] * len(notes)


def test_terminated_is_told_apart_from_failure():
    assert issubclass(Terminated, StageFailed)
    assert Terminated.exit_code == 128 + signal.SIGTERM
