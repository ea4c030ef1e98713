"""One small training stage, run as the stage process runs it; also as a process of its own that tests may kill.

Enters: a stage's name, a folder with `model`, an output folder. Leaves: the stage's artifact.
Refuses: nothing.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from training_inputs import (
    a_checkpoint,
    a_corpus,
    some_conversations,
    some_pictures,
    some_preferences,
    some_prompts,
    some_rewards,
    some_votes,
)

from fmops.artifacts import Checkpoint
from fmops.errors import FmopsError
from fmops.lifecycle import Align, Instruct, Pretrain
from fmops.stage import StageContext

LONG_STEPS = 195


def train(
    stage: str,
    inputs: Path,
    out: Path,
    stream: TextIO,
    *,
    parts: int = 1,
    still_mine: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Run one training stage as the stage process does."""
    from fmops.finetuning.align import align
    from fmops.finetuning.instruct import instruct
    from fmops.pretraining.pretrain import pretrain

    model = inputs / "model"
    out.mkdir(parents=True, exist_ok=True)
    common = {
        "checkpoint": a_checkpoint(inputs / "base", model),
        "out": out,
        "context": StageContext(seed=7, stream=stream, micro_batch_parts=parts, still_mine=still_mine),
    }
    if stage.startswith("long-"):
        # For `benchmarks.checkpoints`: so many resume states over a longer run, or one so many times as long.
        states, times = (*map(int, stage.removeprefix("long-").split("-")), 1)[:2]
        lasting = Pretrain(
            tokens=LONG_STEPS * 512 * times, batch_tokens=512, learning_rate=1e-4, evaluations=1, checkpoints=states
        )
        return pretrain(lasting, corpus=a_corpus(inputs / "corpus", model), **common)
    if stage == "pretrain":
        # A generous ceiling: every measured step's weights are kept, and must come back too.
        config = Pretrain(tokens=900, batch_tokens=128, learning_rate=1e-3, checkpoints=3, old_domain_ceiling=9.0)
        return pretrain(config, corpus=a_corpus(inputs / "corpus", model), **common)
    if stage == "instruct":
        tuning = Instruct(batch_tokens=150, block_tokens=150, learning_rate=1e-3, checkpoints=3)
        return instruct(tuning, conversations=some_conversations(inputs / "talk"), **common)
    if stage == "instruct-seeing":
        seeing = Instruct(adapter="full", batch_tokens=150, block_tokens=150, learning_rate=1e-3, checkpoints=3)
        return instruct(seeing, conversations=some_pictures(inputs / "seen"), **common)
    if stage == "align-kto":
        votes = some_votes(inputs / "votes")
        return align(Align(method="kto", batch_pairs=4, learning_rate=1e-3), preferences=votes, **common)
    if stage == "align-grpo":
        sampled = Align(
            method="grpo", reward={"rewards.py:brief": 1.0, "rewards.py:names_it": 9.0}, answers=4, answer_tokens=8,
            batch_pairs=2, learning_rate=1e-3,
        )  # fmt: skip
        prompts = some_prompts(inputs / "prompts")
        return align(sampled, preferences=prompts, rewards=some_rewards(inputs / "rewards"), **common)
    if stage == "align-orpo":
        pairs = some_preferences(inputs / "pairs")
        return align(Align(method="orpo", batch_pairs=4, learning_rate=1e-3), preferences=pairs, **common)
    return align(
        Align(batch_pairs=4, learning_rate=1e-3, checkpoints=3),
        preferences=some_preferences(inputs / "pairs"),
        **common,
    )


def digests(out: Path) -> dict[str, str]:
    """Of everything that the stage process would commit."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and ".work" not in path.parts)
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed_at_each(kills: Sequence[tuple[str, str]], inputs: Path, folder: Path) -> None:
    """Train in a fork for each (stage, fault), killed there; leaves `folder/<fault>/out`. Imports happen once."""
    from fmops.adapters import transformers_pretrain, trl_dpo, trl_sft  # noqa: F401

    for stage, fault in kills:
        child = os.fork()
        if child == 0:
            os.environ["FMOPS_FAULT"] = fault
            train(stage, inputs, folder / fault.replace(":", "-") / stage / "out", sys.stdout)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            sys.exit(f"{stage} was not killed at {fault}: {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__" and sys.argv[1] == "killed":
    killed_at_each([tuple(kill.split("=")) for kill in sys.argv[4:]], Path(sys.argv[2]), Path(sys.argv[3]))  # type: ignore[misc]
elif __name__ == "__main__":
    try:
        train(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.stdout)
    except FmopsError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
