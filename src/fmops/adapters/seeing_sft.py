"""Instruction tuning of a vision-language model, under the same watch as every other training.

Enters: a model folder with an image processor, dialogues whose tokens have room for their pictures.
Leaves: a trained model folder, its curve, resume states while it runs.
Refuses: LoRA, several processes, and what `trainer` refuses.

A row is one dialogue, filled up on the right: a picture's features replace the embeddings of its own row, which a
packed row would mix. The answers' tokens alone are learnt; both towers move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer

from fmops.adapters import ranks
from fmops.adapters.eyes import Eyes, load_seeing, pictures_of
from fmops.adapters.held_out import first_dialogues, summed_nats
from fmops.adapters.model_files import load_tokenizer
from fmops.adapters.packing import IGNORED
from fmops.adapters.trainer import Trained, run
from fmops.adapters.training_stage import begin, leave, plan_epochs, watch_over
from fmops.adapters.trl_sft import SftTrainer, sft_config
from fmops.errors import FmopsError
from fmops.lifecycle import Instruct
from fmops.pictures import to_url
from fmops.stage import StageContext

ROW_TOKENS = 1024
"""Tokens of dialogues that go through the model together, filling not counted."""


class Dialogue(Protocol):
    """Token ids, which of them are learnt, and the picture files that are seen."""

    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def learnt(self) -> tuple[bool, ...]: ...
    @property
    def pictures(self) -> tuple[Path, ...]: ...


def train(
    config: Instruct,
    *,
    source: Path,
    dialogues: Sequence[Dialogue],
    held_out: Sequence[Dialogue],
    out: Path,
    context: StageContext,
) -> Trained:
    """Tune the model in `source`; write `out/model`."""
    if config.adapter != "full":
        raise FmopsError(
            f"a model that reads pictures learns with every weight: set instruct.adapter to full, not {config.adapter}."
        )
    if ranks.world() > 1:
        raise FmopsError(
            f"runtime.processes is {ranks.world()}, but a model that reads pictures is tuned in one: leave it out."
        )
    work, dtype = begin(context, out=out)
    sizes = [len(dialogue.ids) for dialogue in dialogues]
    plan = plan_epochs(config, sizes, seed=context.seed)
    eyes, tokenizer = Eyes(source, remember=True), load_tokenizer(source)
    collate = _collator(eyes, padding=tokenizer.pad_token_id)
    model = load_seeing(source)
    rows = max(part for part in range(1, plan.blocks_per_step + 1) if _divides(part, plan.blocks_per_step, max(sizes)))
    losses = _held_out_loss(held_out, collate, dtype=dtype)
    watch = watch_over(plan, config, context, losses=losses, source=source)
    trainer = SeeingTrainer(
        model=model,
        args=sft_config(config, plan, micro=rows, work=work, dtype=dtype, seed=context.seed),
        train_dataset=Dataset.from_dict({"place": plan.order}),
        data_collator=lambda some: collate([dialogues[row["place"]] for row in some]),
        processing_class=tokenizer,
    )
    run(trainer, watch, work=work)
    return leave(
        watch, model, source=source, out=out, lora=False, learnt=lambda place: sum(dialogues[plan.order[place]].learnt)
    )


class SeeingTrainer(SftTrainer):
    """TRL looks for pictures in a data set of its own form; ours come with the batch."""

    def _set_signature_columns_if_needed(self) -> None:
        Trainer._set_signature_columns_if_needed(self)


def _divides(part: int, whole: int, largest: int) -> bool:
    return whole % part == 0 and (part == 1 or part * largest <= ROW_TOKENS)


def _collator(eyes: Eyes, *, padding: int) -> Callable[[Sequence[Dialogue]], dict[str, Any]]:
    """Makes a batch: [rows, tokens] ids, labels and mask, and the rows' pictures."""

    def collate(rows: Sequence[Dialogue]) -> dict[str, Any]:
        shape = len(rows), max(len(row.ids) for row in rows)
        ids = np.full(shape, padding, dtype=np.int64)
        labels, mask = np.full(shape, IGNORED, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for place, row in enumerate(rows):
            size = len(row.ids)
            ids[place, :size], mask[place, :size] = row.ids, 1
            labels[place, :size] = np.where(row.learnt, row.ids, IGNORED)
        looks = [[eyes.look(to_url(file.name, file.read_bytes())) for file in row.pictures] for row in rows]
        tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return {name: torch.from_numpy(value) for name, value in tensors.items()} | pictures_of(looks) | {
            "use_cache": False
        }  # fmt: skip

    return collate


def _held_out_loss(
    dialogues: Sequence[Dialogue], collate: Callable[[Sequence[Dialogue]], dict[str, Any]], *, dtype: torch.dtype
) -> Callable[[Any], dict[str, float]]:
    """Measures nats a learnt token on the first held-out dialogues, a dialogue at a time."""
    chosen = first_dialogues(dialogues)

    def measure(model: Any) -> dict[str, float]:
        nats, counted = summed_nats(model, (collate([dialogue]) for dialogue in chosen), dtype=dtype)
        return {"held_out_loss": nats / counted} if counted else {}

    return measure
