"""The promises of the canary and of the monitor, checked on simulated production.

Enters: numbers of runs. Leaves: rates with Clopper–Pearson bounds beside what is promised; JSON.
Refuses: nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from scipy.stats import beta

from benchmarks.simulated import RATES, Production
from fmops.deployment.monitoring.meaning import Code
from fmops.deployment.monitoring.watch import MEASURES, Watch, slow_harm, watch
from fmops.deployment.rollout.evidence import Evidence, observe
from fmops.deployment.rollout.machine import SetTraffic, State, advance, detectable
from fmops.production import Monitor, Rollout

POLICY = Rollout(shadow=0.0, steps=(0.1, 0.5))


def bounds(hits: int, n: int) -> tuple[float, float]:
    """95 % Clopper–Pearson interval of a rate."""
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))
    return low, high


def rate(hits: int, n: int) -> dict[str, Any]:
    low, high = bounds(hits, n)
    return {"hits": hits, "n": n, "rate": hits / n, "low": low, "high": high}


def rollout(
    production: Production, policy: Rollout, *, most: int = 60_000, look: int = 100
) -> tuple[State, Evidence, int]:
    """One rollout from its checks to its end, or `most` requests; looked at every `look` requests."""
    state = State(
        id="r", champion=production.champion, challenger=production.challenger, started_s=production.now_s,
        entered_s=production.now_s,
    )  # fmt: skip
    evidence = Evidence.none_yet(production.champion, production.challenger, policy.margins)
    served = 0
    while served < most:
        state, actions = advance(state, evidence, policy, production.now_s, refused=())
        if state.phase in ("promoted", "rolled back"):
            break
        traffic = actions[-1]
        assert isinstance(traffic, SetTraffic)
        share = traffic.canary
        if share != (evidence.shares[-1][1] if evidence.shares else 0.0):
            evidence = evidence.share_changed(production.now_s, share)
        evidence = observe(evidence, production.serve(look, canary=share, shadow=traffic.shadow))
        served += look
    return state, evidence, served


def canary(
    runs: int, harm: Mapping[str, float], *, policy: Rollout = POLICY, slower: float = 1.0, rhythm: float = 0.0
) -> dict[str, Any]:
    """Many rollouts with the same harm: how they end, and after how many canary answers."""
    ends, answers, requests, seen = {"promoted": 0, "rolled back": 0, "undecided": 0}, [], [], []
    for seed in range(runs):
        # With a rhythm a rollout takes about a day, otherwise some minutes.
        production = Production(seed=seed, harm=harm, slower=slower, rhythm=rhythm, per_second=0.03 if rhythm else 5)
        state, evidence, served = rollout(production, policy)
        phase = state.phase if state.phase in ends else "undecided"
        ends[phase] += 1
        if phase == "rolled back":
            seen.append(evidence.canary_answers)
        answers.append(evidence.canary_answers)
        requests.append(served)
    return {
        "harm": dict(harm), "slower": slower, "runs": runs,
        "rolled_back": rate(ends["rolled back"], runs), "promoted": rate(ends["promoted"], runs),
        "undecided": ends["undecided"],
        "canary_answers_to_rollback": spread(seen), "canary_answers": spread(answers), "requests": spread(requests),
    }  # fmt: skip


def spread(values: list[int]) -> dict[str, float] | None:
    """Median and 90 % range."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p05": ordered[int(0.05 * (len(ordered) - 1))],
        "p95": ordered[int(0.95 * (len(ordered) - 1))],
    }


