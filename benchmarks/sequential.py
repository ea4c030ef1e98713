"""The promises of the canary and of the monitor, checked on simulated production.

Enters: numbers of runs. Leaves: rates with Clopper–Pearson bounds beside what is promised; JSON.
Refuses: nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy.stats import beta

from benchmarks.simulated import Production
from fmops.deployment.rollout.evidence import Evidence, observe
from fmops.deployment.rollout.machine import State, advance, detectable
from fmops.lifecycle import Rollout

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
        share = actions[-1].canary  # type: ignore[union-attr]
        if share != (evidence.shares[-1][1] if evidence.shares else 0.0):
            evidence = evidence.share_changed(production.now_s, share)
        evidence = observe(evidence, production.serve(look, canary=share))
        served += look
    return state, evidence, served


def canary(runs: int, harm: Mapping[str, float], *, policy: Rollout = POLICY, slower: float = 1.0) -> dict[str, Any]:
    """Many rollouts with the same harm: how they end, and after how many canary answers."""
    ends, answers, requests, seen = {"promoted": 0, "rolled back": 0, "undecided": 0}, [], [], []
    for seed in range(runs):
        state, evidence, served = rollout(Production(seed=seed, harm=harm, slower=slower, per_second=5), policy)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    started = time.process_time()
    results: dict[str, Any] = {"canary": canaries(given.runs)}
    for name, found in results["canary"]["runs"].items():
        show(name, found)
    results["cpu_s"] = time.process_time() - started
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
