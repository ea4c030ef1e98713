"""A batch makes the loss or the gradient go wrong.

The step is not applied, the batch is named and kept in quarantine, training goes on; when it stays wrong, training goes
back. Interrupted anywhere, it ends with the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import os
import pkgutil
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_inputs import a_checkpoint, a_corpus, some_preferences
from training_run import digests, train

from fmops.adapters.trainer import QUARANTINE
from fmops.adapters.training_faults import SPIKE_WINDOW, fault_of, refuse_not_finite
from fmops.artifacts import Checkpoint
from fmops.errors import StageFailed, Terminated
from fmops.stage import StageContext


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").symlink_to(tiny_model)
    return folder


def poison(
    monkeypatch, steps: set[int], *, how: str = "loss", leave_at: int | None = None,
    kind: str = "transformers_pretrain.PretrainTrainer",
) -> list[list[torch.Tensor]]:  # fmt: skip
    """Batches of `steps` go wrong whenever a trainer of that kind reads them; returns the weights before each step.

    `leave_at`: SIGTERM arrives during that step, once.
    """
    trainer = pkgutil.resolve_name(f"fmops.adapters.{kind.replace('.', ':')}")
    before: list[list[torch.Tensor]] = []
    pending = [leave_at]
    original = trainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        before.append([p.detach().clone() for p in model.parameters()])
        step = self.state.global_step + 1
        if step == pending[0]:
            pending[0] = None
            os.kill(os.getpid(), signal.SIGTERM)
        if step not in steps:
            return loss
        if how == "jump":
            return loss * 12
        # Infinite curvature: the loss is finite, its gradient is not.
        return loss * math.inf if how == "loss" else loss * 0 + torch.sqrt(loss * 0)

    monkeypatch.setattr(trainer, "compute_loss", poisoned)
    return before


def quarantine(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / QUARANTINE).read_text().splitlines()]


@pytest.mark.parametrize(("how", "said"), [("loss", "loss is inf"), ("gradient", "gradient norm is ")])
def test_a_step_that_went_wrong_is_not_applied_and_its_batch_is_named(how, said, inputs, tmp_path, monkeypatch):
    before = poison(monkeypatch, {4}, how=how)
    stream = io.StringIO()
    train("pretrain", inputs, tmp_path / "out", stream)
    assert all(torch.equal(a, b) for a, b in zip(before[3], before[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before[4], before[5], strict=True))
    [row] = quarantine(tmp_path / "out")
    assert (row["step"], row["item"], len(row["blocks"])) == (4, "training blocks", 1)
    assert row["why"].startswith(said)
    assert f"at step 4: not applied, training blocks {row['blocks'][0]} quarantined" in stream.getvalue()
    curve = [json.loads(line) for line in (tmp_path / "out" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve if "quarantined" in row] == [4]
    assert "loss" not in curve[4]


@pytest.mark.parametrize("leave_at", [3, 4, 5, 7])
def test_interrupted_around_a_wrong_step_the_bytes_are_the_same(leave_at, inputs, tmp_path, monkeypatch):
    poison(monkeypatch, {4})
    train("pretrain", inputs, tmp_path / "whole", io.StringIO())
    monkeypatch.undo()
    poison(monkeypatch, {4}, leave_at=leave_at)
    # After a step that went wrong nothing is saved, so the process is told to leave while it has nothing new.
    with pytest.raises(Terminated):
        train("pretrain", inputs, tmp_path / "cut", io.StringIO())
    train("pretrain", inputs, tmp_path / "cut", io.StringIO())
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_three_in_a_row_go_back_to_the_last_good_state_and_leave_out_what_followed(inputs, tmp_path, monkeypatch):
    before = poison(monkeypatch, {4, 5, 6})
    stream = io.StringIO()
    train("pretrain", inputs, tmp_path / "whole", stream)
    assert "3 steps in a row went wrong (loss is inf): back to step 2; steps 3 to 6 are left out" in stream.getvalue()
    assert [(row["step"], row["why"]) for row in quarantine(tmp_path / "whole")] == [
        (step, "left out by a rollback") for step in (3, 4, 5, 6)
    ]
    # Step 7 begins from the weights that step 3 began from.
    assert all(torch.equal(a, b) for a, b in zip(before[2], before[6], strict=True))
    monkeypatch.undo()
    # Interrupted before the rollback, and again after it.
    for leave_at in (3, 7):
        poison(monkeypatch, {4, 5, 6}, leave_at=leave_at)
        with pytest.raises(Terminated):
            train("pretrain", inputs, tmp_path / "cut", io.StringIO())
        monkeypatch.undo()
    poison(monkeypatch, {4, 5, 6})
    train("pretrain", inputs, tmp_path / "cut", io.StringIO())
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def ended(stage: str, inputs: Path, out: Path) -> Checkpoint:
    """A run at a rate that ruins the weights, one of whose rollbacks comes before its only measurement."""
    from fmops.finetuning.align import align
    from fmops.lifecycle import Align, Pretrain
    from fmops.pretraining.pretrain import pretrain

    out.mkdir(exist_ok=True)
    common = {"checkpoint": a_checkpoint(inputs / "base", inputs / "model"), "out": out}
    common["context"] = StageContext(seed=7, stream=io.StringIO())
    if stage == "align":
        pairs = some_preferences(inputs / "pairs")
        # Held out, the shorter answer is the better one: that is so before training, and nothing is better.
        held_out = pairs.path / "held_out.jsonl"
        swapped = held_out.read_text().replace('"chosen"', '"_"').replace('"rejected"', '"chosen"')
        held_out.write_text(swapped.replace('"_"', '"rejected"'))
        tuning = Align(
            adapter="full", batch_pairs=4, learning_rate=1e-2, checkpoints=3, evaluations=1, keep="best", epochs=2
        )
        return align(tuning, preferences=pairs, **common)
    stops = {"old_domain_ceiling": 1e-9} if stage == "ceiling" else {"keep": "best"}
    config = Pretrain(tokens=900, batch_tokens=128, learning_rate=0.5, checkpoints=3, evaluations=1, **stops)
    return pretrain(config, corpus=a_corpus(inputs / "corpus", inputs / "model"), **common)


@pytest.mark.parametrize("stage", ["ceiling", "best", "align"])
def test_after_a_rollback_the_weights_it_began_with_are_still_those(stage, inputs, tmp_path, monkeypatch):
    kind = "trl_dpo.DpoTrainer" if stage == "align" else "transformers_pretrain.PretrainTrainer"
    poison(monkeypatch, {4, 5, 6}, kind=kind)
    made = ended(stage, inputs, tmp_path / "out")
    began, kept = (load_file(folder / "model.safetensors") for folder in (inputs / "model", made.path / "model"))
    assert "left out by a rollback" in (tmp_path / "out" / QUARANTINE).read_text()
    assert all(torch.equal(began[name], kept[name]) for name in began)


def test_a_run_that_diverges_ends_and_leaves_no_model(inputs, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2, 3})
    said = r"3 steps in a row went wrong up to step 3 \(loss is inf\), and there is no resume state to go back to"
    with pytest.raises(StageFailed, match=said):
        train("pretrain", inputs, tmp_path / "out", io.StringIO())
    assert not (tmp_path / "out" / "model").exists()


def test_a_spike_is_ten_times_the_usual_and_worse_than_the_beginning():
    applied = [2.0] * SPIKE_WINDOW + [0.1] * SPIKE_WINDOW
    assert fault_of(1.9, 1.0, applied=applied) is None  # 19 times the median, but no worse than where it began
    assert fault_of(2.1, 1.0, applied=applied) == "loss jumped from 0.1 to 2.1"
    assert fault_of(2.1, 1.0, applied=applied[: SPIKE_WINDOW - 1]) is None  # too early to know what is usual
    assert fault_of(math.nan, 1.0, applied=[]) == "loss is nan"
    assert fault_of(1.0, math.inf, applied=[]) == "gradient norm is inf"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ({20}, r"the loss jumped from [\d.]+ to [\d.]+ at step 20: not applied, training blocks \d quarantined"),
        ({20, 21, 22}, r"3 steps in a row went wrong \(loss jumped .*\): back to step 19; steps 20 to 22 are left out"),
    ],
)
def test_a_loss_that_jumps_is_not_applied_and_three_in_a_row_go_back(steps, said, inputs, tmp_path, monkeypatch):
    from fmops.lifecycle import Pretrain
    from fmops.pretraining.pretrain import pretrain

    before = poison(monkeypatch, steps, how="jump")
    base, corpus = a_checkpoint(inputs / "base", inputs / "model"), a_corpus(inputs / "corpus", inputs / "model")
    context = StageContext(seed=7, stream=io.StringIO())
    config = Pretrain(tokens=24 * 128, batch_tokens=128, learning_rate=1e-3, checkpoints=3, evaluations=1)
    pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path, context=context)
    assert re.search(said, context.stream.getvalue())
    first = min(row["step"] for row in quarantine(tmp_path))
    # The step after those that were skipped begins where the first of them began.
    assert all(torch.equal(a, b) for a, b in zip(before[first - 1], before[max(steps)], strict=True))


def test_weights_that_are_not_finite_are_not_saved():
    model = torch.nn.Linear(2, 2)
    refuse_not_finite(model)
    with torch.no_grad():
        model.bias[1] = math.nan
    with pytest.raises(StageFailed, match="the weights bias are not finite; they are not saved"):
        refuse_not_finite(model)
