"""Requests through ramp, promotion and rollback: none may fail, end early, or mix two releases.

Enters: nothing; it releases two tiny models, starts them with `fmops up`, and moves the routes under load.
Leaves: counts, latencies in steady state and while routes move; JSON.
Refuses: to slow down with the servers: arrivals are Poisson at half the measured capacity (open loop).

    python -m benchmarks.rollout [--requests 3000] [--out benchmarks/results/rollout-DATE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.gateway import free_port
from fmops.deployment.serving.routes import Routes, RoutesFile, RoutesMoved, Target

TOKENS = 16
AFTER_S = 1.0
"""A move's window ends so long after its action: the supervisor acts on routes with a delay."""


@dataclass(frozen=True)
class Outcome:
    """How one request went; `fault` is None when all was well."""

    started: float
    seconds: float
    release: str | None
    fault: str | None


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> Outcome:
    """One request; every second one is a stream. The answer must name one release, and be whole."""
    stream = number % 2 == 0
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": f"What is number {number}?"}],
        "max_tokens": TOKENS, "stream": stream,
    }  # fmt: skip
    start = time.perf_counter()
    release, fault = None, None
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            text = await answer.text()
            release = answer.headers.get("x-fmops-release")
            fault = find_fault(answer.status, text, release=release, stream=stream)
    except aiohttp.ClientError as error:
        fault = f"broken: {error!r}"
    return Outcome(start, time.perf_counter() - start, release, fault)


def find_fault(status: int, text: str, *, release: str | None, stream: bool) -> str | None:
    """What is wrong with an answer, if anything."""
    if status != 200:
        return f"failed: {status} {text[:200]}"
    if not stream:
        objects = [json.loads(text)]
    else:
        if not text.endswith("data: [DONE]\n\n"):
            return f"truncated: {text[-200:]!r}"
        objects = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    spoke = {value["system_fingerprint"] for value in objects}
    if spoke != {release}:
        return f"mixed: header {release}, body {sorted(spoke)}"
    finished = [choice["finish_reason"] for value in objects for choice in value["choices"]]
    return None if finished and finished[-1] in ("stop", "length") else "truncated: no finish reason"


async def open_loop(
    url: str, key: str, *, rate: float, requests: int, moves: list[tuple[float, Callable[[], None]]]
) -> list[Outcome]:
    """Send requests at random times, `rate` a second, whatever the servers do; `moves` are (share of the requests
    sent, action)."""
    chance = random.Random(0)
    headers = {"Authorization": f"Bearer {key}"}
    tasks: list[asyncio.Task[Outcome]] = []
    due = sorted(moves, key=lambda move: move[0])
    moving: asyncio.Task[None] | None = None
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
        at = time.perf_counter()
        for number in range(requests):
            while due and number >= due[0][0] * requests:
                # Beside the requests, one after the other: the window in which routes move is what counts.
                moving = asyncio.ensure_future(_then(moving, due.pop(0)[1]))
            at += chance.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            tasks.append(asyncio.ensure_future(ask(session, url, number)))
        outcomes = list(await asyncio.gather(*tasks))
        if moving:
            await moving
        return outcomes


async def _then(earlier: asyncio.Task[None] | None, action: Callable[[], None]) -> None:
    if earlier:
        await earlier
    await asyncio.to_thread(action)


async def capacity(url: str, key: str, *, requests: int, at_once: int = 8) -> float:
    """Requests a second in a closed loop of `at_once` clients."""
    headers = {"Authorization": f"Bearer {key}"}
    numbers = iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

        async def client() -> None:
            for number in numbers:
                outcome = await ask(session, url, number)
                assert outcome.fault is None, outcome.fault

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(at_once)))
        return requests / (time.perf_counter() - start)


def summary(outcomes: list[Outcome], *, windows: list[tuple[float, float]]) -> dict[str, Any]:
    """Counts by kind of fault, releases, and latencies: of requests under way while routes moved, and of the others.

    Args:
        windows: begin and end of each move.
    """

    def moving(one: Outcome) -> bool:
        return any(one.started < end + AFTER_S and one.started + one.seconds > begin for begin, end in windows)

    faults = [outcome.fault for outcome in outcomes if outcome.fault]
    kinds = ("failed", "truncated", "mixed", "broken")
    near, far = [one for one in outcomes if moving(one)], [one for one in outcomes if not moving(one)]
    return {
        "requests": len(outcomes),
        **{kind: sum(fault.startswith(kind) for fault in faults) for kind in kinds},
        "in_mutation_window": {"requests": len(near), "faults": sum(one.fault is not None for one in near)},
        "by_release": {str(name): [o.release for o in outcomes].count(name) for name in {o.release for o in outcomes}},
        "steady_s": _quantiles([one.seconds for one in far]),
        "while_moving_s": _quantiles([one.seconds for one in near]),
        "examples": faults[:3],
        # Rule of three, exact: 1 − 0.05^(1/n).
        "failure_rate_below": round(1 - 0.05 ** (1 / len(outcomes)), 6) if not faults else None,
    }


