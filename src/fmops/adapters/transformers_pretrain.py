"""Continued pretraining with Transformers' Trainer.

Enters: a model folder, packed blocks, a plan. Leaves: a trained model folder, its curve, resume states while it runs.
Refuses: what `trainer` refuses: steps that are not finite, resume states that are not whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainingArguments

from fmops.adapters import ranks
from fmops.adapters.ceiling import halve_the_rate
from fmops.adapters.document_attention import attend_by_document
from fmops.adapters.guarded import Guarded
from fmops.adapters.held_out import held_out_losses
from fmops.adapters.linear_loss import learn_without_logits
from fmops.adapters.model_files import (
    add_lora,
    choose_precision,
    flop_per_token,
    load_model,
    peak_flop_per_s,
    save_adapter,
    save_model,
)
from fmops.adapters.packing import PlannedBlocks, collate, labels_of, micro_batch, plan_training, read_blocks
from fmops.adapters.schedule import Schedule, arguments, evenly
from fmops.adapters.sharding import made_whole, shard
from fmops.adapters.trainer import Keep, Trained, Watch, prepare, run
from fmops.artifacts import Benchmarks, Corpus
from fmops.errors import FmopsError
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
    prepare(context)
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    dtype = choose_precision(context, work=work)
    blocks = read_blocks(corpus.train_shards)
    sizes = blocks.sizes()
    plan = plan_training(sizes, tokens=config.tokens, batch_tokens=config.batch_tokens, seed=context.seed)
    if not plan.steps:
        raise FmopsError(f"the corpus has {len(blocks)} blocks with nothing to learn in them. Curate more documents.")
    model = load_model(source)
    attend_by_document(model, note=context.note)
    learn_without_logits(model, note=context.note)
    parameters = model.num_parameters()
    micro = micro_batch(plan, sizes, processes=ranks.world())
    if config.tuning == "lora":
        model = add_lora(model, rank=LORA_RANK)
    work_a_token = flop_per_token(model)
    model = shard(model, context.sharding)
    measure = held_out_losses(corpus, source, dtype=dtype)
    better: Callable[[float, float], bool] = operator.lt
    if benchmarks is not None:
        # The harness takes seconds to import.
        from fmops.adapters.watched_suites import with_suites

        measure, better = with_suites(measure, config, benchmarks, source=source, context=context)
    watch = Watch(
        plan=plan,
        context=context,
        evaluate=measure,
        evaluate_at=evenly(config.evaluations, plan.steps, end=True),
        save_at=evenly(config.checkpoints, plan.steps, end=False),
        keep=keep,
        best=config.metric if config.keep == "best" else None,
        better=better,
        patience=config.patience,
        flop_per_token=work_a_token,
        peak_flop_per_s=peak_flop_per_s(dtype),
    )
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
    model = made_whole(model)
    if config.tuning == "lora":
        save_adapter(model, out / "adapter")
        model = model.merge_and_unload()
    save_model(model, out / "model", source=source)
    last = plan.steps if watch.kept_step is None else watch.kept_step
    read = min(last * plan.blocks_per_step, len(planned))
    return Trained(
        parameters=parameters,
        trained_tokens=sum(int((labels_of(planned[index]) >= 0).sum()) for index in range(read)),
        curve=watch.curve,
        stopped=watch.stopped,
        kept_step=watch.kept_step,
    )
