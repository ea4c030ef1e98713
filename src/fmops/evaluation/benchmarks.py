"""The benchmarks stage: pins the items that this lifecycle is measured on.

Enters: suites and the sources of their items. Leaves: `items/<task>.jsonl` and `tasks.json`.
Refuses: tasks without labels, unknown metrics, empty sources, templates that do not render; before hours are spent.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fmops.artifacts import Benchmarks, Source
from fmops.errors import FmopsError
from fmops.evaluation.checks import require_checks
from fmops.evaluation.items import choose, most, read_items
from fmops.evaluation.protocol import pin, write_json, write_lines
from fmops.evaluation.suites import Suite, check_together, is_path, items_input, load_suite, read_suite
from fmops.jobs import BenchmarksJob
from fmops.stage import StageContext

Documents = list[dict[str, Any]]


def prepare_benchmarks(config: BenchmarksJob, *, out: Path, context: StageContext, **sources: Source) -> Benchmarks:
    """Choose every task's items by seed, check that they can be asked and scored, and write them down.

    Args:
        config: suite names in order, and the most items a task may have.
        sources: `items_<task>` and, for a suite file of the user's own, `suite_<n>`; see `suite_sources`.

    Raises:
        FmopsError: what is wrong with which task, and the remedy.
    """
    from fmops.adapters.lm_eval import check_task, write_examples

    _clear(out)
    suites = tuple(_suite(name, index, sources) for index, name in enumerate(config.suites))
    check_together(suites)
    pinned = []
    items: dict[str, int] = {}
    for suite in suites:
        for name, task in suite.tasks.items():
            documents: Documents = []
            examples: Documents = []
            source = sources.get(items_input(name))
            if source is None and task.source is not None:
                raise FmopsError(f"task {name}: its items did not arrive as the input {items_input(name)}.")
            if task.framework is not None:
                _keep_file(name, source, out)
            elif task.corpus is None:
                documents = read_items(name, task, source)
                if task.shots:
                    documents, examples = _set_apart(documents, task.shots, seed=context.seed, name=name)
                documents = choose(documents, most(task.share, config.limit), seed=context.seed, name=name)
                if "followed" in task.metrics:
                    for document in documents:
                        require_checks(document.get("checks"), f"task {name}, item {document['id']}")
                write_lines(out / "items" / f"{name}.jsonl", documents)
                items[name] = len(documents)
            entry = pin(suite, name, items=len(documents))
            if task.framework is None:
                check_task(entry, [*documents, *examples])
            if examples:
                entry = entry.model_copy(update={"examples": write_examples(entry, examples)})
            pinned.append(entry)
            context.progress(len(pinned), sum(len(each.tasks) for each in suites), unit="tasks")
    write_json(out / "tasks.json", [entry.model_dump(mode="json") for entry in pinned])
    return Benchmarks(path=out, items=items)


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
    for name in ("items", "frameworks"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "tasks.json").unlink(missing_ok=True)
    (out / "items").mkdir(parents=True)
