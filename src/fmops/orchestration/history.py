"""What a run did, read back from its folder.

Enters: `run.json`, `events.jsonl` and the store's records. Leaves: each node's state, record, curve and error.
Refuses: to guess; a node whose record is not known has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fmops.orchestration.events import Event, read_events
from fmops.store import Record, Store

State = Literal["done", "cached", "failed", "running", "waiting", "skipped"]


@dataclass
class NodeRun:
    """One node's part in a run."""

    name: str
    state: State = "waiting"
    """`running` also means: the run was interrupted or killed in it. `skipped`: the run ended before it."""
    reason: str = ""
    error: str | None = None
    fingerprint: str | None = None
    started: float | None = None
    ended: float | None = None
    record: Record | None = None
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    progress: Event | None = None


@dataclass(frozen=True)
class History:
    """One run."""

    id: str
    folder: Path
    facts: dict[str, Any]
    """`run.json`: name, spec, text, command, started, champion."""
    nodes: dict[str, NodeRun]
    started: float | None
    finished: float | None
    """None while the run goes on, and when it was killed."""
    error: str | None
    champion: str | None

    @property
    def name(self) -> str:
        """The lifecycle's name."""
        return str(self.facts.get("name", self.id))

    def record(self, node: str) -> Record | None:
        """The artifact of a node in this run."""
        return self.nodes[node].record if node in self.nodes else None


def read_history(store: Store, folder: Path) -> History:
    """Read a run back; a run cut off by a kill is read as far as it went."""
    facts: dict[str, Any] = {}
    if (folder / "run.json").is_file():
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    nodes: dict[str, NodeRun] = {}
    started = finished = None
    error, champion = None, facts.get("champion")
    for event in read_events(folder):
        if event["event"] == "run-started":
            started = event["time"]
        elif event["event"] == "run-finished":
            finished, error, champion = event["time"], event.get("error"), event.get("champion")
        elif event["node"] != "run":
            _apply(nodes.setdefault(event["node"], NodeRun(event["node"])), event)
    if finished:
        for node in nodes.values():
            if node.state == "waiting":
                node.state = "skipped"
    _attach_records(nodes, store.records())
    return History(folder.name, folder, facts, nodes, started, finished, error, champion)


def _apply(node: NodeRun, event: Event) -> None:
    node.fingerprint = event.get("fingerprint") or node.fingerprint
    match event["event"]:
        case "planned":
            node.state = "cached" if event["state"] == "cached" else "waiting"
            node.reason = event.get("reason", "")
        case "started":
            node.state, node.started = "running", event["time"]
        case "finished":
            node.state, node.ended = "done", event["time"]
        case "cached":
            node.state = "cached"
        case "failed":
            node.state, node.ended, node.error = "failed", event["time"], event.get("error")
        case "metrics":
            node.metrics.append((int(event["step"]), dict(event["values"])))
        case "progress":
            node.progress = event
        case "note":
            node.notes.append(str(event["text"]))
        case _:
            pass  # An event of a newer version: the run's other events still tell the rest.


def _attach_records(nodes: dict[str, NodeRun], records: Iterable[Record]) -> None:
    by_fingerprint = {record.fingerprint: record for record in records}
    by_key = {record.key: record for record in by_fingerprint.values()}
    for node in nodes.values():
        if node.fingerprint and node.state in ("done", "cached"):
            node.record = by_fingerprint.get(node.fingerprint)
    # Events of cached nodes may lack a fingerprint; the records made in this run name their inputs exactly.
    open_ends = [node.record for node in nodes.values() if node.record]
    while open_ends:
        for ref in open_ends.pop().inputs.values():
            parent = by_key.get(ref.ref)
            if parent and parent.node in nodes and nodes[parent.node].record is None:
                nodes[parent.node].record = parent
                open_ends.append(parent)
