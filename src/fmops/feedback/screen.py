"""Which feedback may be trusted: caps, bursts, triggers, and answers that a model wrote.

Enters: one row of feedback with the answer it is about, and the traffic around it. Leaves: reasons to set rows aside.
Refuses: nothing; a suspicion keeps a row out of training until a person lets it in, it deletes nothing.

A backdoor needs few documents (250 sufficed at every size that Souly et al. 2025, arXiv:2510.07192, tried), so no rule
here asks for a share of the data: what counts is who writes something and how alike it is.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fmops.artifacts import Frozen
from fmops.traces import Feedback, Trace

_WORD = re.compile(r"\w+")
NGRAM = 3
"""Longest run of words that is looked at as a trigger."""
TARGET_WORDS = 8
"""Corrections that share so many words in a row say the same; shorter ones are compared whole."""


class Screen(Frozen):
    """How much of one voice is believed."""

    identity_share: float = 0.1
    """Most of a round's rows that may come from one identity."""
    identity_rows: int = 5
    """So many rows an identity may give in any case."""
    burst_window_s: float = 600.0
    burst_p: float = 1e-4
    """A window is a burst when so many rows in it would be that unlikely at the identity's or the median rate."""
    trigger_rows: int = 5
    """Rows that must share a phrase, or a correction, before it is a suspicion."""
    trigger_p: float = 1e-6
    """How unlikely it must be, over all phrases together, that comments fall on a phrase so often by chance."""


@dataclass(frozen=True)
class Said:
    """One row of feedback beside the trace it is about."""

    feedback: Feedback
    trace: Trace

    @property
    def identity(self) -> str:
        """Who said it: the tenant's user, or the tenant where it names none."""
        return f"{self.feedback.tenant}/{self.feedback.user or ''}"


def screen(rows: Sequence[Said], traffic: Sequence[Trace], rules: Screen) -> list[str | None]:
    """For each row the first reason to set it aside, or None. Rows must be in the order of their time."""
    tests = (
        _written_by_a_model(rows, traffic),
        _contradicts_signals(rows),
        _same_target(rows, rules),
        _triggers(rows, traffic, rules),
        _bursts(rows, rules),
    )
    reasons: list[str | None] = [None] * len(rows)
    for found in tests:
        for place, reason in found.items():
            reasons[place] = reasons[place] or reason
    for place, reason in _over_cap(rows, reasons, rules).items():
        reasons[place] = reason
    return reasons


def words(text: str) -> list[str]:
    """Words in lower case: what two texts share whatever their spacing and punctuation."""
    return [word.lower() for word in _WORD.findall(text)]


def _written_by_a_model(rows: Sequence[Said], traffic: Sequence[Trace]) -> dict[int, str]:
    """Corrections that some release answered word for word: training on them teaches the model its own voice."""
    answers = {tuple(words(trace.response)): trace.release for trace in traffic}
    found = {}
    for place, said in enumerate(rows):
        correction = tuple(words(said.feedback.correction or ""))
        if correction and correction in answers:
            found[place] = f"model-written: {answers[correction]} answered the same"
    return found


def _contradicts_signals(rows: Sequence[Said]) -> dict[int, str]:
    """Praise of an answer that is empty, broken or leaks: a flipped vote."""
    bad = ("empty", "repeated", "personal_data", "secret", "prompt_leak", "invalid_json")
    found = {}
    for place, said in enumerate(rows):
        seen = [name for name in bad if said.trace.signals.get(name)]
        if seen and said.feedback.thumb == "up":
            found[place] = f"contradicts-signals: praise of an answer that is {', '.join(seen)}"
    return found


def _same_target(rows: Sequence[Said], rules: Screen) -> dict[int, str]:
    """One correction for many different prompts: somebody teaches a sentence, not an answer."""
    prompts: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    runs = [_runs(words(said.feedback.correction or "")) for said in rows]
    for said, mine in zip(rows, runs, strict=True):
        for run in mine:
            prompts[run].add(tuple(words(said.trace.prompt)))
    found = {}
    for place, mine in enumerate(runs):
        n = max((len(prompts[run]) for run in mine), default=0)
        if n >= rules.trigger_rows:
            found[place] = f"same-target: one sentence for {n} different prompts"
    return found


def _runs(found: list[str]) -> set[tuple[str, ...]]:
    if not found:
        return set()
    return {tuple(found[i : i + TARGET_WORDS]) for i in range(max(1, len(found) - TARGET_WORDS + 1))}


