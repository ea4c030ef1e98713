"""Instruction tuning with TRL's SFTTrainer.

Enters: a model folder, dialogues as tokens. Leaves: a trained model folder, its curve, resume states while it runs.
Refuses: what `trainer` refuses: steps that are not finite, resume states that are not whole.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from fmops.adapters import ranks
from fmops.adapters.guarded import Guarded
from fmops.adapters.held_out import Dialogue, held_out_loss, piece_of
from fmops.adapters.model_files import (
    load_tokenizer,
    peak_flop_per_s,
)
from fmops.adapters.packing import (
    Block,
    Plan,
    PlannedBlocks,
    collate,
    micro_batch,
    pack,
    read_blocks,
)
from fmops.adapters.schedule import RATES, Schedule, arguments
from fmops.adapters.trainer import Trained, run
from fmops.adapters.training_stage import begin, leave, plan_epochs, ready, watch_over
from fmops.artifacts import Benchmarks, Corpus
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
    work, dtype = begin(context, out=out)
    pieces = [piece_of(dialogue) for dialogue in dialogues]
    if corpus:
        tokens = sum(len(piece.input_ids) for piece in pieces)
        pieces += documents_beside(config, corpus, tokens=tokens, context=context)
    # Packing goes by the order it is given; sources often come sorted by topic.
    random.Random(context.seed).shuffle(pieces)
    model, work_a_token, packs = ready(source, context, rank=config.rank if config.adapter == "lora" else None)
    blocks = pack(pieces, block_tokens=config.block_tokens) if packs else pieces
    sizes = [len(block.input_ids) for block in blocks]
    plan = plan_epochs(config, sizes, seed=context.seed)
    micro = micro_batch(plan, sizes, processes=ranks.world()) if packs else 1
    losses = held_out_loss(held_out, dtype=dtype, block_tokens=config.block_tokens if packs else None)
    watch = watch_over(plan, config, context, losses=losses, source=source, benchmarks=benchmarks)
    watch.flop_per_token, watch.peak_flop_per_s = work_a_token, peak_flop_per_s(dtype)
    planned = PlannedBlocks(blocks, plan)
    trainer = SftTrainer(
        model=model,
        args=sft_config(config, plan, micro=micro, work=work, dtype=dtype, seed=context.seed),
        # TRL takes nothing but a `datasets` table; ours lists the plan's places, and the collator fetches the blocks.
        train_dataset=Dataset.from_dict({"place": range(len(planned))}),
        data_collator=lambda rows: collate([planned[row["place"]] for row in rows]),
        processing_class=load_tokenizer(source),
    )
    run(trainer, watch, work=work)
    return leave(watch, model, source=source, out=out, lora=config.adapter == "lora", learnt=planned.learnt)


def sft_config(config: Instruct, plan: Plan, *, micro: int, work: Path, dtype: torch.dtype, seed: int) -> SFTConfig:
    """TRL's settings for rows that are tokens already, `micro` of them at a time."""
    return SFTConfig(
        **arguments(
            work=work,
            steps=plan.steps,
            accumulate=plan.blocks_per_step // micro,
            schedule=Schedule(config.learning_rate or RATES[config.adapter], warmup=0.1, decay=0.5),
            dtype=dtype,
            seed=seed,
        )
        | {"per_device_train_batch_size": micro},
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=False,
        loss_type="nll",
    )


def documents_beside(config: Instruct, corpus: Corpus, *, tokens: int, context: StageContext) -> list[Block]:
    """Documents of the corpus, in its mixture, chosen by seed: as many as give them their share beside `tokens`.

    Where the corpus has no more, all of it is read, and a note says what share that is.
    """
    wanted = round(tokens * config.documents / (1 - config.documents))
    blocks = read_blocks(corpus.train_shards)
    found: list[Block] = []
    for index in random.Random(context.seed).sample(range(len(blocks)), len(blocks)):
        block, start = blocks[index], 0
        for length in block.lengths:
            if wanted <= 0:
                return found
            ids = block.input_ids[start : start + min(length, config.block_tokens)]
            found.append(Block(ids, (len(ids),)))
            wanted, start = wanted - len(ids), start + length
    if wanted > 0:
        read = sum(len(block.input_ids) for block in found)
        context.note(
            f"instruct.documents is {config.documents}, but the corpus has no more than {read} tokens beside the "
            f"dialogues' {tokens}: a share of {read / (read + tokens):.2f}. Curate more, or lower instruct.documents."
        )
    return found
