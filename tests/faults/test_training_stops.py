"""A training process is told to leave, hangs, or runs out of memory.

It leaves with a resume state, is killed and started again, or goes on with smaller micro-batches: the result stays.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest
import torch
import training_run
from training_run import digests, train

from fmops.adapters import resume
from fmops.errors import EXIT_MEMORY, EXIT_TERMINATED, OutOfMemory, StageFailed, Terminated
from fmops.orchestration import launch, watchdog
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
    """A real training process, followed as the launcher does."""
    events: list[dict] = []
    environment = {**os.environ, "FMOPS_FAULT": fault, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, training_run.__file__, "pretrain", str(inputs), str(out)]
    with (out.parent / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    return launch.follow(process, on_event=events.append, idle_s=idle_s), events


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


def leave_in(monkeypatch: pytest.MonkeyPatch, *, step: int, part: int, after: bool = False) -> list[int]:
    """SIGTERM in the given micro-batch of a step, or `after` it. Returns the step of each one that is computed."""
    from fmops.adapters import transformers_pretrain

    trainer = transformers_pretrain.PretrainTrainer
    original, whole = trainer.compute_loss, trainer.training_step
    computed: list[int] = []

    def tell() -> None:
        if computed[-1] == step and computed.count(step) == part:
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(self, *args, **kwargs):
        computed.append(self.state.global_step + 1)
        if not after:
            tell()
        return original(self, *args, **kwargs)

    def interrupted_after(self, *args, **kwargs):
        loss = whole(self, *args, **kwargs)
        if after:
            tell()
        return loss

    monkeypatch.setattr(trainer, "compute_loss", interrupted)
    monkeypatch.setattr(trainer, "training_step", interrupted_after)
    return computed


@pytest.mark.parametrize("after", [False, True], ids=["in a micro-batch", "between two"])
def test_told_to_leave_in_the_middle_of_a_step_it_does_not_finish_it(after, tiny_model, tmp_path, monkeypatch):
    given = wide_inputs(tiny_model, tmp_path)
    wide(4)(**given, out=tmp_path / "whole")
    computed = leave_in(monkeypatch, step=4, part=2, after=after)
    with pytest.raises(Terminated, match=r"told to leave \(SIGTERM\) after step 3 of 5"):
        wide(4)(**given, out=tmp_path / "cut")
    # Two of the fourth step's four micro-batches began; what they computed is dropped.
    assert computed.count(4) == 2
    assert 5 not in computed
    # Resume states are planned after step 2 alone: this one was written for the occasion.
    assert (tmp_path / "cut" / ".work" / "checkpoint-3" / resume.MANIFEST).is_file()
    monkeypatch.undo()
    wide(4)(**given, out=tmp_path / "cut")
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


@pytest.mark.parametrize("site", ["checkpoint-half-written", "checkpoint-before-rename"])
def test_killed_when_the_grace_ends_it_goes_on_from_the_planned_state(site, tiny_model, tmp_path, monkeypatch):
    given = wide_inputs(tiny_model, tmp_path)
    wide(4)(**given, out=tmp_path / "whole")
    leave_in(monkeypatch, step=4, part=2)
    child = os.fork()
    if child == 0:
        # The planned state is the first to pass the site, the one for the occasion the second.
        os.environ["FMOPS_FAULT"] = f"{site}:2"
        wide(4)(**given, out=tmp_path / "cut")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.undo()
    stream = io.StringIO()
    wide(4, stream)(**given, out=tmp_path / "cut")
    assert "checkpoint-3 was torn while it was written; passing over it" in stream.getvalue()
    assert "going on from checkpoint 2" in stream.getvalue()
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


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


def wide_inputs(model: Path, folder: Path) -> dict:
    from training_inputs import a_checkpoint, a_corpus

    return {"checkpoint": a_checkpoint(folder / "base", model), "corpus": a_corpus(folder / "corpus", model)}


def wide(parts: int, stream: TextIO | None = None):
    """Training whose steps read four blocks, together if it may."""
    from fmops.lifecycle import Pretrain
    from fmops.pretraining.pretrain import pretrain
    from fmops.stage import StageContext

    config = Pretrain(tokens=2500, batch_tokens=512, learning_rate=1e-3, checkpoints=1)
    return lambda **given: pretrain(
        config, context=StageContext(seed=7, stream=stream or io.StringIO(), micro_batch_parts=parts), **given
    )


def test_out_of_memory_goes_on_with_smaller_micro_batches_and_the_same_steps(tiny_model, tmp_path, monkeypatch):
    given = wide_inputs(tiny_model, tmp_path)
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


def align_all(inputs: Path, out: Path, *, parts: int = 1) -> None:
    """DPO of all weights: the reference answers before training."""
    from training_inputs import a_checkpoint, some_preferences

    from fmops.finetuning.align import align
    from fmops.lifecycle import Align
    from fmops.stage import StageContext

    align(
        Align(adapter="full", batch_pairs=4, learning_rate=1e-3),
        checkpoint=a_checkpoint(inputs / "base", inputs / "model"),
        preferences=some_preferences(inputs / "pairs"),
        out=out,
        context=StageContext(seed=7, stream=io.StringIO(), micro_batch_parts=parts),
    )


@pytest.mark.parametrize("place", ["load_model", "Scoring._precompute_ref_logps"])
def test_want_of_memory_outside_the_steps_is_said_with_what_helps(place, inputs, tmp_path, monkeypatch, capfd):
    """While the model is read, while the reference answers: in the stage process, and in each of several."""
    from example_run import write_example

    from fmops.adapters import trl_align
    from fmops.orchestration import execute, ranks

    def hungry(*_: object, **__: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(f"{trl_align.__name__}.{place}", hungry)
    reports = io.StringIO()
    with pytest.raises(RuntimeError), ranks.failure_reported(reports):
        align_all(inputs, tmp_path)
    monkeypatch.setattr(execute, "execute", lambda *_, **__: align_all(inputs, tmp_path))
    write_example(tmp_path, ends="empty")
    child = os.fork()
    if child == 0:
        os._exit(execute.run_stage_process(tmp_path / "lifecycle.yaml", "align", workspace=None, fingerprint=None))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT_MEMORY
    for told in (reports.getvalue(), capfd.readouterr().out):
        event = json.loads(told.splitlines()[-1])
        assert event["code"] == EXIT_MEMORY
        assert re.fullmatch(r"out of memory \(.*can't allocate memory.*\)\. Free some, lower batch.*", event["error"])


def test_with_smaller_micro_batches_the_reference_answers_fewer_together(inputs, tmp_path, monkeypatch):
    from fmops.adapters import trl_align

    sizes: list[int] = []
    original = trl_align.Scoring._precompute_ref_logps

    def watched(self, *args, **kwargs):
        sizes.append(self.args.precompute_ref_batch_size)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trl_align.Scoring, "_precompute_ref_logps", watched)
    align_all(inputs, tmp_path, parts=4)
    assert set(sizes) == {1}


ROOM = 110_000_000
"""Bytes that training may map beside the loaded model: eight blocks in a row want more, one at a time needs less."""


def a_model_with_activations(folder: Path, *, like: Path) -> Path:
    """Wide enough that the row of a micro-batch takes more memory than weights and moments do."""
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    shutil.copytree(like, folder)
    torch.manual_seed(0)
    small = AutoConfig.from_pretrained(like)
    config = LlamaConfig(
        vocab_size=small.vocab_size, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_within(room: int | None, given: dict, *, parts: int, out: Path) -> int:
    """Train in a fork to which the kernel gives `room` more bytes once the model is loaded; returns its exit code."""
    from fmops.adapters import transformers_pretrain
    from fmops.lifecycle import Pretrain
    from fmops.pretraining.pretrain import pretrain
    from fmops.stage import StageContext

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    original = transformers_pretrain.PretrainTrainer.compute_loss

    def limited(self, *args, **kwargs):
        if room is not None and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + room, resource.RLIM_INFINITY))
        return original(self, *args, **kwargs)

    transformers_pretrain.PretrainTrainer.compute_loss = limited
    code = 0
    try:
        pretrain(
            Pretrain(tokens=2100, batch_tokens=1024, learning_rate=1e-3, checkpoints=1),
            context=StageContext(seed=7, stream=io.StringIO(), micro_batch_parts=parts),
            out=out,
            **given,
        )
    except StageFailed as error:
        code = error.exit_code
    os._exit(code)


def test_memory_that_the_kernel_refuses_is_told_as_such_and_smaller_micro_batches_learn_the_same(tiny_model, tmp_path):
    given = wide_inputs(a_model_with_activations(tmp_path / "model", like=tiny_model), tmp_path)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert train_within(None, given, parts=1, out=tmp_path / "whole") == 0
    assert train_within(ROOM, given, parts=1, out=tmp_path / "cut") == EXIT_MEMORY
    assert train_within(ROOM, given, parts=8, out=tmp_path / "cut") == 0
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "curve.jsonl").read_text().splitlines()[1:]]
        for name in ("whole", "cut")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


STAGE_THAT_DIES = """#!{python}
import json, os, signal, sys
from pathlib import Path
tries, memory = Path({folder!r}) / "tries", Path({folder!r}) / "memory.events"
with tries.open("a") as log:
    print(os.environ.get("FMOPS_MICRO_BATCH_PARTS", "1"), file=log)
