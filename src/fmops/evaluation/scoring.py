"""Every task of an evaluation, scored by one process or by several that share the work.

Enters: tasks with their documents, a folder for the journals. Leaves: one row a sample and metric, in task order.
Refuses: nothing of its own. Whoever scores what, the rows are the same: chunks are cut and added up by plan.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmops.evaluation.journal import Journal
from fmops.evaluation.protocol import PinnedTask
from fmops.faults import fault_site

if TYPE_CHECKING:
    from fmops.adapters.lm_eval_endpoint import EndpointLM
    from fmops.adapters.lm_eval_scorer import SharedPrefixLM

Entries = list[tuple[PinnedTask, list[dict[str, Any]]]]
Opened = Callable[[], "SharedPrefixLM | EndpointLM"]


def score(
    lm: SharedPrefixLM | EndpointLM,
    entries: Entries,
    work: Path,
    *,
    on_progress: Callable[[float], None],
    worker: int = 0,
) -> list[dict[str, Any]]:
    """Rows of all tasks; finished chunks come from the journals in `work`, and new ones go there.

    `on_progress` is told how many items are done, in parts of items.

    Raises:
        FmopsError: an answer without room in the model, known before anything is scored.
    """
    from fmops.adapters.lm_eval import check_fit, run_task

    for task, documents in entries:
        check_fit(lm, task, documents)
    rows: list[dict[str, Any]] = []
    done = 0
    for task, documents in entries:
        lm.journal = Journal(work / f"{task.task}.jsonl", worker=worker)
        lm.on_progress = lambda share, task=task, done=done: on_progress(done + share * task.items)  # type: ignore[misc]
        rows += run_task(lm, task, documents, chat=task.chat and lm.templated)
        lm.journal.close()
        done += task.items
        fault_site("evaluate.task")
    return rows


@contextmanager
def helpers(count: int, opened: Opened, entries: Entries, work: Path) -> Iterator[None]:
    """So many more processes that score the same tasks while the block runs; a dead one's chunks go to the others.

    `opened` gives each of them the model; it is sent to them by pickle.
    """
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_help, args=(opened, entries, work, worker, os.getpid()), daemon=True)
        for worker in range(1, count + 1)
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _help(opened: Opened, entries: Entries, work: Path, worker: int, parent: int) -> None:
    def stay(_: float) -> None:
        if os.getppid() != parent:
            raise SystemExit(f"process {parent}, which this one helped, is gone")

    score(opened(), entries, work, on_progress=stay, worker=worker)
