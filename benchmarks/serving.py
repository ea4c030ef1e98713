"""Time to first token and throughput of a served model.

Enters: the URL of a server (`fmops serve`). Leaves: one line a number of clients, medians over rounds.
Refuses: nothing; an error of the server ends it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

TEXT = "Describe in a few sentences what a Python function decorator does, and name three uses of it. " * 5
"""About 120 tokens for SmolLM2."""


def ask(url: str, model: str, tokens: int, number: int) -> tuple[float, float, int]:
    """Seconds to the first token, seconds in all, tokens generated."""
    body = {
        "model": model, "prompt": f"{number}. {TEXT}", "temperature": 0, "max_tokens": tokens, "stream": True,
        "stream_options": {"include_usage": True}, "logprobs": 0,
    }  # fmt: skip
    start, first, used = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                usage = json.loads(line[6:]).get("usage")
                used = usage["completion_tokens"] if usage else used
    return first, time.perf_counter() - start, used


def measure(url: str, model: str, *, clients: int, rounds: int, tokens: int) -> None:
    """Print one line for so many clients, each asking `rounds` times one after the other."""
    first, rates = [], []
    with ThreadPoolExecutor(clients) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            answers = list(pool.map(lambda number: ask(url, model, tokens, number), range(clients)))
            rates.append(sum(count for _, _, count in answers) / (time.perf_counter() - start))
            first += [seconds for seconds, _, _ in answers]
    print(
        f"clients {clients}: {statistics.median(rates):.1f} tokens/s (range {min(rates):.1f}–{max(rates):.1f}), first "
        f"token {statistics.median(first):.2f} s (longest {max(first):.2f}), {rounds} rounds of {tokens} tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    given = parser.parse_args()
    model = httpx.get(f"{given.url}/v1/models").json()["data"][0]["id"]
    for clients in given.clients:
        measure(given.url, model, clients=clients, rounds=given.rounds, tokens=given.tokens)


if __name__ == "__main__":
    main()
