"""Five times the capacity for a minute: what is still answered, what is turned away, and how soon it is over.

Enters: nothing; a tiny model behind `fmops up`. Leaves: curves second by second, JSON, docs/images/overload.svg.
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

CALM_S = 15.0
"""Before and after the flood, at half of the capacity."""
PATIENCE = 2.0
"""It is over when answers take no longer than so many times their 95th percentile before the flood."""
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "overload.svg"


async def arrivals(
    session: aiohttp.ClientSession, url: str, *, rate: float, seconds: float, chance: random.Random
) -> list[asyncio.Task[Outcome]]:
    """Requests at random times, `rate` a second, for so long; returns when the last was sent."""
    tasks: list[asyncio.Task[Outcome]] = []
    at = time.perf_counter()
    end = at + seconds
    while (at := at + chance.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.ensure_future(ask(session, url, len(tasks))))
    return tasks


async def probe(session: aiohttp.ClientSession, url: str, found: list[tuple[int, str | None]]) -> None:
    """Status and Retry-After of one more request each second, until cancelled."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "One more?"}], "max_tokens": 1}
    while True:
        await asyncio.sleep(1)
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            await answer.read()
            found.append((answer.status, answer.headers.get("Retry-After")))


async def memory(processes: list[psutil.Process], found: list[float]) -> None:
    """Megabytes of all processes together, twice a second, until cancelled."""
    while True:
        found.append(sum(process.memory_info().rss for process in processes) / 1e6)
        await asyncio.sleep(0.5)


async def flood(house: House, processes: list[psutil.Process], *, times: float, seconds: float) -> dict[str, Any]:
    """Calm, the flood, calm again, without a pause; the capacity before and after: the machine may be busy."""
    before = await capacity(house.url, house.key, requests=300, at_once=16)
    held: list[float] = []
    looks: list[tuple[int, str | None]] = []
    headers = {"Authorization": f"Bearer {house.key}"}
    chance, tasks = random.Random(0), []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
        watch = asyncio.ensure_future(memory(processes, held))
        start = time.perf_counter()
        tasks += await arrivals(session, house.url, rate=before / 2, seconds=CALM_S, chance=chance)
        looking = asyncio.ensure_future(probe(session, house.url, looks))
        tasks += await arrivals(session, house.url, rate=before * times, seconds=seconds, chance=chance)
        looking.cancel()
        over = time.perf_counter() - start
        tasks += await arrivals(session, house.url, rate=before / 2, seconds=CALM_S, chance=chance)
        outcomes = list(await asyncio.gather(*tasks))
        watch.cancel()
    after = await capacity(house.url, house.key, requests=300, at_once=16)
    refused = [wait for status, wait in looks if status != 200]
    return {
        "capacity_per_s": {"before": round(before, 1), "after": round(after, 1)},
        "offered_per_s": round(times * before, 1), "seconds": seconds, "calm_s": CALM_S,
        **curves(outcomes, start=start, over=over, peak=statistics.mean((before, after))),
        "refused_looks": {"n": len(refused), "with_retry_after": sum(wait is not None for wait in refused)},
        "memory_mb": {"first": round(held[0]), "most": round(max(held)), "last": round(held[-1])},
    }  # fmt: skip


