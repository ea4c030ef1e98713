"""Two processes train what one trains: the same batches, losses and weights, whoever dies on the way.

Sums are rounded otherwise in two processes: losses and weights agree to 1e-5, not bit for bit. Two processes that were
killed and two that were not agree bit for bit.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import ranks_run
from ranks_run import CASES, a_context, alone, given, many_together, together
from safetensors.torch import load_file
from training_run import digests

from fmops.adapters.packing import deal, plan_training
from fmops.errors import StageFailed, Terminated
from fmops.orchestration.ranks import run_in_ranks

pytestmark = pytest.mark.xdist_group("ranks")
TOGETHER = [
    ("pretrain", "ddp"),
    ("pretrain", "fsdp2"),
    ("pretrain-lora", "fsdp2"),
    ("instruct", "ddp"),
    ("instruct", "fsdp2"),
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").symlink_to(tiny_model)
    return folder


@pytest.fixture(scope="module")
def ones(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process makes of each case."""
    found = {}
    for case in dict(TOGETHER):
        found[case] = tmp_path_factory.mktemp("one") / "out"
        alone(case, inputs, found[case])
    return found


@pytest.fixture(scope="module")
def twos(inputs: Path, ones: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """What two processes make of it; `resumed` go on from what one process left half-way."""
    wanted = [(*pair, "fresh") for pair in TOGETHER]
    wanted += [("pretrain", "fsdp2", "resumed"), ("instruct", "ddp", "resumed"), ("instruct", "fsdp2", "resumed")]
    outs = {key: tmp_path_factory.mktemp("two") / "out" for key in wanted}
    for (case, _, kind), out in outs.items():
        if kind == "resumed":
            half_done(ones[case], out)
    said = many_together([(case, sharding, out) for (case, sharding, _), out in outs.items()], inputs)
    assert said.count("going on from checkpoint") == 3
    return outs


def half_done(finished: Path, out: Path) -> None:
    """A run that was killed after its second newest resume state."""
    shutil.copytree(finished / ".work", out / ".work", symlinks=True)
    newest = max((out / ".work").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def assert_same(found: Path, wanted: Path) -> None:
    rows, expected = curve(found), curve(wanted)
    assert [sorted(row) for row in rows] == [sorted(row) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=TOLERANCE)
    weights, others = (load_file(out / "model" / "model.safetensors") for out in (found, wanted))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert (value - others[name]).abs().max() < 10 * TOLERANCE, name
    configs = [(out / "model" / "config.json").read_bytes() for out in (found, wanted)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("case", "sharding"), TOGETHER)
def test_two_processes_learn_what_one_learns(case, sharding, ones, twos):
    assert_same(twos[case, sharding, "fresh"], ones[case])


@pytest.mark.parametrize(("case", "sharding"), [("pretrain", "fsdp2"), ("instruct", "ddp"), ("instruct", "fsdp2")])
def test_two_go_on_where_one_was_killed(case, sharding, ones, twos):
    assert_same(twos[case, sharding, "resumed"], ones[case])


@pytest.mark.parametrize(("case", "sharding"), [("pretrain", "fsdp2"), ("instruct", "ddp"), ("pretrain-lora", "fsdp2")])
def test_one_goes_on_where_two_were_killed(case, sharding, inputs, ones, twos, tmp_path):
    out = tmp_path / "out"
    half_done(twos[case, sharding, "fresh"], out)
    alone(case, inputs, out)
    assert_same(out, ones[case])


def test_a_killed_rank_takes_the_job_along_and_the_result_stays(inputs, twos, tmp_path, monkeypatch):
    monkeypatch.setenv("FMOPS_FAULT", "step:3:SIGKILL:1")
    context = a_context("fsdp2")
    together("pretrain", inputs, tmp_path / "out", context)
    said = [event["text"] for event in map(json.loads, context.stream.getvalue().splitlines()) if "text" in event]
    assert "one of 2 training processes died; all start again from the newest resume state" in said
    assert any(text.startswith("going on from checkpoint") for text in said), said
    assert digests(tmp_path / "out") == digests(twos["pretrain", "fsdp2", "fresh"])


def test_ranks_leave_together_and_go_back_together(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(ranks_run.__file__).parent), prepend=os.pathsep)
    job = given("pretrain", inputs) | {"function": "ranks_run:poisoned"}
    (tmp_path / "one").mkdir()
    ranks_run.poisoned(job["config"], **job["inputs"], out=tmp_path / "one", context=a_context(processes=1))
    # One of them is told to leave; the steps that go wrong later do so on one of them, too.
    monkeypatch.setenv("FMOPS_FAULT", "step:1:SIGTERM:1")
    with pytest.raises(Terminated, match=r"told to leave \(SIGTERM\) after step 1 of 7"):
        run_in_ranks(**job, out=tmp_path / "two", context=a_context("fsdp2"))
    monkeypatch.delenv("FMOPS_FAULT")
    context = a_context("fsdp2")
    run_in_ranks(**job, out=tmp_path / "two", context=context)
    said = [event["text"] for event in map(json.loads, context.stream.getvalue().splitlines()) if "text" in event]
    assert said[0] == "going on from checkpoint 1"
    assert "back to step 2; steps 3 to 5 are left out" in said[-1]
    assert_same(tmp_path / "two", tmp_path / "one")


class TellsToLeave(io.StringIO):
    """Reports, the first of which brings SIGTERM to this process."""

    def write(self, text: str) -> int:
        if not self.getvalue():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_told_to_leave_before_the_ranks_can_hear_it_the_job_ends_and_does_not_start_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(ranks_run.__file__).parent), prepend=os.pathsep)
    context = a_context()
    context.stream = TellsToLeave()
    with pytest.raises(Terminated, match=r"told to leave \(SIGTERM\)\. Run again") as error:
        run_in_ranks("ranks_run:wait", CASES["pretrain"], inputs={}, out=tmp_path, context=context)
    assert error.value.exit_code == 128 + signal.SIGTERM
    assert len(context.stream.getvalue().splitlines()) == 1


def test_what_fails_for_a_reason_is_not_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(ranks_run.__file__).parent), prepend=os.pathsep)
    context = a_context()
    with pytest.raises(StageFailed, match="no token to learn"):
        run_in_ranks("ranks_run:refuse", CASES["pretrain"], inputs={}, out=tmp_path, context=context)
    assert context.stream.getvalue() == ""


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 3])
def test_every_step_reads_the_same_blocks_however_many_processes_share_it(world, micro):
    plan = plan_training([30] * 20, tokens=1010, batch_tokens=270, seed=5)
    shares = [deal(plan, micro=micro, rank=rank, world=world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    place = 0
    for step in range(1, plan.steps + 1):
        rounds = -(-len(plan.blocks_of(step)) // (micro * world))
        batches = [share[place + turn] for turn in range(rounds) for share in shares]
        assert [plan.order[at] for batch in batches for at in batch] == list(plan.blocks_of(step))
        place += rounds
    assert place == len(shares[0])
