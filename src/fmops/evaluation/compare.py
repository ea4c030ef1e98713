"""Two reports laid side by side: by task, by item, and where the second one is weakest.

Enters: two reports of one protocol, their items. Leaves: differences with intervals, moved items, slices with counts.
Refuses: nothing; what cannot be paired is left to the gate's verdict, which rejects it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmops.artifacts import EvalReport
from fmops.evaluation import gate
from fmops.evaluation.evidence import Pairs
from fmops.evaluation.protocol import PinnedTask, Protocol
from fmops.evaluation.statistics import clustered_mean, counted_mean, nearer_to_zero, one_sided_bounds
from fmops.evaluation.suites import BIAS_METRICS
from fmops.integrity import read_lines

SMALLEST_SLICE = 10
MOST_VALUES = 80
"""A field with more values than that names items, no kinds of them."""
SLICES_SHOWN = 12
ONE_SIDED = 0.025
"""At either end of the 95 % intervals, which are those of the gate's families."""
_NAMES = ("id", "cluster", "checks", "label", "choices", "unknown", "biased")

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskDifference:
    """One task and metric. Positive is better, whatever the metric; nearer to 0 is, for a bias score."""

    family: str
    task: str
    metric: str
    n: int
    before: float
    after: float
    difference: float
    lower: float
    """Ends of the two-sided 95 % interval."""
    upper: float


@dataclass(frozen=True)
class Moved:
    """One item whose score changed."""

    task: str
    sample: str
    prompt: str
    before: str
    after: str
    difference: float


@dataclass(frozen=True)
class Slice:
    """Items that share something, on which the second model does worse than on the rest of their task."""

    task: str
    name: str
    n: int
    value: float
    standard_error: float
    rest: float


@dataclass(frozen=True)
class Comparison:
    """What is to be seen beside the verdict."""

    tasks: tuple[TaskDifference, ...]
    moved: tuple[Moved, ...]
    slices: tuple[Slice, ...]


def lay_side_by_side(champion: EvalReport, challenger: EvalReport, items: Path | None) -> Comparison:
    """Compare what both measured.

    Args:
        items: the benchmarks' `items` folder; without it prompts and slices by field are not known.
    """
    tasks = Protocol.model_validate_json((challenger.path / "protocol.json").read_bytes()).tasks
    before, after = (
        {(row["task"], row["sample"], row["metric"]): row for row in read_lines(report.path / "samples.jsonl")}
        for report in (champion, challenger)
    )
    shared = [key for key in before if key in after]
    documents = {task.task: documents_of(items, task.task) for task in tasks}
    differences: list[TaskDifference] = []
    moved: list[Moved] = []
    slices: list[Slice] = []
    for task in tasks:
        for metric in task.metrics:
            keys = [key for key in shared if key[0] == task.task and key[2] == metric]
            if not keys:
                continue
            pairs = [(before[key], after[key]) for key in keys]
            differences.append(_difference(task, metric, pairs))
            if metric == task.metrics[0]:
                moved += _moved(task, pairs, documents[task.task])
                slices += _slices(task, [row for _, row in pairs], documents[task.task])
    # Each is worse than the rest of its task, whichever way its scores run.
    slices.sort(key=lambda each: -abs(each.value - each.rest) / each.standard_error)
    return Comparison(tuple(differences), tuple(moved), tuple(slices[:SLICES_SHOWN]))


def fairly(moved: Sequence[Moved], most: int) -> list[Moved]:
    """At most so many of the moved items, by task: the largest change of each, then the second ones, and so on.

    Units differ from task to task, so their changes are not compared.
    """
    ranks: Counter[str] = Counter()
    ranked = []
    for each in sorted(moved, key=lambda each: -abs(each.difference)):
        ranked.append((ranks[each.task], each))
        ranks[each.task] += 1
    shown = sorted(ranked, key=lambda each: each[0])[:most]
    return sorted((each for _, each in shown), key=lambda each: each.task)


def documents_of(items: Path | None, task: str) -> dict[str, Row]:
    """A task's items by id; none where the benchmarks' folder is not known."""
    path = items / f"{task}.jsonl" if items else None
    return {row["id"]: row for row in read_lines(path)} if path and path.is_file() else {}


