"""A large cluster: how much of its time ends in models, one gang alone and many jobs under the queue's policies.

    python -m benchmarks.cluster

**One gang** holds all its nodes at once. Devices fail at random at the rate of Llama 3's, eight to a node. A failure
loses the work since the last whole checkpoint; the job waits for a spare node if there is one, else for a repair, then
for the restart; a second failure meanwhile begins the restart anew. Checkpoints stop the job for a moment. No failure
is correlated, none is silent, and the rate is constant: all three are kinder than reality. A table over spares and
intervals beside the formula of fmops.orchestration.sizing.

**Many jobs** (benchmarks.scheduler_mix) on 16,384 devices, the same ones under each policy of the queue. Both are
written to benchmarks/results/cluster-DATE.json.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.scheduler_mix import CLUSTER, HOURS, MIX, MIX_COLUMNS, POLICIES, simulated
from fmops.orchestration.sizing import DEVICE_FAILURE_H, RESTART_S, goodput, young_daly

DEVICES_A_NODE = 8


@dataclass(frozen=True)
class Run:
    """One job on a cluster."""

    devices: int
    checkpoint_s: float
    restart_s: float
    every_s: float
    spare_nodes: int
    repair_h: float = 24.0
    """Until a failed node is a spare again."""


@dataclass(frozen=True)
class Seen:
    """What one simulated run came to."""

    goodput: float
    failures: int
    waited_h: float
    """For a node, there being no spare."""


def simulate(run: Run, *, hours: float, seed: int) -> Seen:
    """Run so many hours; failures are exponential, also during checkpoints, waits and restarts."""
    random = Random(seed)
    rate = run.devices / (DEVICE_FAILURE_H * 3600)
    end, now, kept, waited = hours * 3600, 0.0, 0.0, 0.0
    spares, repairs, failures = run.spare_nodes, list[float](), 0
    segment = run.every_s + run.checkpoint_s
    failure = random.expovariate(rate)
    while now < end:
        if now + segment <= failure:
            now, kept = now + segment, kept + run.every_s
            continue
        failures, now = failures + 1, failure
        heapq.heappush(repairs, now + run.repair_h * 3600)
        while repairs and repairs[0] <= now:
            heapq.heappop(repairs)
            spares += 1
        if spares:
            spares -= 1
        else:
            back = heapq.heappop(repairs)
            waited, now = waited + back - now, back
        failure = now + random.expovariate(rate)
        while failure < now + run.restart_s:
            # It fails again before it is up: the restart begins anew.
            failures, now = failures + 1, failure
            heapq.heappush(repairs, now + run.repair_h * 3600)
            spares = max(0, spares - 1)
            failure = now + random.expovariate(rate)
        now += run.restart_s
    return Seen(kept / now, failures, waited / 3600)


def gangs(*, devices: int, days: float, runs: int) -> list[dict[str, float]]:
    """Print and return the table of one gang: goodput over intervals and spares."""
    between_s = DEVICE_FAILURE_H * 3600 / devices
    print(f"{devices:,} devices, one failure in {between_s / 3600:.2f} h, {days:g} days, {runs} runs")
    print(
        f"{'checkpoint':>10} {'every':>9} {'spares':>6} {'goodput (range)':>24} {'formula':>8} {'failures':>8} "
        f"{'waited':>8}"
    )
    rows = []
    for checkpoint_s in (5.0, 60.0):
        best = young_daly(checkpoint_s, between_s)
        for every_s in (best / 4, best, best * 4):
            for spares in (0, 8, 64):
                run = Run(devices, checkpoint_s, RESTART_S, every_s, spares)
                seen = [simulate(run, hours=24 * days, seed=seed) for seed in range(runs)]
                good = sorted(each.goodput for each in seen)
                said = goodput(every_s, checkpoint_s=checkpoint_s, between_failures_s=between_s, restart_s=RESTART_S)
                row = asdict(run) | {
                    "goodput": statistics.median(good), "lowest": good[0], "highest": good[-1], "formula": said,
                    "failures": statistics.median(each.failures for each in seen),
                    "waited_h": statistics.median(each.waited_h for each in seen),
                }  # fmt: skip
                rows.append(row)
                shown = f"{row['goodput']:.3f} ({good[0]:.3f}–{good[-1]:.3f})"
                print(
                    f"{checkpoint_s:8.0f} s {every_s:7.0f} s {spares:6d} {shown:>24} {said:8.3f} "
                    f"{row['failures']:8.0f} {row['waited_h']:6.1f} h"
                )
    return rows


def policies(*, runs: int) -> dict[str, Any]:
    """Print and return what each policy makes of the same jobs and failures: median, lowest, highest over the seeds."""
    mix = [dict(zip(MIX_COLUMNS, row, strict=True)) for row in MIX]
    result: dict[str, Any] = {"cluster": asdict(CLUSTER), "hours": HOURS, "runs": runs, "mix": mix, "policies": []}
    first: list[dict[str, float]] = []
    for policy in POLICIES:
        seen = [simulated(policy, seed) for seed in range(runs)]
        first = first or seen
        figures = {name: _middle([each[name] for each in seen]) for name in seen[0]}
        gained = {
            name: _middle([each[name] - before[name] for each, before in zip(seen, first, strict=True)])
            for name in ("goodput", "goodput of the large gang")
        }
        result["policies"].append({"policy": asdict(policy), "figures": figures, "against as configured": gained})
        print(f"\n{policy.name}")
        for name, (middle, lowest, highest) in figures.items():
            print(f"  {name:28} {middle:10.4f} ({lowest:.4f}–{highest:.4f})")
    return result


def _middle(values: list[float]) -> list[float]:
    return [round(value, 5) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    """Simulate 54 days of one gang, and three weeks of many jobs under each policy, twenty times each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=16_384, help="of the one gang")
    parser.add_argument("--days", type=float, default=54, help="of the one gang")
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    rows = gangs(devices=options.devices, days=options.days, runs=options.runs)
    found = {"days": options.days, "runs": options.runs, "rows": rows, "scheduler": policies(runs=options.runs)}
    path = Path(__file__).parent / "results" / f"cluster-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
