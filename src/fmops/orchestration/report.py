"""The page of one run: what happened, what it did to the model, what was decided, what it cost.

Enters: a store and a run's folder. Leaves: `report.html` there: one file, no script, nothing fetched, works from disk.
Refuses: to run anything that it shows. Models write parts of it, so every text is escaped and scripts are forbidden.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from fmops.orchestration.charts import Box, lifecycle_picture, signed
from fmops.orchestration.history import History, NodeRun, read_history
from fmops.orchestration.report_parts import (
    corpus_card,
    costs,
    curves,
    gate_rows,
    headline,
    key_figures,
    samples,
    score_rows,
)
from fmops.store import Record, Store, write_atomically

REPORT = "report.html"
MODEL_ROW = ("base", "pretrain", "instruct", "align")
DATA_ROW = {"benchmarks": "base", "corpus": "pretrain", "conversations": "instruct", "preferences": "align"}
EDGES = (
    *(("benchmarks", "corpus"), ("corpus", "pretrain"), ("conversations", "instruct"), ("preferences", "align")),
    *(("base", "evaluate-base"), ("pretrain", "evaluate-pretrain"), ("gate", "release")),
)
STATES = {
    "done": "done",
    "cached": "kept",
    "failed": "failed",
    "running": "cut off",
    "waiting": "to do",
    "skipped": "not reached",
}


def write_report(store: Store, run_folder: Path) -> Path:
    """Write the page of a run; equal runs give equal pages, and a page can be written again at any time."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["signed"] = signed
    history = read_history(store, run_folder)
    page = environment.get_template("report.html.j2").render(_view(store, history))
    path = run_folder / REPORT
    write_atomically(path, page)
    return path


def _view(store: Store, history: History) -> dict[str, Any]:
    before, after = history.record("evaluate-base"), _candidate_report(history)
    gate, release, corpus = (history.record(name) for name in ("gate", "release", "corpus"))
    return {
        "name": history.name,
        "run": history.id,
        "when": _when(history),
        "headline": headline(history),
        "figures": key_figures(store, history),
        "picture": _picture(history),
        "curves": curves(store, history),
        "scores": score_rows([history.record(f"evaluate-{name}") for name in ("base", "pretrain", "candidate")]),
        "gate": gate.artifact if gate else None,
        "gate_rows": gate_rows(gate.artifact) if gate else [],
        "samples": samples(store, before, after) if before and after else [],
        "corpus": corpus_card(corpus.artifact) if corpus else None,
        "examples": [record for name in ("conversations", "preferences") if (record := history.record(name))],
        "costs": costs(history),
        "states": STATES,
        "release": _release(store, release) if release else None,
        "reproduce": _reproduce(history),
        "notes": [(node.name, note) for node in history.nodes.values() for note in node.notes],
    }


def _candidate_report(history: History) -> Record | None:
    return history.record("evaluate-candidate") or history.record("evaluate-pretrain")


def _picture(history: History) -> Any:
    """The three rows of the lifecycle; a stage that the spec leaves out is not drawn."""
    if not history.nodes:
        return None
    chain = [name for name in MODEL_ROW if name in history.nodes]
    column = {name: place for place, name in enumerate(chain)}
    places = {name: (place, 1) for name, place in column.items()}
    for name, model in DATA_ROW.items():
        places[name] = (column.get(model, 0), 0)
    places |= {"evaluate-base": (0, 2), "evaluate-pretrain": (column.get("pretrain", 0), 2)}
    places |= {"evaluate-candidate": (len(chain) - 1, 2), "gate": (len(chain), 1), "evaluate-champion": (len(chain), 2)}
    places["release"] = (len(chain) + ("gate" in history.nodes), 1)
    boxes = [
        Box(node.name, _state_css(node), _state_text(node), *places[node.name])
        for node in history.nodes.values()
        if node.name in places
    ]
    after = "gate" if "gate" in history.nodes else "release"
    tail = [*pairwise(chain), (chain[-1], after)] if chain else []
    judged = "evaluate-candidate" if "evaluate-candidate" in history.nodes else "evaluate-pretrain"
    verdicts = [(chain[-1], "evaluate-candidate"), (judged, "gate")] if chain else []
    verdicts += [("evaluate-champion", "gate")] if "evaluate-champion" in history.nodes else []
    return lifecycle_picture(boxes, [*EDGES, *tail, *verdicts])


def _state_css(node: NodeRun) -> str:
    blocked = node.name == "gate" and node.record and node.record.artifact["verdict"] != "promote"
    return "blocked" if blocked else node.state


def _state_text(node: NodeRun) -> str:
    if node.name == "gate" and node.record:
        return str(node.record.artifact["verdict"])
    if node.state == "done" and node.record:
        return f"done · {node.record.cost['wall_s']:,.0f} s"
    return STATES[node.state]


def _release(store: Store, record: Record) -> dict[str, Any]:
    folder = store.files(record)
    card = folder / "MODEL_CARD.md"
    return {
        "key": record.key,
        "aliases": sorted(alias for alias, key in store.aliases().items() if key == record.key),
        "licence": record.artifact["licence"],
        "parity": record.artifact["parity"],
        "card": card.read_text(encoding="utf-8")[:20_000] if card.is_file() else "",
        "bytes": sum(entry.bytes for entry in record.files.values()),
    }


def _reproduce(history: History) -> dict[str, Any]:
    records = [node.record for node in history.nodes.values() if node.record]
    newest: Record | None = max(records, key=lambda record: record.created, default=None)
    environment: dict[str, Any] = newest.environment if newest else {}
    return {
        "command": history.facts.get("command", ""),
        "spec": history.facts.get("text", ""),
        "seed": newest.seed if newest else None,
        "facts": _flat({key: value for key, value in environment.items() if key != "command"}),
        "digests": [(record.node, record.key, record.digest) for record in records],
    }


def _flat(environment: dict[str, Any]) -> list[tuple[str, str]]:
    packages = environment.get("packages", {})
    rows = [(name.replace("_", " "), str(value)) for name, value in environment.items() if name != "packages" and value]
    return [*rows, ("packages", ", ".join(f"{name} {version}" for name, version in packages.items()))] if rows else []


def _when(history: History) -> str:
    if history.started is None:
        return ""
    return datetime.fromtimestamp(history.started, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
