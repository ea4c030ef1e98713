"""The benchmark's file: a row for each event over all of its seeds, and the row of each seed.

Enters: rows as `run.play` leaves them. Leaves: one JSON file that grows by calls, and is whole after each.
Refuses: rows of another size, which begin a file anew.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmops.orchestration.bench.site import LOOK_EVERY
from fmops.store import write_atomically

Row = dict[str, Any]
MEDIANS = (
    "detected_after_requests", "recovered_after_requests", "recovered_after_s", "recovery_cpu_s", "recovery_wall_s",
    "answers_of_the_faulty_release", "forgetting_bits_per_byte",
)  # fmt: skip
QUALITIES = (
    "quality_before", "quality_during", "quality_after", "quality_new_during", "quality_new_after",
    "quality_known_before", "quality_known_after",
)  # fmt: skip
_FLAT = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
_NESTED = re.compile(r"\[\s+(\[[^{}]*?\])\s+\]")


def merged(rows: Sequence[Row]) -> Row:
    """One event over its seeds: medians, counts, pooled means. What was missed in one run counts as missed.

    The texts and the curve are those of the first seed.
    """
    whole = {key: value for key, value in rows[0].items() if key not in ("seed", "load_average")}
    # What only some runs came to, such as the time of a recovery, stands in theirs alone.
    told = {name for row in rows for name in row}
    whole |= {name: _median([row.get(name) for row in rows]) for name in MEDIANS if name in told}
    whole |= {name: pooled([row.get(name) for row in rows]) for name in QUALITIES if name in told}
    return whole | {
        "n": len(rows), "seeds": [row["seed"] for row in rows],
        "detected_runs": sum(row["detected_after_requests"] is not None for row in rows),
        "diagnosis_right": all(row["diagnosis_right"] for row in rows),
        "diagnosis_right_runs": sum(row["diagnosis_right"] for row in rows),
        "false_triggers": sum(row["false_triggers"] for row in rows),
        "false_triggers_are": [one for row in rows for one in row["false_triggers_are"]],
        "recovered": None if rows[0]["recovered"] is None else all(row["recovered"] for row in rows),
        "recovered_runs": None if rows[0]["recovered"] is None else sum(bool(row["recovered"]) for row in rows),
        "runs": [{key: value for key, value in row.items() if key not in ("about", "curve")} for row in rows],
    }  # fmt: skip


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median_high(known) if known else None


def pooled(parts: Sequence[Row | None]) -> Row | None:
    """One mean over the requests of all runs, and its 95 % half-width."""
    known = [part for part in parts if part and part["n"]]
    n = sum(part["n"] for part in known)
    if not n:
        return parts[0]
    mean = math.fsum(part["mean"] * part["n"] for part in known) / n
    half = math.sqrt(math.fsum((part["half_width"] * part["n"]) ** 2 for part in known)) / n
    return {"mean": round(mean, 3), "half_width": round(half, 3), "n": n}


class Results:
    """Rows by event and seed, on disk after each."""

    def __init__(self, out: Path, *, quick: bool, order: Sequence[str], clock: Callable[[], float]) -> None:
        self._out, self._order, self._clock = out, list(order), clock
        self._head: Row = {
            "command": " ".join(["fmops", *sys.argv[1:]]), "quick": quick, "look_every": LOOK_EVERY,
            "machine": {"cores": len(os.sched_getaffinity(0)), "platform": platform.platform(),
                        "python": platform.python_version(), "shared": "see load_average of each run"},
            "versions": {name: importlib.metadata.version(name) for name in ("fmops", "torch", "transformers", "trl")},
            "bench_wall_s": 0.0,
        }  # fmt: skip
        self._rows: dict[str, list[Row]] = {}
        earlier: Row = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        if earlier.get("quick") == quick and "bench_wall_s" in earlier:
            self._head = {key: earlier[key] for key in self._head}
            for event in earlier["events"]:
                told = {key: event[key] for key in ("about", "curve")}
                # The curve of the first seed is the event's; others are not kept.
                self._rows[event["name"]] = [{**run, **told} for run in event["runs"]]
        self._since = clock()

    def add(self, row: Row) -> None:
        """Take in one run, in place of an earlier one of its seed, and write the file."""
        others = [one for one in self._rows.get(row["name"], []) if one["seed"] != row["seed"]]
        self._rows[row["name"]] = sorted([*others, row], key=lambda one: one["seed"])
        now = self._clock()
        self._head["bench_wall_s"] = round(self._head["bench_wall_s"] + now - self._since, 1)
        self._since = now
        write_atomically(self._out, as_text(self.whole))

    @property
    def whole(self) -> Row:
        """What the file holds."""
        names = sorted(self._rows, key=self._order.index)
        return {**self._head, "events": [merged(self._rows[name]) for name in names]}


def as_text(value: Row) -> str:
    """JSON that a person can read and a diff can show: objects over several lines, lists of numbers on one."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    flat = _FLAT.sub(lambda found: f"[{_one_line(found[1])}]", text)
    return _NESTED.sub(lambda found: f"[{_one_line(found[1])}]", flat) + "\n"


def _one_line(text: str) -> str:
    return re.sub(r",\s*\n\s*", ", ", text)
