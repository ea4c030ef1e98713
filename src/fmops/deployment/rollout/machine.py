"""The rollout as a state machine: pure, so that it can be read, tested and replayed.

Enters: state, evidence, policy, the time, perhaps a person's order. Leaves: the next state, and what the world must be.
Refuses: to promote without evidence, and to act on an order that the phase does not allow.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from fmops.artifacts import Frozen
from fmops.deployment.evalues import e_bh, minimum_detectable
from fmops.deployment.rollout.evidence import LATENCIES, SIGNALS, Evidence
from fmops.errors import EXIT_FAILED, FmopsError
from fmops.production import Rollout

Phase = Literal["checking", "shadow", "canary", "held", "promoted", "rolled back"]
Order = Literal["promote", "hold", "resume", "rollback"]
ENDED = ("promoted", "rolled back")
LATENCY_BUDGET = 0.2
"""Share of alpha that is spent on latency; the rest is spent on answers."""


class RolloutConflict(FmopsError):
    """The rollout is not where the order supposes; an API answers 409."""

    exit_code = EXIT_FAILED


class State(Frozen):
    """Where a rollout stands."""

    id: str
    champion: str = Field(description="Release that serves when the rollout starts.")
    challenger: str
    phase: Phase = "checking"
    step: int = Field(0, description="Index into the policy's steps, while a canary.")
    started_s: float
    entered_s: float = Field(description="Unix time at which the phase or step began.")
    reason: str = "waiting for the challenger's engine and its checks"
    held_from: Literal["shadow", "canary", "checking"] | None = Field(None, description="Phase that a hold returns to.")
    held_by: Literal["person", "silence"] | None = None
    settled: bool = Field(False, description="Ended, and the world agrees.")


class SetTraffic(Frozen):
    """Who should answer which share. Idempotent."""

    champion: str
    challenger: str | None
    canary: float = 0.0
    shadow: float = 0.0


class MoveChampion(Frozen):
    """The alias `champion` should move, if it still points where the rollout began. Idempotent."""

    before: str
    after: str
    why: str


Action = SetTraffic | MoveChampion


def advance(
    state: State,
    evidence: Evidence,
    policy: Rollout,
    now: float,
    *,
    refused: tuple[str, ...] | None = None,
    order: Order | None = None,
) -> tuple[State, tuple[Action, ...]]:
    """One look. Actions follow from the new state alone and are repeated until the world agrees.

    `refused` are the reasons of the checks before traffic: None while they have not run, empty when all passed.

    Rules, the first that applies:
    1. An ended rollout stays as it is.
    2. A person rolls back at any time; promotes once the checks have passed.
    3. Roll back when a check before traffic refuses, when the average e-value of harm reaches 1/α, or when latency
       bounds part.
    4. Roll back at the deadline: by then there is no proof that the challenger is good.
    5. A person holds, and resumes. No answer of the challenger for `silence_minutes`: hold; go on when answers come.
    6. Checks passed → shadow → canary, step by step, each after so many answers.
    7. Promote at the last step when, signal by signal, "worse by more than the margin" is rejected at level α.

    Raises:
        RolloutConflict: the order does not fit the phase.
    """
    new = _next(state, evidence, policy, now, refused=refused, order=order)
    return new, wanted(new, policy)


def wanted(state: State, policy: Rollout) -> tuple[Action, ...]:
    """What the world must be in this state, in the order in which it must be made so."""
    champion, challenger = state.champion, state.challenger
    if state.phase == "promoted":
        # The alias first: if somebody else has moved it, traffic must not follow us.
        move = MoveChampion(before=champion, after=challenger, why=f"{state.id}: {state.reason}")
        return (move, SetTraffic(champion=challenger, challenger=None))
    if state.phase == "rolled back":
        return (SetTraffic(champion=champion, challenger=None),)
    active = state.held_from if state.phase == "held" else state.phase
    return (
        SetTraffic(
            champion=champion,
            challenger=challenger,
            canary=policy.steps[state.step] if active == "canary" else 0.0,
            shadow=policy.shadow if active == "shadow" else 0.0,
        ),
    )


def harm(evidence: Evidence, policy: Rollout) -> str | None:
    """Why the challenger must go, or None. P(ever, if it is as good as the champion) ≤ policy.alpha."""
    answers = policy.alpha * (1 - LATENCY_BUDGET)
    if evidence.log_harm >= math.log(1 / answers):
        logs = {name: signal.log_harm for name, signal in evidence.signals.items()}
        culprits = e_bh(logs, policy.alpha) or (max(logs, key=lambda name: logs[name]),)
        return f"harm, e = {_e(evidence.log_harm)} ≥ {1 / answers:g}: " + ", ".join(
            f"{name} {_rates(evidence, name)}" for name in culprits
        )
    each = policy.alpha * LATENCY_BUDGET / (len(LATENCIES) * len(policy.steps))
    for name, latency in evidence.latency.items():
        if found := latency.slower(alpha=each):
            quantile, upper, lower = found
            return f"slower: {quantile:.0%} of {name} is at least {lower:.3g} s, the champion's at most {upper:.3g} s"
    return None


def detectable(evidence: Evidence, policy: Rollout, step: int) -> dict[str, float]:
    """Smallest rise of each signal's rate that a step with just its fewest answers finds with 80 % power."""
    share = policy.steps[step]
    canary = sum([policy.answers] * (step + 1))
    champion = sum(round(policy.answers * (1 - part) / part) for part in policy.steps[: step + 1])
    alpha = policy.alpha * (1 - LATENCY_BUDGET)
    return {
        name: minimum_detectable(
            signal.champion.guess if signal.champion.n else 0.01, a=champion, b=canary, alpha=alpha,
            # Each signal averages three e-values: canary, rare events, shadow.
            signals=3 * len(SIGNALS),
        )
        for name, signal in evidence.signals.items()
        if share and (signal.champion.n or not evidence.canary_answers)
    }  # fmt: skip


