"""How long a run is, how its rate goes, and when it measures and saves.

Enters: steps, shares of them, a seed. Leaves: keyword arguments for `TrainingArguments` and TRL's configs, steps.
Refuses: nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RATES = {"lora": 2e-4, "full": 2e-5}
"""Peak rates of instruction tuning, where the spec names none."""
FLOOR = 0.1
"""Share of the peak rate at which a run ends, so that the next round can warm up from a model that still moves."""


@dataclass(frozen=True)
class Schedule:
    """Warm up, stay, decay (WSD; Hu et al. 2024)."""

    learning_rate: float
    warmup: float
    """Share of the steps that warm up."""
    decay: float
    """Share of the steps that decay to a tenth of the peak."""


def evenly(count: int, steps: int, *, end: bool) -> frozenset[int]:
    """`count` steps spread evenly over 1…`steps`; the last one is `steps` itself when `end`."""
    parts = count if end else count + 1
    chosen = {round(steps * part / parts) for part in range(1, count + 1)}
    return frozenset(step for step in chosen if step >= 1 and (end or step < steps))


def arguments(
    *, work: Path, steps: int, accumulate: int, schedule: Schedule, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Keyword arguments for `TrainingArguments` and TRL's configs. All defaults that differ between them are set."""
    warmup, decay = math.ceil(schedule.warmup * steps), math.floor(schedule.decay * steps)
    return {
        "output_dir": str(work),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": schedule.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": warmup,
        "lr_scheduler_kwargs": {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": FLOOR},
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        # Every process runs the same layers, and buffers are constants.
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }
