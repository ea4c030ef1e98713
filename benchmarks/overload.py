"""Five times the capacity for a minute: what is still answered, what is turned away, and how soon it is over.

Enters: nothing; a tiny model behind `fmops up`. Leaves: a curve second by second, and JSON.
Refuses: to slow down with the servers: arrivals are Poisson at a multiple of the measured capacity (open loop).

    python -m benchmarks.overload [--seconds 60] [--times 5] [--out benchmarks/results/overload-DATE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.rollout import House, Outcome, ask, capacity

RECOVERY_S = 15.0
"""Watched after the flood, at a quarter of the capacity."""


async def phase(session: aiohttp.ClientSession, url: str, *, rate: float, seconds: float) -> list[Outcome]:
    """Requests at random times, `rate` a second, for so long; returns when all have ended."""
    chance = random.Random(0)
    tasks: list[asyncio.Task[Outcome]] = []
    at = time.perf_counter()
    end = at + seconds
    while (at := at + chance.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.ensure_future(ask(session, url, len(tasks))))
    return list(await asyncio.gather(*tasks))


async def refusal(session: aiohttp.ClientSession, url: str) -> tuple[int, str | None]:
    """Status and Retry-After of one request more."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "One more?"}], "max_tokens": 1}
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        await answer.read()
        return answer.status, answer.headers.get("Retry-After")


async def probe(session: aiohttp.ClientSession, url: str, *, seconds: float) -> list[tuple[int, str | None]]:
    """A look at how it refuses, each second."""
    seen = []
    for _ in range(int(seconds)):
        await asyncio.sleep(1)
        seen.append(await refusal(session, url))
    return seen


async def memory(processes: list[psutil.Process], found: list[float]) -> None:
    """Megabytes of all processes together, twice a second, until cancelled."""
    while True:
        found.append(sum(process.memory_info().rss for process in processes) / 1e6)
        await asyncio.sleep(0.5)


async def flood(house: House, processes: list[psutil.Process], *, times: float, seconds: float) -> dict[str, Any]:
    """Capacity, the flood, the recovery, and the capacity again: the machine may be busy otherwise."""
    before = await capacity(house.url, house.key, requests=200)
    held: list[float] = []
    watch = asyncio.ensure_future(memory(processes, held))
    headers = {"Authorization": f"Bearer {house.key}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
        start = time.perf_counter()
        looks = asyncio.ensure_future(probe(session, house.url, seconds=seconds))
        outcomes = await phase(session, house.url, rate=times * before, seconds=seconds)
        over = time.perf_counter()
        refusals = await looks
        calm = await phase(session, house.url, rate=before / 4, seconds=RECOVERY_S)
    after = await capacity(house.url, house.key, requests=200)
    watch.cancel()
    return {
        "capacity_per_s": {"before": round(before, 1), "after": round(after, 1)},
        "offered_per_s": round(times * before, 1), "seconds": seconds,
        **curve(outcomes, start=start, seconds=seconds, peak=statistics.mean((before, after))),
        "refused_by_status": dict(Counter(str(status) for status, _ in refusals if status != 200)),
        "refused_with_retry_after": sum(wait is not None for status, wait in refusals if status != 200),
        "last_answer_after_the_flood_s": round(over - start - seconds, 2),
        "recovered_after_s": recovered(calm, since=start + seconds),
        "memory_mb": {"first": round(held[0]), "most": round(max(held)), "last": round(held[-1])},
    }  # fmt: skip


def curve(outcomes: list[Outcome], *, start: float, seconds: float, peak: float) -> dict[str, Any]:
    """Whole answers by the second in which they ended, beside the peak; and all that went otherwise, by kind."""
    served = [one for one in outcomes if one.fault is None]
    ended = Counter(int(one.started + one.seconds - start) for one in served)
    a_second = [ended[second] for second in range(int(seconds))]
    # In the first seconds places fill up.
    steady = a_second[5:] if len(a_second) > 10 else a_second
    faults = Counter(" ".join(one.fault.split()[:2]) for one in outcomes if one.fault)
    waits = sorted(one.seconds for one in served)
    return {
        "requests": len(outcomes), "served": len(served), "otherwise": dict(faults),
        "goodput_per_s": round(statistics.mean(steady), 1), "goodput_of_peak": round(statistics.mean(steady) / peak, 3),
        "served_s": {"p50": round(waits[len(waits) // 2], 3), "p99": round(waits[len(waits) * 99 // 100], 3)},
        "served_by_second": a_second,
    }  # fmt: skip


def recovered(calm: list[Outcome], *, since: float) -> float | None:
    """Seconds from the flood's end to the first request after which none was refused."""
    last = max((one.started for one in calm if one.fault), default=None)
    rest = [one.started for one in calm if last is None or one.started > last]
    return round(max(0.0, min(rest) - since), 2) if rest else None


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--times", type=float, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as scratch:
        house = House(Path(scratch))
        try:
            everyone = psutil.process_iter(["cmdline"])
            servers = [one for one in everyone if scratch in " ".join(one.info["cmdline"] or ())]
            found = asyncio.run(flood(house, servers, times=given.times, seconds=given.seconds))
        finally:
            house.run("down")
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
