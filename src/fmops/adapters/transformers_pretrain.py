"""Continued pretraining with Transformers' Trainer.

Enters: a model folder, packed blocks, a plan. Leaves: a trained model folder, its curve, resume states while it runs.
Refuses: what `trainer` refuses: steps that are not finite, resume states that are not whole.
"""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer, TrainingArguments

from fmops.adapters import ranks
from fmops.adapters.ceiling import halve_the_rate
from fmops.adapters.guarded import Guarded
from fmops.adapters.held_out import held_out_losses
from fmops.adapters.model_files import (
    peak_flop_per_s,
)
from fmops.adapters.packing import PlannedBlocks, collate, micro_batch, read_blocks
from fmops.adapters.schedule import Schedule, arguments
from fmops.adapters.trainer import Keep, Trained, run
from fmops.adapters.training_stage import begin, leave, plan_blocks, ready, watch_over
from fmops.artifacts import Benchmarks, Corpus
from fmops.lifecycle import Pretrain
from fmops.stage import StageContext

LORA_RANK = 64
"""Continued pretraining stores more than instruction tuning does, so its adapter is wider."""


class PretrainTrainer(Guarded, Trainer):  # type: ignore[misc]
    """Transformers' Trainer under our watch."""


def train(
    config: Pretrain,
    *,
    source: Path,
    corpus: Corpus,
    out: Path,
    keep: Keep | None,
    context: StageContext,
    benchmarks: Benchmarks | None = None,
) -> Trained:
    """Train the model in `source` on the corpus; write `out/model` (and `out/adapter` where LoRA is trained).

    `keep` judges each measured row of the curve; the run stops at the first it refuses and keeps the weights before.
    `benchmarks` bring the items of `config.suites`.
    """
    work, dtype = begin(context, out=out)
    model, work_a_token, packs = ready(source, context, rank=LORA_RANK if config.tuning == "lora" else None)
    blocks = read_blocks(corpus.train_shards)
    if not packs:
        blocks = blocks.apart()
    sizes = blocks.sizes()
    plan = plan_blocks(config, sizes, seed=context.seed)
    micro = micro_batch(plan, sizes, processes=ranks.world()) if packs else 1
    losses = held_out_losses(corpus, source, dtype=dtype)
    watch = watch_over(plan, config, context, losses=losses, source=source, benchmarks=benchmarks)
    watch.keep, watch.flop_per_token, watch.peak_flop_per_s = keep, work_a_token, peak_flop_per_s(dtype)
    if config.on_ceiling == "adjust":
        watch.go_on = halve_the_rate
    planned = PlannedBlocks(blocks, plan)
    trainer = PretrainTrainer(
        model=model,
        args=TrainingArguments(
            **arguments(
                work=work,
                steps=plan.steps,
                accumulate=plan.blocks_per_step // micro,
                schedule=Schedule(config.learning_rate, config.warmup, config.decay),
                dtype=dtype,
                seed=context.seed,
            )
            | {"per_device_train_batch_size": micro}
        ),
        train_dataset=planned,
        data_collator=collate,
    )
    run(trainer, watch, work=work)
    return leave(watch, model, source=source, out=out, lora=config.tuning == "lora", learnt=planned.learnt)