def _difference(task: PinnedTask, metric: str, pairs: list[tuple[Row, Row]]) -> TaskDifference:
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    before, after = (counted_mean(rows).value for rows in (ours, theirs))
    if metric in BIAS_METRICS:
        mean = nearer_to_zero(ours, theirs)
        interval = one_sided_bounds(mean, ONE_SIDED)
        return TaskDifference(task.family, task.task, metric, mean.n, before, after, mean.value, *interval)
    sign = 1.0 if task.higher_is_better else -1.0
    items = Pairs(
        family=task.family,
        differences=[sign * (after["score"] - before["score"]) for before, after in pairs],
        clusters=[row["cluster"] for row in ours],
        binary={row["score"] for row in (*ours, *theirs)} <= {0, 1},
    )
    seen = gate.compare(items, alpha=ONE_SIDED, margin=task.margin, families=1)
    return TaskDifference(
        task.family, task.task, metric, seen.n, before, after, seen.difference, seen.lower, seen.upper
    )


def _moved(task: PinnedTask, pairs: list[tuple[Row, Row]], documents: Mapping[str, Row]) -> Iterable[Moved]:
    """Items with another score, the largest change first."""
    sign = 1.0 if task.higher_is_better else -1.0
    changed = [(ours, theirs) for ours, theirs in pairs if ours["score"] != theirs["score"]]
    changed.sort(key=lambda pair: (-abs(pair[1]["score"] - pair[0]["score"]), pair[0]["sample"]))
    for ours, theirs in changed:
        yield Moved(
            task=task.task,
            sample=ours["sample"],
            prompt=asked_text(documents.get(ours["sample"], {})),
            before=_answer(ours),
            after=_answer(theirs),
            difference=sign * (theirs["score"] - ours["score"]),
        )


def asked_text(document: Mapping[str, Any]) -> str:
    """An item's own texts, as they are."""
    return "\n".join(str(value) for name, value in document.items() if name not in _NAMES and isinstance(value, str))


def _answer(row: Row) -> str:
    shown = f"{row['score']:.4g}"
    return f"{shown}: {row['response']}" if row.get("response") else shown


def _slices(task: PinnedTask, rows: list[Row], documents: Mapping[str, Row]) -> Iterable[Slice]:
    """Kinds of items on which the score is worse than on the other items of the task."""
    kinds: defaultdict[str, list[Row]] = defaultdict(list)
    known = [row for row in rows if row["sample"] in documents]
    sizes = sorted(len(asked_text(documents[row["sample"]])) for row in known)
    fields = _kinds(documents.values())
    for row in known:
        document = documents[row["sample"]]
        size = len(asked_text(document))
        third = sum(size > sizes[len(sizes) * part // 3] for part in (1, 2))
        kinds["length: " + ("short", "middle", "long")[third]].append(row)
        for field in fields:
            if field in document:
                kinds[f"{field}: {document[field]}"].append(row)
    sign = 1.0 if task.higher_is_better else -1.0
    for name, mine in kinds.items():
        chosen = {row["sample"] for row in mine}
        others = [row["score"] for row in known if row["sample"] not in chosen]
        if len(mine) < SMALLEST_SLICE or not others:
            continue
        mean = clustered_mean([row["score"] for row in mine], [row["cluster"] for row in mine])
        rest = math.fsum(others) / len(others)
        if 0 < mean.standard_error < math.inf and sign * (mean.value - rest) < 0:
            yield Slice(task.task, name, mean.n, mean.value, mean.standard_error, rest)


def _kinds(documents: Iterable[Row]) -> list[str]:
    """Fields that sort items into a few kinds: subject, category, type."""
    values: defaultdict[str, set[Any]] = defaultdict(set)
    for document in documents:
        for name, value in document.items():
            if name not in _NAMES and isinstance(value, str | int) and len(values[name]) <= MOST_VALUES:
                values[name].add(value)
    return sorted(name for name, found in values.items() if 1 < len(found) <= MOST_VALUES)
