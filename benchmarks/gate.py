"""How often the gate is fooled: simulations on the scores of real models.

Enters: two evaluations of one protocol (`--before`, `--after`: folders with samples.jsonl and protocol.json).
Leaves: a table of rates with Clopper–Pearson bounds beside what is promised, and benchmarks/results/gate-DATE.json.
Refuses: evaluations that cannot be paired.

    python -m benchmarks.gate --before DIR --after DIR [--quick]

Equal models are made from real ones: each cluster of items (document, question) keeps its pair of scores, and a coin
says which of the two models is the challenger. So spread, ties, clusters and mixtures of scores are real, and the truth
is known: there is no difference. A regression is put in by turning right answers of the challenger wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from scipy.special import betaincinv

from fmops.artifacts import EvalReport, Judged
from fmops.evaluation import spending, statistics
from fmops.evaluation.evidence import Evidence, Pairs, gather
from fmops.evaluation.gate import GUARD, POWER, decide
from fmops.evaluation.protocol import PinnedTask, digest, pin, write_json, write_lines
from fmops.evaluation.suites import Suite, load_suite
from fmops.integrity import read_lines

ALPHA = 0.05
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Rate:
    """So many of so many, and what was promised."""

    name: str
    hits: int
    n: int
    promised: str

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95 % Clopper–Pearson interval."""
        low = 0.0 if self.hits == 0 else float(betaincinv(self.hits, self.n - self.hits + 1, 0.025))
        high = 1.0 if self.hits == self.n else float(betaincinv(self.hits + 1, self.n - self.hits, 0.975))
        return low, high


def read_report(folder: Path) -> EvalReport:
    """An evaluation by its folder; the metrics are not needed."""
    written = json.loads((folder / "protocol.json").read_bytes())
    return EvalReport(path=folder, metrics=(), fingerprint=digest(written))


def swapped(pairs: Pairs, rng: random.Random) -> Pairs:
    """The same scores, with a coin a cluster for who is the challenger."""
    sign = {cluster: rng.choice((-1.0, 1.0)) for cluster in sorted(set(pairs.clusters))}
    differences = [sign[cluster] * value for value, cluster in zip(pairs.differences, pairs.clusters, strict=True)]
    return replace(pairs, differences=differences)


