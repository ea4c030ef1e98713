"""What all our trainers share: a watch over every step, resume states that can be trusted.

Enters: a training plan and a Transformers or TRL trainer class. Leaves: a trained model, its curve, its resume states.
Refuses: to apply a step that went wrong, to save weights that are not finite, to go on without resume states.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback, set_seed

from fmops.adapters import ranks, resume
from fmops.adapters.packing import Plan
from fmops.adapters.sharding import like, settle, whole
from fmops.adapters.training_faults import (
    cut_micro_batch,
    fault_of,
    memory_explained,
    on_sigterm,
    refuse_not_finite,
    written_or_explained,
)
from fmops.curve import measured
from fmops.errors import StageFailed, Terminated
from fmops.faults import fault_site
from fmops.stage import StageContext

STATE = "fmops.json"
"""Our part of a resume state: the curve so far, and which weights were kept."""
KEPT_WEIGHTS = "kept.safetensors"
QUARANTINE = "quarantine.jsonl"
"""Steps that were not applied, in the artifact: step, why, what it read."""
Measure = Callable[[Any], dict[str, float]]
"""What is found of a model as it is, by name."""
Keep = Callable[[dict[str, float], dict[str, float]], bool]
"""Whether weights may be kept, by the curve's first row and their own."""
IN_A_ROW = 3
"""Steps that go wrong one after the other until the weights themselves are suspected."""
LEFT_OUT = "left out by a rollback"


@dataclass(frozen=True)
class Trained:
    """What a run leaves beside its files, whatever it trained."""

    parameters: int
    trained_tokens: int
    curve: list[dict[str, float]]
    stopped: bool
    kept_step: int | None