def canaries(runs: int) -> dict[str, Any]:
    """A/A, harms by size, and a harm just beyond a margin, which must not be promoted."""
    table = {
        "A/A": canary(runs, {}),
        "A/A, rates and latencies swing by half over the day": canary(runs, {}, rhythm=0.5),
        "A/A with half of the requests mirrored first": canary(
            runs // 2, {}, policy=POLICY.model_copy(update={"shadow": 0.5})
        ),
        "refused +0.05 (margin 0.05)": canary(runs, {"refused": 0.05}),
        "refused +0.10": canary(runs // 2, {"refused": 0.10}),
        "empty +0.02 (margin 0.02)": canary(runs, {"empty": 0.02}),
        "empty +0.05": canary(runs // 2, {"empty": 0.05}),
        "failed +0.10": canary(runs // 2, {"failed": 0.10}),
        "secret +0.01": canary(runs // 2, {"secret": 0.01}),
        "five signals +0.02": canary(
            runs // 2, dict.fromkeys(("failed", "empty", "refused", "truncated", "repeated"), 0.02)
        ),
        "latency x1.5": canary(runs // 2, {}, slower=1.5),
        "better: refused -0.03": canary(runs // 4, {"refused": -0.03}),
    }
    _, evidence, _ = rollout(Production(seed=0, per_second=5), POLICY)
    return {
        "policy": POLICY.model_dump(mode="json"),
        "promises": {"A/A rolled back": POLICY.alpha, "promoted at the margin": POLICY.alpha},
        "minimum_detectable_harm": [detectable(evidence, POLICY, step) for step in range(len(POLICY.steps))],
        "runs": table,
    }


MONITOR = Monitor()
DAY = 400
"""Answers a day."""
BEFORE = 2000
"""Answers in control before a change, the reference included."""


Coder = Callable[[str], Code]


def drift_run(seed: int, change: Callable[[Production, int], None], answers: int, code: Coder | None = None) -> Watch:
    """Answers in control, then as `change` makes them (it is told how many answers ago the change began).

    Without `code` nothing is said about what prompts mean.
    """
    production = Production(
        seed=seed, topics={"python": 0.7, "cooking": 0.3}, log_probability=-1.0, per_second=DAY / 86_400
    )

    def taken(state: Watch, count: int) -> Watch:
        traces = [*production.serve(count)]
        codes = {trace.id: code(trace.prompt) for trace in traces} if code else None
        return watch(state, traces, (), MONITOR, codes)

    state = taken(Watch(release=production.champion), BEFORE)
    for start in range(0, answers, 25):
        change(production, start)
        state = slow_harm(taken(state, 25), production.now_s, MONITOR)
    return state


def unchanged(production: Production, since: int) -> None:
    """In control."""


def rates(**added: float) -> Callable[[Production, int], None]:
    """A step in the rates of signals."""

    def change(production: Production, since: int) -> None:
        production.rates = {**RATES, **{name: RATES[name] + more for name, more in added.items()}}

    return change


def gradual(production: Production, since: int) -> None:
    """Refusals rise from 4 to 14 % over 4,000 answers."""
    production.rates = {**RATES, "refused": RATES["refused"] + 0.1 * min(1.0, since / 4000)}


def topics(production: Production, since: int) -> None:
    """Half of the users ask about something else."""
    production.topics = {"python": 0.35, "cooking": 0.15, "medicine": 0.5}


def longer(production: Production, since: int) -> None:
    """Answers are half as long again."""
    production.longer = 1.5


def doubtful(production: Production, since: int) -> None:
    """Answers are less likely under the model by 0.2 nats a token, one standard deviation."""
    production.log_probability = -1.2


def seasonal(production: Production, since: int) -> None:
    """Benign: by day people ask about Python, in the evening about cooking, and answers follow, every day."""
    evening = 0.5 + 0.5 * math.sin(2 * math.pi * production.now_s / 86_400)
    production.topics = {"python": 1 - 0.6 * evening, "cooking": 0.6 * evening}
    production.longer = 1 + 0.2 * evening


DRIFTS: dict[str, tuple[Callable[[Production, int], None], str, str, int]] = {
    # name: change, kind and signal that should alarm, answers
    "quality: refused +0.05": (rates(refused=0.05), "harm", "refused", 6000),
    "quality: refused +0.10": (rates(refused=0.10), "harm", "refused", 3000),
    "quality: repeated +0.10": (rates(repeated=0.10), "harm", "repeated", 3000),
    "safety: secret +0.03": (rates(secret=0.03), "harm", "secret", 3000),
    "language: wrong +0.20": (rates(wrong_language=0.20), "harm", "wrong_language", 3000),
    "infrastructure: failed +0.20": (rates(failed=0.20), "harm", "failed", 3000),
    "gradual: refused to +0.10": (gradual, "harm", "refused", 6000),
    "topic: half are new": (topics, "shift", "topic", 3000),
    "length: x1.5": (longer, "shift", "words", 3000),
    "log-probability: -0.2": (doubtful, "shift", "log_probability", 3000),
}


def quiet(runs: int, seed: int, code: Coder | None = None) -> dict[str, Any]:
    """Thirty days in control, and thirty days of benign seasons."""
    month = 30 * DAY
    same = [drift_run(seed + n, unchanged, month - BEFORE, code) for n in range(runs)]
    season = [drift_run(seed + n, seasonal, month - BEFORE, code) for n in range(runs // 2)]
    return {
        "answers_a_day": DAY,
        # P(alarm within n) ≤ n/A for each kind, plus the slow rule's 0.1 for harm.
        "promises": {
            "harm in 30 days": month / MONITOR.observations_per_false_alarm + 0.1,
            "shift in 30 days": month / MONITOR.observations_per_false_alarm,
        },
        "in_control": {kind: rate(raised(same, kind), len(same)) for kind in ("harm", "shift")},
        "shifted": {name: sum(any(a.signal == name for a in state.alarms) for state in same) for name in MEASURES},
        "seasonal": {kind: rate(raised(season, kind), len(season)) for kind in ("harm", "shift")},
    }


def drifts(runs: int, seed: int, code: Coder | None = None) -> dict[str, Any]:
    """Each kind of drift."""
    table = {}
    for name, (change, kind, signal, answers) in DRIFTS.items():
        states = [drift_run(1000 + seed + n, change, answers, code) for n in range(runs)]
        table[name] = drift_row(states, kind, signal)
    return {"policy": MONITOR.model_dump(mode="json"), "table": table}


def raised(states: Sequence[Watch], kind: str) -> int:
    return sum(any(alarm.kind == kind for alarm in state.alarms) for state in states)


def drift_row(states: Sequence[Watch], kind: str, signal: str) -> dict[str, Any]:
    """How many runs were found, after how many answers, and how many alarmed otherwise."""
    delays, early, others = [], 0, 0
    for state in states:
        start = 1_800_000_000.0 + BEFORE * 86_400 / DAY
        right = [alarm for alarm in state.alarms if (alarm.kind, alarm.signal) == (kind, signal)]
        after = [alarm for alarm in right if alarm.at_s >= start]
        early += any(alarm.at_s < start for alarm in state.alarms)
        others += any(alarm.kind == "harm" and alarm not in right for alarm in state.alarms)
        if after:
            delays.append(round((after[0].at_s - start) / 86_400 * DAY))
    n = len(states)
    return {
        "alarm": f"{kind}: {signal}", "found": rate(len(delays), n), "answers_to_alarm": spread(delays),
        "before_the_change": rate(early, n), "other_harm_alarms": rate(others, n),
    }  # fmt: skip


def show_quiet(found: Mapping[str, Any]) -> None:
    """Alarms while nothing is wrong."""
    print("in control, runs with a shift alarm by measure:", found["shifted"])
    for name in ("in_control", "seasonal"):
        for kind, r in found[name].items():
            print(f"{name} 30 days, {kind}: {r['hits']} of {r['n']} runs ({r['low']:.3f}–{r['high']:.3f})")


def show_drift(found: Mapping[str, Any]) -> None:
    """The drift table."""
    for name, row in found["table"].items():
        delay = row["answers_to_alarm"] or {"median": math.nan, "p95": math.nan}
        r = row["found"]
        print(
            f"{name:30} found {r['hits']} of {r['n']} ({r['low']:.3f}–{r['high']:.3f}), median delay "
            f"{delay['median']:.0f} (95 %: {delay['p95']:.0f}) answers, too early {row['before_the_change']['hits']}, "
            f"other harm alarms {row['other_harm_alarms']['hits']}"
        )


def show(name: str, found: Mapping[str, Any]) -> None:
    """One line of a canary's table."""
    back, up = found["rolled_back"], found["promoted"]
    delay = found["canary_answers_to_rollback"] or {"median": float("nan")}
    print(
        f"{name:28} n {back['n']:5} rolled back {back['rate']:.3f} ({back['low']:.3f}–{back['high']:.3f}) "
        f"promoted {up['rate']:.3f} ({up['low']:.3f}–{up['high']:.3f}) undecided {found['undecided']} "
        f"median answers to rollback {delay['median']:.0f}, requests {found['requests']['median']:.0f}",
        flush=True,
    )


def prompt_codes(folder: Path) -> Coder:
    """What puts prompts into codes; a text is put into one once."""
    from fmops.adapters.prompt_codes import PromptCodes

    return lru_cache(maxsize=100_000)(PromptCodes(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["canary", "quiet", "drift"])
    parser.add_argument("--runs", type=int, help="Default: 300 for canary, 60 for quiet, 24 for drift.")
    parser.add_argument("--seed", type=int, default=0, help="First seed, of quiet and drift.")
    parser.add_argument("--model", type=Path, help="Folder whose embeddings say what prompts mean; not of canary.")
    parser.add_argument("--out", type=Path, help="Add the part to this JSON file.")
    given = parser.parse_args()
    started = time.process_time()
    code = prompt_codes(given.model) if given.model else None
    if given.part == "canary":
        found = canaries(given.runs or 300)
        for name, row in found["runs"].items():
            show(name, row)
    elif given.part == "quiet":
        found = quiet(given.runs or 60, given.seed, code)
        show_quiet(found)
    else:
        found = drifts(given.runs or 24, given.seed, code)
        show_drift(found)
    found["cpu_s"] = time.process_time() - started
    if given.out:
        results = json.loads(given.out.read_text()) if given.out.is_file() else {}
        given.out.write_text(json.dumps({**results, given.part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
