"""Direct preference optimisation with TRL's DPOTrainer (Rafailov et al. 2023).

Enters: a model folder, preference pairs as tokens. Leaves: a trained model folder, its curve, held-out preferences.
Refuses: what `trainer` refuses: steps that are not finite, resume states that are not whole.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer

from fmops.adapters.document_attention import attend_by_document
from fmops.adapters.model_files import (
    choose_precision,
    evaluating,
    load_model,
    load_tokenizer,
    lora_config,
    save_adapter,
    save_model,
)
from fmops.adapters.packing import Plan
from fmops.adapters.shared_prefix import share_prefixes
from fmops.adapters.trainer import Guarded, Schedule, Trained, Watch, arguments, evenly, prepare, run
from fmops.errors import FmopsError
from fmops.lifecycle import Align
from fmops.stage import StageContext

MICRO_BATCHES = (4, 2, 1)
"""Pairs that go through the model together, most first; a step's pairs must divide by it."""
HELD_OUT_PAIRS = 64
RATES = {"lora": 1e-4, "full": 1e-6}


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


class DpoTrainer(Guarded, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer under our watch, on pairs that are tokens already; each prompt is computed once a pair."""

    def __init__(self, *args: Any, note: Callable[[str], None], **kwargs: Any) -> None:
        self.note = note
        self._shares: bool | None = None
        super().__init__(*args, **kwargs)
        self._share_prefixes()

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        # TRL calls it while it is made, right after it gave the model its own fused head.
        self._share_prefixes()
        return super()._precompute_ref_logps(*args, **kwargs)

    def _share_prefixes(self) -> None:
        if self._shares is None:
            bare = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            self._shares = share_prefixes(bare, note=self.note)


def train(
    config: Align, *, source: Path, pairs: Sequence[Pair], held_out: Sequence[Pair], out: Path, context: StageContext
) -> tuple[Trained, dict[str, float]]:
    """Align the model in `source`; write `out/model` (and `out/adapter`). Also returns `held_out_preferences`."""
    prepare(context)
    disable_progress_bar()
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    dtype = choose_precision(context, work=work)
    micro = next(size for size in MICRO_BATCHES if config.batch_pairs % size == 0)
    plan = plan_pairs(pairs, config=config, micro=micro, seed=context.seed)
    model = load_model(source)
    attend_by_document(model, note=context.note)
    parameters = model.num_parameters()
    watch = Watch(
        plan=plan,
        context=context,
        evaluate=lambda _: {},
        evaluate_at=frozenset(),
        save_at=evenly(config.checkpoints, plan.steps, end=False),
    )
    trainer = DpoTrainer(
        note=context.note,
        model=model,
        args=DPOConfig(
            **arguments(
                work=work,
                steps=plan.steps,
                accumulate=max(1, config.batch_pairs // micro),
                schedule=Schedule(config.learning_rate or RATES[config.adapter], warmup=0.1, decay=0.5),
                dtype=dtype,
                seed=context.seed,
            )
            | {"per_device_train_batch_size": micro},
            gradient_checkpointing=False,
            beta=config.beta,
            max_length=None,
            # Full tuning moves the reference away, so it answers beforehand; LoRA switches its adapter off.
            precompute_ref_log_probs=config.adapter == "full",
        ),
        train_dataset=Dataset.from_list([_row(pairs[index]) for index in plan.order]),
        processing_class=load_tokenizer(source),
        # TRL wraps the model itself: an adapter that it is given ready-made it would copy as the reference.
        peft_config=lora_config(rank=config.rank) if config.adapter == "lora" else None,
    )
    chosen = _sample(held_out, seed=context.seed)
    before = answer_log_probs(trainer, chosen, dtype=dtype)
    run(trainer, watch, work=work)
    after = answer_log_probs(trainer, chosen, dtype=dtype)
    if config.adapter == "lora":
        save_adapter(trainer.model, out / "adapter")
        model = trainer.model.merge_and_unload()
    save_model(model, out / "model", source=source)
    trained = Trained(
        parameters=parameters,
        trained_tokens=sum(len(pairs[index].chosen) + len(pairs[index].rejected) for index in plan.order),
        curve=watch.curve,
        stopped=watch.stopped,
        kept_step=watch.kept_step,
    )
    context.cost["pairs_per_s"] = context.cost["tokens_per_s"] * len(plan.order) / plan.tokens
    return trained, held_out_preferences(before, after, beta=config.beta)


def plan_pairs(pairs: Sequence[Pair], *, config: Align, micro: int, seed: int) -> Plan:
    """Pairs in seeded order, epoch after epoch; a multiple of `micro`, so that every pair weighs the same."""
    wanted = round(config.epochs * len(pairs))
    wanted = min(wanted, config.max_pairs or wanted)
    wanted -= wanted % micro
    if not wanted:
        raise FmopsError(f"{len(pairs)} preference pairs do not fill a batch of {micro}. Add pairs, or raise epochs.")
    order: list[int] = []
    epoch = 0
    while len(order) < wanted:
        indices = list(range(len(pairs)))
        random.Random(f"{seed} epoch {epoch}").shuffle(indices)
        order += indices
        epoch += 1
    order = order[:wanted]
    read = list(accumulate(pairs[index].tokens for index in order))
    ends = range(config.batch_pairs, wanted + config.batch_pairs, config.batch_pairs)
    return Plan(
        order=tuple(order),
        last_tokens=pairs[order[-1]].tokens,
        blocks_per_step=config.batch_pairs,
        tokens=read[-1],
        tokens_after=tuple(read[min(end, wanted) - 1] for end in ends),
        item="preference pairs",
    )


def answer_log_probs(trainer: Any, pairs: Sequence[Pair], *, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Of each pair, the log-probability of the chosen and of the rejected answer under the model as it is."""
    found: list[tuple[float, float]] = []
    with evaluating(trainer.model, dtype=dtype) as device:
        for start in range(0, len(pairs), MICRO_BATCHES[0]):
            batch = trainer.data_collator([_row(pair) for pair in pairs[start : start + MICRO_BATCHES[0]]])
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
            scores = trainer.model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)
            better, worse = scores.float().cpu().chunk(2)
            found += zip(better.tolist(), worse.tolist(), strict=True)
    return found


def held_out_preferences(
    before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]], *, beta: float
) -> dict[str, float]:
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


def _sample(pairs: Sequence[Pair], *, seed: int) -> list[Pair]:
    return random.Random(seed).sample(list(pairs), min(len(pairs), HELD_OUT_PAIRS))


def _row(pair: Pair) -> dict[str, list[int]]:
    return {
        "prompt_ids": list(pair.prompt),
        "chosen_ids": list(pair.chosen),
        "rejected_ids": list(pair.rejected),
    }
