"""What monitoring remembers of the release that serves, and how it takes in answers. Pure.

Enters: traces and votes, in the order in which they were written; codes of the prompts' meaning. Leaves: frozen
state, and alarms.
Refuses: traces of other releases and arms; they say nothing about what serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b

from pydantic import Field

from fmops.artifacts import Alarm, Frozen
from fmops.deployment.evalues import Count, exact_upper
from fmops.deployment.monitoring.detectors import Detector, Shift, risk_has_risen
from fmops.deployment.monitoring.judge import JUDGED
from fmops.deployment.monitoring.meaning import AROUND, MOST, Code, strangeness
from fmops.deployment.monitoring.signals import BINARY
from fmops.deployment.monitoring.topics import novelty, words_of
from fmops.production import Monitor
from fmops.traces import Feedback, Trace

RATES = ("failed", "slow", "disliked", JUDGED, *BINARY)
"""0/1 signals that are watched for harm."""
MEASURES: dict[str, Callable[[float], int]] = {
    "topic": lambda value: math.floor(value * 50),
    "meaning": lambda value: math.floor(value * AROUND),
    "prompt_words": lambda value: math.floor(4 * math.log2(1 + value)),
    "words": lambda value: math.floor(4 * math.log2(1 + value)),
    "log_probability": lambda value: math.floor(max(value, -20.0) * 20),
}
"""Numbers whose distribution is watched, and the bins in which they are counted."""
TOLERANCES = {"secret": 0.0, "personal_data": 0.0, "prompt_leak": 0.0}
TOLERANCE = 0.005
"""Rise above normal that is no harm, where neither the spec nor `TOLERANCES` says otherwise."""
REFERENCE_MISSED = 0.01
"""Chance that normal is measured too low, over all signals together."""
SLOW_SHARE = 0.05
"""An answer is slow when it takes longer than all but so many of the reference's, per token."""
LATEST = 200
"""Values of a measure that the pictures show."""
RATE_NOW = 50
"""Answers over which an alarm states the rate of now."""
EXAMPLES = 5
VOTES_PER_IDENTITY = 5
"""A day; one user cannot raise an alarm alone."""
VOICES = 500
"""Answers among which one user may not speak too often."""
LOUDER = 2.0
"""Of those, a user's count up to so many equal shares: a few who flood the traffic do not look like everybody."""
FEWEST = 2
"""Answers of a user that count in any case."""
NORMAL_NOVELTY = 4
"""A quarter as many prompts as the reference has say, after it, how many new words are normal, and how far away."""
BY_REFERENCE = ("topic", "meaning")
"""Measures of the distance to the reference's prompts: there are none before it is complete."""


class Rate(Frozen):
    """One 0/1 signal."""

    reference: Count = Count()
    since: Count = Count()
    """Since the reference was complete."""
    detector: Detector | None = Field(None, description="From the end of the reference on.")
    latest: tuple[int, ...] = Field(default=(), description="The last values, newest last.")
    examples: tuple[str, ...] = Field(default=(), description="Traces with the event, newest last.")
    silent_until_s: float = 0.0
    risen: bool = Field(False, description="The slow rule has alarmed; once is enough until the next release.")


class Measure(Frozen):
    """One number's distribution."""

    reference: dict[int, int] = Field(default={})
    latest: tuple[int, ...] = ()
    shift: Shift = Shift()
    examples: tuple[str, ...] = ()
    silent_until_s: float = 0.0


class Watch(Frozen):
    """Everything about one release. It outlives restarts; a new release begins a new one."""

    release: str
    answers: int = 0
    rates: dict[str, Rate] = Field(default=dict.fromkeys(RATES, Rate()))
    measures: dict[str, Measure] = Field(default=dict.fromkeys(MEASURES, Measure()))
    known_words: frozenset[int] = Field(default=frozenset(), description="Of the reference's prompts, hashed.")
    known_codes: tuple[Code, ...] = Field(
        default=(), description="Of the reference's prompts, each once; empty where nobody puts prompts into codes."
    )
    token_s: tuple[float, ...] = Field(
        default=(), description="Seconds a token of the reference, until it is complete."
    )
    slow_s: float | None = Field(None, description="Seconds a token above which an answer is slow.")
    voices: tuple[str, ...] = Field(
        default=(), description="Users of the last answers; empty where it did not count, or the client names none."
    )
    votes: dict[str, int] = Field(default={}, description="Votes by identity on `votes_day`.")
    votes_day: int = 0
    before: dict[str, Count] = Field(default={}, description="Reference rates of the release before.")
    alarms: tuple[Alarm, ...] = ()


