"""Small trainings that one process or several can run; also one torchrun job that runs many, so that imports cost once.

Enters: jobs as `fmops.orchestration.ranks` writes them. Leaves: their artifacts.
Refuses: nothing.
"""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from training_inputs import a_checkpoint, a_corpus, some_benchmarks, some_conversations

from fmops.artifacts import Checkpoint
from fmops.errors import StageFailed
from fmops.jobs import BenchmarksJob
from fmops.lifecycle import Instruct, Pretrain
from fmops.orchestration.ranks import failure_reported, run_in_ranks, run_rank, write_job
from fmops.stage import STAGES, StageContext

# Three blocks a step: two processes cannot share them evenly. A generous ceiling: kept weights must come back, too.
CASES = {
    "pretrain": Pretrain(tokens=2300, batch_tokens=384, learning_rate=1e-3, checkpoints=3, old_domain_ceiling=9.0),
    "pretrain-lora": Pretrain(
        tokens=1500, batch_tokens=384, learning_rate=1e-3, checkpoints=3, tuning="lora",
        suites=("words.yaml",), suite_items=8, evaluations=2, keep="best", metric="words",
    ),
    "instruct": Instruct(
        batch_tokens=450, block_tokens=150, learning_rate=1e-3, checkpoints=3,
        suites=("words.yaml",), suite_items=8, evaluations=3, keep="best", metric="words",
    ),
}  # fmt: skip


def given(case: str, inputs: Path) -> dict[str, Any]:
    """Function, config and input artifacts of a case; `inputs` has a folder `model`."""
    model = inputs / "model"
    artifacts: dict[str, Any] = {"checkpoint": a_checkpoint(inputs / "base", model)}
    if CASES[case].suites:
        watched = BenchmarksJob(suites=(), watched={"words.yaml": 8})
        artifacts["benchmarks"] = some_benchmarks(inputs / "benchmarks", watched)
    if case == "instruct":
        artifacts["conversations"] = some_conversations(inputs / "talk", train=48)
    else:
        artifacts["corpus"] = a_corpus(inputs / "corpus", model)
    return {"function": STAGES[case.partition("-")[0]].function, "config": CASES[case], "inputs": artifacts}


def a_context(sharding: str = "auto", *, processes: int = 2, launcher: str = "torchrun") -> StageContext:
    return StageContext(
        seed=7,
        stream=io.StringIO(),
        processes=processes,
        launcher=launcher,
        sharding=sharding,
        precision="float32",
    )


def alone(case: str, inputs: Path, out: Path) -> Checkpoint:
    """In this process."""
    wanted = given(case, inputs)
    function = STAGES[case.partition("-")[0]].load()
    out.mkdir(parents=True, exist_ok=True)
    made = function(wanted["config"], **wanted["inputs"], out=out, context=a_context(processes=1))
    assert isinstance(made, Checkpoint)
    return made


def together(case: str, inputs: Path, out: Path, context: StageContext) -> Checkpoint:
    """In several, as the stage process runs it."""
    made = run_in_ranks(**given(case, inputs), out=out, context=context)
    assert isinstance(made, Checkpoint)
    return made


def many_together(jobs: list[tuple[str, str, Path]], inputs: Path) -> str:
    """(case, sharding, out) one after the other, in the two ranks of one torchrun job; returns what they report."""
    written = [write_job(**given(case, inputs), out=out, context=a_context(sharding)) for case, sharding, out in jobs]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__,
         *map(str, written)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "FMOPS_PARENT_PID": ""},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-500:] + ended.stderr[-3000:]
    return ended.stdout


def wait(config: Pretrain, *, out: Path, context: StageContext) -> Checkpoint:
    """A stage function that says that it has begun, and does not end by itself for half a minute."""
    signal.alarm(30)
    context.note("begun")
    while True:
        signal.pause()


def poisoned(config: Pretrain, *, out: Path, context: StageContext, **given: Any) -> Checkpoint:
    """Continued pretraining whose steps 3 to 5 go wrong, on the last rank."""
    from fmops.adapters import ranks
    from fmops.adapters.transformers_pretrain import PretrainTrainer
    from fmops.pretraining.pretrain import pretrain

    original = PretrainTrainer.compute_loss

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        last = ranks.rank() == ranks.world() - 1
        return loss * math.inf if last and self.state.global_step + 1 in (3, 4, 5) else loss

    with mock.patch.object(PretrainTrainer, "compute_loss", wrong):
        return pretrain(config, out=out, context=context, **given)


def refuse(config: Pretrain, *, out: Path, context: StageContext) -> Checkpoint:
    """A stage function that finds something wrong."""
    raise StageFailed("no token to learn")


if __name__ == "__main__":
    from fmops.adapters import ranks

    with ranks.joined():
        for job in map(Path, sys.argv[1:]):
            with failure_reported(sys.stdout):
                run_rank(job, rank=ranks.rank(), reports=sys.stdout)
