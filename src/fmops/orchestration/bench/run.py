"""One event from quiet to mended, and what is reported of it.

Enters: a world, an event, a seed. Leaves: a row of figures; all of them in one JSON file.
Refuses: to leave out an event that was missed or diagnosed wrongly; the row says so.
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmops.artifacts import Diagnosis, GateDecision
from fmops.orchestration.bench.events import POISON, Event, events, serve_as_before
from fmops.orchestration.bench.result import Results, Row
from fmops.orchestration.bench.site import Look, Served, Site, open_site
from fmops.orchestration.bench.users import Mix, Users
from fmops.orchestration.bench.world import FULL, QUICK, Size, World, make_world, write_pages
from fmops.orchestration.events import View

QUIET = 80
"""Most requests after the reference in which nothing is wrong yet."""
ATTACKS = ("same-target", "trigger", "burst", "identity-cap")
"""Reasons of the feedback screen that speak of somebody's will."""
CURVE = 16
"""Requests of one point of the quality curve."""


def bench(
    folder: Path | None,
    *,
    quick: bool,
    names: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    view: View,
    say: Callable[[str], None],
) -> Row:
    """Play the events and write `out`; rows that are there already from the same size stay.

    Args:
        folder: where the worlds are made, one a seed, and kept for the next call; a temporary one without it.
    """
    size, known = (QUICK if quick else FULL), events()
    results = Results(out, quick=quick, order=list(known), clock=time.monotonic)
    with tempfile.TemporaryDirectory(prefix="fmops-loop-bench-") as scratch:
        home = (folder or Path(scratch)).resolve()
        for seed in seeds:
            world = _world(home / f"world-{seed}", size, view, seed=seed)
            for name in names:
                with tempfile.TemporaryDirectory(prefix="event-", dir=home) as copy:
                    row = asyncio.run(play(known[name], world.moved(Path(copy) / "project"), view, seed=seed))
                say(describe(row))
                results.add(row)
    return results.whole


