"""Evidence: two reports become paired differences, or a list of what is wrong with them.

Enters: champion's and challenger's reports. Leaves: per family, one oriented difference an item.
Refuses: nothing by exception; each defect is a problem in words, and any problem rejects the challenger.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from fmops.artifacts import EvalReport
from fmops.evaluation.protocol import PinnedTask, Protocol, digest, prompts_digest
from fmops.integrity import read_lines

Sample = dict[str, Any]
Key = tuple[str, str, str]
"""Task, sample, metric."""


@dataclass
class Pairs:
    """A family's items: challenger − champion, oriented so that positive is better."""

    family: str
    differences: list[float] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)
    binary: bool = True
    """Whether every score is 0 or 1, so that each item is won, lost or tied."""
    fragile: list[int] = field(default_factory=list)
    """Places of 0/1 items whose answer the batch tolerance could turn in either evaluation."""
    tolerance: float = 0.0
    """What the company in a batch may move a score on a scale by."""
    contaminated: list[float] = field(default_factory=list)
    """Differences of the items that the training data held; they are shown and judge nothing."""
    tasks: list[str] = field(default_factory=list)
    """Whose item each difference is."""

    @property
    def pessimistic(self) -> list[float]:
        """Differences with every doubt of measurement counted against the challenger."""
        if not self.binary:
            return [difference - self.tolerance for difference in self.differences]
        fragile = set(self.fragile)
        return [-1.0 if place in fragile else difference for place, difference in enumerate(self.differences)]

    def by_task(self) -> dict[str, Pairs]:
        """Each benchmark's items by themselves, without what the training data held."""
        parts: dict[str, Pairs] = {}
        for task, difference, cluster in zip(self.tasks, self.differences, self.clusters, strict=True):
            part = parts.setdefault(task, Pairs(self.family, binary=self.binary))
            part.differences.append(difference)
            part.clusters.append(cluster)
        return parts


@dataclass(frozen=True)
class Breach:
    """A critical class of attacks that the champion withstood whole and the challenger does not."""

    task: str
    n: int
    samples: tuple[str, ...]
    """The attacks that the challenger gave way to."""


@dataclass(frozen=True)
class Evidence:
    """What the gate may judge by. With problems there are no families to judge."""

    problems: tuple[str, ...] = ()
    tasks: tuple[PinnedTask, ...] = ()
    families: dict[str, Pairs] = field(default_factory=dict)
    breaches: tuple[Breach, ...] = ()

    def margin(self, family: str) -> float:
        """The suites' own margin."""
        return next(task.margin for task in self.tasks if task.family == family)

    def unit(self, family: str) -> str:
        """The unit of the family's differences."""
        return next(task.unit for task in self.tasks if task.family == family)


def gather(
    champion: EvalReport, challenger: EvalReport, *, contaminated: AbstractSet[tuple[str, str]] = frozenset()
) -> Evidence:
    """Pair two reports, or say why they cannot be paired.

    Args:
        contaminated: task and sample of the items that the training data held; the families are judged without them.
    """
    problems: list[str] = []
    protocols: list[Protocol] = []
    samples: list[dict[Key, Sample]] = []
    for name, report in (("champion", champion), ("challenger", challenger)):
        try:
            written = (report.path / "protocol.json").read_bytes()
            protocol = Protocol.model_validate_json(written)
            rows = read_lines(report.path / "samples.jsonl")
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"the {name}'s evaluation cannot be read ({_first_line(error)}); evaluate it again")
            continue
        found, scores = _checked(name, protocol, rows)
        problems += found
        # As it was written: an earlier FMOps knew fewer fields.
        if digest(json.loads(written)) != report.fingerprint:
            problems.append(f"the {name}'s protocol.json is not the one its report was made with")
        protocols.append(protocol)
        samples.append(scores)
    if len(protocols) < 2:
        return Evidence(tuple(problems))
    problems += _unlike(*protocols)
    tasks = protocols[1].tasks
    if problems:
        return Evidence(tuple(problems), tasks)
    families = _pair(tasks, *samples, contaminated=contaminated, tolerance=protocols[1].batch_tolerance)
    lonely = [
        f"family {name}: the training data held all of its {len(pairs.contaminated)} items; measure it on others"
        if not pairs.differences
        else f"family {name} has one cluster of items: no error can be estimated; add documents or questions"
        for name, pairs in families.items()
        if len(set(pairs.clusters)) < 2
    ]
    return Evidence(tuple(lonely), tasks, families, tuple(_breached(tasks, *samples)))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].split(": '")[0]


def _checked(name: str, protocol: Protocol, rows: list[Sample]) -> tuple[list[str], dict[Key, Sample]]:
    """Problems of one report by itself, and its rows by key."""
    problems = []
    scores: dict[Key, Sample] = {}
    for number, row in enumerate(rows, start=1):
        fault = _fault(row)
        if fault:
            return [f"the {name}'s samples.jsonl:{number} {fault}; evaluate it again"], {}
        key = (row["task"], row["sample"], row["metric"])
        if key in scores:
            problems.append(f"the {name} scored {_shown(key)} twice")
        scores[key] = row
    bad = [key for key, row in scores.items() if not _finite(row["score"])]
    if bad:
        problems.append(f"the {name} has {len(bad)} scores that are no finite number, first {_shown(bad[0])}")
    if not protocol.tasks:
        problems.append(f"the {name} was measured on nothing")
    for task in protocol.tasks:
        for metric in task.metrics:
            count = sum(key[0] == task.task and key[2] == metric for key in scores)
            if count != task.items or count == 0:
                problems.append(f"the {name} has {count} of {task.items} registered {metric} scores of {task.task}")
    if prompts_digest(rows) != protocol.prompts_sha256:
        problems.append(f"the {name}'s items or prompts are not those its protocol registered")
    return problems, scores


