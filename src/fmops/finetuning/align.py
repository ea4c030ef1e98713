"""Alignment: the model learns which answers people prefer, like, or a function rewards.

Enters: a checkpoint with a chat template; pairs, votes or prompts. Leaves: a checkpoint.
Refuses: examples longer than `max_tokens`, templates whose answers it cannot tell apart, rewards it cannot trust.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from fmops.artifacts import Benchmarks, Checkpoint, Preferences, Source
from fmops.curve import best_note, kept_row, summary
from fmops.errors import FmopsError
from fmops.finetuning.preferences import read_pairs, read_prompts, read_votes
from fmops.finetuning.rewards import load_rewards
from fmops.lifecycle import HELD_OUT_METRICS, Align
from fmops.stage import StageContext

READ: dict[str, Any] = {"dpo": read_pairs, "orpo": read_pairs, "kto": read_votes, "grpo": read_prompts}


def align(
    config: Align,
    *,
    checkpoint: Checkpoint,
    preferences: Preferences,
    out: Path,
    context: StageContext,
    rewards: Source | None = None,
    benchmarks: Benchmarks | None = None,
) -> Checkpoint:
    """Align `checkpoint` by `config.method`; killed, and called again, it goes on where it was.

    Args:
        config: the method and its dials.
        checkpoint: whose model is aligned; it is the reference, too.
        preferences: in the form that the method reads.
        out: where model, adapter and curve are left.
        context: seed, threads, precision.
        rewards: the files of the functions that `config.reward` names.
        benchmarks: bring the items that `config.suites` asks for.

    Raises:
        FmopsError: an example is too long, none is usable, the chat template is ambiguous, a reward is not to be used.
        StageFailed: a loss is not finite, or a resume state cannot be written.
    """
    from fmops.adapters.model_files import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.model)
    read = READ[config.method]
    train_set = read(preferences.path / "train.jsonl", config, tokenizer=tokenizer, context=context)
    held_out = read(preferences.path / "held_out.jsonl", config, tokenizer=tokenizer, context=context)
    if not train_set:
        raise FmopsError(
            f"{config.method} can learn from none of {preferences.path / 'train.jsonl'}. See the notes above, and name "
            "another source."
        )
    given: dict[str, Any] = {"examples": train_set, "held_out": held_out, "benchmarks": benchmarks}
    if config.method == "grpo":
        given["rewards"] = load_rewards(config.reward, rewards, [*train_set, *held_out])
    result, measured = _trainer(config.method)(config, source=checkpoint.model, out=out, context=context, **given)
    (out / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in result.curve))
    kept = kept_row(result.curve, result.kept_step)
    if kept is not result.curve[-1]:
        context.note(best_note(result.curve, kept=kept, metric=config.kept_by, stopped=result.stopped))
    told, own = summary(result.curve, last=kept), HELD_OUT_METRICS[config.method]
    return Checkpoint(
        path=out,
        stage="align",
        parameters=result.parameters,
        trained_tokens=result.trained_tokens,
        # What is measured of held-out examples has the method's own names.
        metrics={name: value for name, value in told.items() if not name.startswith(own)} | measured,
        licence=checkpoint.licence,
    )


def _trainer(method: str) -> Any:
    """The `train` of the method's adapter; the others stay unread (a second of imports)."""
    return import_module(f"fmops.adapters.trl_{method}").train
