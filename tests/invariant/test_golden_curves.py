"""The loss curves of a tiny model, against those committed: a change of arithmetic, order or schedule shows.

Tokens come from a seeded generator, not from text, so that neither tokenizer nor Python's version moves a curve.
Tolerance: 1e-4 of each loss; another processor or thread count rounds otherwise, in the sixth digit.

A curve that is meant to change is written again by `python tests/invariant/test_golden_curves.py MODEL_FOLDER`.
"""

from __future__ import annotations

import io
import json
import random
import signal
import sys
from pathlib import Path

import pytest

from fmops.artifacts import Corpus
from fmops.errors import Terminated
from fmops.finetuning.dialogue import Encoded
from fmops.finetuning.preferences import Pair
from fmops.lifecycle import Align, Instruct, Pretrain
from fmops.stage import StageContext

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "curves.json"
TOLERANCE = 1e-4
STAGES = ("pretrain", "instruct", "align")


def tokens(count: int, *, seed: str) -> tuple[int, ...]:
    """A first-order chain over 40 ids: there is something to learn."""
    dice = random.Random(seed)
    ids, state = [], dice.randrange(40)
    for _ in range(count):
        state = (3 * state + dice.randrange(3)) % 40
        ids.append(100 + state)
    return tuple(ids)


def a_golden_corpus(folder: Path) -> Corpus:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    shard = folder / "train" / "00000.parquet"
    if not shard.is_file():
        rows = [[tokens(64, seed=f"a{n}") + tokens(32, seed=f"b{n}"), [64, 32]] for n in range(24)]
        columns = {
            "input_ids": pa.array([ids for ids, _ in rows], pa.list_(pa.int32())),
            "lengths": pa.array([lengths for _, lengths in rows], pa.list_(pa.int32())),
        }
        shard.parent.mkdir(parents=True)
        parquet.write_table(pa.table(columns), shard)
    return Corpus(
        path=folder, documents=48, tokens=24 * 96, blocks=24, block_tokens=96, replay_share=0.0,
        held_out_new=0, held_out_old=0,
    )  # fmt: skip


def losses(stage: str, model: Path, folder: Path, *, parts: int = 1) -> list[float]:
    """Train; the loss of each step. Called again on the same folder it goes on from a resume state."""
    from fmops.adapters import transformers_pretrain, trl_dpo, trl_sft

    context = StageContext(seed=3, stream=io.StringIO(), micro_batch_parts=parts)
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    if stage == "pretrain":
        trained = transformers_pretrain.train(
            Pretrain(tokens=3840, batch_tokens=384, learning_rate=1e-3, checkpoints=2),
            source=model,
            corpus=a_golden_corpus(folder / "corpus"),
            out=out,
            keep=None,
            context=context,
        )
    elif stage == "instruct":
        dialogues = [Encoded(tokens(40, seed=f"d{n}"), (False,) * 20 + (True,) * 20) for n in range(40)]
        trained = trl_sft.train(
            Instruct(batch_tokens=320, block_tokens=80, learning_rate=1e-3, checkpoints=2),
            source=model, dialogues=dialogues, held_out=[], out=out, context=context,
        )  # fmt: skip
    else:
        pairs = [
            Pair(tokens(12, seed=f"p{n}"), tokens(8, seed=f"c{n}"), tokens(10, seed=f"r{n}")[::-1]) for n in range(24)
        ]
        trained, _ = trl_dpo.train(
            Align(batch_pairs=4, learning_rate=1e-3, checkpoints=2),
            source=model, examples=pairs, held_out=[], out=out, context=context,
        )  # fmt: skip
    return [row["loss"] for row in trained.curve if "loss" in row]


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_curve_is_the_committed_one(stage, tiny_model, tmp_path):
    assert losses(stage, tiny_model, tmp_path) == pytest.approx(json.loads(GOLDEN.read_text())[stage], rel=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_smaller_micro_batches_in_the_middle_of_a_run_read_the_same_batches(stage, tiny_model, tmp_path, monkeypatch):
    from fmops.adapters import trainer

    golden = json.loads(GOLDEN.read_text())[stage]
    real = trainer.Watch.on_step_end

    def interrupted(self, args, state, *given, **named):
        if state.global_step == len(golden) // 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, args, state, *given, **named)

    monkeypatch.setattr(trainer.Watch, "on_step_end", interrupted)
    with pytest.raises(Terminated):
        losses(stage, tiny_model, tmp_path)
    monkeypatch.undo()
    assert losses(stage, tiny_model, tmp_path, parts=4) == pytest.approx(golden, rel=TOLERANCE)


if __name__ == "__main__":
    import tempfile

    curves = {stage: losses(stage, Path(sys.argv[1]), Path(tempfile.mkdtemp())) for stage in STAGES}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