def seconds_to_leave(outcomes: list[Outcome], *, release: str, begin: float) -> float:
    """From an order to take the traffic off a release to the last request that it still took."""
    return max((one.started - begin for one in outcomes if one.release == release and one.started > begin), default=0.0)


def _quantiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100)
    return {"n": len(seconds), "p50": round(cuts[49], 4), "p99": round(cuts[98], 4)}


class House:
    """Two releases of tiny models in one workspace, behind `fmops up`."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
        from tiny_model import write_tiny_model

        self.spec, self.port = folder / "lifecycle.yaml", free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.releases = []
        for seed in (0, 1):
            model = write_tiny_model(folder / f"model-{seed}", seed=seed)
            self.spec.write_text(
                f"name: tiny\nbase: {model}\nruntime: {{threads: 1}}\n"
                f"serve: {{port: {self.port}, max_tokens: 256, tokens_per_minute: 100000000}}\n"
            )
            self.run("run")
            self.releases.append(json.loads((folder / ".fmops" / "aliases.json").read_text())["champion"])
        self.routes = RoutesFile(folder / ".fmops" / "routes.json")
        self.routes.compare_and_swap(Routes(champion=Target(release=self.releases[0])), expected=0)
        self.run("up")
        self.key = (folder / ".fmops" / "local.key").read_text().strip()

    def run(self, command: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "fmops", command, "--spec", str(self.spec)], check=True, stdout=subprocess.DEVNULL
        )

    def move(self, **changes: Any) -> None:
        """Change the routes, as the rollout controller does; the supervisor may have changed them in between."""
        while True:
            now = self.routes.current()
            try:
                wanted = Routes.model_validate({**now.model_dump(), **changes})
                self.routes.compare_and_swap(wanted, expected=now.version)
            except RoutesMoved:
                continue
            return

    def challenge(self, release: str) -> None:
        """Ask for a challenger and wait until its engine answers."""
        self.move(challenger={"release": release, "url": None}, canary_share=0.0, shadow_share=0.0)
        while (challenger := self.routes.current().challenger) is None or challenger.url is None:
            time.sleep(0.05)

    def promote(self) -> None:
        """The challenger takes everything; the old engine is drained and ended."""
        now = self.routes.current()
        self.move(champion=now.challenger and now.challenger.model_dump(), challenger=None, canary_share=0.0,
                  shadow_share=0.0)  # fmt: skip

    def roll_back(self) -> None:
        """The challenger gets nothing any more; its engine is drained and ended."""
        self.move(challenger=None, canary_share=0.0, shadow_share=0.0)


def main() -> None:
    """Print and write the figures; exit code 1 when a request went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    windows: list[tuple[float, float]] = []
    # Ended from outside it still takes down what it has brought up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as scratch:
        house = House(Path(scratch))
        old, new = house.releases

        def noted(action: Callable[[], None]) -> Callable[[], None]:
            def move() -> None:
                begin = time.perf_counter()
                action()
                windows.append((begin, time.perf_counter()))

            return move

        try:
            house.challenge(new)
            most = asyncio.run(capacity(house.url, house.key, requests=200))
            moves = [
                (0.10, noted(lambda: house.move(shadow_share=0.2))),
                (0.18, noted(lambda: house.move(shadow_share=0.0, canary_share=0.01))),
                (0.26, noted(lambda: house.move(canary_share=0.1))),
                (0.34, noted(lambda: house.move(canary_share=0.5))),
                (0.45, noted(house.promote)),
                (0.55, noted(lambda: house.challenge(old))),
                (0.65, noted(lambda: house.move(canary_share=0.5))),
                (0.80, noted(house.roll_back)),
            ]
            outcomes = asyncio.run(open_loop(house.url, house.key, rate=most / 2, requests=given.requests, moves=moves))
        finally:
            house.run("down")
    found = {
        "capacity_per_s": round(most, 1), "rate_per_s": round(most / 2, 1), "moves": len(moves),
        # The last move rolls back the release that was promoted from.
        "rollback_s": round(seconds_to_leave(outcomes, release=old, begin=windows[-1][0]), 4),
        **summary(outcomes, windows=windows),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(1 if found["examples"] else 0)


if __name__ == "__main__":
    main()
