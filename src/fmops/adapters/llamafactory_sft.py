"""Instruction tuning with LLaMA-Factory, in an environment of its own.

Enters: a model folder, dialogues as tokens. Leaves: a trained model folder, its curve.
Refuses: what needs a measurement while it trains; weights that are not all there.

It is given our tokens in our order, so template, mask and order are those of every other trainer; its config is a YAML
file that its own parser reads. It pads where ours packs, and writes and finds its own resume states.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fmops.adapters.held_out import Dialogue, held_out_loss, piece_of
from fmops.adapters.model_files import load_model, save_adapter, save_model, take_weights
from fmops.adapters.packing import Block, Plan, PlannedBlocks, labels_of, micro_batch
from fmops.adapters.schedule import FLOOR, RATES
from fmops.adapters.trainer import Trained
from fmops.adapters.training_faults import refuse_not_finite
from fmops.adapters.training_stage import begin, first_row, plan_epochs
from fmops.errors import OutOfMemory, StageFailed
from fmops.frameworks import executable, follow, installed_version, last_words, own_environment
from fmops.lifecycle import Instruct
from fmops.stage import StageContext

FOLDER = "llama-factory"
WARMUP, DECAY = 0.1, 0.5


def train(
    config: Instruct,
    *,
    source: Path,
    dialogues: Sequence[Dialogue],
    held_out: Sequence[Dialogue],
    out: Path,
    context: StageContext,
) -> Trained:
    """Tune the model in `source`; write `out/model` (and `out/adapter` where LoRA is trained).

    Raises:
        FmopsError: LLaMA-Factory is not here, or epochs are less than a step.
        StageFailed: it ended early; OutOfMemory when a smaller micro-batch may fit.
    """
    command = executable("llamafactory")
    scratch, dtype = begin(context, out=out)
    work = scratch / FOLDER
    work.mkdir(exist_ok=True)
    context.environment["llamafactory"] = installed_version(command, "llamafactory")
    pieces = [piece_of(dialogue) for dialogue in dialogues]
    random.Random(context.seed).shuffle(pieces)
    sizes = [len(piece.input_ids) for piece in pieces]
    plan = plan_epochs(config, sizes, seed=context.seed)
    planned = PlannedBlocks(pieces, plan)
    rows = [planned[index] for index in range(len(planned))]
    write_tokens(rows, work / "tokens")
    settings = settings_of(config, plan=plan, sizes=sizes, source=source, work=work, context=context)
    path = work / "train.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    model = load_model(source)
    measure = held_out_loss(held_out, dtype=dtype)
    start = first_row(measure, model, context)
    made = work / "made"
    ends = tokens_after(rows, settings, processes=context.processes)
    if not (made / "ended").is_file():
        _run(command, path, made=made, ends=ends, context=context)
    curve = [start, *_curve(made / "trainer_state.json", ends)]
    parameters = model.num_parameters()
    if config.adapter == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, made)
        refuse_not_finite(model)
        save_adapter(model, out / "adapter")
        model = model.merge_and_unload()
    else:
        take_weights(model, made, of="LLaMA-Factory")
        refuse_not_finite(model)
    curve[-1] |= measure(model)
    save_model(model, out / "model", source=source)
    return Trained(
        parameters=parameters,
        trained_tokens=sum(map(planned.learnt, range(len(planned)))),
        curve=curve,
        stopped=False,
        kept_step=None,
    )


def write_tokens(rows: Sequence[Block], out: Path) -> None:
    """Every example of the run in the order in which it is read, as a `datasets` folder."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    shutil.rmtree(out, ignore_errors=True)
    columns = {
        "input_ids": [block.input_ids.tolist() for block in rows],
        "attention_mask": [[1] * len(block.input_ids) for block in rows],
        "labels": [labels_of(block).tolist() for block in rows],
    }
    Dataset.from_dict(columns).save_to_disk(out)


