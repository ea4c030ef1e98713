"""The gate: may the challenger replace the champion?

Enters: two evaluation reports of the same protocol. Leaves: `decision.json`: a verdict with reasons.
Refuses: missing, partial or unlike evidence; it rejects rather than guesses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fmops.artifacts import EvalReport, FamilyResult, GateDecision
from fmops.errors import unknown
from fmops.evaluation import statistics
from fmops.evaluation.evidence import Evidence, Pairs, gather
from fmops.evaluation.protocol import write_json
from fmops.lifecycle import Gate
from fmops.stage import StageContext

POWER = 0.8
Verdict = Literal["promote", "reject", "need more data"]


@dataclass(frozen=True)
class Decision:
    """A verdict, before it is a file."""

    verdict: Verdict
    reasons: tuple[str, ...]
    families: tuple[FamilyResult, ...] = ()
    improved: tuple[str, ...] = ()


def gate(
    config: Gate, *, champion: EvalReport, challenger: EvalReport, out: Path, context: StageContext
) -> GateDecision:
    """Compare two reports item by item, decide, and write `decision.json`. The policy is `decide`'s.

    Raises:
        FmopsError: a margin for a family that no suite measures.
    """
    evidence = gather(champion, challenger)
    measured = {task.family for task in evidence.tasks}
    for family in config.margins:
        if measured and family not in measured:
            raise unknown("family under gate.margins:", family, measured)
    decision = decide(evidence, alpha=config.alpha, margins=config.margins, primary=config.primary)
    for reason in decision.reasons:
        context.note(reason)
    artifact = GateDecision(
        path=out,
        verdict=decision.verdict,
        reasons=decision.reasons,
        alpha=config.alpha,
        families=decision.families,
        improved=decision.improved,
    )
    write_json(out / "decision.json", artifact.model_dump(mode="json"))
    return artifact


def decide(evidence: Evidence, *, alpha: float, margins: Mapping[str, float], primary: tuple[str, ...]) -> Decision:
    """The policy. Rules are read in order; the first that applies gives the verdict.

    1. Reject when evidence is missing, partial, not a number, or of another protocol.
    2. Reject when some family regressed: the optimistic end of its difference lies below −margin.
    3. Reject when a gain is asked for and ruled out: the optimistic end of every primary family is at most 0.
    4. Need more data when some family is undecided (its interval holds −margin), or when a gain is asked for and no
       primary family's is significant (Holm over the primaries).
    5. Promote: the pessimistic end of every family lies above −margin, and a primary family improved.

    Promoting a model that is worse than a margin in any family has probability at most α: every family must pass its
    own test at level α (intersection–union), so no correction is due.
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
    results = tuple(
        compare(pairs, alpha=alpha, margin=margins.get(family, evidence.margin(family)), families=count)
        for family, pairs in evidence.families.items()
    )
    p_values = {name: improvement(evidence.families[name]) for name in primary}
    improved = statistics.holm(p_values, alpha)
    verdict, reasons = _verdict(results, primary, improved, evidence, alpha)
    return Decision(verdict, reasons, results, improved)


def compare(pairs: Pairs, *, alpha: float, margin: float, families: int) -> FamilyResult:
    """One family's paired comparison, positive is better.

    0/1 items without clusters take Tango's score bounds; 0/1 items with clusters the wider of Tango's and the
    clustered ones; scores on a scale the clustered ones.
    """
    mean = statistics.clustered_mean(pairs.differences, pairs.clusters)
    lower, upper = statistics.one_sided_bounds(mean, alpha)
    if pairs.binary:
        low, high = statistics.tango_bounds(pairs.won, pairs.lost, mean.n, alpha)
        clustered = mean.clusters < mean.n
        lower, upper = (min(lower, low), max(upper, high)) if clustered else (low, high)
    verdict: Literal["non-inferior", "regressed", "undecided"] = "undecided"
    if lower > -margin:
        verdict = "non-inferior"
    elif upper < -margin:
        verdict = "regressed"
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
    )


def improvement(pairs: Pairs) -> float:
    """One-sided p-value of a gain: exact McNemar for 0/1 items, clustered t otherwise, the larger one if both apply."""
    clustered = statistics.improvement_p(statistics.clustered_mean(pairs.differences, pairs.clusters))
    if not pairs.binary:
        return clustered
    exact = statistics.mcnemar_p(pairs.won, pairs.lost)
    return exact if len(set(pairs.clusters)) == len(pairs.differences) else max(exact, clustered)


def _verdict(
    results: tuple[FamilyResult, ...],
    primary: tuple[str, ...],
    improved: tuple[str, ...],
    evidence: Evidence,
    alpha: float,
) -> tuple[Verdict, tuple[str, ...]]:
    level = f"{100 * (1 - alpha):g} %"
    told = {result.family: _told(result, evidence.unit(result.family), level) for result in results}
    regressed = [result for result in results if result.verdict == "regressed"]
    undecided = [result for result in results if result.verdict == "undecided"]
    gains = [result for result in results if result.family in primary]
    if regressed:
        return "reject", tuple(f"{each.family} regressed: {told[each.family]}" for each in regressed)
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
    return "promote", tuple(reasons)


def _told(result: FamilyResult, unit: str, level: str) -> str:
    clusters = f", {result.clusters} clusters" if result.clusters < result.n else ""
    return (
        f"{result.difference:+.4f} {unit} (one-sided {level} bounds {result.lower:+.4f} and {result.upper:+.4f}, "
        f"margin {result.margin:g}, n = {result.n}{clusters})"
    )
