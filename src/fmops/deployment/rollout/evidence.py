"""What the answers so far say about a challenger.

Enters: traces, in the order in which they were written. Leaves: frozen evidence, the same however often one looked.
Refuses: traces of other releases, requests that were the client's fault, and signals that are not there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from fmops.artifacts import Frozen
from fmops.deployment.evalues import Betting, Count, RareEvents, TwoStreams, log_mean, quantile_ranks
from fmops.deployment.monitoring.signals import BINARY
from fmops.traces import Feedback, Trace

SIGNALS = ("failed", *BINARY, "disliked")
REQUIRED = ("failed", "empty", "truncated", "repeated", "refused")
"""Promotion needs evidence on these in any case, and on every other signal that the champion shows."""
MARGINS = {
    "truncated": 0.05, "repeated": 0.03, "refused": 0.05, "invalid_json": 0.05, "wrong_language": 0.03, "secret": 0.01,
    "personal_data": 0.01, "disliked": 0.1,
}  # fmt: skip
DEFAULT_MARGIN = 0.02
SHOWN = 50
"""A signal that so many of the champion's answers carry must be proven for the challenger, too."""
VOTES_PER_IDENTITY = 5
"""In the life of a rollout: who sees which release answered could blame one of them alone."""
ANSWERS_KEPT = 5000
"""Newest answers on which a vote still counts."""
BLOCK = 5
"""Canary answers in a block: bets are placed anew after each block, whoever looks when."""
PAIRS_WAITING = 2000
LATENCIES = ("first_token_s", "token_s")
QUANTILES = (0.5, 0.95)
LATENCY_TOLERANCE = 0.25
"""By so much may the canary's quantiles be longer."""
BIN = math.log(1.02)
"""Latencies are counted in bins 2 % wide; bounds take the bin's pessimistic edge."""


class SignalEvidence(Frozen):
    """One signal: harm, and its absence beyond a margin; from the canary and from shadow pairs."""

    harm: TwoStreams = TwoStreams()
    fine: TwoStreams
    rare: RareEvents = RareEvents()
    shadow_harm: Betting = Betting(null=0.0)
    shadow_fine: Betting
    waiting: tuple[Count, Count] = (Count(), Count())
    """Champion's and canary's answers of the block that is not full yet."""

    @property
    def log_harm(self) -> float:
        """Log e-value against "the challenger is no worse"."""
        return log_mean((self.harm.log_e, self.rare.log_e, self.shadow_harm.log_e))

    @property
    def log_fine(self) -> float:
        """Log e-value against "the challenger is worse by more than the margin"."""
        return log_mean((self.fine.log_e, self.shadow_fine.log_e))

    @property
    def champion(self) -> Count:
        """Answers of the champion, those of the open block included."""
        return self.harm.a + self.waiting[0]

    @property
    def canary(self) -> Count:
        """Answers of the canary, those of the open block included."""
        return self.harm.b + self.waiting[1]


class Latency(Frozen):
    """Latencies of one measure within one ramp step: counts by bin."""

    champion: dict[int, int] = Field(default={})
    canary: dict[int, int] = Field(default={})

    def slower(self, *, alpha: float) -> tuple[float, float, float] | None:
        """Quantile, its upper bound for the champion and its lower bound for the canary, in seconds, if they show harm.

        The median and the 95th percentile are compared; each of the four bounds is missed, at any time, with
        probability at most alpha/4 (Howard & Ramdas 2022). Both arms serve the same hours within a step, hence each
        step starts anew.
        """
        for quantile in QUANTILES:
            upper = self.bounds("champion", quantile, alpha / 4)[1]
            lower = self.bounds("canary", quantile, alpha / 4)[0]
            if lower > upper * (1 + LATENCY_TOLERANCE):
                return quantile, upper, lower
        return None

    def proven(self, *, alpha: float) -> bool:
        """Whether "the canary's median is longer than the tolerance allows" is rejected at level `alpha`."""
        upper = self.bounds("canary", 0.5, alpha / 2)[1]
        return upper <= self.bounds("champion", 0.5, alpha / 2)[0] * (1 + LATENCY_TOLERANCE)

    def bounds(self, arm: Literal["champion", "canary"], quantile: float, alpha: float) -> tuple[float, float]:
        """Bounds of a quantile in seconds; 0 and infinity when nothing is known."""
        counts: dict[int, int] = getattr(self, arm)
        low, high = quantile_ranks(sum(counts.values()), quantile, alpha)
        return _order_statistic(counts, low), _order_statistic(counts, high) * math.exp(BIN)


