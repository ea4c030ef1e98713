"""Kahneman-Tversky optimisation with TRL's KTOTrainer (Ethayarajh et al. 2024): votes on single answers.

Enters: a model folder, votes as tokens. Leaves: a trained model folder, its curve, held-out votes.
Refuses: votes that all say the same; to cut a micro-batch, since the estimate of the drift belongs to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from trl import KTOConfig, KTOTrainer

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
from fmops.errors import FmopsError, StageFailed
from fmops.lifecycle import Align
from fmops.stage import StageContext

MICRO_BATCHES = (8, 4, 2)
"""Votes that go through the model together, most first. The drift from the reference (the KL term) is estimated inside,
from each prompt with the answer of the vote before, so more is better."""
ITEM = "votes"


class Vote(Protocol):
    """A prompt with one answer, as tokens, and whether people liked it."""

    @property
    def prompt(self) -> tuple[int, ...]: ...
    @property
    def answer(self) -> tuple[int, ...]: ...
    @property
    def liked(self) -> bool: ...
    @property
    def tokens(self) -> int: ...


class KtoTrainer(Scoring, KTOTrainer):  # type: ignore[misc]
    """TRL's KTOTrainer under our watch, on votes that are tokens already."""


def train(
    config: Align,
    *,
    source: Path,
    examples: Sequence[Vote],
    held_out: Sequence[Vote],
    out: Path,
    context: StageContext,
    benchmarks: Benchmarks | None = None,
) -> tuple[Trained, dict[str, float]]:
    """Align the model in `source`; write `out/model` (and `out/adapter`). Also returns `held_out_votes`."""
    if context.micro_batch_parts > 1:
        raise StageFailed(
            "out of memory, and a batch of kto cannot be cut: its estimate of the drift would change. "
            f"Lower align.max_tokens ({config.max_tokens}), or train with LoRA."
        )
    setting = set_up(config, source=source, out=out, context=context, benchmarks=benchmarks)
    micro = next(size for size in MICRO_BATCHES if config.batch_pairs % size == 0)
    plan = plan_examples(examples, config=config, whole=micro, item=ITEM, seed=context.seed)
    votes = [examples[index] for index in plan.order]
    weights = balance(sum(vote.liked for vote in votes), len(votes))
    trainer = KtoTrainer(
        note=context.note,
        args=KTOConfig(
            **setting.options(plan, accumulate=config.batch_pairs // micro, micro=micro),
            beta=setting.beta,
            max_length=None,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
            # Full tuning moves the reference away, so it answers beforehand; LoRA switches its adapter off.
            precompute_ref_log_probs=config.adapter == "full",
        ),
        train_dataset=Dataset.from_list(rows(votes, micro=micro)),
        **setting.trainer_options(by_document=True),
    )
    measured = sample_held_out(held_out, seed=context.seed)
    measured_rows = [_row(vote) for vote in measured]

    def votes_after(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
        rewards = [setting.beta * (new - old) for old, new in zip(before, after, strict=True)]
        return held_out_votes(rewards, [vote.liked for vote in measured])

    trained, before, after = train_between(
        trainer,
        plan,
        setting=setting,
        measure=lambda: answer_log_probs(trainer, measured_rows, batch=MICRO_BATCHES[0], dtype=setting.dtype),
        shown=lambda old, new: _accuracy(votes_after(old, new)),
        learnt=sum(len(vote.answer) for vote in votes),
    )
    return trained, votes_after(before, after)


def balance(liked: int, votes: int) -> tuple[float, float]:
    """Weights of a liked and of a disliked vote, so that both kinds weigh the same in all (equation 8 of the paper).

    Raises:
        FmopsError: there is one kind only.
    """
    disliked = votes - liked
    if not liked or not disliked:
        raise FmopsError(
            f"all {votes} votes are {'thumbs up' if liked else 'thumbs down'}: kto learns from the difference. "
            "Add votes of the other kind."
        )
    return (disliked / liked, 1.0) if liked < disliked else (1.0, liked / disliked)


def rows(votes: Sequence[Vote], *, micro: int) -> list[dict[str, Any]]:
    """Rows for TRL's collator; each is given the answer of the one before, in a ring inside its micro-batch."""
    found = []
    for index, vote in enumerate(votes):
        start = index - index % micro
        before = votes[start + (index - start - 1) % micro]
        found.append({**_row(vote), "KL_completion_ids": list(before.answer)})
    return found


def held_out_votes(rewards: Sequence[float], liked: Sequence[bool]) -> dict[str, float]:
    """How far liked answers rose above disliked ones: beta × (log-probability after − before), 0 before training.

    `vote_accuracy` is the share of (liked, disliked) couples in which the liked one rose more; a tie counts half.
    """
    good = [reward for reward, like in zip(rewards, liked, strict=True) if like]
    bad = [reward for reward, like in zip(rewards, liked, strict=True) if not like]
    found = {"held_out_votes": float(len(rewards))} if rewards else {}
    if not good or not bad:
        return found
    wins = sum((better > worse) + 0.5 * (better == worse) for better in good for worse in bad)
    return found | {
        "vote_accuracy": wins / (len(good) * len(bad)),
        "reward_liked": math.fsum(good) / len(good),
        "reward_disliked": math.fsum(bad) / len(bad),
        "reward_margin": math.fsum(good) / len(good) - math.fsum(bad) / len(bad),
        "reward_margin_standard_error": math.sqrt(_variance(good) / len(good) + _variance(bad) / len(bad)),
    }


def _accuracy(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name == "vote_accuracy"}


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)


def _row(vote: Vote) -> dict[str, Any]:
    return {"prompt_ids": list(vote.prompt), "completion_ids": list(vote.answer), "label": vote.liked}
