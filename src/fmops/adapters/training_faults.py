"""What can go wrong in training, told from what merely looks odd, and said so that it can be mended.

Enters: losses, gradient norms, errors of libraries, signals. Leaves: a verdict, or an error that names the remedy.
Refuses: weights that are not finite; to call any other error a want of memory or of room.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fmops.adapters import ranks
from fmops.adapters.sharding import local
from fmops.errors import OutOfMemory, StageFailed, disk_is_full, memory_ran_out

SPIKE = 10.0
"""A loss so many times the median of the last `SPIKE_WINDOW` steps, and above the first ones, went wrong."""
SPIKE_WINDOW = 16


def fault_of(loss: float, gradient_norm: float, *, applied: Sequence[float]) -> str | None:
    """What is wrong with a step, or None; `applied` are the losses of earlier steps.

    A loss counts as a spike only above every early loss, too: near zero, ten times the median is noise.
    """
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"gradient norm is {gradient_norm}"
    if len(applied) < SPIKE_WINDOW:
        return None
    median = statistics.median(applied[-SPIKE_WINDOW:])
    if loss > SPIKE * median and loss > max(applied[:SPIKE_WINDOW]):
        return f"loss jumped from {median:.4g} to {loss:.4g}"
    return None


def cut_micro_batch(trainer: Any, *, parts: int) -> None:
    """Cut each micro-batch into `parts` equal ones, or as near as its size allows, and share them out to the processes.

    The global batch stays: `deal` fills up with empty micro-batches what does not come out even.
    """
    size = trainer.args.per_device_train_batch_size
    smaller = max(part for part in range(1, size + 1) if size % part == 0 and part <= max(1, size // parts))
    batches = trainer.args.gradient_accumulation_steps * size // smaller
    trainer.args.gradient_accumulation_steps = -(-batches // ranks.world())
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = smaller


@contextmanager
def memory_explained(trainer: Any) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        size = trainer.args.per_device_train_batch_size
        if size == 1:
            raise StageFailed(
                "out of memory with one example at a time. Lower block_tokens (or max_tokens), or train with LoRA."
            ) from error
        raise OutOfMemory(
            f"out of memory with {size} examples at a time. `fmops run` tries fewer, with the same global batch."
        ) from error


@contextmanager
def on_sigterm(leave: Callable[[], None]) -> Iterator[None]:
    """SIGTERM calls `leave` while the block runs, where signals can be caught: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGTERM, lambda *_: leave())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse_not_finite(model: Any) -> None:
    """No weights that are not finite reach a resume state or an artifact, on whichever rank they lie."""
    named = list(model.named_parameters())
    wrong = ranks.summed([float(not torch.isfinite(local(value)).all()) for _, value in named])
    for (name, _), times in zip(named, wrong, strict=True):
        if times:
            raise StageFailed(f"the weights {name} are not finite; they are not saved. Lower the learning rate.")


@contextmanager
def written_or_explained(checkpoint: Path, *, failed: Callable[[str], None]) -> Iterator[None]:
    """Turn a failed write into an error that says how much room there is; the torn folder is removed, to make some.

    `failed` is told why, in one word.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        failed(_in_a_word(error))
        status = os.statvfs(checkpoint.parent)
        free_mb = status.f_bavail * status.f_frsize / 1e6
        raise StageFailed(
            f"the resume state {checkpoint.name} could not be written: {str(error).splitlines()[0]} ({free_mb:.0f} MB "
            "are free). Earlier ones are intact. Make room and run again: training goes on from the newest."
        ) from error


def _in_a_word(error: BaseException) -> str:
    """errno's name in small letters; of what has none, whether the disk is full."""
    if disk_is_full(error):
        return "enospc"
    return errno.errorcode.get(getattr(error, "errno", None) or 0, "other").lower()
