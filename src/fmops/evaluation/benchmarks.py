"""The benchmarks stage: pins the items that this lifecycle is measured on.

Enters: suites and the sources of their items. Leaves: `items/<task>.jsonl` and `tasks.json`;
`watched/<task>.jsonl` and `watched.json` for training, of which the gate asks nothing.
Refuses: tasks without labels, unknown metrics, empty sources, templates that do not render; before hours are spent.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from fmops.artifacts import Benchmarks, Source
from fmops.errors import FmopsError
from fmops.evaluation.checks import require_checks
from fmops.evaluation.items import choose, most, read_items
from fmops.evaluation.protocol import PinnedTask, pin, write_json, write_lines
from fmops.evaluation.suites import Suite, SuiteTask, check_together, is_path, items_input, load_suite, read_suite
from fmops.jobs import BenchmarksJob
from fmops.stage import StageContext

Documents = list[dict[str, Any]]


def prepare_benchmarks(config: BenchmarksJob, *, out: Path, context: StageContext, **sources: Source) -> Benchmarks:
    """Choose every task's items by seed, check that they can be asked and scored, and write them down.

    Args:
        config: suite names in order, the most items a task may have, and which suites training may watch.
        sources: `items_<task>` and, for a suite file of the user's own, `suite_<n>`; see `suite_sources`.

    Raises:
        FmopsError: what is wrong with which task, and the remedy.
    """
    _clear(out)
    names = config.named
    suites = {name: _suite(name, index, sources) for index, name in enumerate(names)}
    check_together(tuple(suites.values()))
    tasks = [(name, task) for name in names for task in suites[name].tasks]
    read = {task: _read(suites[name].tasks[task], task, sources, out, seed=context.seed) for name, task in tasks}
    watched: dict[str, Documents] = {}
    for name, task in tasks:
        if name in config.watched:
            count = most(suites[name].tasks[task].share, config.watched[name])
            watched[task] = _watched(read[task][0], count, seed=context.seed, name=task)
    # Whoever chose weights by an item may not be judged by it, nor by one that shares its passage or asks the same.
    known = {mark for documents in watched.values() for each in documents for mark in _marks(each)}
    asked: dict[str, Documents] = {}
    for name, task in tasks:
        if name in config.suites:
            left = [each for each in read[task][0] if not known.intersection(_marks(each))]
            asked[task] = choose(left, most(suites[name].tasks[task].share, config.limit), seed=context.seed, name=task)
    pinned = []
    by_suite: dict[str, list[dict[str, Any]]] = {name: [] for name in config.watched}
    for name, task in tasks:
        examples = read[task][1]
        if name in config.watched:
            entry = _pin(suites[name], task, watched[task], examples, out / "watched")
            by_suite[name].append(entry.model_dump(mode="json"))
        if name in config.suites:
            pinned.append(_pin(suites[name], task, asked[task], examples, out / "items").model_dump(mode="json"))
        context.progress(len(pinned), len(tasks), unit="tasks")
    write_json(out / "tasks.json", pinned)
    if by_suite:
        write_json(out / "watched.json", by_suite)
    items = {entry["task"]: entry["items"] for entry in pinned if (out / "items" / f"{entry['task']}.jsonl").is_file()}
    return Benchmarks(path=out, items=items, watched={task: len(documents) for task, documents in watched.items()})


def _read(
    task: SuiteTask, name: str, sources: dict[str, Source], out: Path, *, seed: int
) -> tuple[Documents, Documents]:
    """A task's items, and those that stand before each as examples."""
    source = sources.get(items_input(name))
    if source is None and task.source is not None:
        raise FmopsError(f"task {name}: its items did not arrive as the input {items_input(name)}.")
    if task.framework is not None:
        _keep_file(name, source, out)
    if task.framework is not None or task.corpus is not None:
        return [], []
    documents = read_items(name, task, source)
    return _set_apart(documents, task.shots, seed=seed, name=name) if task.shots else (documents, [])


def _watched(documents: Documents, count: int | None, *, seed: int, name: str) -> Documents:
    """Items that training may look at, from whole clusters by seed; at least half of the clusters stay the gate's."""
    sizes = Counter(each["cluster"] for each in documents)
    order = sorted(sizes)
    random.Random(f"{seed}/{name}/watched").shuffle(order)
    half, chosen, found = order[: len(order) // 2], set(), 0
    if len(half) < 2:
        raise FmopsError(
            f"task {name} has {len(documents)} items in {len(order)} clusters: too few to set some apart for training. "
            "Leave its suite out of the training's `suites`."
        )
    for cluster in half:
        if count is None or found < count:
            chosen.add(cluster)
            found += sizes[cluster]
    return choose([each for each in documents if each["cluster"] in chosen], count, seed=seed, name=name)


def _marks(document: dict[str, Any]) -> tuple[str, str]:
    """What makes two items one: their cluster, and a digest of what they ask, whatever the task is called."""
    return document["cluster"], document["id"].rpartition("-")[2]


def _pin(suite: Suite, name: str, documents: Documents, examples: Documents, folder: Path) -> PinnedTask:
    """Write a task's items down, checked; returns how it is asked."""
    from fmops.adapters.lm_eval import check_task, write_examples

    task = suite.tasks[name]
    entry = pin(suite, name, items=len(documents))
    if task.framework is None and task.corpus is None:
        if "followed" in task.metrics:
            for document in documents:
                require_checks(document.get("checks"), f"task {name}, item {document['id']}")
        folder.mkdir(exist_ok=True)
        write_lines(folder / f"{name}.jsonl", documents)
    if task.framework is None:
        check_task(entry, [*documents, *examples])
    return entry.model_copy(update={"examples": write_examples(entry, examples)}) if examples else entry


def _set_apart(documents: Documents, count: int, *, seed: int, name: str) -> tuple[Documents, Documents]:
    """Items to ask, and items to show as examples; equal ones at any limit."""
    if len(documents) <= count:
        raise FmopsError(f"task {name}: {len(documents)} items, and {count} of them are to be examples. Lower `shots`.")
    shown = choose(documents, count, seed=seed, name=f"{name}/shots")
    known = {each["id"] for each in shown}
    return [each for each in documents if each["id"] not in known], shown


def _suite(name: str, index: int, sources: dict[str, Source]) -> Suite:
    if not is_path(name):
        return load_suite(name, root=Path())
    source = sources.get(f"suite_{index}")
    if source is None:
        raise FmopsError(f"suite file {name} did not arrive as the input suite_{index}.")
    return read_suite(source.files[0].path)


def _keep_file(name: str, source: Source | None, out: Path) -> None:
    """The framework's own description of the task; what it asks is known when it runs."""
    if source is None:
        return
    if len(source.files) != 1:
        raise FmopsError(f"task {name}: {source.uri} gives {len(source.files)} files. Name the task's one Python file.")
    (out / "frameworks").mkdir(exist_ok=True)
    shutil.copyfile(source.files[0].path, out / "frameworks" / f"{name}.py")


def _clear(out: Path) -> None:
    # A killed attempt may have left half of the items; they are made again in seconds.
    for name in ("items", "frameworks", "watched"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("tasks.json", "watched.json"):
        (out / name).unlink(missing_ok=True)
    (out / "items").mkdir(parents=True)
