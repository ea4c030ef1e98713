"""Processes that train one model together: who this one is, and what all must agree on.

Enters: the environment that torchrun or Ray Train sets. Leaves: a rank, and values that are equal on every rank.
Refuses: nothing; where one process trains, all of this is the identity.

What training decides (is the step applied, does the run end, which resume state is newest) it decides on values from
here: ranks that decided apart would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)
"""The first rank may seal a resume state of many gigabytes, or measure, while the others wait for it."""
T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """The process group of this job while the block runs, unless a launcher (Ray Train) has made it already."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def lost_another(error: BaseException) -> bool:
    """Whether it says no more than that another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def world() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first, 0, reports and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(value: Callable[[], T]) -> T:
    """What the first rank finds; the others do not look."""
    if world() == 1:
        return value()
    found: list[Any] = [value() if rank() == 0 else None]
    dist.broadcast_object_list(found)
    answer: T = found[0]
    return answer


def summed(values: Sequence[float]) -> list[float]:
    """Element by element over the ranks. Not finite anywhere is not finite everywhere."""
    if world() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(value) for value in total]


def any_of(*, flag: bool) -> bool:
    """Whether it is set on any rank."""
    return summed([float(flag)])[0] > 0


def collected(value: T) -> list[T]:
    """Of each rank, in order, on the first one; nothing on the others."""
    if world() == 1:
        return [value]
    found: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(value, found)
    return found or []


def wait_for_all() -> None:
    """Return when every rank is here."""
    if world() > 1:
        dist.barrier()