def _next(
    state: State, evidence: Evidence, policy: Rollout, now: float, *,
    refused: tuple[str, ...] | None, order: Order | None,
) -> State:  # fmt: skip
    if state.phase in ENDED:
        if order:
            raise RolloutConflict(f"rollout {state.id} has ended: {state.phase} ({state.reason}). Start another one.")
        return state
    if order == "rollback":
        return _enter(state, "rolled back", now, "by hand")
    if refused:
        return _enter(state, "rolled back", now, f"refused before any traffic: {'; '.join(refused)}")
    if reason := harm(evidence, policy):
        return _enter(state, "rolled back", now, reason)
    if order == "promote":
        if state.phase == "checking" or state.held_from == "checking":
            raise RolloutConflict(f"rollout {state.id} has not passed its checks yet. Wait, or roll back.")
        unproven = evidence.unproven(policy.alpha)
        proof = f"without proof on {', '.join(unproven)}" if unproven else "every signal proven"
        return _enter(state, "promoted", now, f"by hand, {proof}")
    if now >= state.started_s + policy.deadline_hours * 3600:
        missing = ", ".join(evidence.unproven(policy.alpha)) or "the end of the ramp"
        return _enter(state, "rolled back", now, f"deadline of {policy.deadline_hours:g} h without proof on {missing}")
    if order or state.phase == "held":
        return _hold(state, evidence, now, order)
    return _go_on(state, evidence, policy, now, checked=refused is not None)


def _hold(state: State, evidence: Evidence, now: float, order: Order | None) -> State:
    if order == "hold":
        before = state.held_from if state.phase == "held" else state.phase
        return _enter(state, "held", now, "by hand").model_copy(update={"held_from": before, "held_by": "person"})
    if order == "resume" and state.phase != "held":
        raise RolloutConflict(f"rollout {state.id} is not held; it is in phase {state.phase}.")
    spoke = evidence.last_seen_s > state.entered_s
    if order == "resume" or (state.held_by == "silence" and spoke):
        assert state.held_from is not None
        return _enter(state, state.held_from, now, "resumed by hand" if order else "answers came again")
    return state


def _go_on(state: State, evidence: Evidence, policy: Rollout, now: float, *, checked: bool) -> State:
    if state.phase == "checking":
        if not checked:
            return state
        return _enter(state, "shadow" if policy.shadow else "canary", now, "checks passed: parity, golden prompts")
    if now - max(state.entered_s, evidence.last_seen_s) > policy.silence_minutes * 60:
        reason = f"no answer of the challenger for {policy.silence_minutes:g} minutes; no metrics are not good metrics"
        held = _enter(state, "held", now, reason)
        return held.model_copy(update={"held_from": state.phase, "held_by": "silence"})
    if state.phase == "shadow":
        if evidence.pairs < policy.answers:
            return state
        return _enter(state, "canary", now, f"{evidence.pairs} shadow pairs without harm")
    if evidence.step_answers < policy.answers:
        return state
    if state.step + 1 < len(policy.steps):
        reason = f"{evidence.step_answers} answers at {policy.steps[state.step]:.0%} without harm"
        return _enter(state, "canary", now, reason, step=state.step + 1)
    if evidence.unproven(policy.alpha):
        return state
    return _enter(state, "promoted", now, f"not worse beyond any margin (α = {policy.alpha:g}), ramp complete")


def _enter(state: State, phase: Phase, now: float, reason: str, *, step: int | None = None) -> State:
    moved = {"phase": phase, "entered_s": now, "reason": reason, "step": state.step if step is None else step}
    return state.model_copy(update={**moved, "held_from": None, "held_by": None})


def _rates(evidence: Evidence, name: str) -> str:
    signal = evidence.signals[name]
    canary, champion = signal.canary, signal.champion
    if not canary.n:
        pairs = signal.shadow_harm
        return f"{pairs.total:+g} over {pairs.n} shadow pairs"
    return f"{canary.events} of {canary.n} against the champion's {champion.events} of {champion.n}"


def _e(log_e: float) -> str:
    return f"{math.exp(min(log_e, 700)):.3g}"