async def play(event: Event, world: World, view: View, *, seed: int) -> Row:
    """Serve in quiet, inject, serve until it is mended or patience is over, and a while longer."""
    size, serve = world.size, event.serve or serve_as_before
    loads = [os.getloadavg()[0]]
    wall, users = time.monotonic(), Users(world, seed=seed)
    async with open_site(world) as site:
        await site.look()
        # In every arm, so that any false alarm has something to train on.
        write_pages(world.folder / "docs", world.new)
        quiet = size.reference + min(QUIET, size.reference)
        await site.serve(users, Mix(), quiet)
        at_s = site.now_s
        await event.inject(site, view)
        injected_wall, mended = time.monotonic(), None
        while len(site.served) < quiet + (size.patience if event.mended else size.patience // 4):
            await serve(site, users, event.mix)
            if event.mended and event.mended(site):
                mended = len(site.served)
                break
        mended_wall, mended_s = time.monotonic(), site.now_s
        if event.mended:
            await site.serve(users, event.mix, size.tail)
        loads.append(os.getloadavg()[0])
        row = {"seed": seed, **_row(event, site, quiet=quiet, injected_s=at_s, mended=mended)}
    if mended is not None:
        real = event.serve is not None
        row["recovered_after_s"] = round(mended_wall - injected_wall if real else mended_s - at_s, 1)
        row["recovered_clock"] = "wall" if real else "simulated"
        row["recovery_wall_s"] = round(mended_wall - injected_wall, 1)
    row |= {"wall_s": round(time.monotonic() - wall, 1), "load_average": [round(load, 1) for load in loads]}
    return row


def _row(event: Event, site: Site, *, quiet: int, injected_s: float, mended: int | None) -> Row:
    before, after = [[look for look in site.looks if (look.requests > quiet) == late] for late in (False, True)]
    found = next((look for look in after if _found_by(look, event, since_s=injected_s)), None)
    acts, diagnosis = _acts(site.looks), _diagnosis(after)
    harm = [alarm for look in before for alarm in look.report.alarms if alarm.kind == "harm"]
    late_harm = [] if event.mended else _harm(after, since_s=injected_s)
    false = [act for act in acts if act not in event.acts] + [
        f"alarm {a.signal}" for a in {a.signal: a for a in [*harm, *late_harm]}.values()
    ]
    end = mended or len(site.served)
    fault = next((look.rollout.state.challenger for look in after if look.rollout), None)
    rounds = site.looks[-1].rounds
    decisions = site.gates()
    tail = site.served[end:] if event.mended else site.served[quiet:]
    row: Row = {
        "name": event.name, "about": event.about, "requests": len(site.served), "quiet_requests": quiet,
        "detected_after_requests": found.requests - quiet if found else None,
        "detected_by": _found_by(found, event, since_s=injected_s) if found else None,
        "diagnosis": diagnosis, "diagnoses": _diagnoses(after),
        "diagnosis_right": diagnosis in event.causes,
        "alarms": _alarms(after, since_s=injected_s), "acts": acts,
        "false_triggers": len(false), "false_triggers_are": false,
        "shift_alarms": sorted({a.signal for look in after for a in look.report.alarms if a.kind == "shift"}),
        "recovered": mended is not None if event.mended else None,
        "recovered_after_requests": mended - quiet if mended else None, "recovered_after_s": None,
        "recovery_cpu_s": round(sum(look.cpu_s for look in after if look.requests <= end), 1) if event.mended else None,
        "quality_before": mean(site.served[quiet // 2 : quiet]),
        "quality_during": mean(site.served[quiet:end]) if event.mended else None,
        "quality_after": mean(tail),
        "failed_requests": sum(served.status != 200 for served in site.served[quiet:]),
        "answers_of_the_faulty_release": _answers_of(fault, site.served[quiet:]) if fault and not rounds else None,
        "rounds": [[each.trigger.stage, each.outcome or each.phase, each.reason] for each in rounds],
        "forgetting_bits_per_byte": _forgotten(decisions[-1]) if decisions else None,
        "feedback": site.feedback_counts().model_dump(),
        "curve": _curve(site.served),
    }  # fmt: skip
    if event.mix.new_share:
        row["quality_new_during"] = mean([s for s in site.served[quiet:end] if s.question.domain == "new"])
        row["quality_new_after"] = mean([s for s in tail if s.question.domain == "new"])
        row["quality_known_before"] = mean([s for s in site.served[quiet // 2 : quiet] if s.question.domain == "known"])
        row["quality_known_after"] = mean([s for s in tail if s.question.domain == "known"])
    return row


def _forgotten(decision: GateDecision) -> float | None:
    """Rise of the old domain's bits per byte that the last round's gate saw, whatever it decided."""
    found = [family.difference for family in decision.families if family.family == "forgetting"]
    return round(-found[0], 4) if found else None


def mean(served: Sequence[Served]) -> Row:
    """Mean quality, its 95 % half-width, and n."""
    values = [one.quality for one in served if one.question.domain != "attack"]
    if not values:
        return {"mean": None, "half_width": None, "n": 0}
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 3), "half_width": round(1.96 * spread, 3), "n": len(values)}


def _alarms(looks: Sequence[Look], *, since_s: float) -> list[list[Any]]:
    """Each alarm after the injection: requests served at the look that raised it, kind, signal."""
    rows: dict[tuple[str, str, float], list[Any]] = {}
    for look in looks:
        for alarm in look.report.alarms:
            if alarm.at_s > since_s:
                rows.setdefault((alarm.kind, alarm.signal, alarm.at_s), [look.requests, alarm.kind, alarm.signal])
    return list(rows.values())


def _curve(served: Sequence[Served]) -> list[list[float]]:
    return [[at, mean(served[at - CURVE : at])["mean"]] for at in range(CURVE, len(served) + 1, CURVE)]


def _answers_of(release: str, served: Sequence[Served]) -> int:
    return sum(one.release == release for one in served)


def _found_by(look: Look, event: Event, *, since_s: float) -> str | None:
    """What first spoke of harm: the rollout, an alarm, golden prompts, the screen; None when nothing did.

    A shift counts only where the diagnosis made more of it: shifts are logged, and hurt nobody. That answers got slow
    finds nothing but an infrastructure fault: whoever else uses the machine makes them so.
    """
    if look.rollout and look.rollout.state.phase == "rolled back":
        return f"rollout: {look.rollout.state.reason}"
    told = look.report.diagnosis
    alarms = [
        alarm for alarm in look.report.alarms
        if alarm.at_s > since_s and (alarm.kind == "harm" or _acts_on(told))
        and (alarm.signal != "slow" or "infrastructure" in event.causes)
    ]  # fmt: skip
    if alarms:
        return ", ".join(dict.fromkeys(f"{alarm.kind} of {alarm.signal}" for alarm in alarms))
    if look.report.golden is not None and look.report.golden < 1:
        return "golden prompts"
    if aside := _set_aside(look):
        return aside
    return told.cause if told and told.stage == "rollback" else None


def _set_aside(look: Look) -> str | None:
    """What the loop said of feedback that looks like an attack; single rows that a model wrote are none."""
    said = (line for line in look.said if line.startswith("feedback: "))
    return next((line for line in said if any(f" {reason}" in line for reason in ATTACKS)), None)


def _acts_on(told: Diagnosis | None) -> bool:
    return told is not None and any(one.stage not in ("evaluate", "none", "alert") for one in told.every)


def _harm(looks: Sequence[Look], *, since_s: float) -> list[Any]:
    return [a for look in looks for a in look.report.alarms if a.kind == "harm" and a.at_s > since_s]


def _acts(looks: Sequence[Look]) -> list[str]:
    """What the loop did: rounds begun, releases rolled back by the rollout, champions taken back."""
    acts = [f"round {each.trigger.stage}" for each in looks[-1].rounds]
    ended = {look.rollout.state.id: look.rollout.state.phase for look in looks if look.rollout}
    acts += ["rolled out back" for phase in ended.values() if phase == "rolled back"]
    return acts + ["rollback" for look in looks for line in look.said if line.startswith("rolled back from ")]


def _diagnoses(looks: Sequence[Look]) -> list[list[Any]]:
    """Each diagnosis of the monitor when it first stood: requests so far, cause, stage."""
    rows: list[list[Any]] = []
    for look in looks:
        told = look.report.diagnosis
        if told and (not rows or rows[-1][1] != told.cause):
            rows.append([look.requests, told.cause, told.stage])
    return rows


def _diagnosis(looks: Sequence[Look]) -> str:
    """What the loop acted on; where it did nothing, what the monitor said last."""
    for look in looks:
        if look.rounds:
            return look.rounds[0].trigger.why.partition(":")[0]
        if look.rollout and look.rollout.state.phase == "rolled back":
            return "release fault"
        if any(line.startswith(("rolled back from ", "release fault")) for line in look.said):
            return "release fault"
    if any(_set_aside(look) for look in looks):
        return POISON
    told = _diagnoses(looks)
    return str(told[-1][1]) if told else ""


def describe(row: Row) -> str:
    """One event in a line."""
    found = row["detected_after_requests"]
    what = f"found after {found} requests by {row['detected_by']}" if found is not None else "nothing found"
    mended = f"; mended after {row['recovered_after_requests']}" if row["recovered"] else ""
    right = "right" if row["diagnosis_right"] else "WRONG"
    said = f"{row['diagnosis'] or 'no diagnosis'} ({right}){mended}"
    return f"{row['name']}: {what}; {said}; false triggers {row['false_triggers']}"


def _world(folder: Path, size: Size, view: View, *, seed: int) -> World:
    from fmops.orchestration.bench.facts import KNOWN, NEW, facts_of

    if (folder / ".fmops" / "aliases.json").is_file():
        known, new = facts_of(KNOWN, most=size.facts), facts_of(NEW, most=size.facts)
        return World(folder=folder, size=size, known=tuple(known), new=tuple(new))
    return make_world(folder, size, view, seed=seed)