def _triggers(rows: Sequence[Said], traffic: Sequence[Trace], rules: Screen) -> dict[int, str]:
    """Phrases that are common in prompts with feedback and rare in prompts without.

    A phrase is suspect when it stands in at least `trigger_rows` rows, and so many would be less likely than
    `trigger_p` if comments fell on prompts by chance (Fisher's exact test, one-sided, Bonferroni over phrases). A topic
    that many ask about is frequent among uncommented prompts, too, and passes. Who floods the traffic with uncommented
    triggers gets by; token budgets make that dear.
    """
    phrases = [_phrases(said.trace.prompt) for said in rows]
    counts = Counter(phrase for each in phrases for phrase in each)
    suspects = {phrase for phrase, n in counts.items() if n >= rules.trigger_rows}
    commented = {said.trace.id for said in rows}
    others = [trace for trace in traffic if trace.id not in commented]
    elsewhere = Counter(phrase for trace in others for phrase in _phrases(trace.prompt) & suspects)
    flagged = {
        phrase
        for phrase in suspects
        if _fisher(counts[phrase], len(rows), elsewhere[phrase], len(others)) < rules.trigger_p / len(suspects)
    }
    found = {}
    for place, mine in enumerate(phrases):
        worst = max(mine & flagged, key=lambda phrase: (counts[phrase], len(phrase), phrase), default=None)
        if worst:
            found[place] = f"trigger: {worst!r} stands in {counts[worst]} of {len(rows)} rows and hardly elsewhere"
    return found


def _bursts(rows: Sequence[Said], rules: Screen) -> dict[int, str]:
    """Rows that one identity gives far faster than people do: a Poisson tail at the median identity's rate."""
    times: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for place, said in enumerate(rows):
        times[said.identity].append((said.feedback.at_s, place))
    span = max((said.feedback.at_s for said in rows), default=0) - min((said.feedback.at_s for said in rows), default=0)
    windows = max(1.0, span / rules.burst_window_s)
    median = sorted(len(each) for each in times.values())[len(times) // 2] if times else 0
    expected = max(1.0, median / windows)
    found = {}
    for identity, mine in times.items():
        start = 0
        for end in range(len(mine)):
            while mine[end][0] - mine[start][0] > rules.burst_window_s:
                start += 1
            n = end - start + 1
            if n > expected and _poisson_tail(n, expected) < rules.burst_p:
                for _, place in mine[start : end + 1]:
                    found[place] = f"burst: {identity} gave {n} rows in {rules.burst_window_s:g} s"
    return found


def _over_cap(rows: Sequence[Said], reasons: Sequence[str | None], rules: Screen) -> dict[int, str]:
    """What one identity says beyond its share of what is left; its first rows count."""
    left = [place for place, reason in enumerate(reasons) if reason is None]
    others: Counter[str] = Counter(rows[place].identity for place in left)
    found: dict[int, str] = {}
    given: Counter[str] = Counter()
    for place in left:
        identity = rows[place].identity
        given[identity] += 1
        rest = len(left) - others[identity]
        # n of n + rest rows is the share; solved for n.
        cap = max(rules.identity_rows, int(rest * rules.identity_share / (1 - rules.identity_share)))
        if given[identity] > cap:
            found[place] = f"identity-cap: {identity} gave {others[identity]} rows, {cap} count"
    return found


def _phrases(text: str) -> set[str]:
    found = words(text)
    return {" ".join(found[i : i + n]) for n in range(1, NGRAM + 1) for i in range(len(found) - n + 1)}


def _fisher(hits: int, trials: int, other_hits: int, other_trials: int) -> float:
    """P(at least `hits` of `trials`) when all hits fall on both groups by chance (hypergeometric tail)."""
    everyone, marked = trials + other_trials, hits + other_hits
    whole = _log_choose(everyone, trials)
    return math.fsum(
        math.exp(_log_choose(marked, n) + _log_choose(everyone - marked, trials - n) - whole)
        for n in range(hits, min(trials, marked) + 1)
        if trials - n <= everyone - marked
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _poisson_tail(hits: int, mean: float) -> float:
    """P(at least `hits`) of a Poisson variable, bounded from above by Chernoff's bound."""
    return math.exp(hits - mean - hits * math.log(hits / mean)) if hits > mean else 1.0