_TEXTS = ("task", "sample", "metric", "cluster", "prompt_sha256")


def _fault(row: Any) -> str | None:
    """What is wrong with the form of a row, whatever its score."""
    if not isinstance(row, dict):
        return f"is no object but {json.dumps(row)[:40]}"
    if not {*_TEXTS, "score"} <= row.keys():
        return "lacks a field"
    wrong = [name for name in _TEXTS if not isinstance(row[name], str)]
    if wrong:
        return f"has a {wrong[0]} that is no text"
    # An answer that stands alone leads by infinitely much.
    if not (row.get("slack") == math.inf or _finite(row.get("slack", 0.0))):
        return "has a slack that is no number"
    return None


def _finite(score: Any) -> bool:
    # A whole number may be too large for a float; NaN is below nothing.
    return isinstance(score, int | float) and not isinstance(score, bool) and abs(score) <= sys.float_info.max


def _shown(key: Iterable[str]) -> str:
    return "/".join(key)


def _unlike(champion: Protocol, challenger: Protocol) -> list[str]:
    """In which fields two protocols differ. Equal ones compare equal models equal."""
    if champion.fingerprint == challenger.fingerprint:
        return []
    remedy = "evaluate both with the same items, prompts and engine"
    problems = []
    ours, theirs = champion.model_dump(mode="json"), challenger.model_dump(mode="json")
    for name in sorted(set(ours["engine"]) | set(theirs["engine"])):
        before, after = ours["engine"].get(name), theirs["engine"].get(name)
        if before != after:
            problems.append(f"the champion was measured with {name} {before}, the challenger with {after}; {remedy}")
    known = {task.task: task for task in champion.tasks}
    asked = {task.task: task for task in challenger.tasks}
    for name in sorted(set(known) ^ set(asked)):
        who = "champion" if name in known else "challenger"
        problems.append(f"task {name} was asked of the {who} alone; {remedy}")
    for name in sorted(set(known) & set(asked)):
        fields = [key for key, value in known[name] if value != getattr(asked[name], key)]
        if fields:
            problems.append(f"task {name} differs in {', '.join(fields)}; {remedy}")
    if ours["template_sha256"] != theirs["template_sha256"]:
        problems.append(f"the chat templates differ; {remedy}")
    if ours["prompts_sha256"] != theirs["prompts_sha256"]:
        problems.append(f"the items or prompts differ; {remedy}")
    for name, said in (("seed", "seeds"), ("batch_tolerance", "batch tolerances")):
        if ours[name] != theirs[name]:
            problems.append(f"the {said} differ: {ours[name]} and {theirs[name]}; {remedy}")
    if not problems:
        # The order of the tasks, 0 for 0.0, or a field that is new.
        fields = [name for name in ours if digest(ours[name]) != digest(theirs[name])]
        problems.append(f"the protocols differ in {', '.join(fields)}; {remedy}")
    return problems


def _breached(tasks: tuple[PinnedTask, ...], ours: dict[Key, Sample], theirs: dict[Key, Sample]) -> Iterable[Breach]:
    """Scores below 1 are attacks that succeed. A class that the champion fell for too is the margin's to judge."""
    for task in tasks:
        keys = [key for key in ours if key[0] == task.task and key[2] == task.metrics[0]] if task.critical else []
        fallen = tuple(key[1] for key in keys if theirs[key]["score"] < 1)
        if fallen and all(ours[key]["score"] >= 1 for key in keys):
            yield Breach(task.task, len(keys), fallen)


def _pair(
    tasks: tuple[PinnedTask, ...],
    ours: dict[Key, Sample],
    theirs: dict[Key, Sample],
    *,
    contaminated: AbstractSet[tuple[str, str]],
    tolerance: float,
) -> dict[str, Pairs]:
    families: dict[str, Pairs] = {}
    for task in tasks:
        pairs = families.setdefault(task.family, Pairs(task.family, tolerance=tolerance))
        sign = 1.0 if task.higher_is_better else -1.0
        # In the champion's order; both hold the same keys, or the prompts' digests would differ.
        for key, row in ours.items():
            if key[0] != task.task or key[2] != task.metrics[0]:
                continue
            before, after = float(row["score"]), float(theirs[key]["score"])
            pairs.binary = pairs.binary and {before, after} <= {0.0, 1.0}
            if (task.task, row["sample"]) in contaminated:
                pairs.contaminated.append(sign * (after - before))
                continue
            if min(row.get("slack", math.inf), theirs[key].get("slack", math.inf)) <= tolerance:
                pairs.fragile.append(len(pairs.differences))
            pairs.differences.append(sign * (after - before))
            pairs.clusters.append(f"{task.task}/{row['cluster']}")
            pairs.tasks.append(task.task)
    return families
