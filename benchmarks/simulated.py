"""Simulated production: traces whose truth is known.

Enters: rates by arm, shares, a seed. Leaves: traces as the gateway writes them, in a workspace where one is named.
Refuses: nothing. It imitates the gateway's columns, not language.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fmops.traces import TRACES, DayLog, Trace

RATES = {
    "failed": 0.003, "empty": 0.003, "truncated": 0.08, "repeated": 0.01, "refused": 0.04, "wrong_language": 0.005,
    "personal_data": 0.002, "secret": 0.0, "prompt_leak": 0.001,
}  # fmt: skip
"""How often a good release shows each signal."""

TOPICS = {
    "python": "python handle decorator generator iterator class module function import object list argument",
    "cooking": "recipe flour oven butter onion garlic simmer bake dough pepper salad sauce",
    "medicine": "symptom treatment dosage influenza patient doctor hospital vaccine fever nausea allergy clinic",
}
"""Words of the prompts, by topic."""


@dataclass
class Production:
    """Two releases behind a gateway; `harm` is added to the challenger's rates."""

    seed: int
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    harm: Mapping[str, float] = field(default_factory=dict)
    slower: float = 1.0
    """Factor on the challenger's latency."""
    champion: str = "release-champion"
    challenger: str = "release-challenger"
    topics: Mapping[str, float] = field(default_factory=dict)
    """Weights of the prompts' topics; without any, prompts are empty."""
    questions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Whole prompts by topic, to draw from; a topic that has none is made of its words."""
    longer: float = 1.0
    """Factor on the length of answers."""
    log_probability: float | None = None
    """Mean over answers of the mean log-probability, in nats."""
    rhythm: float = 0.0
    """All rates and latencies, of both arms, swing by this share over the day."""
    per_second: float = 1.0
    now_s: float = 1_800_000_000.0

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._number = 0

    def serve(self, requests: int, *, canary: float = 0.0, shadow: float = 0.0) -> Iterator[Trace]:
        """So many requests at these shares; mirrored ones leave two traces."""
        for _ in range(requests):
            self.now_s += 1 / self.per_second
            self._number += 1
            id_ = f"r{self.seed}-{self._number}"
            if self._chance.random() < canary:
                yield self._answer(id_, "canary")
            else:
                yield self._answer(id_, "champion")
                if self._chance.random() < shadow:
                    yield self._answer(f"{id_}s", "shadow", shadow_of=id_)

    def _answer(self, id_: str, arm: str, *, shadow_of: str | None = None) -> Trace:
        mine = arm == "champion"
        season = 1 + self.rhythm * math.sin(2 * math.pi * self.now_s / 86_400)
        happened = {
            name: float(self._chance.random() < rate * season + (0.0 if mine else self.harm.get(name, 0.0)))
            for name, rate in self.rates.items()
        }
        failed = bool(happened.pop("failed"))
        words = max(1.0, self._chance.lognormvariate(4, 0.6) * self.longer)
        likely = None if self.log_probability is None else self._chance.gauss(self.log_probability, 0.2)
        tokens = 0 if failed else int(words)
        first = self._chance.lognormvariate(-2, 0.4) * season * (1.0 if mine else self.slower)
        return Trace(
            id=id_, started_s=self.now_s, tenant="t", arm=arm, release=self.champion if mine else self.challenger,
            shadow_of=shadow_of, operation="chat", status=500 if failed else 200,
            finish_reason="error" if failed else "stop", prompt_tokens=20, completion_tokens=tokens,
            first_token_s=None if failed else first, duration_s=first + words * 0.02,
            prompt=self._prompt(), response="", mean_log_probability=likely,
            signals={} if failed else {**happened, "words": words},
        )  # fmt: skip

    def _prompt(self) -> str:
        if not self.topics:
            return ""
        topic = self._chance.choices(list(self.topics), list(self.topics.values()))[0]
        if topic in self.questions:
            return self._chance.choice(self.questions[topic])
        return " ".join(self._chance.choices(TOPICS[topic].split(), k=self._chance.randint(4, 12)))


def write_traces(workspace: Path, production: Production, requests: int, **shares: float) -> None:
    """Serve, and leave the traces where the gateway of a workspace does; `shares` are those of `Production.serve`."""
    log = DayLog(workspace / TRACES, Trace)
    for trace in production.serve(requests, **shares):
        log.append(trace, at_s=trace.started_s)
    log.close()
