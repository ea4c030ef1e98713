"""What commands print: the plan, the outcome of a run, the status; and the release that is to be served.

Enters: a project. Leaves: text, or a release with its record.
Refuses: to name a champion where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fmops.artifacts import Release
from fmops.errors import FmopsError
from fmops.integrity import read_json, read_lines
from fmops.locks import holder
from fmops.orchestration.detectable import told_before
from fmops.orchestration.estimate import estimate, parameters_of
from fmops.orchestration.events import read_events
from fmops.orchestration.project import Project
from fmops.sources import Report
from fmops.store import Record, artifact_key

if TYPE_CHECKING:
    from fmops.orchestration.run import Outcome


def render_plan(project: Project, *, report: Report | None = None) -> str:
    """A line a stage: what would happen, why, tokens and expected time; then the sums.

    `report` is told what is downloaded for it.
    """
    planner = project.planner(report)
    steps = planner.plan()
    base = steps["base"]
    source = planner.sources[base.node.sources["source"]]
    parameters = base.record.artifact["parameters"] if base.record else parameters_of(source)
    rows, total, unknown = [], 0.0, []
    for name, step in steps.items():
        expected = estimate(step, planner.newest, threads=project.threads, parameters=parameters)
        if expected.wall_s is None:
            unknown.append(name)
        else:
            total += expected.wall_s
        time = "?" if expected.wall_s is None else f"{expected.wall_s:,.0f} s {expected.basis}" * (expected.wall_s > 0)
        rows.append((name, step.state, f"{expected.tokens:,}" if expected.tokens else "", time, step.reason))
    lines = [table(("stage", "state", "tokens", "time", "why"), rows), ""]
    dollars = project.spec.runtime.dollars_per_hour
    cost = f", ${total / 3600 * dollars:,.2f} at ${dollars:g} an hour" if dollars else ""
    least = "at least " if unknown else ""
    lines.append(f"expected: {least}{total / 60:,.1f} min on {project.threads} threads{cost}")
    if unknown:
        lines.append(f"not in that sum, never run here: {', '.join(unknown)}")
    lines += told_before(project, planner, steps)
    return "\n".join(lines)


def render_outcome(project: Project, outcome: Outcome) -> str:
    """How a run ended, and what to do next."""
    made = [step.record for step in outcome.steps.values() if step.record]
    if not outcome.executed:
        lines = [f"nothing to do: {len(made)} stages are up to date"]
    else:
        lines = _before_and_after(project, outcome)
        gate = outcome.steps["gate"].record if "gate" in outcome.steps else None
        if gate:
            lines.append(f"gate: {gate.artifact['verdict']}")
            lines += [f"  {reason}" for reason in gate.artifact["reasons"]]
        lines.append(f"report: {outcome.report}")
    if outcome.alias == "challenger" and outcome.champion != project.store.aliases().get("champion"):
        lines.append(f"challenger: {outcome.champion}; the champion is serving, so it has to win its traffic")
        lines.append(f"next: fmops rollout start {project.options}")
        return "\n".join(lines)
    lines.append(f"champion: {outcome.champion}")
    lines.append(f"next: fmops serve {project.options}, then fmops chat {project.options}")
    return "\n".join(lines)


def render_status(project: Project) -> str:
    """Aliases, the last run and its stages, and who holds the workspace."""
    store = project.store
    lines = [f"workspace: {store.root}", *([f"store: {store.place}"] if store.shared else [])]
    held = holder(store.root / "lock")
    if held:
        lines.append(f"running: {held}")
    lines += [f"{alias}: {key}" for alias, key in sorted(store.aliases().items())]
    if (store.root / "up").is_dir():
        from fmops.orchestration.up import serving

        lines += serving(store.root)
    # A run that was killed as it began has a folder, and no `run.json` yet.
    runs = sorted(path.parent for path in store.runs.glob("*/run.json"))
    if not runs:
        return "\n".join([*lines, "no run yet: `fmops run` starts one"])
    events = read_events(runs[-1])
    started = read_json(runs[-1] / "run.json", remedy=f"Move {runs[-1]} away.")["started"]
    lines.append(f"last run: {runs[-1].name}, started {started}")
    rows = []
    for name, node in project.graph.nodes.items():
        mine = [event for event in events if event["node"] == name]
        planned = next((e["state"] for e in mine if e["event"] == "planned"), "")
        unknown_yet = "cached" if planned == "cached" else "not reached"
        state = next((e["event"] for e in reversed(mine) if e["event"] in _STATES), unknown_yet)
        shown = next((e for e in reversed(mine) if e["event"] == "progress"), None)
        detail = next((e["summary"] for e in reversed(mine) if e["event"] == "finished"), "")
        if state == "started" and shown:
            detail = f"{shown['done']:,.0f}/{shown['total']:,.0f} {shown['unit']}"
        made = next((e["fingerprint"] for e in reversed(mine) if e.get("fingerprint") and state in _KEPT), None)
        key = artifact_key(node.stage.name, made) if made else ""
        rows.append((name, "running" if state == "started" and held else _STATES.get(state, state), key, detail))
    return "\n".join([*lines, table(("stage", "state", "artifact", ""), rows)])


_KEPT = ("finished", "cached")
_STATES = {"started": "interrupted", "finished": "done", "cached": "cached", "failed": "failed"}


def serves(project: Project) -> bool:
    """Whether `fmops up` serves this workspace. Where it never did, its libraries are not imported."""
    if not (project.store.root / "up").is_dir():
        return False
    from fmops.orchestration.up import is_up

    return is_up(project.store.root)


def find_release(project: Project, key: str) -> tuple[Record, Release]:
    """The release behind an alias or a key, its signature verified.

    Raises:
        FmopsError: no such release; says how to get one.
        IntegrityError: it is unsigned, signed with another key, or not what was signed.
    """
    from fmops.orchestration.signatures import check_release

    if key == "champion" and "champion" not in project.store.aliases():
        raise FmopsError(f"no champion in {project.store.place}: nothing was released yet. Run `fmops run` first.")
    record = project.store.by_key(key)
    artifact = project.store.load(record)
    if not isinstance(artifact, Release):
        raise FmopsError(f"{record.key} is a {record.kind}, no release. Only a release can be served.")
    check_release(project.store, record)
    return record, artifact


def _before_and_after(project: Project, outcome: Outcome) -> list[str]:
    """The first few sample answers of the base and of the candidate, side by side."""
    reports = [outcome.steps[name].record for name in ("evaluate-base", "evaluate-candidate") if name in outcome.steps]
    answers = [_generations(project, record) for record in reports if record]
    if len(answers) != 2:
        return []
    lines = ["samples, before and after:"]
    for prompt in [prompt for prompt in answers[0] if prompt in answers[1]][:3]:
        lines += [f"  > {_short(prompt)}", f"    before: {_short(answers[0][prompt])}"]
        lines.append(f"    after:  {_short(answers[1][prompt])}")
    return lines


def _generations(project: Project, record: Record) -> dict[str, str]:
    path = project.store.files(record) / "generations.jsonl"
    rows = read_lines(path) if path.is_file() else []
    return {row["prompt"]: row["response"] for row in rows}


def _short(text: str, width: int = 160) -> str:
    flat = " ".join(text.split()) or "(nothing)"
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell."""
    lines = [head, *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines
    )