def drawn(pairs: Pairs, n: int, rng: random.Random) -> Pairs:
    """About `n` items of equal models: whole clusters drawn with replacement, each draw a cluster of its own."""
    groups: dict[str, list[float]] = {}
    for value, cluster in zip(pairs.differences, pairs.clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    names, differences, clusters = sorted(groups), [], []
    while len(differences) < n:
        group, sign = groups[rng.choice(names)], rng.choice((-1.0, 1.0))
        clusters += [str(len(differences))] * len(group)
        differences += [sign * value for value in group]
    return Pairs(pairs.family, differences, clusters, pairs.binary, tasks=[pairs.family] * len(differences))


def degraded(pairs: Pairs, loss: float, rng: random.Random) -> Pairs:
    """Take `loss` from the mean: of 0/1 items by turning single ones, of others by a shift."""
    if not pairs.binary:
        return replace(pairs, differences=[value - loss for value in pairs.differences])
    # A won item becomes lost with 2 steps, a tie with 1; the expected mean falls by `loss`.
    above = [value > -1 for value in pairs.differences]
    rate = min(1.0, loss * len(above) / max(1, sum(above)))
    differences = [
        value - 1.0 if can and rng.random() < rate else value
        for value, can in zip(pairs.differences, above, strict=True)
    ]
    return replace(pairs, differences=differences)


def equal_models(evidence: Evidence, n: int, *, margins: dict[str, float], seed: int) -> list[Rate]:
    """E01: a challenger that is the champion."""
    rng = random.Random(seed)
    promoted = rejected = blocked = 0
    primary = tuple(name for name in ("domain", "capability") if name in evidence.families)
    for _ in range(n):
        found = replace(evidence, families={name: swapped(pairs, rng) for name, pairs in evidence.families.items()})
        promoted += decide(found, alpha=ALPHA, margins=margins, primary=primary).verdict == "promote"
        plain = decide(found, alpha=ALPHA, margins=margins, primary=()).verdict
        rejected += plain == "reject"
        blocked += plain != "promote"
    return [
        Rate("E01 equal model promoted as better", promoted, n, f"≤ {ALPHA}"),
        Rate("E01 equal model called regressed", rejected, n, f"≤ {ALPHA} a family at the margin, far less inside it"),
        Rate("E01 equal model not passed (primary: none)", blocked, n, "≤ 0.2 where the items suffice for the margins"),
    ]


def planned(pairs: Pairs, margin: float, *, families: int) -> int:
    """Items with which an equal model passes the margin as often as the plan says, by the spread of these ones."""
    totals: dict[str, float] = {}
    for value, cluster in zip(pairs.differences, pairs.clusters, strict=True):
        totals[cluster] = totals.get(cluster, 0.0) + value
    # Equal models differ by 0 in the mean, so the spread is about 0.
    error = math.sqrt(math.fsum(total**2 for total in totals.values())) / len(pairs.differences)
    reach = statistics.normal_quantile(1 - ALPHA) + statistics.normal_quantile(1 - (1 - POWER) / families)
    return max(len(pairs.differences), math.ceil(len(pairs.differences) * (reach * error / margin) ** 2))


def enough_items(evidence: Evidence, n: int, *, margins: dict[str, float], seed: int) -> list[Rate]:
    """E01 with as many items as the margins need: whole clusters of the real ones, drawn again."""
    rng = random.Random(seed)
    wanted = {name: margins.get(name, evidence.margin(name)) for name in evidence.families}
    counts = {name: planned(pairs, wanted[name], families=len(wanted)) for name, pairs in evidence.families.items()}
    blocked = 0
    for _ in range(n):
        found = replace(
            evidence, families={name: drawn(pairs, counts[name], rng) for name, pairs in evidence.families.items()}
        )
        blocked += decide(found, alpha=ALPHA, margins=margins, primary=()).verdict != "promote"
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [Rate(f"E01 the same with the planned items ({told})", blocked, n, f"≤ {1 - POWER:.1f}")]


def one_of_twenty(
    evidence: Evidence,
    n: int,
    *,
    items: int,
    margin: float,
    seed: int,
    alpha: float = ALPHA,
    factors: tuple[float, ...] = (0, 1, 2),
) -> list[Rate]:
    """E02: twenty benchmarks drawn from the real items; one of them is worse by the margin, or by twice that.

    Args:
        factors: the losses that are tried, in margins.
        alpha: what the gate tests at; a looser one than promised must be seen as such.
    """
    rng = random.Random(seed)
    binary = [pairs for pairs in evidence.families.values() if pairs.binary]
    pattern = evidence.tasks[0]
    rates = []
    promised = {0: "the higher the better", 1: f"≤ {ALPHA}", 2: f"≪ {ALPHA}"}
    for factor in factors:
        promoted = 0
        for _ in range(n):
            families = {f"b{place}": drawn(binary[place % len(binary)], items, rng) for place in range(20)}
            worse = f"b{rng.randrange(20)}"
            families[worse] = degraded(families[worse], factor * margin, rng)
            tasks = tuple(pattern.model_copy(update={"task": name, "family": name}) for name in families)
            found = Evidence((), tasks, families)
            margins = dict.fromkeys(families, margin)
            promoted += decide(found, alpha=alpha, margins=margins, primary=()).verdict == "promote"
        what = f"E02 one of 20 worse by {factor * margin:g} (margin {margin:g}, {items} items each): passed"
        rates.append(Rate(what, promoted, n, promised[factor]))
    return rates


def one_of_pooled(evidence: Evidence, n: int, *, items: int, margin: float, seed: int) -> list[Rate]:
    """E02 as the packaged suites are: the twenty benchmarks pooled into four families of five."""
    rng = random.Random(seed)
    binary = [pairs for pairs in evidence.families.values() if pairs.binary]
    pattern = evidence.tasks[0]
    families = {f"f{place}": [f"b{place}.{at}" for at in range(5)] for place in range(4)}
    tasks = tuple(
        pattern.model_copy(update={"task": name, "family": family, "margin": margin})
        for family, names in families.items()
        for name in names
    )
    rates = []
    for factor, promised in ((0.0, f"≤ {ALPHA}"), (GUARD, f"≤ {ALPHA}"), (GUARD + 1, "the higher the better")):
        passed = fallen = held = 0
        for _ in range(n):
            parts = {task.task: drawn(rng.choice(binary), items, rng) for task in tasks}
            worse = rng.choice(tasks).task
            parts[worse] = degraded(parts[worse], factor * margin, rng)
            pools = {name: together(name, {each: parts[each] for each in own}) for name, own in families.items()}
            decision = decide(Evidence((), tasks, pools), alpha=ALPHA, margins={}, primary=())
            passed += decision.verdict == "promote"
            fallen += any(each.fallen for each in decision.guards)
            held += all(each.verdict == "non-inferior" for each in decision.families)
        what = f"E02 one of 20 in 4 families worse by {factor * margin:g} (margin {margin:g}, guard {GUARD * margin:g})"
        rates += [
            Rate(f"{what}: rejected by a guard", fallen, n, promised),
            Rate(f"{what}: passed", passed, n, "the higher the better" if factor == 0 else "nothing"),
            Rate(f"{what}: passed without guards", held, n, "nothing"),
        ]
    return rates


def together(family: str, parts: Mapping[str, Pairs]) -> Pairs:
    """One family of several benchmarks of 0/1 items."""
    pool = Pairs(family)
    for name, pairs in parts.items():
        pool.differences += pairs.differences
        pool.clusters += [f"{name}/{cluster}" for cluster in pairs.clusters]
        pool.tasks += [name] * len(pairs.differences)
    return pool


COLLAPSES = (
    (400, "mmlu", 0.2), (1000, "mmlu", 0.2), (400, "boolq", 0.3), (1000, "boolq", 0.3), (400, "boolq", 0.4),
    (400, "piqa", 0.15), (1000, "piqa", 0.15),
)  # fmt: skip
"""Limit on items, benchmark of the packaged suite `capability`, loss."""


def collapsed(n: int, *, seed: int) -> list[Rate]:
    """One benchmark of `capability` alone falls; otherwise the models differ on a tenth of the items, either way."""
    rates = []
    for limit, name, loss in COLLAPSES:
        found = [capability(limit, {name: loss}, random.Random(f"{seed} {name} {turn}")) for turn in range(n)]
        decisions = [decide(each, alpha=ALPHA, margins={}, primary=()) for each in found]
        held = sum(each.families[0].verdict == "non-inferior" for each in decisions)
        passed = sum(each.verdict == "promote" for each in decisions)
        what = f"capability, limit {limit}, {name} −{loss:g}"
        rates += [
            Rate(f"{what}: passed without guards", held, n, "nothing"),
            Rate(f"{what}: passed", passed, n, "the fewer the better"),
        ]
    return rates


def guards_of_equal(
    n: int, *, seed: int, limits: tuple[int, ...] = (40, 400), alpha: float | None = None
) -> list[Rate]:
    """What guards cost: equal models, and the worst that they must bear, every benchmark worse by just its guard.

    Args:
        alpha: what the guards test at; a looser one than promised must be seen as such.
    """
    rates = []
    for limit in limits:
        for what, loss in (("equal models", 0.0), ("every benchmark worse by its guard", GUARD * 0.05)):
            fallen = 0
            for turn in range(n):
                found = capability(limit, None, random.Random(f"{seed} {what} {turn}"), loss=loss)
                decision = decide(found, alpha=ALPHA, margins={}, primary=(), guard_alpha=alpha)
                fallen += any(each.fallen for each in decision.guards)
            rates.append(Rate(f"capability, limit {limit}, {what}: rejected by a guard", fallen, n, f"≤ {ALPHA}"))
    return rates


@cache
def packaged() -> Suite:
    return load_suite("capability", root=Path())


def capability(limit: int, losses: Mapping[str, float] | None, rng: random.Random, *, loss: float = 0.0) -> Evidence:
    """The packaged suite with simulated 0/1 items: 5 % won, 5 % lost, and more lost by the loss."""
    suite, parts = packaged(), {}
    for name, task in suite.tasks.items():
        n, more = round(limit * task.share), (losses or {}).get(name, loss)
        draws = [rng.random() for _ in range(n)]
        differences = [1.0 if value < 0.05 else -1.0 if value < 0.1 + more else 0.0 for value in draws]
        parts[name] = Pairs(name, differences, [str(place) for place in range(n)])
    tasks = tuple(pin(suite, name, items=limit) for name in suite.tasks)
    return Evidence((), tasks, {"capability": together("capability", parts)})


def noise_in_a_row(
    evidence: Evidence, streams: int, *, rounds: int, margins: dict[str, float], seed: int
) -> list[Rate]:
    """E04: candidates that are all equal to the champion, one after the other, with and without spending α."""
    rng = random.Random(seed)
    primary = tuple(name for name in ("domain", "capability") if name in evidence.families)
    fooled = unspent = 0
    for _ in range(streams):
        tested: list[Judged] = []
        careless = False
        for _ in range(rounds):
            found = replace(evidence, families={name: swapped(pairs, rng) for name, pairs in evidence.families.items()})
            decision = decide(found, alpha=ALPHA, margins=margins, primary=primary)
            level = spending.level(tested, ALPHA)
            p_value = 1.0 if decision.p_value is None else decision.p_value
            careless = careless or decision.verdict == "promote"
            tested.append(Judged(candidate="noise", level=level, p_value=p_value, promoted=p_value <= level))
        fooled += any(each.promoted for each in tested)
        unspent += careless
    return [
        Rate(f"E04 {rounds} noise candidates: one promoted", fooled, streams, f"≤ {ALPHA / 2}"),
        Rate(f"E04 the same at α = {ALPHA} each round", unspent, streams, "nothing; this is what spending prevents"),
    ]


Rows = list[Any]
"""Objects, but where the defect is that one is none."""
TAMPERED: dict[str, Callable[[Rows, random.Random], Rows]] = {
    "a row lost": lambda rows, rng: rows[: (place := rng.randrange(len(rows)))] + rows[place + 1 :],
    "half of the rows": lambda rows, rng: rng.sample(rows, len(rows) // 2),
    "not a number": lambda rows, rng: _changed(rows, rng, "score", math.nan),
    "infinite": lambda rows, rng: _changed(rows, rng, "score", math.inf),
    "a text for a score": lambda rows, rng: _changed(rows, rng, "score", "1"),
    "null for a score": lambda rows, rng: _changed(rows, rng, "score", None),
    "a row twice": lambda rows, rng: [*rows, rng.choice(rows)],
    "another prompt": lambda rows, rng: _changed(rows, rng, "prompt_sha256", "0" * 64),
    "another cluster": lambda rows, rng: _changed(rows, rng, "cluster", "mine"),
    "another sample": lambda rows, rng: _changed(rows, rng, "sample", "invented"),
    "a field lost": lambda rows, rng: _lost(rows, rng),
    "no object": lambda rows, rng: [None, *rows[1:]],
    "a list for a sample": lambda rows, rng: _changed(rows, rng, "sample", ["invented"]),
    "nothing at all": lambda rows, rng: [],
}
UNLIKE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another chat template": lambda protocol: {**protocol, "template_sha256": "0" * 64},
    "another batch tolerance": lambda protocol: {**protocol, "batch_tolerance": 1.0},
    "other scorers": lambda protocol: {**protocol, "engine": {**protocol["engine"], "scorers": "0" * 16}},
    "another seed": lambda protocol: {**protocol, "seed": protocol["seed"] + 1},
}
"""One of two reports was made under another protocol, and says so."""


def _changed(rows: Rows, rng: random.Random, field: str, value: Any) -> Rows:
    place = rng.randrange(len(rows))
    return [{**row, field: value} if at == place else row for at, row in enumerate(rows)]


def _lost(rows: Rows, rng: random.Random) -> Rows:
    place, field = (
        rng.randrange(len(rows)),
        rng.choice(("score", "cluster", "task", "sample", "metric", "prompt_sha256")),
    )
    return [{k: v for k, v in row.items() if at != place or k != field} for at, row in enumerate(rows)]


def tampered(before: Path, after: Path, n: int, *, seed: int) -> list[Rate]:
    """E03: one defect in one of two real reports, chosen at random."""
    rng = random.Random(seed)
    accepted = 0
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(n):
            folders = {}
            for name, original in (("before", before), ("after", after)):
                folders[name] = Path(scratch) / f"{turn}-{name}"
                folders[name].mkdir()
                for file in ("samples.jsonl", "protocol.json"):
                    shutil.copy(original / file, folders[name] / file)
            folder = folders[rng.choice(("before", "after"))]
            defect = rng.choice(sorted({**TAMPERED, **UNLIKE}))
            if defect in TAMPERED:
                rows = TAMPERED[defect](read_lines(folder / "samples.jsonl"), rng)
                write_lines(folder / "samples.jsonl", rows)
            else:
                protocol = json.loads((folder / "protocol.json").read_bytes())
                write_json(folder / "protocol.json", UNLIKE[defect](protocol))
            evidence = gather(read_report(folders["before"]), read_report(folders["after"]))
            accepted += decide(evidence, alpha=ALPHA, margins={}, primary=()).verdict != "reject"
            for made in folders.values():
                shutil.rmtree(made)
    defects = len(TAMPERED) + len(UNLIKE)
    return [Rate(f"E03 a report with one of {defects} defects not rejected", accepted, n, "0")]


def wide(tasks: tuple[PinnedTask, ...]) -> dict[str, float]:
    """The quickstart's margins: what forty items a task can show."""
    known = {"capability": 0.1, "bias": 0.2, "harm": 0.1, "over-refusal": 0.1, "forgetting": 0.05}
    return {name: margin for name, margin in known.items() if name in {task.family for task in tasks}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="A twentieth of the runs.")
    options = parser.parse_args()
    evidence = gather(read_report(options.before), read_report(options.after))
    if evidence.problems:
        raise SystemExit("\n".join(evidence.problems))
    part, started = (20 if options.quick else 1), time.process_time()
    margins = wide(evidence.tasks)
    rates = [
        *equal_models(evidence, 2000 // part, margins=margins, seed=1),
        *enough_items(evidence, 1000 // part, margins=margins, seed=5),
        *one_of_twenty(evidence, 500 // part, items=400, margin=0.1, seed=2),
        *one_of_pooled(evidence, 200 // part, items=400, margin=0.1, seed=6),
        *collapsed(500 // part, seed=7),
        *guards_of_equal(1000 // part, seed=8),
        *tampered(options.before, options.after, 500 // part, seed=3),
        *noise_in_a_row(evidence, 200 // part, rounds=100, margins=margins, seed=4),
    ]
    rows = []
    for rate in rates:
        low, high = rate.bounds
        print(f"{rate.name:86} {rate.hits:5} of {rate.n:5}  {low:.4f} to {high:.4f}  promised {rate.promised}")
        rows.append(
            {"name": rate.name, "hits": rate.hits, "n": rate.n, "low": low, "high": high, "promised": rate.promised}
        )
    families = {name: [len(pairs.differences), len(set(pairs.clusters))] for name, pairs in evidence.families.items()}
    result = {
        "command": "python -m benchmarks.gate", "alpha": ALPHA, "rates": rows, "families_items_clusters": families,
        "cpu_s": round(time.process_time() - started, 1),
        "machine": f"{platform.machine()}, {platform.python_version()}",
    }  # fmt: skip
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"gate-{time.strftime('%Y-%m-%d')}.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
