"""What the training stages share round their trainers: how they begin, what they read, what they leave.

Enters: a stage's config and folder, a trained model. Leaves: a plan, a watch over it, `out/model`, what the run tells.
Refuses: to train on less than a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from fmops.adapters.document_attention import attend_by_document, keeps_documents_apart
from fmops.adapters.linear_loss import learn_without_logits
from fmops.adapters.model_files import (
    add_lora,
    choose_precision,
    flop_per_token,
    load_model,
    quiet,
    save_adapter,
    save_model,
)
from fmops.adapters.packing import Plan, plan_training
from fmops.adapters.schedule import evenly
from fmops.adapters.sharding import made_whole, shard
from fmops.adapters.trainer import Measure, Trained, Watch, told
from fmops.artifacts import Benchmarks
from fmops.errors import FmopsError
from fmops.lifecycle import Instruct, Pretrain
from fmops.stage import StageContext


def begin(context: StageContext, *, out: Path) -> tuple[Path, torch.dtype]:
    """Quiet libraries, threads, seeds; the scratch folder under `out`, and the arithmetic of training."""
    quiet()
    # TRL draws bars of its own; it looks at the environment alone.
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(context.threads)
    set_seed(context.seed)
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    return work, choose_precision(context, work=work)


def plan_blocks(config: Pretrain, sizes: Sequence[int], *, seed: int) -> Plan:
    """Blocks of these sizes until `config.tokens` are read.

    Raises:
        FmopsError: there is nothing to learn in them.
    """
    plan = plan_training(sizes, tokens=config.tokens, batch_tokens=config.batch_tokens, seed=seed)
    if not plan.steps:
        raise FmopsError(f"the corpus has {len(sizes)} blocks with nothing to learn in them. Curate more documents.")
    return plan


def plan_epochs(config: Instruct, sizes: Sequence[int], *, seed: int) -> Plan:
    """Dialogues, or blocks of them, of these sizes for `config.epochs`, at most `config.max_tokens`.

    Raises:
        FmopsError: that is less than one step.
    """
    tokens = round(config.epochs * sum(sizes))
    tokens = min(tokens, config.max_tokens or tokens)
    plan = plan_training(sizes, tokens=tokens, batch_tokens=config.batch_tokens, seed=seed)
    if not plan.steps:
        raise FmopsError(f"epochs {config.epochs} of {sum(sizes)} tokens is less than one step. Raise instruct.epochs.")
    return plan


def ready(source: Path, context: StageContext, *, rank: int | None) -> tuple[Any, float, bool]:
    """The model in `source` with our attention and loss, ready to be trained, in shards where it is; the operations
    that a trained token needs; and whether a row may hold several documents.

    `rank` is that of a LoRA adapter, None trains every weight.
    """
    model = load_model(source)
    packs = attend_by_document(model, note=context.note) or keeps_documents_apart(model)
    learn_without_logits(model, note=context.note)
    if rank is not None:
        model = add_lora(model, rank=rank)
    # Shards would count as what one process holds of them.
    work_a_token = flop_per_token(model)
    return shard(model, context.sharding), work_a_token, packs


def watch_over(
    plan: Plan, config: Pretrain | Instruct, context: StageContext, *, losses: Measure, source: Path,
    benchmarks: Benchmarks | None = None,
) -> Watch:  # fmt: skip
    """A watch that measures, saves, keeps and stops as `config` says.

    Args:
        losses: held-out losses of the model as it is.
        source: the model's folder, for its tokenizer.
        benchmarks: bring the items of `config.suites`.
    """
    watch = Watch(
        plan=plan,
        context=context,
        evaluate=losses,
        evaluate_at=evenly(config.evaluations, plan.steps, end=True),
        save_at=evenly(config.checkpoints, plan.steps, end=False),
        best=config.metric if config.keep == "best" else None,
        patience=config.patience,
    )
    if benchmarks is not None:
        # The harness takes seconds to import.
        from fmops.adapters.watched_suites import with_suites

        with_suites(watch, config, benchmarks, source=source, context=context)
    return watch


def first_row(measure: Measure, model: Any, context: StageContext) -> dict[str, float]:
    """The first row of the curve of a framework with a loop of its own: the model as it begins."""
    return told({"step": 0, "tokens": 0, **measure(model)}, context)


def leave(watch: Watch, model: Any, *, source: Path, out: Path, lora: bool, learnt: Callable[[int], int]) -> Trained:
    """Write `out/model` (and `out/adapter` where LoRA was trained); returns what the run tells beside its files.

    `learnt` counts the tokens that carry loss at a place of the plan's order.
    """
    model = made_whole(model)
    if lora:
        save_adapter(model, out / "adapter")
        model = model.merge_and_unload()
    save_model(model, out / "model", source=source)
    plan = watch.plan
    last = plan.steps if watch.kept_step is None else watch.kept_step
    read = min(last * plan.blocks_per_step, len(plan.order))
    return Trained(
        parameters=model.num_parameters(),
        trained_tokens=sum(learnt(place) for place in range(read)),
        curve=watch.curve,
        stopped=watch.stopped,
        kept_step=watch.kept_step,
    )
