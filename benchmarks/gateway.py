"""What the gateway costs: CPU a request, and what it leaves of an engine's throughput.

Enters: nothing; it starts an engine that answers at once, and a gateway before it. Leaves: a table, and JSON.
Refuses: to compare runs of different moments: bare engine and gateway take turns (A B A B), in one run.

    python -m benchmarks.gateway [--quick] [--out benchmarks/results/gateway-DATE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from fmops.deployment.serving.gateway.keys import KeyRing
from fmops.deployment.serving.routes import Routes, RoutesFile, Target

ROOT = Path(__file__).resolve().parents[1]
FAKE = ROOT / "tests" / "fake_engine.py"
SERVE = """
import sys
from pathlib import Path
from fmops.deployment.serving.gateway.process import run_gateway
from fmops.production import Serve
run_gateway(Path(sys.argv[1]), Serve(port=int(sys.argv[2]), tokens_per_minute=10**9), name="tiny")
"""
PROMPT = "Describe in a few sentences what a Python function decorator does, and name three uses of it. " * 5
STREAMS = 16
TOKENS = 64


def free_port() -> int:
    """A port that is free now, and so is the next: the gateway's metrics take it.

    Below those that the kernel gives to outgoing connections: it is still free when a server starts some seconds later.
    """
    for port in random.sample(range(20_000, 30_000, 4), 500):
        try:
            for one in (port, port + 1):
                socket.create_server(("127.0.0.1", one)).close()
        except OSError:
            continue
        return port
    raise RuntimeError("no free port between 20000 and 30000")


async def load(url: str, *, key: str, stream: bool, requests: int, at_once: int) -> float:
    """Seconds for so many requests, `at_once` of them under way."""
    body = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS, "stream": stream}
    ).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "X-Request-Id": "0" * 24}
    left = iter(range(requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in left:
            async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as answer:
                text = await answer.read()
                assert answer.status == 200, text
                assert not stream or text.endswith(b"[DONE]\n\n")

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(at_once)))
        return time.perf_counter() - start


def cpu(process: psutil.Process) -> float:
    """CPU seconds that a process has used, by its own clock: the ticks that psutil reads miscount short wake-ups."""
    return time.clock_gettime(~process.pid << 3 | 2)  # CPUCLOCK_SCHED of that process, as clock_getcpuclockid(3) does


def wait_for(url: str) -> None:
    """Until a server answers."""
    port = int(url.rpartition(":")[2])
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)


def measure(*, rounds: int, requests: int, token_s: float, together: bool = False) -> dict[str, Any]:
    """Both ways in turn; CPU of the gateway a request, and tokens a second through it over those without it.

    Args:
        together: all answers get their next token in one moment, as from an engine that steps its batch; otherwise
            each has its own moments, which is the dearest for a gateway.
    """
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch)
        port, engine_port = free_port(), free_port()
        engine_url, url = f"http://127.0.0.1:{engine_port}", f"http://127.0.0.1:{port}"
        RoutesFile(workspace / "routes.json").compare_and_swap(
            Routes(champion=Target(release="release-a", url=engine_url)), expected=0
        )
        _, key = KeyRing(workspace / "keys.json").add("bench")
        paced = [str(TOKENS), str(token_s), *(["together"] if together else [])]
        engine = subprocess.Popen([sys.executable, str(FAKE), str(engine_port), "release-a", *paced])
        gateway = subprocess.Popen([sys.executable, "-c", SERVE, str(workspace), str(port)], stdout=subprocess.DEVNULL)
        try:
            wait_for(engine_url), wait_for(url)
            watched = psutil.Process(gateway.pid)
            for stream in (False, True):
                asyncio.run(load(url, key=key, stream=stream, requests=50, at_once=STREAMS))
            for _ in range(rounds):
                for stream in (False, True):
                    name = "stream" if stream else "whole"
                    bare_s = asyncio.run(load(engine_url, key=key, stream=stream, requests=requests, at_once=STREAMS))
                    before = cpu(watched)
                    through_s = asyncio.run(load(url, key=key, stream=stream, requests=requests, at_once=STREAMS))
                    figures.setdefault(f"cpu_ms_{name}", []).append((cpu(watched) - before) / requests * 1e3)
                    if stream:
                        figures.setdefault("throughput_share_stream", []).append(bare_s / through_s)
                        figures.setdefault("engine_tokens_per_s", []).append(requests * TOKENS / bare_s)
            figures["gateway_peak_mb"] = [watched.memory_info().rss / 1e6]
        finally:
            for process in (gateway, engine):
                process.terminate()
                process.wait()
    return {
        name: {"median": round(statistics.median(values), 3), "range": [round(min(values), 3), round(max(values), 3)]}
        for name, values in figures.items()
    }


def main() -> None:
    """Print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rounds, requests = (2, 100) if given.quick else (5, 300)
    found = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]},
        "streams": STREAMS, "tokens": TOKENS, "rounds": rounds, "requests": requests,
        "instant": measure(rounds=rounds, requests=requests, token_s=0.0),
        "paced_5_ms_a_token": measure(rounds=min(rounds, 5), requests=min(requests, 160), token_s=0.005),
        "paced_25_ms_a_token": measure(rounds=min(rounds, 3), requests=min(requests, 96), token_s=0.025),
        "steps_of_25_ms": measure(rounds=min(rounds, 3), requests=min(requests, 96), token_s=0.025, together=True),
    }  # fmt: skip
    for upstream in ("instant", "paced_5_ms_a_token", "paced_25_ms_a_token", "steps_of_25_ms"):
        print(f"{upstream}: {STREAMS} at once, {TOKENS} tokens an answer")
        for name, value in found[upstream].items():
            low, high = value["range"]
            print(f"  {name:26} {value['median']:8.3f}   (range {low:.3f}–{high:.3f})")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
