"""Every method of alignment keeps the same promises: it learns, resumes bit for bit, and says what went wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_run
from training_inputs import REWARDS, a_checkpoint, some_preferences, some_prompts, some_rewards, some_votes
from training_run import digests, train

from fmops.adapters.model_files import load_model
from fmops.errors import FmopsError, StageFailed, Terminated
from fmops.finetuning.align import READ, align
from fmops.lifecycle import Align
from fmops.stage import StageContext

METHODS = ("dpo", "orpo", "kto", "grpo")
ITEMS = {"dpo": "preference pairs", "orpo": "preference pairs", "kto": "votes", "grpo": "prompts"}


def aligned(method: str, folder: Path, model: Path, *, parts: int = 1, rewards: str = REWARDS, stream=None, **options):
    """Run the stage on small inputs of the method's form."""
    context = StageContext(seed=5, stream=io.StringIO() if stream is None else stream, micro_batch_parts=parts)
    inputs = {"dpo": some_preferences, "orpo": some_preferences, "kto": some_votes, "grpo": some_prompts}
    config = {"learning_rate": 2e-3, "batch_pairs": 4, "checkpoints": 2, **options}
    given = {}
    if method == "grpo":
        config = {"reward": "rewards.py:brief", **config, "answers": 4, "answer_tokens": 12, "batch_pairs": 2}
        given["rewards"] = some_rewards(folder, rewards)
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return align(
        Align(method=method, **config),
        checkpoint=a_checkpoint(folder / "base", model),
        preferences=inputs[method](folder / "examples"),
        out=folder / "out",
        context=context,
        **given,
    )


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "out" / "curve.jsonl").read_text().splitlines()]


def test_the_suite_knows_every_method():
    assert set(METHODS) == set(READ)


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_wanted_becomes_likelier(method, adapter, tiny_model, tmp_path, capfd):
    told = io.StringIO()
    done = aligned(method, tmp_path, tiny_model, adapter=adapter, epochs=4 if method == "grpo" else 2, stream=told)
    bars = [event["shown"] for event in map(json.loads, told.getvalue().splitlines()) if event["event"] == "progress"]
    if method == "grpo":
        rewards = [row["reward"] for row in curve(tmp_path) if "reward" in row]
        assert sum(rewards[-4:]) > sum(rewards[:4])
        assert done.metrics["held_out_prompts"] == 4
        assert done.metrics["reward_gain"] == pytest.approx(
            done.metrics["reward_after"] - done.metrics["reward_before"]
        )
    else:
        assert done.metrics["reward_margin"] > 2 * done.metrics["reward_margin_standard_error"] > 0
    # Use of the machine is told where all work is training.
    assert [bool(0 < shown.get("mfu", 0) < 2) for shown in bars] == [method != "grpo"] * len(bars)
    assert done.stage == "align"
    assert done.trained_tokens > 0
    assert done.parameters == load_model(tiny_model).num_parameters()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file() == (adapter == "lora")
    before, after = load_model(tiny_model).state_dict(), load_model(done.model).state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("method", [method for method in METHODS if method != "dpo"])
def test_killed_or_not_the_bytes_are_the_same(method, tiny_model, tmp_path):
    (tmp_path / "model").symlink_to(tiny_model)
    stage = f"align-{method}"
    train(stage, tmp_path, tmp_path / "whole", io.StringIO())
    ended = subprocess.run(
        [sys.executable, training_run.__file__, stage, str(tmp_path), str(tmp_path / "cut")],
        env={**os.environ, "FMOPS_FAULT": "checkpoint-sealed:1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert not (tmp_path / "cut" / "model").exists()
    stream = io.StringIO()
    train(stage, tmp_path, tmp_path / "cut", stream)
    assert "going on from checkpoint" in stream.getvalue()
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_whose_gradient_is_not_finite_is_left_out_and_named(method, tiny_model, tmp_path, monkeypatch):
    from fmops.adapters import trl_dpo, trl_grpo, trl_kto, trl_orpo

    kind = {
        "dpo": trl_dpo.DpoTrainer,
        "orpo": trl_orpo.OrpoTrainer,
        "kto": trl_kto.KtoTrainer,
        "grpo": trl_grpo.GrpoTrainer,
    }[method]
    original = kind.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * torch.inf if self.state.global_step == 1 else loss

    monkeypatch.setattr(kind, "compute_loss", poisoned)
    aligned(method, tmp_path, tiny_model)
    [row] = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert (row["step"], row["item"]) == (2, ITEMS[method])
    assert row["blocks"]


@pytest.mark.parametrize("method", METHODS)
def test_told_to_leave_it_goes_on_with_less_memory_and_the_same_batches(method, tiny_model, tmp_path, monkeypatch):
    from fmops.adapters import trainer

    whole = aligned(method, tmp_path / "whole", tiny_model)
    real = trainer.Watch.on_step_end

    def interrupted(self, args, state, *given, **named):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, args, state, *given, **named)

    monkeypatch.setattr(trainer.Watch, "on_step_end", interrupted)
    with pytest.raises(Terminated, match=r"told to leave \(SIGTERM\) after step 2"):
        aligned(method, tmp_path / "cut", tiny_model)
    monkeypatch.undo()
    if method == "kto":
        with pytest.raises(StageFailed, match="a batch of kto cannot be cut: its estimate of the drift would change"):
            aligned(method, tmp_path / "cut", tiny_model, parts=2)
        return
    done = aligned(method, tmp_path / "cut", tiny_model, parts=2)
    losses = [[row.get("loss") for row in curve(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[1][1:] == pytest.approx(losses[0][1:], abs=1e-5, rel=1e-4)
    assert done.trained_tokens == whole.trained_tokens


def test_a_reward_that_is_no_number_ends_the_run_and_names_the_prompt(tiny_model, tmp_path):
    with pytest.raises(
        FmopsError, match=r"reward rewards.py:brief returned nan for prompt \w+; it must return a finite"
    ):
        aligned("grpo", tmp_path, tiny_model, rewards="def brief(answer):\n    return float('nan')\n")
    assert not (tmp_path / "out" / "model").exists()


def test_rewards_are_added_by_their_weights(tiny_model, tmp_path):
    both = "def brief(answer):\n    return 1\n\ndef good(answer, topic):\n    return 3\n"
    reward = {"rewards.py:brief": 1.0, "rewards.py:good": 0.5}
    done = aligned("grpo", tmp_path, tiny_model, rewards=both, reward=reward)
    rows = [row for row in curve(tmp_path) if "reward" in row]
    assert {row["reward"] for row in rows} == {2.5}
    assert {row["reward/rewards.py:good"] for row in rows} == {3.0}
    # Equal rewards teach nothing: no answer was better than the group.
    assert done.metrics["reward_gain"] == 0
    before, after = load_model(tiny_model).state_dict(), load_model(done.model).state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
