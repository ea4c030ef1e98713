"""The lifecycle picture: ten steps round the circle, each with its state.

Enters: the newest run, and what production does. Leaves: for each step a state, a few words, and how long it took.
Refuses: to guess; a step that the run does not have is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fmops.locks import holder
from fmops.orchestration.history import History, NodeRun
from fmops.orchestration.summary import summarise

Step = Literal["done", "kept", "running", "waiting", "failed", "stopped", "held", "absent"]
NODES = {
    "data": ("base", "benchmarks", "preferences", "conversations", "corpus"),
    "pretrain": ("pretrain",),
    "instruct": ("instruct",),
    "align": ("align",),
    "evaluate": ("evaluate-champion", "evaluate-base", "evaluate-pretrain", "evaluate-candidate"),
    "gate": ("gate",),
    "release": ("release",),
}
"""Step of the picture → stages of a run; the last one that is ready speaks for the step."""
PHASES: dict[str, Step] = {
    "checking": "running", "shadow": "running", "canary": "running", "held": "held", "promoted": "done",
    "rolled back": "stopped",
}  # fmt: skip
Part = Mapping[str, Any]


def busy(root: Path) -> bool:
    """Whether a run goes on in the workspace right now."""
    return holder(root / "lock") is not None


def run(history: History | None, *, busy: bool) -> dict[str, Any] | None:
    """The newest run in a few facts."""
    if history is None:
        return None
    over = history.finished is not None
    state = ("failed" if history.error else "done") if over else ("running" if busy else "interrupted")
    return {
        "id": history.id, "name": history.name, "state": state, "started": history.started,
        "finished": history.finished, "error": history.error,
    }  # fmt: skip


def steps(history: History | None, parts: Mapping[str, Any], *, busy: bool) -> list[dict[str, str]]:
    """Ten steps in the order of the circle."""
    nodes = history.nodes if history else {}
    found = [_trained(name, [nodes[n] for n in members if n in nodes], busy=busy) for name, members in NODES.items()]
    return [*found, _rollout(parts["rollout"]), _serve(parts["serving"]), _monitor(parts["monitor"])]


def _step(name: str, state: Step, words: str = "") -> dict[str, str]:
    return {"name": name, "state": state, "words": words}


def _trained(name: str, nodes: list[NodeRun], *, busy: bool) -> dict[str, str]:
    """One step of the run: as far as its stages are."""
    if not nodes:
        return _step(name, "absent", "not in this run")
    for node in nodes:
        if node.state == "failed":
            return _step(name, "failed", _short(node.error or "failed"))
        if node.state == "running":
            return _step(name, "running", _progress(node)) if busy else _step(name, "stopped", "interrupted")
    ready = [node for node in nodes if node.state in ("done", "cached")]
    record = next((node.record for node in reversed(ready) if node.record), None)
    if len(ready) < len(nodes):
        skipped = any(node.state == "skipped" for node in nodes)
        words = f"{len(ready)} of {len(nodes)} done" if ready else ("not reached" if skipped else "to do")
        return _step(name, "waiting", words)
    words = _short(summarise(record)) if record else ""
    if record and record.kind == "release":
        words = record.key
    if record and record.kind == "gate" and record.artifact["verdict"] != "promote":
        return _step(name, "stopped", words)
    return _step(name, "done" if any(node.state == "done" for node in nodes) else "kept", words)


def _progress(node: NodeRun) -> str:
    shown = node.progress
    return f"{shown['done']:,.0f} of {shown['total']:,.0f} {shown['unit']}" if shown else "running"


def _rollout(rollout: Part | None) -> dict[str, str]:
    if rollout is None:
        return _step("rollout", "absent", "none yet")
    if "error" in rollout:
        return _step("rollout", "failed", "cannot be read")
    share = f" {rollout['share'] * 100:g} %" if rollout["phase"] == "canary" else ""
    return _step("rollout", PHASES[rollout["phase"]], f"{rollout['phase']}{share}, {rollout['answers']:,} answers")


def _serve(serving: Part) -> dict[str, str]:
    if "error" in serving:
        return _step("serve", "failed", "cannot be read")
    if not serving["up"]:
        return _step("serve", "absent", "nothing is up")
    if serving["gateway"] != "ok":
        return _step("serve", "failed", f"gateway: {serving['gateway']}")
    engines = [one for one in serving["processes"] if one["release"]]
    healthy = sum(one["healthy"] for one in engines)
    if healthy < len(engines):
        return _step("serve", "failed", f"{healthy} of {len(engines)} engines answer")
    return _step("serve", "done", f"{healthy} engine{'s' * (healthy != 1)} behind the gateway" if engines else "up")


def _monitor(monitor: Part | None) -> dict[str, str]:
    if monitor is None:
        return _step("monitor", "absent", "has not looked yet")
    if "error" in monitor:
        return _step("monitor", "failed", "cannot be read")
    if monitor["stale"]:
        return _step("monitor", "failed", "does not look any more")
    alarms = len(monitor["alarms"])
    words = f"{monitor['answers']:,} answers, {alarms or 'no'} alarm{'s' * (alarms > 1)}"
    return _step("monitor", "stopped" if any(a["kind"] == "harm" for a in monitor["alarms"]) else "done", words)


def _short(text: str, width: int = 90) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
