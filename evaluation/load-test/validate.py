"""What a load test must show: every request answered, streams whole, first tokens before the ends.

Enters: locust's `load_stats.csv`. Leaves: the table, exit code 0 or 1. Refuses: a run that asked too little.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

FEWEST = 10
USERS = 4
"""Whose last answers may be under way when locust writes its file for the last time."""


def main(path: Path) -> int:
    """Print what was measured and say whether it holds."""
    rows = {row["Name"]: row for row in csv.DictReader(path.open(encoding="utf-8"))}
    for name in ("stream opened", "first token", "whole answer"):
        row = rows[name]
        print(f"{name}: n = {row['Request Count']}, failed {row['Failure Count']}, "
              f"median {float(row['50%']):.0f} ms, 95 % within {float(row['95%']):.0f} ms")  # fmt: skip
    asked, whole = int(rows["stream opened"]["Request Count"]), int(rows["whole answer"]["Request Count"])
    failed = int(rows["Aggregated"]["Failure Count"])
    holds = asked >= FEWEST and failed == 0 and whole + USERS >= asked
    holds = holds and float(rows["first token"]["50%"]) <= float(rows["whole answer"]["50%"])
    print("ok" if holds else f"WRONG: {asked} asked (at least {FEWEST}), {whole} whole, {failed} failed")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