class Evidence(Frozen):
    """All that is known about a challenger in production."""

    champion: str
    challenger: str
    shares: tuple[tuple[float, float], ...] = Field(
        default=(), description="(Unix time, canary share) of each change, oldest first."
    )
    signals: dict[str, SignalEvidence]
    latency: dict[str, Latency] = Field(default=dict.fromkeys(LATENCIES, Latency()))
    canary_answers: int = 0
    step_answers: int = Field(0, description="Of the canary, since the last change of share.")
    pairs: int = 0
    last_seen_s: float = Field(0.0, description="When the challenger last answered, as canary or shadow.")
    unpaired: dict[str, dict[str, float]] = Field(
        default={}, description="Signals of requests whose other half is not here yet, by the client's id."
    )
    answered: dict[str, tuple[bool, float]] = Field(
        default={}, description="Answers that can still be voted on: whether of the canary, and its share then."
    )
    votes: dict[str, int] = Field(default={}, description="By identity.")

    @classmethod
    def none_yet(cls, champion: str, challenger: str, margins: Mapping[str, float]) -> Evidence:
        """Before any traffic."""
        signals = {}
        for name in SIGNALS:
            margin = margins.get(name, MARGINS.get(name, DEFAULT_MARGIN))
            signals[name] = SignalEvidence(
                fine=TwoStreams(margin=margin, direction="below"), shadow_fine=Betting(null=margin, direction="below")
            )
        return cls(champion=champion, challenger=challenger, signals=signals)

    def share_changed(self, now: float, share: float) -> Evidence:
        """A new ramp step: its answers are counted from here, latencies start anew."""
        return self.model_copy(
            update={
                "shares": (*self.shares, (now, share)),
                "step_answers": 0,
                "latency": dict.fromkeys(LATENCIES, Latency()),
            }
        )

    def share_at(self, moment: float) -> float:
        """The canary's share when a request arrived."""
        return next((share for since, share in reversed(self.shares) if since <= moment), 0.0)

    @property
    def log_harm(self) -> float:
        """Log of the average e-value over all signals."""
        return log_mean([signal.log_harm for signal in self.signals.values()])

    def unproven(self, alpha: float) -> tuple[str, ...]:
        """Signals and latencies on which "worse by more than the margin" is not rejected at level `alpha`.

        What is missing is unproven. Each passes its own test (intersection–union): their number needs no correction.
        Votes can send a release back, but none waits for them: most answers get none.
        """
        limit = math.log(1 / alpha)
        shown = [name for name, signal in self.signals.items() if signal.champion.n >= SHOWN and name != "disliked"]
        needed = [name for name in self.signals if name in REQUIRED or name in shown]
        answers = [name for name in needed if self.signals[name].log_fine < limit]
        timed = [name for name, latency in self.latency.items() if sum(latency.champion.values()) >= SHOWN]
        return (*answers, *(name for name in timed if not self.latency[name].proven(alpha=alpha)))


def signals_of(trace: Trace) -> dict[str, float]:
    """0/1 signals of a request; a failed one says nothing else, one that the client spoilt or left says nothing."""
    if trace.status >= 500 or trace.finish_reason == "error":
        return {"failed": 1.0}
    if trace.status >= 400:
        return {}
    return {"failed": 0.0} | {name: trace.signals[name] for name in BINARY if name in trace.signals}


def observe(evidence: Evidence, traces: Iterable[Trace]) -> Evidence:
    """Fold traces into the evidence, one by one: how they are cut into looks changes nothing."""
    signals = dict(evidence.signals)
    blocks = {name: _Block(signal.waiting) for name, signal in signals.items()}
    timed = {
        (name, arm): Counter(getattr(latency, arm))
        for name, latency in evidence.latency.items()
        for arm in ("champion", "canary")
    }
    unpaired, answered = dict(evidence.unpaired), dict(evidence.answered)
    known = {"canary_answers": evidence.canary_answers, "step_answers": evidence.step_answers, "pairs": evidence.pairs}
    last = evidence.last_seen_s
    step_since = evidence.shares[-1][0] if evidence.shares else math.inf
    for trace in traces:
        expected = evidence.champion if trace.arm == "champion" else evidence.challenger
        seen = signals_of(trace)
        if trace.release != expected or not seen or trace.retry_of:
            continue  # a retry goes where the first try did not succeed, not where chance sent it
        share = evidence.share_at(trace.started_s)
        if trace.arm != "champion":
            last = max(last, trace.started_s + trace.duration_s)
        if trace.arm == "shadow" or (trace.arm == "champion" and not share):
            known["pairs"] += _pair(signals, unpaired, trace, seen)
        if trace.arm == "shadow" or not share:
            continue
        _count(signals, blocks, seen, canary=trace.arm == "canary", share=share)
        answered[trace.id] = (trace.arm == "canary", share)
        known["canary_answers"] += trace.arm == "canary"
        if trace.started_s >= step_since:
            known["step_answers"] += trace.arm == "canary"
            _time(timed, trace)
    signals = {name: signal.model_copy(update={"waiting": blocks[name].take()}) for name, signal in signals.items()}
    latency = {
        name: Latency(champion=timed[name, "champion"], canary=timed[name, "canary"]) for name in evidence.latency
    }
    while len(answered) > ANSWERS_KEPT:
        answered.pop(next(iter(answered)))
    return evidence.model_copy(
        update={
            "signals": signals, "latency": latency, "unpaired": unpaired, "answered": answered, "last_seen_s": last,
            **known,
        }
    )  # fmt: skip


