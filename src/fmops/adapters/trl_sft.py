"""Instruction tuning with TRL's SFTTrainer.

Enters: a model folder, dialogues as tokens. Leaves: a trained model folder, its curve, resume states while it runs.
Refuses: what `trainer` refuses: steps that are not finite, resume states that are not whole.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from fmops.adapters import ranks
from fmops.adapters.document_attention import attend_by_document
from fmops.adapters.guarded import Guarded
from fmops.adapters.held_out import Dialogue, held_out_loss, piece_of
from fmops.adapters.linear_loss import learn_without_logits
from fmops.adapters.model_files import (
    add_lora,
    choose_precision,
    flop_per_token,
    load_model,
    load_tokenizer,
    peak_flop_per_s,
    save_adapter,
    save_model,
)
from fmops.adapters.packing import (
    Block,
    PlannedBlocks,
    collate,
    labels_of,
    micro_batch,
    pack,
    plan_training,
    read_blocks,
)
from fmops.adapters.schedule import RATES, Schedule, arguments, evenly
from fmops.adapters.sharding import made_whole, shard
from fmops.adapters.trainer import Trained, Watch, prepare, run
from fmops.artifacts import Benchmarks, Corpus
from fmops.errors import FmopsError
from fmops.lifecycle import Instruct
from fmops.stage import StageContext


class SftTrainer(Guarded, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer under our watch."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The same loss by way of the model's own `labels`: TRL's fused head visits every position on a CPU, twice."""
        return Trainer.compute_loss(self, *args, **kwargs)


def train(
    config: Instruct,
    *,
    source: Path,
    dialogues: Sequence[Dialogue],
    held_out: Sequence[Dialogue],
    out: Path,
    context: StageContext,
    corpus: Corpus | None = None,
    benchmarks: Benchmarks | None = None,
) -> Trained:
    """Tune the model in `source`; write `out/model` (and `out/adapter` where LoRA is trained).

    Args:
        corpus: where the documents come from that `config.documents` asks for.
        benchmarks: bring the items of `config.suites`.
    """
    prepare(context)
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    dtype = choose_precision(context, work=work)
    pieces = [piece_of(dialogue) for dialogue in dialogues]
    if corpus:
        tokens = sum(len(piece.input_ids) for piece in pieces)
        pieces += documents_beside(config, corpus, tokens=tokens, seed=context.seed)
    # Packing goes by the order it is given; sources often come sorted by topic.
    random.Random(context.seed).shuffle(pieces)
    blocks = pack(pieces, block_tokens=config.block_tokens)
    sizes = [len(block.input_ids) for block in blocks]
    tokens = round(config.epochs * sum(sizes))
    plan = plan_training(
        sizes, tokens=min(tokens, config.max_tokens or tokens), batch_tokens=config.batch_tokens, seed=context.seed
    )
    if not plan.steps:
        raise FmopsError(f"epochs {config.epochs} of {sum(sizes)} tokens is less than one step. Raise instruct.epochs.")
    model = load_model(source)
    attend_by_document(model, note=context.note)
    learn_without_logits(model, note=context.note)
    parameters = model.num_parameters()
    micro = micro_batch(plan, sizes, processes=ranks.world())
    if config.adapter == "lora":
        model = add_lora(model, rank=config.rank)
    work_a_token = flop_per_token(model)
    model = shard(model, context.sharding)
    measure = held_out_loss(held_out, block_tokens=config.block_tokens, dtype=dtype)
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
        best=config.metric if config.keep == "best" else None,
        better=better,
        patience=config.patience,
        flop_per_token=work_a_token,
        peak_flop_per_s=peak_flop_per_s(dtype),
    )
    planned = PlannedBlocks(blocks, plan)
    trainer = SftTrainer(
        model=model,
        args=SFTConfig(
            **arguments(
                work=work,
                steps=plan.steps,
                accumulate=plan.blocks_per_step // micro,
                schedule=Schedule(config.learning_rate or RATES[config.adapter], warmup=0.1, decay=0.5),
                dtype=dtype,
                seed=context.seed,
            )
            | {"per_device_train_batch_size": micro},
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            packing=False,
            padding_free=False,
            loss_type="nll",
        ),
        # TRL takes nothing but a `datasets` table; ours lists the plan's places, and the collator fetches the blocks.
        train_dataset=Dataset.from_dict({"place": range(len(planned))}),
        data_collator=lambda rows: collate([planned[row["place"]] for row in rows]),
        processing_class=load_tokenizer(source),
    )
    run(trainer, watch, work=work)
    model = made_whole(model)
    if config.adapter == "lora":
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


def documents_beside(config: Instruct, corpus: Corpus, *, tokens: int, seed: int) -> list[Block]:
    """Documents of the corpus, in its mixture, chosen by seed: as many as give them their share beside `tokens`."""
    wanted = round(tokens * config.documents / (1 - config.documents))
    blocks = read_blocks(corpus.train_shards)
    found: list[Block] = []
    for index in random.Random(seed).sample(range(len(blocks)), len(blocks)):
        block, start = blocks[index], 0
        for length in block.lengths:
            if wanted <= 0:
                return found
            ids = block.input_ids[start : start + min(length, config.block_tokens)]
            found.append(Block(ids, (len(ids),)))
            wanted, start = wanted - len(ids), start + length
    return found