def settings_of(
    config: Instruct, *, plan: Plan, sizes: Sequence[int], source: Path, work: Path, context: StageContext
) -> dict[str, Any]:
    """The spec in LLaMA-Factory's words."""
    micro = max(1, micro_batch(plan, sizes, processes=context.processes) // context.micro_batch_parts)
    accumulate = ceil(plan.blocks_per_step / (micro * context.processes))
    steps = ceil(len(plan.order) / (micro * accumulate * context.processes))
    adapter = {"lora_rank": config.rank, "lora_alpha": 2 * config.rank, "lora_dropout": 0.0, "lora_target": "all"}
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(source.resolve()),
        "finetuning_type": config.adapter,
        **(adapter if config.adapter == "lora" else {}),
        # It asks for a name and a template, and reads neither: the tokens are there.
        "dataset": "fmops",
        "template": "empty",
        "tokenized_path": str((work / "tokens").resolve()),
        "disable_shuffling": True,
        "cutoff_len": config.block_tokens,
        "output_dir": str((work / "made").resolve()),
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": config.learning_rate or RATES[config.adapter],
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": ceil(WARMUP * steps),
        "lr_scheduler_kwargs": {"num_decay_steps": int(DECAY * steps), "decay_type": "linear", "min_lr_ratio": FLOOR},
        "optim": "adamw_torch",
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "bf16": context.environment["precision"] == "bfloat16",
        "use_cpu": not _on_gpu(),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": max(1, steps // (config.checkpoints + 1)),
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": context.seed,
    }


def tokens_after(rows: Sequence[Block], settings: dict[str, Any], *, processes: int) -> list[int]:
    """Tokens read after each of its steps."""
    step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes
    read = np.cumsum([len(row.input_ids) for row in rows])
    return [int(read[min(end, len(read)) - 1]) for end in range(step, len(read) + step, step)]


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(command: str, path: Path, *, made: Path, ends: Sequence[int], context: StageContext) -> None:
    """Start it, report what it logs, and note that it came to its end."""
    for torn in made.glob("checkpoint-*"):
        # It is written last; without it the state would be found and could not be read.
        if not (torn / "trainer_state.json").is_file():
            shutil.rmtree(torn)
    work, log, logged = path.parent, path.with_name("output.txt"), made / "trainer_log.jsonl"
    environment = own_environment(
        work, OMP_NUM_THREADS=str(context.threads), NPROC_PER_NODE=str(context.processes),
        FORCE_TORCHRUN=str(int(context.processes > 1)),
    )  # fmt: skip
    shown, began = 0, context.clock()

    def take(_: str) -> None:
        nonlocal shown
        lines = logged.read_text().splitlines() if logged.is_file() else []
        for row in map(json.loads, lines[shown:]):
            step = row.get("current_steps", 0)
            if "loss" in row and 0 < step <= len(ends):
                context.metrics(step, tokens=ends[step - 1], loss=row["loss"])
                speed = ends[step - 1] / max(1e-9, context.clock() - began)
                context.cost["tokens_per_s"] = speed
                context.progress(ends[step - 1], ends[-1], unit="tokens", tokens_per_s=speed, loss=row["loss"])
        shown = len(lines)

    code = follow([command, "train", str(path)], folder=work, environment=environment, log=log, on_line=take)
    if code:
        said = last_words(log)
        if "out of memory" in said or "can't allocate memory" in said:
            raise OutOfMemory(f"LLaMA-Factory ran out of memory: {said}. `fmops run` tries smaller micro-batches.")
        raise StageFailed(f"LLaMA-Factory ended with code {code}: {said}. All it said: {log}; its config: {path}")
    (made / "ended").touch()


def _curve(path: Path, ends: Sequence[int]) -> list[dict[str, float]]:
    """A row a step."""
    history = json.loads(path.read_text())["log_history"]
    rows = {int(row["step"]): float(row["loss"]) for row in history if "loss" in row}
    if sorted(rows) != list(range(1, len(ends) + 1)):
        raise StageFailed(f"LLaMA-Factory logged {len(rows)} of {len(ends)} steps. Remove {path.parent}, run again.")
    return [{"step": step, "tokens": ends[step - 1], "loss": loss} for step, loss in sorted(rows.items())]