def hear(evidence: Evidence, votes: Iterable[Feedback]) -> Evidence:
    """Fold thumbs into the evidence, as the signal `disliked`. Chance sent each answer to its arm, so the share of
    thumbs down may differ between the arms only by what was answered. One vote an answer, a few an identity.
    """
    answered, cast = dict(evidence.answered), dict(evidence.votes)
    signals = {"disliked": evidence.signals["disliked"]}
    block = _Block(signals["disliked"].waiting)
    for vote in votes:
        identity = f"{vote.tenant}/{vote.user or ''}"
        if vote.thumb is None or vote.id not in answered or cast.get(identity, 0) >= VOTES_PER_IDENTITY:
            continue
        canary, share = answered.pop(vote.id)
        cast[identity] = cast.get(identity, 0) + 1
        seen = {"disliked": float(vote.thumb == "down")}
        _count(signals, {"disliked": block}, seen, canary=canary, share=share)
    heard = signals["disliked"].model_copy(update={"waiting": block.take()})
    return evidence.model_copy(
        update={"signals": {**evidence.signals, "disliked": heard}, "answered": answered, "votes": cast}
    )


class _Block:
    """A block that is filling: events and answers of either arm. Lives for one fold only."""

    def __init__(self, waiting: tuple[Count, Count]) -> None:
        champion, canary = waiting
        self.champion, self.canary = [champion.events, champion.n], [canary.events, canary.n]

    def take(self) -> tuple[Count, Count]:
        """What is in it; it is empty afterwards."""
        found = [Count(events=events, n=n) for events, n in (self.champion, self.canary)]
        self.champion, self.canary = [0, 0], [0, 0]
        return found[0], found[1]


def _count(
    signals: dict[str, SignalEvidence], blocks: Mapping[str, _Block], seen: Mapping[str, float], *,
    canary: bool, share: float,
) -> None:  # fmt: skip
    for name, value in seen.items():
        if name not in blocks:
            continue  # evidence that an older version began does not hold it
        block, event = blocks[name], int(value > 0)
        arm = block.canary if canary else block.champion
        arm[0] += event
        arm[1] += 1
        changes: dict[str, object] = {}
        if event:
            changes["rare"] = signals[name].rare.add(share, int(canary), 1)
        if block.canary[1] >= BLOCK and block.champion[1]:
            champion_block, canary_block = block.take()
            changes |= {
                "harm": signals[name].harm.block(champion_block, canary_block),
                "fine": signals[name].fine.block(champion_block, canary_block),
            }
        if changes:
            signals[name] = signals[name].model_copy(update=changes)


def _pair(
    signals: dict[str, SignalEvidence], unpaired: dict[str, dict[str, float]], trace: Trace, seen: dict[str, float]
) -> int:
    """Bet on the difference when both halves of a mirrored request are here; returns the number of pairs made."""
    shadow = trace.arm == "shadow"
    client = trace.shadow_of if shadow else trace.id
    if client is None:
        return 0
    other = unpaired.pop(("" if shadow else "shadow ") + client, None)
    if other is None:
        unpaired[("shadow " if shadow else "") + client] = seen
        while len(unpaired) > PAIRS_WAITING:
            # Most champion's answers are never mirrored; the oldest wait in vain.
            unpaired.pop(next(iter(unpaired)))
        return 0
    challenger, champion = (seen, other) if shadow else (other, seen)
    for name in challenger.keys() & champion.keys() & signals.keys():
        signal, difference = signals[name], challenger[name] - champion[name]
        signals[name] = signal.model_copy(
            update={
                "shadow_harm": signal.shadow_harm.add(difference),
                "shadow_fine": signal.shadow_fine.add(difference),
            }
        )
    return 1


def _time(timed: Mapping[tuple[str, str], Counter[int]], trace: Trace) -> None:
    measured = {"first_token_s": trace.first_token_s}
    if trace.completion_tokens >= 8:
        measured["token_s"] = trace.duration_s / trace.completion_tokens
    arm = "canary" if trace.arm == "canary" else "champion"
    for name, seconds in measured.items():
        if seconds and seconds > 0:
            timed[name, arm][math.floor(math.log(seconds) / BIN)] += 1


def _order_statistic(counts: Mapping[int, int], rank: int) -> float:
    """Lower edge, in seconds, of the bin that holds the value of that rank (from 1)."""
    if rank < 1:
        return 0.0  # nothing is shorter
    for place in sorted(counts):
        rank -= counts[place]
        if rank <= 0:
            return math.exp(place * BIN)
    return math.inf
