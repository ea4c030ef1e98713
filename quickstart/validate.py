"""Compare what a case's run left with the results it promises.

Enters: a case folder with `expected.json` (`node/figure` → value and tolerance) and its `.fmops` workspace.
Leaves: a line a figure, exit code 0 when all agree, 1 otherwise. Refuses: a case that has not run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fmops.errors import FmopsError
from fmops.store import Record, Store


def figure(record: Record, name: str) -> Any:
    """A figure of an artifact: a field, a metric of a checkpoint, or `task/metric` of an evaluation."""
    artifact = record.artifact
    if record.kind == "evaluation":
        task, _, metric = name.partition("/")
        return next(m["value"] for m in artifact["metrics"] if m["task"] == task and m["name"] == metric)
    if record.kind == "checkpoint" and name in artifact["metrics"]:
        return artifact["metrics"][name]
    value: Any = artifact
    for part in name.split("."):
        value = value[part]
    return value


def check(folder: Path) -> list[str]:
    """Every figure that is not as expected, as a line; prints all of them.

    Raises:
        FmopsError: the case has not run.
    """
    store = Store(folder / ".fmops")
    newest = {record.node: record for record in store.records()}
    wrong = []
    for key, expected in json.loads((folder / "expected.json").read_text(encoding="utf-8")).items():
        node, _, name = key.partition("/")
        if node not in newest:
            raise FmopsError(
                f"{folder} has no artifact of {node}: run it first with `fmops run --spec {folder}/lifecycle.yaml`."
            )
        found = figure(newest[node], name)
        if "at_least" in expected or "at_most" in expected:
            agrees = expected.get("at_least", found) <= found <= expected.get("at_most", found)
        elif "tolerance" in expected:
            agrees = abs(found - expected["value"]) <= expected["tolerance"]
        else:
            agrees = found == expected["value"]
        line = f"{'ok   ' if agrees else 'WRONG'} {key}: {found} (expected {json.dumps(expected)})"
        print(line)
        if not agrees:
            wrong.append(line)
    return wrong


if __name__ == "__main__":
    try:
        sys.exit(1 if check(Path(sys.argv[1])) else 0)
    except FmopsError as error:
        sys.exit(f"error: {error}")
