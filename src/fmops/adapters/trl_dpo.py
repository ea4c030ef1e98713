"""Direct preference optimisation with TRL's DPOTrainer (Rafailov et al. 2023).

Enters: a model folder, preference pairs as tokens. Leaves: a trained model folder, its curve, held-out preferences.
Refuses: what `trainer` refuses: steps that are not finite, resume states that are not whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from fmops.adapters.trainer import Trained
from fmops.adapters.trl_align import (
    Scoring,
    answer_log_probs,
    plan_examples,
    sample_held_out,
    set_up,
    train_between,
)
from fmops.artifacts import Benchmarks
from fmops.lifecycle import Align
from fmops.stage import StageContext

MICRO_BATCHES = (4, 2, 1)
"""Pairs that go through the model together, most first; a step's pairs must divide by it."""
ITEM = "preference pairs"
Scores = Sequence[tuple[float, float]]
"""Of each pair, the log-probability of the chosen and of the rejected answer."""


class Pair(Protocol):
    """A prompt with two answers, as tokens."""

    @property
    def prompt(self) -> tuple[int, ...]: ...
    @property
    def chosen(self) -> tuple[int, ...]: ...
    @property
    def rejected(self) -> tuple[int, ...]: ...
    @property
    def tokens(self) -> int: ...


class DpoTrainer(Scoring, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer under our watch, on pairs that are tokens already; each prompt is computed once a pair."""

    refers = True
    """Whether there is a reference model."""


def train(
    config: Align,
    *,
    source: Path,
    examples: Sequence[Pair],
    held_out: Sequence[Pair],
    out: Path,
    context: StageContext,
    benchmarks: Benchmarks | None = None,
    kind: type[DpoTrainer] = DpoTrainer,
) -> tuple[Trained, dict[str, float]]:
    """Align the model in `source`; write `out/model` (and `out/adapter`). Also returns `held_out_preferences`."""
    setting = set_up(config, source=source, out=out, context=context, benchmarks=benchmarks)
    micro = next(size for size in MICRO_BATCHES if config.batch_pairs % size == 0)
    plan = plan_examples(examples, config=config, whole=micro, item=ITEM, seed=context.seed)
    trainer = kind(
        note=context.note,
        args=DPOConfig(
            **setting.options(plan, accumulate=config.batch_pairs // micro, micro=micro),
            beta=setting.beta,
            max_length=None,
            # Full tuning moves the reference away, so it answers beforehand; LoRA switches its adapter off.
            precompute_ref_log_probs=config.adapter == "full" or not kind.refers,
            # As many as training will take together: it comes before them.
            precompute_ref_batch_size=max(1, micro // context.micro_batch_parts),
        ),
        train_dataset=Dataset.from_list([_row(examples[index]) for index in plan.order]),
        **setting.trainer_options(by_document=True),
    )
    chosen = [_row(pair) for pair in sample_held_out(held_out, seed=context.seed)]
    trained, before, after = train_between(
        trainer,
        plan,
        setting=setting,
        measure=lambda: score(trainer, chosen, dtype=setting.dtype),
        shown=lambda _, now: preference_accuracy(now),
        learnt=sum(len(examples[index].chosen) + len(examples[index].rejected) for index in plan.order),
    )
    context.cost["pairs_per_s"] = context.cost["tokens_per_s"] * len(plan.order) / plan.tokens
    return trained, held_out_preferences(before, after, beta=setting.beta)


def score(trainer: Any, rows: Sequence[dict[str, Any]], *, dtype: torch.dtype) -> Scores:
    """Of each pair's answers the log-probability under the model as it is."""
    found: list[tuple[float, float]] = []
    for start in range(0, len(rows), MICRO_BATCHES[0]):
        part = rows[start : start + MICRO_BATCHES[0]]
        # The collator lays the chosen answers of a batch before the rejected ones.
        both = answer_log_probs(trainer, part, batch=len(part), dtype=dtype)
        found += zip(both[: len(part)], both[len(part) :], strict=True)
    return found


def preference_accuracy(scores: Scores) -> dict[str, float]:
    """How often the chosen answer is the likelier one."""
    return {"preference_accuracy": sum(a > b for a, b in scores) / len(scores)} if scores else {}


def held_out_preferences(before: Scores, after: Scores, *, beta: float) -> dict[str, float]:
    """How often the chosen answer is the likelier one, before and after, and DPO's implicit reward.

    The reward of an answer is beta × (log-probability after − before); before training it is 0 for every answer.
    """
    n = len(before)
    if not n:
        return {}
    margins = [beta * ((new[0] - old[0]) - (new[1] - old[1])) for old, new in zip(before, after, strict=True)]
    accuracy = sum(margin > 0 for margin in margins) / n
    mean = math.fsum(margins) / n
    spread = math.fsum((margin - mean) ** 2 for margin in margins)
    return {
        "held_out_pairs": float(n),
        "preference_accuracy_before": sum(chosen > rejected for chosen, rejected in before) / n,
        "preference_accuracy_after": sum(chosen > rejected for chosen, rejected in after) / n,
        "reward_accuracy": accuracy,
        "reward_accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
        "reward_margin": mean,
        "reward_margin_standard_error": math.sqrt(spread / (n - 1) / n) if n > 1 else 0.0,
    }


def _row(pair: Pair) -> dict[str, list[int]]:
    return {
        "prompt_ids": list(pair.prompt),
        "chosen_ids": list(pair.chosen),
        "rejected_ids": list(pair.rejected),
    }
