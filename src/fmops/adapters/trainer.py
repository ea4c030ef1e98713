"""What all our trainers share: arguments, a watch over every step, resume states that can be trusted.

Enters: a training plan and a Transformers or TRL trainer class. Leaves: a trained model, its curve, its resume states.
Refuses: to apply a step whose loss or gradient is not finite, and to go on when a resume state cannot be written.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback, set_seed

from fmops.adapters import resume
from fmops.adapters.model_files import quiet
from fmops.adapters.packing import Plan
from fmops.errors import StageFailed
from fmops.faults import fault_site
from fmops.stage import StageContext

STATE = "fmops.json"
"""Our part of a resume state: the curve so far, and which weights were kept."""
KEPT_WEIGHTS = "kept.safetensors"
Keep = Callable[[dict[str, float], dict[str, float]], bool]
"""Whether weights may be kept, by the curve's first row and their own."""
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


@dataclass(frozen=True)
class Trained:
    """What a run leaves beside its files, whatever it trained."""

    parameters: int
    trained_tokens: int
    curve: list[dict[str, float]]
    stopped: bool
    kept_step: int | None


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
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }


@dataclass(eq=False)
class Watch(TrainerCallback):  # type: ignore[misc]
    """Sees every step: keeps the curve, reports, measures held-out losses, asks for resume states, may stop the run."""

    plan: Plan
    context: StageContext
    evaluate: Callable[[Any], dict[str, float]]
    """Held-out losses of the model as it is."""
    evaluate_at: frozenset[int]
    save_at: frozenset[int]
    keep: Keep | None = None
    """Judges each measured step; the run stops at the first that may not be kept."""
    curve: list[dict[str, float]] = field(default_factory=list)
    kept_step: int | None = None
    stopped: bool = False
    _losses: list[float] = field(default_factory=list)
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)
    _started: tuple[float, int] = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            row = {"step": 0, "tokens": 0, **self.evaluate(model)}
            self.curve.append(row)
            self.context.metrics(0, **{key: value for key, value in row.items() if key != "step"})
            self._keep_weights(model, 0)
        self._started = (self.context.clock(), self._tokens(state.global_step))

    def on_micro_batch(self, loss: float, *, step: int) -> None:
        """Called by the trainer with each micro-batch's share of the step's loss."""
        if not math.isfinite(loss):
            raise _not_finite("loss", loss, step=step, plan=self.plan)
        self._losses.append(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step, tokens = state.global_step, self._tokens(state.global_step)
        row: dict[str, float] = {"step": step, "tokens": tokens, "loss": math.fsum(self._losses)}
        self._losses.clear()
        if step in self.evaluate_at:
            row |= self.evaluate(model)
            if self.keep is not None and not self.keep(self.curve[0], row):
                self.stopped = control.should_training_stop = True
            else:
                self._keep_weights(model, step)
        self.curve.append(row)
        speed = (tokens - self._started[1]) / max(1e-9, self.context.clock() - self._started[0])
        self.context.metrics(step, **{key: value for key, value in row.items() if key != "step"})
        self.context.progress(tokens, self.plan.tokens, unit="tokens", loss=row["loss"], tokens_per_s=speed)
        control.should_save = step in self.save_at and not self.stopped
        fault_site("step")

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        with _written_or_explained(folder):
            if self._kept and self.kept_step not in (0, state.global_step):
                save_file(self._kept, folder / KEPT_WEIGHTS)
            (folder / STATE).write_text(json.dumps({"curve": self.curve, "kept_step": self.kept_step}))
            resume.seal(folder)
        resume.prune(folder.parent)

    def restore(self, checkpoint: Path, model: Any) -> None:
        """Take over the curve and the kept weights of a resume state. `model` still has the weights it began with."""
        state = json.loads((checkpoint / STATE).read_text())
        self.curve = state["curve"]
        self.kept_step = state["kept_step"]
        if self.keep is None:
            return
        if (checkpoint / KEPT_WEIGHTS).is_file():
            self._kept = load_file(checkpoint / KEPT_WEIGHTS)
        elif self.kept_step == 0:
            self._kept = _trainable(model)

    def after_resume(self, model: Any, step: int) -> None:
        """Called with the resumed weights, which may be the kept ones."""
        if self.keep is not None and self.kept_step == step:
            self._kept = _trainable(model)

    def put_back(self, model: Any) -> None:
        """Give `model` the last weights that `keep` allowed."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self._kept.items():
                parameters[name].copy_(value)

    def tokens_per_s(self, step: int) -> float:
        """Of this attempt, held-out measurements and resume states included."""
        return (self._tokens(step) - self._started[1]) / max(1e-9, self.context.clock() - self._started[0])

    def _keep_weights(self, model: Any, step: int) -> None:
        if self.keep is not None:
            self._kept, self.kept_step = _trainable(model), step

    def _tokens(self, step: int) -> int:
        return self.plan.tokens_after[step - 1] if step else 0


class Guarded:
    """Mixed into a trainer class: no step that is not finite is applied, no half-written resume state is trusted."""

    watch: Watch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        # The optimizer has not stepped yet: an error here leaves the weights as they were.
        self.watch.on_micro_batch(float(loss), step=self.state.global_step + 1)  # type: ignore[attr-defined]
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        if norm is not None and not math.isfinite(float(norm)):
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise _not_finite("gradient norm", float(norm), step=step, plan=self.watch.plan)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        fault_site("checkpoint-begin")
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        with _written_or_explained(folder):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        fault_site("checkpoint-written")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        # Its pickle of the arguments is read by nobody: a resume state holds what loads with weights_only=True.
        (Path(output_dir or ".") / "training_args.bin").unlink(missing_ok=True)
        fault_site("checkpoint-half-written")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Model cards are the release's business; TRL writes one with every checkpoint."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.watch.restore(Path(resume_from_checkpoint), self.model)  # type: ignore[attr-defined]
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        step = int(Path(resume_from_checkpoint).name.removeprefix("checkpoint-"))
        self.watch.after_resume(self.model, step)  # type: ignore[attr-defined]


def prepare(context: StageContext) -> None:
    """Quiet libraries, as many threads as the context allows, every generator seeded."""
    quiet()
    # TRL draws bars of its own; it looks at the environment alone.
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(context.threads)
    set_seed(context.seed)


def run(trainer: Any, watch: Watch, *, work: Path) -> None:
    """Train to the end of the plan, from the newest good resume state under `work`."""
    trainer.watch = watch
    # It prints every log line to standard output, which belongs to the stage's reports.
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    checkpoint = resume.newest_good(work, report=watch.context.note)
    if checkpoint is not None:
        watch.context.note(f"going on from {checkpoint.name.replace('-', ' ')}")
    set_seed(watch.context.seed)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    watch.context.cost["tokens_per_s"] = watch.tokens_per_s(trainer.state.global_step)
    if watch.stopped:
        watch.put_back(trainer.model)


def _trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def _not_finite(what: str, value: float, *, step: int, plan: Plan) -> StageFailed:
    blocks = ", ".join(map(str, plan.blocks_of(step)))
    return StageFailed(
        f"the {what} of step {step} is {value} ({plan.item} {blocks}). The step is not applied and training "
        "stops. Look into those, or lower the learning rate; resume states from before are intact."
    )


@contextmanager
def _written_or_explained(checkpoint: Path) -> Iterator[None]:
    """Turn a failed write into an error that says how much room there is; the torn folder is removed, to make some."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        status = os.statvfs(checkpoint.parent)
        free_mb = status.f_bavail * status.f_frsize / 1e6
        raise StageFailed(
            f"the resume state {checkpoint.name} could not be written: {str(error).splitlines()[0]} ({free_mb:.0f} MB "
            "are free). Earlier ones are intact. Make room and run again: training goes on from the newest."
        ) from error