def watch(
    state: Watch, traces: Iterable[Trace], votes: Iterable[Feedback], policy: Monitor,
    codes: Mapping[str, Code] | None = None,
) -> Watch:  # fmt: skip
    """Take in what is new, answers in the order of their log. How they are cut into looks changes nothing.

    `codes` are those of the prompts, by the trace's id; without them nothing is said about meaning.
    """
    for trace in traces:
        if watches(state.release, trace):
            state = _answer(state, trace, trace.started_s + trace.duration_s, policy, (codes or {}).get(trace.id, ""))
    for vote in votes:
        state = _vote(state, vote, policy)
    return state


def watches(release: str, trace: Trace) -> bool:
    """Whether a trace says anything about the release that serves."""
    return trace.arm == "champion" and trace.release == release


def seen_in(trace: Trace, slow_s: float | None) -> dict[str, float]:
    """0/1 signals of an answer; a failed one says nothing else, one that the client spoilt or left says nothing."""
    if trace.status >= 500 or trace.finish_reason == "error":
        return {"failed": 1.0}
    if trace.status >= 400:
        return {}
    seen = {"failed": 0.0} | {name: trace.signals[name] for name in (JUDGED, *BINARY) if name in trace.signals}
    pace = _pace(trace)
    return seen | ({"slow": float(pace > slow_s)} if pace is not None and slow_s is not None else {})


def _answer(state: Watch, trace: Trace, now: float, policy: Monitor, code: Code) -> Watch:
    seen = seen_in(trace, state.slow_s)
    if not seen:
        return state
    identity = f"{trace.tenant}/{trace.user}" if trace.user else ""
    heard = not identity or not _loud(state.voices, identity)
    if not heard:
        # What is asked and said is left out; a request that fails or takes long is the machine's doing.
        seen = {name: value for name, value in seen.items() if name in ("failed", "slow")}
    voices = (*state.voices[-(VOICES - 1) :], identity if heard else "")
    changes: dict[str, object] = {"answers": state.answers + 1, "voices": voices}
    pace = _pace(trace)
    if state.slow_s is None and pace is not None:
        paces = (*state.token_s, pace)
        changes["token_s"] = paces
        if len(paces) * 2 >= policy.reference:
            # The first half of the reference says what slow is, the second how often normal is slow.
            changes |= {"slow_s": sorted(paces)[math.ceil((1 - SLOW_SHARE) * len(paces)) - 1], "token_s": ()}
    ready_before, ready = (state.answers + more >= policy.reference for more in (0, 1))
    numbers: dict[str, float | None] = {
        "prompt_words": float(len(trace.prompt.split())) if trace.prompt else None,
        "words": trace.signals.get("words"),
        "log_probability": trace.mean_log_probability,
    }
    if heard and not ready_before:
        changes |= _remembered(state, trace, code, policy)
    elif heard:
        words = words_of(trace.prompt)
        numbers["topic"] = novelty(words, state.known_words) if words else None
        numbers["meaning"] = strangeness(code, state.known_codes) if code else None
    rates, measures = dict(state.rates), dict(state.measures)
    for name, value in seen.items():
        rates[name] = _rate(rates.get(name, Rate()), name, int(value > 0), trace.id, now, policy, ready=ready)
    for name, number in numbers.items():
        if heard and number is not None:
            known = name not in BY_REFERENCE or state.answers >= policy.reference + policy.reference // NORMAL_NOVELTY
            had = measures.get(name, Measure())
            measures[name] = _measure(had, name, number, trace.id, now, ready=ready and known)
    return _judge(state.model_copy(update={**changes, "rates": rates, "measures": measures}), now, policy)