count = len(tries.read_text().split())
if count > {times}:
    print(json.dumps({{"event": "failed", "error": "it went on", "code": 1}}))
    sys.exit(1)
if {how!r} == "hangs":
    signal.pause()
if {how!r} == "is killed for memory":
    memory.write_text(f"low 0\\noom_kill {{count}}\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("how", "times", "note", "tries", "error"),
    [
        ("hangs", 1, "no sign of life for 3 s; killed, and started again", ["1", "1"], "it went on"),
        ("hangs", 9, "no sign of life for 1 s; killed, and started again", ["1"] * 4, "sign of life for 1 s, 4 times"),
        ("is killed for memory", 2, "out of memory; starting again with micro-", ["1", "2", "4"], "it went on"),
        ("is killed for memory", 9, "out of memory; starting", ["1", "2", "4", "8"], "killed for want of memory"),
        ("is killed", 9, None, ["1"], r"was killed \(SIGKILL\), by hand or for want of memory"),
    ],
)
def test_the_launcher_starts_again_what_hung_or_was_killed_for_memory(
    how, times, note, tries, error, tmp_path, monkeypatch
):
    from example_run import write_example

    from fmops.orchestration.project import Project

    write_example(tmp_path, ends="empty")
    (tmp_path / "memory.events").write_text("low 0\noom_kill 0\n")
    monkeypatch.setattr(watchdog, "MEMORY_EVENTS", (tmp_path / "memory.events",))
    script = tmp_path / "python"
    script.write_text(STAGE_THAT_DIES.format(python=sys.executable, folder=str(tmp_path), how=how, times=times))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    notes: list[str] = []
    with pytest.raises(StageFailed, match=error) as raised:
        launch.launch_local(
            Project.open(tmp_path / "lifecycle.yaml"),
            "pretrain",
            fingerprint="0" * 64,
            log=tmp_path / "log",
            on_event=lambda event: notes.append(event["text"]),
            # Starting Python takes less, on a busy machine too, where it must not be taken for a hang.
            idle_s=1.0 if times > 2 else 3.0,
        )
    assert (tmp_path / "tries").read_text().split() == tries
    assert [note in text for text in notes] == [True] * (len(tries) - 1)
    assert raised.value.exit_code == (EXIT_MEMORY if "want of memory" in error and note else 1)


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
