"""Group-relative policy optimisation with TRL's GRPOTrainer (Shao et al. 2024): the model answers, a function rewards.

Enters: a model folder, prompts, rewards. Leaves: a trained model folder, its curve, held-out rewards.
Refuses: what `trainer` refuses: steps that are not finite, resume states that are not whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fmops.adapters.guarded import Guarded
from fmops.adapters.model_files import evaluating
from fmops.adapters.trainer import Trained
from fmops.adapters.trl_align import Setting, plan_examples, sample_held_out, set_up, train_between
from fmops.artifacts import Benchmarks
from fmops.lifecycle import Align
from fmops.stage import StageContext

MICRO_BATCHES = (8, 4, 2, 1)
"""Answers that go through the model together, most first; a step's answers must divide by it."""
ITEM = "prompts"
HELD_OUT = 32
"""Held-out prompts answered before and after: each costs a whole answer."""


class Asked(Protocol):
    """A prompt, and what a reward may want to know of it."""

    @property
    def id(self) -> str: ...
    @property
    def messages(self) -> Sequence[Mapping[str, str]]: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...
    @property
    def tokens(self) -> int: ...


class Reward(Protocol):
    """What an answer is worth."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    def __call__(self, prompt: Any, answer: str) -> float: ...


class GrpoTrainer(Guarded, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer under our watch; every step answers its own prompts, so nothing is off-policy."""

    def get_train_dataloader(self) -> Any:
        # After the memory ran out a step has more and smaller micro-batches: they still share one generation.
        self.args.steps_per_generation = self.args.gradient_accumulation_steps
        return super().get_train_dataloader()

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        found: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        means = found.mean(dim=0).tolist()
        total = sum(weight * mean for weight, mean in zip(self.reward_weights.tolist(), means, strict=True))
        named = dict(zip((f"reward/{name}" for name in self.reward_func_names), means, strict=True))
        self.watch.measured |= {
            "reward": total,
            **(named if len(named) > 1 else {}),
            "answer_tokens": float(sum(map(len, completion_ids_list))),
        }
        return found


def train(
    config: Align,
    *,
    source: Path,
    examples: Sequence[Asked],
    held_out: Sequence[Asked],
    out: Path,
    context: StageContext,
    rewards: Sequence[Reward],
    benchmarks: Benchmarks | None = None,
) -> tuple[Trained, dict[str, float]]:
    """Align the model in `source`; write `out/model` (and `out/adapter`). Also returns `held_out_rewards`."""
    setting = set_up(config, source=source, out=out, context=context, benchmarks=benchmarks)
    answers = config.batch_pairs * config.answers
    micro = next(size for size in MICRO_BATCHES if answers % size == 0)
    plan = plan_examples(examples, config=config, whole=config.batch_pairs, item=ITEM, seed=context.seed)
    asked = [examples[index] for index in plan.order]
    trainer = GrpoTrainer(
        args=GRPOConfig(
            **setting.options(plan, accumulate=answers // micro, micro=micro),
            beta=config.beta or 0.0,
            num_generations=config.answers,
            steps_per_generation=answers // micro,
            max_completion_length=config.answer_tokens,
            reward_weights=[reward.weight for reward in rewards],
            shuffle_dataset=False,
        ),
        reward_funcs=[_as_trl_calls_it(reward, asked) for reward in rewards],
        # Columns stay with us: a table would want one type in each.
        train_dataset=Dataset.from_list(
            [{"prompt": [dict(m) for m in one.messages], "place": place} for place, one in enumerate(asked)]
        ),
        **setting.trainer_options(by_document=False),
    )
    measured = sample_held_out(held_out, seed=context.seed, most=HELD_OUT)
    trained, before, after = train_between(
        trainer,
        plan,
        setting=setting,
        measure=lambda: greedy_rewards(trainer, measured, rewards=rewards, setting=setting),
        shown=lambda _, now: {"held_out_reward": math.fsum(now) / len(now)} if now else {},
        learnt=0,
        # The loss is a surrogate around 0; its size says nothing.
        spikes=False,
    )
    learnt = round(sum(row.get("answer_tokens", 0.0) for row in trained.curve))
    return dataclasses.replace(trained, trained_tokens=learnt), held_out_rewards(before, after)


def greedy_rewards(
    trainer: Any, prompts: Sequence[Asked], *, rewards: Sequence[Reward], setting: Setting
) -> list[float]:
    """The weighted reward of the model's most likely answer to each prompt."""
    tokenizer = trainer.processing_class
    found = []
    with evaluating(trainer.model, dtype=setting.dtype) as device:
        for prompt in prompts:
            messages = [dict(message) for message in prompt.messages]
            given = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(device)
            ids = trainer.model.generate(
                **given,
                do_sample=False,
                max_new_tokens=setting.config.answer_tokens,
                eos_token_id=trainer.eos_token_ids,
                pad_token_id=tokenizer.pad_token_id,
            )[0, given["input_ids"].shape[1] :]
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            found.append(math.fsum(reward.weight * reward(prompt, answer) for reward in rewards))
    return found


def held_out_rewards(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Mean reward of greedy answers to held-out prompts, before and after, and their paired difference."""
    n = len(before)
    if not n:
        return {}
    gains = [new - old for old, new in zip(before, after, strict=True)]
    mean = math.fsum(gains) / n
    spread = math.fsum((gain - mean) ** 2 for gain in gains)
    return {
        "held_out_prompts": float(n),
        "reward_before": math.fsum(before) / n,
        "reward_after": math.fsum(after) / n,
        "reward_gain": mean,
        "reward_gain_standard_error": math.sqrt(spread / (n - 1) / n) if n > 1 else 0.0,
    }


def _as_trl_calls_it(reward: Reward, asked: Sequence[Asked]) -> Callable[..., list[float]]:
    def scored(*, completions: Sequence[Any], place: Sequence[int], **_: Any) -> list[float]:
        return [reward(asked[index], answer[0]["content"]) for index, answer in zip(place, completions, strict=True)]

    scored.__name__ = reward.name
    return scored