@dataclass(eq=False)
class Watch(TrainerCallback):  # type: ignore[misc]
    """Sees every step: keeps the curve, reports, measures the model, asks for resume states, may stop the run."""

    plan: Plan
    context: StageContext
    evaluate: Measure
    """Held-out losses, and scores of suites, of the model as it is."""
    evaluate_at: frozenset[int]
    save_at: frozenset[int]
    spikes: bool = True
    """Whether a loss far above the others means that a step went wrong."""
    measured: dict[str, float] = field(default_factory=dict)
    """What the trainer found out in this step, for the curve."""
    keep: Keep | None = None
    """Judges each measured step; the run stops at the first that may not be kept, unless `go_on` finds a way."""
    go_on: Callable[..., bool] = lambda *_, **__: False
    best: str | None = None
    """The measurement by which the best weights are kept; None keeps the newest."""
    better: Callable[[float, float], bool] = operator.lt
    """Whether a value of `best` is better than the kept weights': lower for losses, higher for most scores."""
    patience: int | None = None
    """Measurements in a row that are no better, after which the run stops."""
    flop_per_token: float = 0.0
    """Of useful work, for the share of this machine's rate that is shown; 0 shows none."""
    peak_flop_per_s: float = 0.0
    """Of all processes together."""
    curve: list[dict[str, float]] = field(default_factory=list)
    kept_step: int | None = None
    stopped: bool = False
    leaving: bool = False
    in_step: bool = False
    """Gradients are being computed: weights and moments are those of the step before."""
    generators: dict[str, Any] = field(default_factory=dict)
    """States of the random generators after the newest step."""
    quarantined: dict[int, str] = field(default_factory=dict)
    """Steps that were not applied, and why."""
    left_out: frozenset[int] = frozenset()
    """Steps that a rollback takes out of the rest of the run."""
    _losses: list[float] = field(default_factory=list)
    _loss: float = 0.0
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)
    _started: tuple[float, int] = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.curve.append(told({"step": 0, "tokens": 0, **self._measure(model)}, self.context))
            self._keep_weights(model, 0)
        self._started = (self.context.clock(), self._tokens(state.global_step))

    def __post_init__(self) -> None:
        self.sealer = resume.Sealer(report=self.context.note)

    def leave(self) -> None:
        """Write a resume state and end: at once while gradients are computed, which are dropped; else when the next
        micro-batch begins, or after the step where none does. A measurement is finished first.

        Several processes finish the step, since they can only leave together.

        Raises:
            Leave: at once.
        """
        self.leaving = True
        if self.in_step and ranks.world() == 1:
            self.in_step = False
            raise Leave

    def on_micro_batch(self, loss: float) -> None:
        """Called by the trainer with each micro-batch's share of the step's loss."""
        self._losses.append(loss)

    def may_apply(self, step: int, *, gradient_norm: float) -> bool:
        """Whether the optimizer may step; if not, the step is quarantined and said."""
        if step in self.left_out:
            self.quarantined[step] = LEFT_OUT
            return False
        wrong = [loss for loss in self._losses if not math.isfinite(loss)]
        loss = self._loss = ranks.summed([wrong[0] if wrong else math.fsum(self._losses)])[0]
        applied = [row["loss"] for row in self.curve if "loss" in row and self.spikes]
        why = fault_of(loss, gradient_norm, applied=applied)
        if why is None:
            return True
        self.quarantined[step] = why
        blocks = ", ".join(map(str, self.plan.blocks_of(step)))
        self.context.note(f"the {why} at step {step}: not applied, {self.plan.item} {blocks} quarantined")
        return False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        step, tokens = state.global_step, self._tokens(state.global_step)
        row: dict[str, float] = {"step": step, "tokens": tokens, **self.measured}
        row |= {"quarantined": 1.0} if step in self.quarantined else {"loss": self._loss}
        self._losses.clear()
        self.measured.clear()
        if step in self.evaluate_at:
            row |= self._measure(model)
            if self.keep is not None and not self.keep(self.curve[0], row):
                self.stopped = control.should_training_stop = not self.go_on(self, model, row, **given)
            elif self._since_best(row) == 0:
                self._keep_weights(model, step)
            elif self.patience is not None and self._since_best(row) >= self.patience:
                self.stopped = control.should_training_stop = True
        self.curve.append(told(row, self.context))
        speed = (tokens - self._started[1]) / max(1e-9, self.context.clock() - self._started[0])
        self.context.progress(tokens, self.plan.tokens, unit="tokens", tokens_per_s=speed, **self._shown(row, speed))
        fault_site("step")
        if self._went_wrong() >= IN_A_ROW:
            raise GoBack(step)
        told_to_leave = ranks.any_of(flag=self.leaving or self.context.told_to_leave())
        if told_to_leave:
            # Never set to False: a signal that comes in between would be lost.
            self.leaving = True
        leave = told_to_leave and step < self.plan.steps
        # What follows a step that went wrong may be wrong itself: such weights are nothing to go back to.
        control.should_save = (step in self.save_at or leave) and not self.stopped and not self._went_wrong()
        control.should_training_stop = control.should_training_stop or leave

    def _shown(self, row: dict[str, float], speed: float) -> dict[str, float]:
        """Figures beside the bar: use of the machine, this step's loss, the newest measurements."""
        shown = {"mfu": speed * self.flop_per_token / self.peak_flop_per_s} if self.flop_per_token else {}
        shown |= {"loss": row["loss"]} if "loss" in row else {}
        names = measured(self.curve)
        newest = next((r for r in reversed(self.curve) if names and names[0] in r), {})
        return shown | {name: newest[name] for name in names if name in newest}

    def _since_best(self, row: dict[str, float]) -> int:
        """How many measurements, `row` the last, were no better than the kept weights'; 0: `row` is to be kept."""
        name = self.best
        if name is None:
            return 0
        kept = next(earlier[name] for earlier in self.curve if earlier["step"] == self.kept_step)
        since = [earlier for earlier in self.curve if name in earlier and earlier["step"] > (self.kept_step or 0)]
        return 0 if self.better(row[name], kept) else len(since) + 1

    def trusted(self, step: int) -> bool:
        """Whether weights after `step` are something to go back to, and not saved yet."""
        return bool(self.generators) and step not in self.save_at and not self._went_wrong()

    def _went_wrong(self) -> int:
        """Newest steps that went wrong one after the other."""
        count = 0
        for row in reversed(self.curve):
            if self.quarantined.get(int(row["step"]), LEFT_OUT) == LEFT_OUT:
                break
            count += 1
        return count

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if ranks.rank():
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        with written_or_explained(folder, failed=self.context.checkpoint_failed):
            # Those of step 0, too: after a rollback nothing in memory has them any more.
            if self._kept and self.kept_step != state.global_step:
                save_file(self._kept, folder / KEPT_WEIGHTS)
            mine: dict[str, Any] = {"curve": self.curve, "kept_step": self.kept_step, "quarantined": self.quarantined}
            mine |= {"left_out": sorted(self.left_out)}
            (folder / STATE).write_text(json.dumps(mine))
        self.sealer.seal(folder, planned=self.save_at)

    def wait_for_disk(self) -> None:
        """Return once the last resume state is on disk, or say why it cannot be."""
        folder = self.sealer.pending
        if folder is not None:
            with written_or_explained(folder, failed=self.context.checkpoint_failed):
                self.sealer.wait()

    def restore(self, checkpoint: Path) -> None:
        """Take over the curve and the kept weights of a resume state, unless those are its own: `after_resume`."""
        state = json.loads((checkpoint / STATE).read_text())
        self.curve, self.kept_step = state["curve"], state["kept_step"]
        self.quarantined = {int(step): why for step, why in state["quarantined"].items()}
        self.left_out |= frozenset(state["left_out"])
        self._losses.clear()
        self._kept.clear()
        if self._keeps and (checkpoint / KEPT_WEIGHTS).is_file():
            self._kept = load_file(checkpoint / KEPT_WEIGHTS)

    def after_resume(self, model: Any, step: int) -> None:
        """Called with the resumed weights, which may be the kept ones."""
        if self._keeps and self.kept_step == step:
            self._kept = _trainable(model)

    def put_back(self, model: Any) -> None:
        """Give `model` the last weights that `keep` allowed."""
        settle(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(like(self._kept[name], parameter))

    def tokens_per_s(self, step: int) -> float:
        """Of this attempt, held-out measurements and resume states included."""
        return (self._tokens(step) - self._started[1]) / max(1e-9, self.context.clock() - self._started[0])

    @property
    def _keeps(self) -> bool:
        return self.keep is not None or self.best is not None

    def _measure(self, model: Any) -> dict[str, float]:
        found = self.evaluate(model)
        settle(model)
        return found

    def _keep_weights(self, model: Any, step: int) -> None:
        if self._keeps:
            # The weights before go first: memory holds one copy, not two.
            self._kept.clear()
            self._kept, self.kept_step = _trainable(model), step

    def _tokens(self, step: int) -> int:
        return self.plan.tokens_after[step - 1] if step else 0


class Leave(Exception):
    """Told to leave in the middle of a step."""


class GoBack(Exception):
    """Several steps went wrong one after the other; not an error yet."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def told(row: dict[str, float], context: StageContext) -> dict[str, float]:
    """A row of the curve, reported."""
    context.metrics(int(row["step"]), **{key: value for key, value in row.items() if key != "step"})
    return row


def run(trainer: Any, watch: Watch, *, work: Path) -> None:
    """Train to the end of the plan, from the newest good resume state under `work`.

    Steps that were not applied are listed in `quarantine.jsonl` beside `work`.

    Raises:
        OutOfMemory: a smaller micro-batch may fit. Terminated: by SIGTERM, with a resume state.
        StageFailed: training diverges, or a resume state cannot be written.
    """
    trainer.watch = watch
    # It prints every log line to standard output, which belongs to the stage's reports.
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    cut_micro_batch(trainer, parts=watch.context.micro_batch_parts)
    checkpoint = ranks.agreed(lambda: resume.newest_good(work, report=watch.context.note))
    if checkpoint is not None:
        watch.context.note(f"going on from {checkpoint.name.replace('-', ' ')}")
    with on_sigterm(watch.leave), memory_explained(trainer):
        _train(trainer, watch, checkpoint, work=work)
    watch.wait_for_disk()
    if ranks.any_of(flag=watch.leaving) and trainer.state.global_step < watch.plan.steps and not watch.stopped:
        step = trainer.state.global_step
        raise Terminated(
            f"told to leave (SIGTERM) after step {step} of {watch.plan.steps}. Run again to go on from there."
        )
    speed = watch.context.cost["tokens_per_s"] = watch.tokens_per_s(trainer.state.global_step)
    if watch.flop_per_token:
        watch.context.cost["mfu"] = speed * watch.flop_per_token / watch.peak_flop_per_s
    if watch.kept_step not in (None, trainer.state.global_step):
        watch.put_back(trainer.model)
    refuse_not_finite(trainer.model)
    watch.context.still_mine()
    _write_quarantine(work.parent / QUARANTINE, watch)


def _train(trainer: Any, watch: Watch, checkpoint: Path | None, *, work: Path) -> None:
    """Train; when the weights are suspected, go back to the last planned resume state and leave out what followed."""
    went_back_to = None
    while True:
        set_seed(watch.context.seed)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return
        except Leave:
            watch.wait_for_disk()
            trainer.save_where_it_is()
            return
        except GoBack as wrong:
            watch.wait_for_disk()
            checkpoint = ranks.agreed(
                lambda: resume.newest_good(work, report=watch.context.note, planned=watch.save_at)
            )
            reasons = "; ".join(
                sorted({watch.quarantined[step] for step in range(wrong.step - IN_A_ROW + 1, wrong.step + 1)})
            )
            if checkpoint is None or checkpoint == went_back_to:
                again = "again after going back" if checkpoint else "and there is no resume state to go back to"
                raise StageFailed(
                    f"{IN_A_ROW} steps in a row went wrong up to step {wrong.step} ({reasons}), {again}. "
                    "Lower the learning rate, or look into the quarantined examples in the notes above."
                ) from None
            went_back_to, start = checkpoint, resume.step_of(checkpoint)
            watch.left_out |= frozenset(range(start + 1, wrong.step + 1))
            watch.context.note(
                f"{IN_A_ROW} steps in a row went wrong ({reasons}): back to step {start}; "
                f"steps {start + 1} to {wrong.step} are left out"
            )


def _write_quarantine(path: Path, watch: Watch) -> None:
    path.unlink(missing_ok=True)
    if watch.quarantined:
        rows = [
            {"step": step, "why": why, "item": watch.plan.item, "blocks": watch.plan.blocks_of(step)}
            for step, why in sorted(watch.quarantined.items())
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
