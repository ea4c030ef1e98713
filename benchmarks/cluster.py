"""Failures on a large cluster: how much of the time ends in the model.

    python -m benchmarks.cluster

One job holds all its nodes at once (a gang). Devices fail at random at the rate of Llama 3's, eight to a node. A
failure loses the work since the last whole checkpoint; the job waits for a spare node if there is one, else for a
repair, then for the restart; a second failure meanwhile begins the restart anew. Checkpoints stop the job for a
moment. No failure is correlated, none is silent, and the rate is constant: all three are kinder than reality. Prints a
table over spares and intervals beside the formula of fmops.orchestration.sizing, and writes
benchmarks/results/cluster-DATE.json.
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


def main() -> None:
    """Simulate 54 days at 16,384 devices, twenty times each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=16_384)
    parser.add_argument("--days", type=float, default=54)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    between_s = DEVICE_FAILURE_H * 3600 / options.devices
    rows = []
    print(
        f"{options.devices:,} devices, one failure in {between_s / 3600:.2f} h, {options.days:g} days, "
        f"{options.runs} runs"
    )
    print(
        f"{'checkpoint':>10} {'every':>9} {'spares':>6} {'goodput (range)':>24} {'formula':>8} {'failures':>8} "
        f"{'waited':>8}"
    )
    for checkpoint_s in (5.0, 60.0):
        best = young_daly(checkpoint_s, between_s)
        for every_s in (best / 4, best, best * 4):
            for spares in (0, 8, 64):
                run = Run(options.devices, checkpoint_s, RESTART_S, every_s, spares)
                seen = [simulate(run, hours=24 * options.days, seed=seed) for seed in range(options.runs)]
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
    path = Path(__file__).parent / "results" / f"cluster-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps({"days": options.days, "runs": options.runs, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
