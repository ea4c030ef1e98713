"""What the gate will be able to see: the minimum detectable effect of every family, told before anything is spent.

Enters: a project, its pinned items where they are made, the decisions before. Leaves: a line a family.
Refuses: nothing. What only an evaluation can tell is said to be unknown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fmops.orchestration.project import Project
from fmops.store import Record

if TYPE_CHECKING:
    from fmops.evaluation.suites import Suite, SuiteTask
    from fmops.orchestration.plan import Planner, Step

DISAGREEMENT = 0.1
"""Share of items on which base and candidate are expected to differ; a light finetune moves about so many."""


def told_before(project: Project, planner: Planner, steps: Mapping[str, Step]) -> list[str]:
    """What the coming round can show, and at which level it tests; nothing where the spec has no gate."""
    if not project.spec.gate:
        return []
    level, earlier = planner.next_level(project.spec.gate.alpha)
    pinned = steps["benchmarks"].record if "benchmarks" in steps else None
    coming = f"round {earlier + 1} of this workspace tests at level {level:.4f} of α {project.spec.gate.alpha:g}"
    return [*minimum_detectable(project, pinned, alpha=level), f"gate: {coming}"]


def minimum_detectable(project: Project, pinned: Record | None, *, alpha: float) -> list[str]:
    """A line a family, as the gate tests them: the smallest margin that an equal model passes with 80 % power.

    Families of right-or-wrong items go by their number. Of bits per byte, of questions made from held-out documents and
    of what another framework asks, the spread or the number is known once they were judged: by the newest decision.

    Args:
        pinned: the benchmarks artifact; before it is made the spec's limit stands for the number of items.
        alpha: the level of the coming round.
    """
    from fmops.evaluation.gate import POWER
    from fmops.evaluation.statistics import Mean, detectable
    from fmops.evaluation.statistics import minimum_detectable as by_items
    from fmops.evaluation.suites import load_suite

    spec = project.spec
    if not (spec.gate and spec.evaluate):
        return []
    families: defaultdict[str, list[Suite]] = defaultdict(list)
    for name in spec.evaluate.suites:
        suite = load_suite(name, root=project.graph.root)
        families[suite.family].append(suite)
    judged, many, lines = _judged(project), len(families), []
    for family, suites in families.items():
        asked = spec.gate.margins.get(family, suites[0].margin)
        n = _items(suites, limit=spec.evaluate.limit, pinned=pinned.artifact["items"] if pinned else {})
        last = judged.get(family)
        if n:
            seen, basis = by_items(n, disagreement=DISAGREEMENT, alpha=alpha, families=many), f"with {n} items"
        elif last:
            mean = Mean(0.0, last["standard_error"], last["n"], last["clusters"])
            seen = detectable(mean, alpha=alpha, power=POWER, families=many)
            basis = f"with the spread of the last {mean.n} items"
        else:
            told = f"what {family} can show is known after its first evaluation; asked is {asked:g} {suites[0].unit}"
            lines.append(f"gate: {told}")
            continue
        enough = "" if seen <= asked else "; an equal model may be told: need more data"
        lines.append(f"gate: {family} {basis} can show a margin of {seen:.3f}, asked is {asked:g}{enough}")
    otherwise = f"{100 * DISAGREEMENT:.0f} % of right-or-wrong items answered otherwise than before"
    return [*lines, f"  ({100 * POWER:.0f} % power, {otherwise})"]


def _judged(project: Project) -> dict[str, dict[str, Any]]:
    """Each family as the newest decision saw it that judged two models which differ there."""
    decisions = [record.artifact for record in project.store.records() if record.kind == "gate"]
    return {row["family"]: row for each in decisions for row in each["families"] if row["standard_error"]}


def _items(suites: list[Suite], *, limit: int | None, pinned: Mapping[str, int]) -> int | None:
    """How many right-or-wrong items the suites ask; None where that is not known beforehand."""
    from fmops.evaluation.items import most

    total = 0
    for suite in suites:
        for name, task in suite.tasks.items():
            counts = [count for count in (most(task.share, limit), pinned.get(name)) if count]
            if _unknown(task) or not counts:
                return None
            total += min(counts)
    return total


def _unknown(task: SuiteTask) -> bool:
    return bool(task.corpus or task.framework) or task.config.output_type == "loglikelihood_rolling"
