"""What the methods of alignment share: the setting of a run, the order of examples, training between two measurements.

Enters: the stage's config, examples as tokens, a trainer of TRL's. Leaves: a trained model folder, its curve.
Refuses: too few examples for a batch; what `trainer` refuses.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from datasets.utils.logging import disable_progress_bar

from fmops.adapters.document_attention import attend_by_document
from fmops.adapters.guarded import Guarded, generators, set_generators
from fmops.adapters.model_files import (
    evaluating,
    flop_per_token,
    load_model,
    load_tokenizer,
    lora_config,
    peak_flop_per_s,
    save_adapter,
    save_model,
)
from fmops.adapters.packing import Plan
from fmops.adapters.schedule import Schedule, arguments, evenly
from fmops.adapters.shared_prefix import share_prefixes
from fmops.adapters.trainer import Trained, Watch, run
from fmops.adapters.training_stage import begin
from fmops.artifacts import Benchmarks
from fmops.errors import FmopsError
from fmops.lifecycle import Align
from fmops.stage import StageContext

HELD_OUT = 64
"""Held-out examples measured before and after."""
BETA = 0.1
RATES = {
    "dpo": {"lora": 1e-4, "full": 1e-6},
    "orpo": {"lora": 1e-4, "full": 5e-6},
    "kto": {"lora": 1e-4, "full": 1e-6},
    "grpo": {"lora": 2e-5, "full": 1e-6},
}
Example = TypeVar("Example")
Measured = TypeVar("Measured")


class Counted(Protocol):
    """An example that knows its size."""

    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Setting:
    """One run of the align stage."""

    config: Align
    source: Path
    out: Path
    work: Path
    context: StageContext
    dtype: torch.dtype
    benchmarks: Benchmarks | None
    """Bring the items of `config.suites`."""

    @property
    def beta(self) -> float:
        return BETA if self.config.beta is None else self.config.beta

    def options(self, plan: Plan, *, accumulate: int, micro: int) -> dict[str, Any]:
        """Keyword arguments of every method's config."""
        rate = self.config.learning_rate or RATES[self.config.method][self.config.adapter]
        common = arguments(
            work=self.work,
            steps=plan.steps,
            accumulate=accumulate,
            schedule=Schedule(rate, warmup=0.1, decay=0.5),
            dtype=self.dtype,
            seed=self.context.seed,
        )
        return common | {"per_device_train_batch_size": micro, "gradient_checkpointing": False}

    def trainer_options(self, *, by_document: bool) -> dict[str, Any]:
        """Model, tokenizer and adapter, as TRL's trainers take them."""
        model = load_model(self.source)
        if by_document:
            attend_by_document(model, note=self.context.note)
        return {
            "model": model,
            "processing_class": load_tokenizer(self.source),
            # TRL wraps the model itself: an adapter that it is given ready-made it would copy as the reference.
            "peft_config": lora_config(rank=self.config.rank) if self.config.adapter == "lora" else None,
        }


class Scoring(Guarded):
    """Mixed into a trainer of TRL's that scores given answers: its rows are tokens already, prompts are shared."""

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
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]

    def _share_prefixes(self) -> None:
        if self._shares is None:
            model: Any = self.model
            bare = model.get_base_model() if hasattr(model, "get_base_model") else model
            self._shares = share_prefixes(bare, note=self.note)


def set_up(
    config: Align, *, source: Path, out: Path, context: StageContext, benchmarks: Benchmarks | None = None
) -> Setting:
    """Quiet libraries, seeds, scratch space, precision."""
    disable_progress_bar()
    work, dtype = begin(context, out=out)
    return Setting(config, source, out, work, context, dtype, benchmarks)


def plan_examples(examples: Sequence[Counted], *, config: Align, whole: int, item: str, seed: int) -> Plan:
    """Examples in seeded order, epoch after epoch; a multiple of `whole`, so that every example weighs the same."""
    wanted = round(config.epochs * len(examples))
    wanted = min(wanted, config.max_pairs or wanted)
    wanted -= wanted % whole
    if not wanted:
        raise FmopsError(f"{len(examples)} {item} do not fill a batch of {whole}. Add some, or raise epochs.")
    order: list[int] = []
    epoch = 0
    while len(order) < wanted:
        indices = list(range(len(examples)))
        random.Random(f"{seed} epoch {epoch}").shuffle(indices)
        order += indices
        epoch += 1
    order = order[:wanted]
    read = list(accumulate(examples[index].tokens for index in order))
    ends = range(config.batch_pairs, wanted + config.batch_pairs, config.batch_pairs)
    return Plan(
        order=tuple(order),
        last_tokens=examples[order[-1]].tokens,
        blocks_per_step=config.batch_pairs,
        tokens=read[-1],
        tokens_after=tuple(read[min(end, wanted) - 1] for end in ends),
        item=item,
    )