def curves(outcomes: list[Outcome], *, start: float, over: float, peak: float) -> dict[str, Any]:
    """By second since `start`: asked, answered, turned away, and the median time that an answer took.

    Args:
        over: end of the flood, in seconds since `start`.
        peak: capacity, requests a second.
    """
    served = [one for one in outcomes if one.fault is None]
    faults = Counter(" ".join(one.fault.split()[:2]) for one in outcomes if one.fault)
    length = int(max(one.started + one.seconds for one in outcomes) - start) + 1
    asked = Counter(int(one.started - start) for one in outcomes)
    ended = Counter(int(one.started + one.seconds - start) for one in served)
    turned = Counter(int(one.started + one.seconds - start) for one in outcomes if one.fault)
    took = [[one.seconds for one in served if int(one.started + one.seconds - start) == s] for s in range(length)]
    # The line fills up in the first seconds of the flood.
    steady = [ended[second] for second in range(int(CALM_S) + 3, int(over))]
    waits = sorted(one.seconds for one in served if CALM_S < one.started - start < over)
    return {
        "requests": len(outcomes), "served": len(served), "otherwise": dict(faults),
        "goodput_per_s": round(statistics.mean(steady), 1), "goodput_of_peak": round(statistics.mean(steady) / peak, 3),
        "served_in_flood_s": {"p50": round(waits[len(waits) // 2], 3), "p99": round(waits[len(waits) * 99 // 100], 3)},
        "recovered_after_s": recovered(outcomes, start=start, over=over),
        "by_second": {
            "asked": [asked[s] for s in range(length)], "served": [ended[s] for s in range(length)],
            "turned_away": [turned[s] for s in range(length)],
            "median_s": [round(statistics.median(one), 3) if one else None for one in took],
        },
    }  # fmt: skip


def recovered(outcomes: list[Outcome], *, start: float, over: float) -> float | None:
    """Seconds from the flood's end to the arrival from which on all were answered, and as fast as before it."""
    calm = sorted(one.seconds for one in outcomes if one.fault is None and one.started - start < CALM_S)
    usual = calm[len(calm) * 95 // 100] * PATIENCE
    later = [one for one in outcomes if one.started - start >= over]
    slow = [one.started for one in later if one.fault or one.seconds > usual]
    # One in twenty was as slow before.
    last = max(slow[: max(0, len(slow) - len(later) // 20)], default=start + over)
    return round(last - start - over, 2) if last < max(one.started for one in later) else None


def draw(found: dict[str, Any]) -> str:
    """The curves as a picture: rates above, times below, on one axis of seconds."""
    by, calm, flood_s = found["by_second"], found["calm_s"], found["seconds"]
    width, left, right = 760, 62, 34
    length = len(by["asked"])

    def across(second: float) -> float:
        return left + second / length * (width - left - right)

    def panel(top: float, height: float, series: list[tuple[str, list[float | None]]], most: float) -> list[str]:
        def down(value: float) -> float:
            return top + height - min(value, most) / most * height

        parts = [
            f'<line x1="{left}" x2="{width - right}" y1="{down(at):.1f}" y2="{down(at):.1f}" stroke="#d8d4cc"/>'
            f'<text x="{left - 8}" y="{down(at) + 4:.1f}" text-anchor="end" fill="#67625a">{at:g}</text>'
            for at in (0, most / 2, most)
        ]
        for colour, values in series:
            known = [(across(second + 0.5), down(value)) for second, value in enumerate(values) if value is not None]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in known)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        return parts

    waited = [value for value in by["median_s"] if value is not None]
    most_rate, most_s = _round_up(max(by["asked"])), _round_up(max(waited))
    times = found["offered_per_s"] / found["capacity_per_s"]["before"]
    words = [
        (left, 16, "requests a second", "#1d1c1a"), (left + 150, 16, "asked", "#8a8275"),
        (left + 205, 16, "answered", "#14715c"), (left + 285, 16, "turned away (429)", "#b1362b"),
        (left, 236, "seconds to the whole answer, median", "#1d1c1a"),
        (across(calm) + 5, 34, f"{times:.3g} × capacity", "#67625a"),
    ]  # fmt: skip
    ticks = [(across(at), 378, f"{at:g} s", "#67625a") for at in range(0, length + 1, 15)]
    shade = (
        f'<rect x="{across(calm):.1f}" y="22" width="{across(calm + flood_s) - across(calm):.1f}" height="340" '
        'fill="#f3f0ea"/>'
    )
    told = "".join(f'<text x="{x:.1f}" y="{y}" fill="{colour}">{text}</text>' for x, y, text, colour in words + ticks)
    upper = [("#8a8275", by["asked"]), ("#b1362b", by["turned_away"]), ("#14715c", by["served"])]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 390" role="img" '
        'font-family="sans-serif" font-size="12"><title>Five times the capacity, and after</title>'
        f'<rect width="{width}" height="390" fill="#ffffff"/>{shade}'
        + "".join(panel(40, 170, upper, most_rate) + panel(250, 110, [("#2566a8", by["median_s"])], most_s))
        + f"{told}</svg>\n"
    )


def _round_up(value: float) -> float:
    """To a number that divides well."""
    step = 10 ** len(str(int(value))) / 20
    return (int(value / step) + 1) * step


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
    print(json.dumps({key: value for key, value in found.items() if key != "by_second"}, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, separators=(",", ":")).replace('],"', '],\n"') + "\n")
        PICTURE.write_text(draw(found))


if __name__ == "__main__":
    main()
