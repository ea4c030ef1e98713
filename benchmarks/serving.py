"""Engines side by side: time to the first token, time between tokens, tokens a second, beside what memory allows.

Enters: a model folder (or the URL of a server). Leaves: a line an engine and number of clients; JSON.
Refuses: to compare moments: each engine waits in a process of its own, and they take turns (A B A B).

    python -m benchmarks.serving --model FOLDER [--engines transformers openvino] [--threads 1] [--out FILE.json]
    python -m benchmarks.serving --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

TEXT = "Describe in a few sentences what a Python function decorator does, and name three uses of it. " * 5
"""About 120 tokens for SmolLM2."""
BYTES_A_WEIGHT = {"transformers": 4.0, "openvino": 34 / 32, "llama.cpp": 34 / 32}
"""Q8_0 keeps 32 weights in 34 bytes."""


def bandwidth(*, megabytes: int = 400) -> float:
    """Bytes a second that one thread reads from memory: best of five sums over an array far larger than the caches."""
    array = np.ones(megabytes * 250_000, dtype=np.float32)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        array.sum()
        best = max(best, array.nbytes / (time.perf_counter() - start))
    return best


def work(engine: str, folder: Path, *, threads: int, tokens: int) -> None:
    """The process of one engine: a number of clients a line in, figures of one round a line out."""
    from fmops.deployment.serving.engine import Generation, load_engine

    start = time.perf_counter()
    loaded = load_engine(engine, folder, max_tokens=1024, threads=threads)
    print(json.dumps({"load_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        clients = int(line)
        times: list[list[float]] = [[] for _ in range(clients)]
        done = threading.Semaphore(0)

        def emitting(mine: list[float], done: threading.Semaphore = done) -> Any:
            def emit(event: Any) -> None:
                mine.append(time.perf_counter())
                if len(mine) == tokens or getattr(event, "finish", None):
                    done.release()

            return emit

        process = psutil.Process()
        cpu, begin = sum(process.cpu_times()[:2]), time.perf_counter()
        for number in range(clients):
            prompt = tuple(loaded.tokenizer.encode(f"{number}. {TEXT}"))
            loaded.submit(Generation(prompt=prompt, max_tokens=tokens), emitting(times[number]))
        for _ in range(clients):
            done.acquire()
        wall = time.perf_counter() - begin
        gaps = [later - earlier for one in times for earlier, later in pairwise(one)]
        print(
            json.dumps(
                {
                    "first_token_s": statistics.median(one[0] - begin for one in times),
                    "between_tokens_s": statistics.median(gaps) if gaps else 0.0,
                    "tokens_per_s": sum(map(len, times)) / wall,
                    "tokens_per_cpu_s": sum(map(len, times)) / (sum(process.cpu_times()[:2]) - cpu),
                    "peak_mb": _peak_mb(),
                }
            ),
            flush=True,
        )
    loaded.close()


def _peak_mb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def compare(folder: Path, engines: list[str], *, clients: list[int], rounds: int, threads: int, tokens: int) -> Any:
    """Rounds of every engine in turn; medians and ranges."""
    parameters = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 4
    command = [sys.executable, "-m", "benchmarks.serving", "--model", str(folder), "--threads", str(threads)]
    workers = {
        name: subprocess.Popen(
            [*command, "--tokens", str(tokens), "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in engines
    }  # fmt: skip
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in engines}
    loads = {}
    try:
        for name, worker in workers.items():
            loads[name] = json.loads(worker.stdout.readline())["load_s"]
        for number in range(rounds + 1):
            for count in clients:
                for name, worker in workers.items():
                    worker.stdin.write(f"{count}\n")
                    worker.stdin.flush()
                    row = json.loads(worker.stdout.readline())
                    # The first round warms up.
                    if number:
                        found[name].setdefault(str(count), []).append(row)
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    speed = bandwidth()
    limits = {name: speed / (BYTES_A_WEIGHT.get(name, 4.0) * parameters) for name in engines}
    return {
        "model": {"parameters": round(parameters)}, "tokens": tokens, "rounds": rounds, "threads": threads,
        "memory_bytes_per_s": round(speed), "cores": len(os.sched_getaffinity(0)),
        "memory_limit_one_client_tokens_per_s": {name: round(limit, 1) for name, limit in limits.items()},
        "load_s": {name: round(value, 1) for name, value in loads.items()},
        "engines": {
            name: {count: {key: _spread([row[key] for row in rows]) for key in rows[0]} for count, rows in by.items()}
            for name, by in found.items()
        },
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "low": round(min(values), 4), "high": round(max(values), 4)}


def show(found: dict[str, Any]) -> None:
    """One line an engine and number of clients."""
    print(f"memory {found['memory_bytes_per_s'] / 1e9:.1f} GB/s, {found['threads']} threads, {found['tokens']} tokens")
    for name, by in found["engines"].items():
        limit = found["memory_limit_one_client_tokens_per_s"][name]
        print(f"{name}: loads in {found['load_s'][name]} s; memory allows {limit} tokens/s to one client")
        for count, row in by.items():
            rate = row["tokens_per_s"]
            first, gap = row["first_token_s"]["median"], row["between_tokens_s"]["median"] * 1e3
            print(
                f"  {count:>2} clients: {rate['median']:6.1f} tokens/s (range {rate['low']:.1f}–{rate['high']:.1f}), "
                f"{row['tokens_per_cpu_s']['median']:.1f} a CPU second, first token {first:.2f} s, "
                f"between tokens {gap:.0f} ms, {row['peak_mb']['high']:.0f} MB"
            )


def ask(url: str, model: str, tokens: int, number: int) -> tuple[float, float, int]:
    """Seconds to the first token, seconds in all, tokens generated, over HTTP."""
    body = {
        "model": model, "prompt": f"{number}. {TEXT}", "temperature": 0, "max_tokens": tokens, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {os.environ.get('FMOPS_API_KEY', 'none')}"}
    start, first, used = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                usage = json.loads(line[6:]).get("usage")
                used = usage["completion_tokens"] if usage else used
    return first, time.perf_counter() - start, used


def measure_url(url: str, *, clients: list[int], rounds: int, tokens: int) -> None:
    """Print one line a number of clients, each asking `rounds` times one after the other."""
    headers = {"Authorization": f"Bearer {os.environ.get('FMOPS_API_KEY', 'none')}"}
    model = httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"]
    for count in clients:
        first: list[float] = []
        rates = []
        with ThreadPoolExecutor(count) as pool:
            for _ in range(rounds):
                start = time.perf_counter()
                answers = list(pool.map(lambda number: ask(url, model, tokens, number), range(count)))
                rates.append(sum(used for _, _, used in answers) / (time.perf_counter() - start))
                first += [seconds for seconds, _, _ in answers]
        print(
            f"clients {count}: {statistics.median(rates):.1f} tokens/s (range {min(rates):.1f}–{max(rates):.1f}), "
            f"first token {statistics.median(first):.2f} s (longest {max(first):.2f}), {rounds} rounds of {tokens}"
        )


def main() -> None:
    """Measure engines in turn, or one server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--engines", nargs="+", default=["transformers", "openvino"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.model, threads=given.threads, tokens=given.tokens)
    elif given.url:
        measure_url(given.url, clients=given.clients, rounds=given.rounds, tokens=given.tokens)
    else:
        found = compare(
            given.model, given.engines, clients=given.clients, rounds=given.rounds, threads=given.threads,
            tokens=given.tokens,
        )  # fmt: skip
        show(found)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