def _remembered(state: Watch, trace: Trace, code: Code, policy: Monitor) -> dict[str, object]:
    """A prompt of the reference becomes known: its words, and of a sample of prompts the meaning."""
    known: dict[str, object] = {"known_words": state.known_words | words_of(trace.prompt)}
    if code and code not in state.known_codes and _chance(trace.id, "known") * policy.reference < MOST:
        known["known_codes"] = (*state.known_codes, code)
    return known


def _loud(voices: tuple[str, ...], identity: str) -> bool:
    """Whether a user has spoken too often among the last answers to be heard again."""
    most = max(FEWEST, LOUDER * len(voices) / max(1, len(set(voices) - {""})))
    return voices.count(identity) >= most


def _vote(state: Watch, vote: Feedback, policy: Monitor) -> Watch:
    if vote.thumb is None:
        return state
    day, identity = int(vote.at_s // 86_400), f"{vote.tenant}/{vote.user or ''}"
    votes = state.votes if day == state.votes_day else {}
    cast = votes.get(identity, 0)
    state = state.model_copy(update={"votes": {**votes, identity: cast + 1}, "votes_day": day})
    if cast >= VOTES_PER_IDENTITY:
        return state
    down = int(vote.thumb == "down")
    rate = _rate(state.rates["disliked"], "disliked", down, vote.id, vote.at_s, policy, ready=True)
    return _judge(state.model_copy(update={"rates": {**state.rates, "disliked": rate}}), vote.at_s, policy)


def _rate(rate: Rate, name: str, event: int, trace: str, now: float, policy: Monitor, *, ready: bool) -> Rate:
    one = Count(events=event, n=1)
    # Votes and a judge's verdicts are rarer than answers: a tenth as many say what is normal.
    wanted = policy.reference // 10 if name in ("disliked", JUDGED) else policy.reference // 2
    changes: dict[str, object] = {"latest": (*rate.latest[-(RATE_NOW - 1) :], event)}
    if event:
        changes["examples"] = (*rate.examples[-(EXAMPLES - 1) :], trace)
    if rate.reference.n < wanted or (rate.detector is None and not ready):
        changes["reference"] = rate.reference + one
    else:
        detector = rate.detector or Detector(null=tolerated(rate.reference, tolerance_of(name, policy.tolerances)))
        if now >= rate.silent_until_s:
            detector = detector.add(float(event))
        changes |= {"detector": detector, "since": rate.since + one}
    return rate.model_copy(update=changes)


def tolerance_of(name: str, given: Mapping[str, float]) -> float:
    """The rise of a signal's rate that is no harm."""
    return given.get(name, TOLERANCES.get(name, TOLERANCE))


def tolerated(reference: Count, tolerance: float) -> float:
    """The rate above which it is harm: the upper bound of normal, and a tolerance."""
    return min(exact_upper(reference, REFERENCE_MISSED / len(RATES)) + tolerance, 0.999)


def _measure(measure: Measure, name: str, number: float, trace: str, now: float, *, ready: bool) -> Measure:
    place = MEASURES[name](number)
    changes: dict[str, object] = {
        "latest": (*measure.latest[-(LATEST - 1) :], place), "examples": (*measure.examples[-(EXAMPLES - 1) :], trace),
    }  # fmt: skip
    if not ready:
        changes["reference"] = {**measure.reference, place: measure.reference.get(place, 0) + 1}
    if now >= measure.silent_until_s:
        changes["shift"] = measure.shift.add(place, _chance(trace, name))
    return measure.model_copy(update=changes)


def _judge(state: Watch, now: float, policy: Monitor) -> Watch:
    """Alarm when the average level of harm reaches its threshold, and the same, apart, for shifts.

    The average of e-detectors is one. A named signal has reached the threshold itself; the largest always has.
    """
    threshold = float(policy.observations_per_false_alarm)
    detectors = {name: rate.detector for name, rate in state.rates.items() if rate.detector}
    if detectors and math.fsum(d.level for d in detectors.values()) >= threshold * len(RATES):
        for name in [name for name, detector in detectors.items() if detector.level >= threshold]:
            state = _harm(state, name, now, policy, level=detectors[name].level, answers=detectors[name].n)
    levels = {name: measure.shift.level for name, measure in state.measures.items()}
    if math.fsum(levels.values()) >= threshold * len(MEASURES):
        for name in [name for name, level in levels.items() if level >= threshold]:
            state = _shifted(state, name, now, policy)
    return state


def slow_harm(state: Watch, now: float, policy: Monitor) -> Watch:
    """The rule for slow harm, once a look: the risk since the reference against the reference's, at all times valid.

    P(it is ever wrongly true) ≤ 1/10, over all signals together, in the life of a release.
    """
    for name, rate in state.rates.items():
        tolerance = tolerance_of(name, policy.tolerances)
        alpha = 0.1 / len(RATES)
        if rate.risen or not rate.since.n or now < rate.silent_until_s:
            continue
        if risk_has_risen(rate.reference, rate.since, tolerance=tolerance, alpha=alpha):
            state = _harm(state, name, now, policy, level=1 / alpha, answers=rate.since.n)
            risen = state.rates[name].model_copy(update={"risen": True})
            state = state.model_copy(update={"rates": {**state.rates, name: risen}})
    return state


def _harm(state: Watch, name: str, now: float, policy: Monitor, *, level: float, answers: int) -> Watch:
    rate = state.rates[name]
    alarm = Alarm(
        signal=name, kind="harm", at_s=now, level=level, threshold=float(policy.observations_per_false_alarm),
        answers=answers, reference=rate.reference.events / rate.reference.n if rate.reference.n else None,
        now=sum(rate.latest) / len(rate.latest) if rate.latest else None, examples=rate.examples,
    )  # fmt: skip
    assert rate.detector is not None
    reset = rate.model_copy(
        update={
            "detector": Detector(null=rate.detector.null), "silent_until_s": now + policy.cool_down_hours * 3600,
        }
    )  # fmt: skip
    return state.model_copy(update={"rates": {**state.rates, name: reset}, "alarms": (*state.alarms, alarm)})


def _shifted(state: Watch, name: str, now: float, policy: Monitor) -> Watch:
    measure = state.measures[name]
    alarm = Alarm(
        signal=name, kind="shift", at_s=now, level=measure.shift.level, examples=measure.examples,
        threshold=float(policy.observations_per_false_alarm), answers=measure.shift.n,
    )  # fmt: skip
    # What came after the change is the new normal.
    reset = measure.model_copy(update={"shift": Shift(), "silent_until_s": now + policy.cool_down_hours * 3600})
    return state.model_copy(update={"measures": {**state.measures, name: reset}, "alarms": (*state.alarms, alarm)})


def next_release(state: Watch, release: str) -> Watch:
    """A new release serves: what was normal is measured anew, and what was normal before is kept for comparison."""
    before = {name: rate.reference for name, rate in state.rates.items() if rate.reference.n}
    return Watch(release=release, before=before)


def worse_than_before(state: Watch, tolerances: Mapping[str, float]) -> tuple[str, ...]:
    """Signals whose normal is worse than under the release before, beyond the tolerance.

    Only the reference counts, the first answers after the promotion: what begins later is not the release's fault.
    """
    alpha = 0.1 / len(RATES)
    return tuple(
        name
        for name, before in state.before.items()
        if risk_has_risen(before, state.rates[name].reference, tolerance=tolerance_of(name, tolerances), alpha=alpha)
    )


def _pace(trace: Trace) -> float | None:
    return trace.duration_s / trace.completion_tokens if trace.completion_tokens >= 8 else None


def _chance(trace: str, measure: str) -> float:
    """A uniform number that only the trace's id decides: a replay gives the same ranks."""
    return int.from_bytes(blake2b(f"{measure}\0{trace}".encode(), digest_size=7).digest(), "big") / 2**56