def sample_held_out(examples: Sequence[Example], *, seed: int, most: int = HELD_OUT) -> list[Example]:
    """The held-out examples that are measured."""
    return random.Random(seed).sample(list(examples), min(len(examples), most))


def answer_log_probs(trainer: Any, rows: Sequence[dict[str, Any]], *, batch: int, dtype: torch.dtype) -> list[float]:
    """Log-probabilities of the answers in a collator's rows, batch by batch as the collator orders them."""
    found: list[float] = []
    with evaluating(trainer.model, dtype=dtype) as device:
        for start in range(0, len(rows), batch):
            padded = trainer.data_collator(list(rows[start : start + batch]))
            ids, mask = padded["input_ids"].to(device), padded["attention_mask"].to(device)
            labels = ids.masked_fill(padded["completion_mask"].to(device) == 0, -100)
            output = trainer.model(
                input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True
            )
            found += output.log_probs.sum(dim=1).float().cpu().tolist()
    return found


def train_between(
    trainer: Any,
    plan: Plan,
    *,
    setting: Setting,
    measure: Callable[[], Measured],
    shown: Callable[[Measured, Measured], dict[str, float]],
    learnt: int,
    spikes: bool = True,
) -> tuple[Trained, Measured, Measured]:
    """Measure, train to the end of the plan, measure again; write `out/model` (and `out/adapter`).

    Args:
        trainer: one of ours, ready to train.
        plan: what it reads.
        setting: of the run.
        measure: what is known of the model as it is.
        shown: what the curve says of a measurement, beside the one before training.
        learnt: tokens that carry loss.
        spikes: whether a loss far above the others means that a step went wrong.

    Returns:
        What was trained, and what was measured before it and of the weights that are kept.
    """
    config, context = setting.config, setting.context
    before = measure()
    found, begins = {0: before}, shown(before, before)

    def evaluate(_: Any) -> dict[str, float]:
        step = trainer.state.global_step
        if not step:
            return begins
        drawn = generators()
        found[step] = measure()
        set_generators(drawn)
        return shown(before, found[step])

    if config.keep == "best" and config.metric is None and config.kept_by not in begins:
        raise FmopsError(
            f"align.keep is best, but the held-out examples are too few or too alike to tell {config.kept_by}. Add "
            "some, name a suite as metric, or set keep to last."
        )

    watch = Watch(
        plan=plan,
        context=context,
        evaluate=evaluate,
        evaluate_at=evenly(config.evaluations, plan.steps, end=True),
        save_at=evenly(config.checkpoints, plan.steps, end=False),
        spikes=spikes,
        best=config.kept_by if config.keep == "best" else None,
        better=operator.gt,
        patience=config.patience,
    )
    if isinstance(trainer, Scoring):
        # What generates its answers first does other work than its tokens tell.
        watch.flop_per_token, watch.peak_flop_per_s = flop_per_token(trainer.model), peak_flop_per_s(setting.dtype)
    if setting.benchmarks is not None:
        # The harness takes seconds to import.
        from fmops.adapters.watched_suites import with_suites

        with_suites(watch, config, setting.benchmarks, source=setting.source, context=context)
    run(trainer, watch, work=setting.work)
    kept = trainer.state.global_step if watch.kept_step is None else watch.kept_step
    after = found[kept] if kept in found else measure()
    model = trainer.model
    if config.adapter == "lora":
        save_adapter(model, setting.out / "adapter")
        model = model.merge_and_unload()
    save_model(model, setting.out / "model", source=setting.source)
    trained = Trained(
        parameters=model.num_parameters(),
        trained_tokens=learnt,
        curve=watch.curve,
        stopped=watch.stopped,
        kept_step=watch.kept_step,
    )
    return trained, before, after
