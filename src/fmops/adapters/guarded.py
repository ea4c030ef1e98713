"""What our trainers do otherwise than those of Transformers and TRL.

Enters: a trainer class to be mixed into, the watch over its run. Leaves: the same training, step by step under it.
Refuses: a step that went wrong; half-written resume states; states that only so many processes could read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fmops.adapters import ranks, resume
from fmops.adapters.packing import deal
from fmops.adapters.sharding import (
    is_sharded,
    load_optimizer,
    load_weights,
    whole,
    whole_optimizer,
    whole_state,
)
from fmops.adapters.trainer import Watch
from fmops.adapters.training_faults import refuse_not_finite, written_or_explained
from fmops.faults import fault_site

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


@contextmanager
def _reduced_later(model: Any) -> Iterator[None]:
    """Gradients of a model in shards add up on each rank while the block runs."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def generators() -> dict[str, Any]:
    """States of this process's random generators, under Transformers' names."""
    found = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    return found | ({"cuda": torch.cuda.random.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.random.set_rng_state_all(states["cuda"])


class Guarded:
    """Mixed into a trainer class: no step that went wrong is applied, no half-written resume state is trusted.

    With several processes each reads its share of every step's micro-batches; the first one writes resume states, in
    the form of one process, so that any number of them may go on.
    """

    watch: Watch
    args: Any
    model: Any
    state: Any

    def get_train_dataloader(self) -> Any:
        if ranks.world() == 1:
            return super().get_train_dataloader()  # type: ignore[misc]
        return torch.utils.data.DataLoader(
            self.train_dataset,  # type: ignore[attr-defined]
            batch_sampler=deal(
                self.watch.plan,
                micro=self.args.per_device_train_batch_size,
                rank=ranks.rank(),
                world=ranks.world(),
            ),
            collate_fn=self.data_collator,  # type: ignore[attr-defined]
        )

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 in self.watch.left_out:
            return torch.zeros((), device=self.args.device)
        self.watch.in_step = True
        if self.watch.leaving:
            # Told so since the last micro-batch.
            self.watch.leave()
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.watch.in_step = False
        # Trainers multiply it by the number of processes, over which gradients are then averaged.
        self.watch.on_micro_batch(float(loss) / ranks.world())
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = whole(super()._clip_grad_norm(model))  # type: ignore[misc]
        if not self.watch.may_apply(self.state.global_step + 1, gradient_norm=float(norm)):
            # Without gradients the optimizer leaves weights, moments and its own step count alone.
            model.zero_grad(set_to_none=True)
            return torch.zeros_like(torch.as_tensor(norm))
        return norm

    def _defer_fsdp_gradient_reduction(self) -> Any:
        return _reduced_later(self.model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        fault_site("checkpoint-begin")
        self.watch.context.still_mine()
        self.watch.wait_for_disk()
        refuse_not_finite(self.model)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # All that needs every rank comes first: what fails after it is the disk.
        self._weights = whole_state(self.model)
        self._moments = whole_optimizer(self.optimizer) if is_sharded(self.model) else None  # type: ignore[attr-defined]
        drawn = ranks.collected(generators()) if ranks.world() > 1 else []
        if ranks.rank() == 0:
            with written_or_explained(folder, failed=self.watch.context.checkpoint_failed):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                for rank, state in enumerate(drawn):
                    torch.save(state, folder / f"rng_state_{rank}.pth")
        del self._weights, self._moments
        fault_site("checkpoint-written")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict or self._weights)  # type: ignore[misc]
        # Its pickle of the arguments is read by nobody: a resume state holds what loads with weights_only=True.
        (Path(output_dir or ".") / "training_args.bin").unlink(missing_ok=True)
        fault_site("checkpoint-half-written")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._moments is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        torch.save(self._moments, Path(output_dir) / "optimizer.pt")
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")  # type: ignore[attr-defined]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Transformers calls it after each step.
        self.watch.generators = generators()
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def save_where_it_is(self) -> None:
        """A resume state of the last whole step, from the middle of the next; none where that step went wrong."""
        if self.state.global_step and self.watch.trusted(self.state.global_step):
            # In the middle of the next step they have moved on.
            set_generators(self.watch.generators)
            self._save_checkpoint(self.model, None)
            self.watch.on_save(self.args, self.state, None)

    def _save_rng_state(self, output_dir: str) -> None:
        if ranks.world() == 1:
            super()._save_rng_state(output_dir)  # type: ignore[misc]

    def store_flos(self) -> None:
        """Nobody reads them, and the first rank would wait for the others."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Model cards are the release's business; TRL writes one with every checkpoint."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.watch.restore(folder)
        if is_sharded(self.model):
            load_weights(self.model, load_file(next(folder / name for name in WEIGHTS if (folder / name).is_file())))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self.watch.after_resume(self.model, resume.step_of(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in ("optimizer.pt", "scheduler.pt")
        )
        load_optimizer(self.optimizer, state)  # type: ignore[attr-defined]
        self.lr_scheduler.load_state_dict(schedule)  # type: ignore[attr-defined]
