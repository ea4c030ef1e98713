"""The gate: may the challenger replace the champion?

Enters: two reports of one protocol, the rounds before, what the data held. Leaves: `decision.json`, with reasons.
Refuses: missing, partial or unlike evidence; it rejects rather than guesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from fmops.artifacts import (
    Artifact,
    Conversations,
    Corpus,
    EvalReport,
    FamilyResult,
    GateDecision,
    GuardResult,
    Judged,
    Preferences,
)
from fmops.errors import unknown
from fmops.evaluation import spending, statistics
from fmops.evaluation.evidence import Breach, Evidence, Pairs, gather
from fmops.evaluation.protocol import digest, write_json
from fmops.integrity import read_lines, sha256
from fmops.jobs import GateJob
from fmops.stage import StageContext

POWER = 0.8
GUARD = 2.0
"""A benchmark's guard, in margins of its family. Two benchmarks pooled let one lose twice the margin at most while the
other holds; a family of more of them allows one no more than that."""
RESISTANCE = frozenset({"harm", "red-team"})
"""Families in which saying nothing of use looks best."""
Verdict = Literal["promote", "reject", "need more data"]


@dataclass(frozen=True)
class Decision:
    """A verdict, before it is a file."""

    verdict: Verdict
    reasons: tuple[str, ...]
    families: tuple[FamilyResult, ...] = ()
    improved: tuple[str, ...] = ()
    p_value: float | None = None
    """Of the whole test; None when the evidence allowed none."""
    guards: tuple[GuardResult, ...] = ()


def gate(
    config: GateJob,
    *,
    champion: EvalReport,
    challenger: EvalReport,
    out: Path,
    context: StageContext,
    **data: Corpus | Conversations | Preferences,
) -> GateDecision:
    """Compare two reports item by item, decide, and write `decision.json`. The policy is `decide`'s.

    The level is what `spending.level` leaves of α after the earlier rounds. Evidence that is refused tests nothing, so
    it costs nothing.

    Args:
        data: what the challenger was trained on; items that it held are shown, and judge nothing.

    Raises:
        FmopsError: a margin for a family that no suite measures, or a guard for a task of none.
    """
    evidence = gather(champion, challenger, contaminated=contaminated_items(data.values()))
    for what, named, measured in (
        ("family under gate.margins:", config.margins, {task.family for task in evidence.tasks}),
        ("task under gate.guards:", config.guards, {task.task for task in evidence.tasks}),
    ):
        for name in named:
            if measured and name not in measured:
                raise unknown(what, name, measured)
    level = spending.level(config.earlier, config.alpha)
    decision = decide(
        evidence, alpha=level, margins=config.margins, primary=config.primary,
        guards=config.guards, guard_alpha=config.alpha,
    )  # fmt: skip
    rounds, p_value = config.earlier, decision.p_value
    if p_value is not None:
        promoted = decision.verdict == "promote"
        candidate = digest([scores_digest(champion), scores_digest(challenger)])[:16]
        rounds = (*rounds, Judged(candidate=candidate, level=level, p_value=p_value, promoted=promoted))
    artifact = GateDecision(
        path=out,
        verdict=decision.verdict,
        reasons=decision.reasons,
        alpha=config.alpha,
        families=decision.families,
        improved=decision.improved,
        level=None if p_value is None else level,
        p_value=p_value,
        wealth=spending.wealth(rounds, config.alpha),
        rounds=rounds,
        guards=decision.guards,
    )
    write_json(out / "decision.json", artifact.model_dump(mode="json"))
    return artifact


def contaminated_items(data: Iterable[Artifact]) -> set[tuple[str, str]]:
    """Task and sample of the items that these data artifacts list as found in the raw data."""
    paths = [artifact.path / "contaminated.jsonl" for artifact in data]
    return {(row["task"], row["sample"]) for path in paths if path.is_file() for row in read_lines(path)}


def scores_digest(report: EvalReport) -> str:
    """What tells one challenger's measurement from another's."""
    return sha256(report.path / "samples.jsonl")


def decide(
    evidence: Evidence,
    *,
    alpha: float,
    margins: Mapping[str, float],
    primary: tuple[str, ...],
    guards: Mapping[str, float] = MappingProxyType({}),
    guard_alpha: float | None = None,
) -> Decision:
    """The policy. Rules are read in order; the first that applies gives the verdict.

    1. Reject when evidence is missing, partial, not a number, or of another protocol.
    2. Reject when some family regressed: the optimistic end of its difference lies below −margin. Reject when a
       benchmark of a pooled family fell: its optimistic end lies below −guard. Reject when a critical class of attacks
       succeeds that the champion withstood whole, be it once.
    3. Reject when a gain is asked for and ruled out: the optimistic end of every primary family is at most 0.
    4. Need more data when some family is undecided (its interval holds −margin), or when a gain is asked for and no
       primary family's is significant (Holm over the primaries).
    5. Promote: the pessimistic end of every family lies above −margin, and a primary family improved.

    Promoting a model that is worse than a margin in any family has probability at most α: every family must pass its
    own test at level α (intersection–union), so no correction is due. Guards only add rejections; what they cost, and
    `guard_alpha` (left out: α), see `guarded`.
    """
    problems = list(evidence.problems)
    problems += [
        f"the primary family {name} was not measured: add a suite for it, or change gate.primary"
        for name in primary
        if evidence.tasks and name not in evidence.families
    ]
    if problems:
        return Decision("reject", tuple(problems))
    count = len(evidence.families)
    margins = {family: margins.get(family, evidence.margin(family)) for family in evidence.families}
    results = tuple(
        compare(pairs, alpha=alpha, margin=margins[family], families=count, unit=evidence.unit(family))
        for family, pairs in evidence.families.items()
    )
    benchmarks = guarded(evidence, alpha=guard_alpha or alpha, margins=margins, guards=guards)
    p_values = {name: improvement(evidence.families[name]) for name in primary}
    improved = statistics.holm(p_values, alpha)
    fallen = _fallen(benchmarks, guard_alpha or alpha)
    verdict, reasons = _verdict(results, primary, improved, alpha, rejected=[*fallen, *_breached(evidence.breaches)])
    # Intersection–union takes the largest p-value; of the gains Holm lets one pass when the smallest, times their
    # number, does.
    gain = min(1.0, len(p_values) * min(p_values.values())) if p_values else 0.0
    p_value = max(gain, *(result.p_value for result in results))
    return Decision(verdict, reasons, results, improved, p_value, benchmarks)


def guarded(
    evidence: Evidence, *, alpha: float, margins: Mapping[str, float], guards: Mapping[str, float]
) -> tuple[GuardResult, ...]:
    """Each benchmark that shares its family with others, or has a guard of its own, against its guard.

    Every one is tested at α over their number (Bonferroni): where none has lost more than its guard, one or more is
    called fallen with probability at most α, and an equal model far more rarely. One that is undecided blocks nothing,
    so how few its items are costs no good model anything. A benchmark of one cluster has no error and no guard.
    """
    chosen = [
        (task, pairs)
        for parts in (whole.by_task() for whole in evidence.families.values())
        for task, pairs in parts.items()
        if (len(parts) > 1 or task in guards) and len(set(pairs.clusters)) > 1
    ]
    results = []
    for task, pairs in chosen:
        lower, upper = _bounds(pairs, pairs.differences, alpha / len(chosen))
        guard = guards.get(task, GUARD * margins[pairs.family])
        results.append(
            GuardResult(
                task=task,
                family=pairs.family,
                n=len(pairs.differences),
                clusters=len(set(pairs.clusters)),
                difference=math.fsum(pairs.differences) / len(pairs.differences),
                lower=lower,
                upper=upper,
                guard=guard,
                unit=evidence.unit(pairs.family),
                fallen=upper < -guard,
            )
        )
    return tuple(results)


def _fallen(guards: tuple[GuardResult, ...], alpha: float) -> list[str]:
    level = f"{100 * (1 - alpha / max(1, len(guards))):.4g} %"
    return [
        f"{each.task} of {each.family} fell by more than its guard: {each.difference:+.4f} {each.unit} (one-sided "
        f"{level} bounds {each.lower:+.4f} and {each.upper:+.4f}, guard {each.guard:g}, n = {each.n})"
        for each in guards
        if each.fallen
    ]


def _breached(breaches: tuple[Breach, ...]) -> list[str]:
    return [
        f"{each.task} is critical: the champion withstood all {each.n}, the challenger gave way to "
        f"{len(each.samples)}, first {each.samples[0]}"
        for each in breaches
    ]


def compare(pairs: Pairs, *, alpha: float, margin: float, families: int, unit: str = "") -> FamilyResult:
    """One family's paired comparison, positive is better.

    0/1 items without clusters take Tango's score bounds; 0/1 items with clusters the wider of Tango's and the
    clustered ones; scores on a scale the clustered ones. Doubts of measurement count against the challenger.
    """
    mean = statistics.clustered_mean(pairs.differences, pairs.clusters)
    lower, upper = _bounds(pairs, pairs.differences, alpha)
    if pairs.fragile or pairs.tolerance:
        lower = _bounds(pairs, pairs.pessimistic, alpha)[0]
    verdict: Literal["non-inferior", "regressed", "undecided"] = "undecided"
    if lower > -margin:
        verdict = "non-inferior"
    elif upper < -margin:
        verdict = "regressed"
    everything = [*pairs.differences, *pairs.contaminated]
    return FamilyResult(
        family=pairs.family,
        n=mean.n,
        clusters=mean.clusters,
        difference=mean.value,
        standard_error=mean.standard_error,
        lower=lower,
        upper=upper,
        margin=margin,
        minimum_detectable=statistics.detectable(mean, alpha=alpha, power=POWER, families=families),
        verdict=verdict,
        unit=unit,
        p_value=_worse_p(pairs, margin),
        contaminated=len(pairs.contaminated),
        raw_difference=math.fsum(everything) / len(everything) if pairs.contaminated else None,
        fragile=len(pairs.fragile) if pairs.binary else 0,
    )


def _bounds(pairs: Pairs, values: list[float], alpha: float) -> tuple[float, float]:
    mean = statistics.clustered_mean(values, pairs.clusters)
    lower, upper = statistics.one_sided_bounds(mean, alpha)
    if not pairs.binary:
        return lower, upper
    low, high = statistics.tango_bounds(*_counted(values), mean.n, alpha)
    return (min(lower, low), max(upper, high)) if mean.clusters < mean.n else (low, high)


def _worse_p(pairs: Pairs, margin: float) -> float:
    """The p-value against `worse by the margin or more`: what the lower bound says, as a number."""
    values = pairs.pessimistic
    mean = statistics.clustered_mean(values, pairs.clusters)
    clustered = statistics.worse_p(mean, margin)
    if not pairs.binary:
        return clustered
    score = statistics.tango_p(*_counted(values), mean.n, margin)
    return max(clustered, score) if mean.clusters < mean.n else score


def _counted(differences: list[float]) -> tuple[int, int]:
    """Items won and lost."""
    return sum(difference > 0 for difference in differences), sum(difference < 0 for difference in differences)


def improvement(pairs: Pairs) -> float:
    """One-sided p-value of a gain: exact McNemar for 0/1 items, clustered t otherwise, the larger one if both apply."""
    values = pairs.pessimistic
    clustered = statistics.improvement_p(statistics.clustered_mean(values, pairs.clusters))
    if not pairs.binary:
        return clustered
    exact = statistics.mcnemar_p(*_counted(values))
    return exact if len(set(pairs.clusters)) == len(values) else max(exact, clustered)


def _verdict(
    results: tuple[FamilyResult, ...],
    primary: tuple[str, ...],
    improved: tuple[str, ...],
    alpha: float,
    *,
    rejected: list[str],
) -> tuple[Verdict, tuple[str, ...]]:
    level = f"{100 * (1 - alpha):.4g} %"
    told = {result.family: _told(result, level) for result in results}
    regressed = [result for result in results if result.verdict == "regressed"]
    undecided = [result for result in results if result.verdict == "undecided"]
    gains = [result for result in results if result.family in primary]
    bad = [*(f"{each.family} regressed: {told[each.family]}" for each in regressed), *rejected]
    if bad:
        return "reject", tuple(bad)
    if gains and all(each.upper <= 0 for each in gains):
        return "reject", tuple(f"a gain in {each.family} is ruled out: {told[each.family]}" for each in gains)
    reasons = [
        f"{each.family} is undecided: {told[each.family]}; with this spread a margin of "
        f"{each.minimum_detectable:.3g} could be shown, so add items or widen the margin"
        for each in undecided
    ]
    if primary and not improved:
        reasons += [f"no significant gain in {each.family}: {told[each.family]}" for each in gains]
    if reasons:
        return "need more data", tuple(reasons)
    reasons = [f"{name} improved: {told[name]}" for name in improved]
    reasons += [
        f"{each.family} did not regress: {told[each.family]}" for each in results if each.family not in improved
    ]
    families = {each.family for each in results}
    if families & RESISTANCE and "over-refusal" not in families:
        reasons.append("over-refusal was not measured: a model that refuses everything would have passed as well")
    return "promote", tuple(reasons)


def _told(result: FamilyResult, level: str) -> str:
    notes = [f"{result.clusters} clusters"] if result.clusters < result.n else []
    if result.fragile:
        notes.append(f"{result.fragile} within the batch tolerance, counted as lost")
    if result.raw_difference is not None:
        notes.append(f"{result.contaminated} left out: in the training data; with them {result.raw_difference:+.4f}")
    bounds = f"one-sided {level} bounds {result.lower:+.4f} and {result.upper:+.4f}"
    about = "".join(f", {note}" for note in notes)
    return f"{result.difference:+.4f} {result.unit} ({bounds}, margin {result.margin:g}, n = {result.n}{about})"
