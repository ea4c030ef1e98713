"""Everything that the page shows, as one value.

Enters: a project. Leaves: JSON and its ETag; the same while nothing changed.
Refuses: nothing. What cannot be read is said in its place, so that one broken file never blanks the page.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from fmops.artifacts import DriftReport, GateDecision, Release
from fmops.console import lifecycle, production
from fmops.deployment.monitoring.monitor import FOLDER as DRIFT
from fmops.deployment.rollout.controller import Controller
from fmops.errors import FmopsError
from fmops.evaluation import spending
from fmops.orchestration.history import History, read_history
from fmops.orchestration.project import Project
from fmops.orchestration.rounds import WEEK_S, Round, Rounds, Trigger, decide
from fmops.store import Record

FRESH_S = 1.0
"""The state is made anew at most so often, however many look."""
RECORDS_S = 30.0
"""Records are read again when a run or an alias moved, and at the latest after so long."""
SHOWN_ROUNDS = 20
SHOWN_RELEASES = 12

Part = dict[str, Any]


class Snapshots:
    """The state of one workspace, made when somebody looks."""

    def __init__(self, project: Project, *, read_only: bool, clock: Callable[[], float] = time.time) -> None:
        self._project, self._read_only, self._clock = project, read_only, clock
        self._lock = threading.Lock()
        self._made_s = -1.0
        self._current = ("", b"")
        self._records: list[Record] = []
        self._history: History | None = None
        self._stamp: tuple[Any, ...] = ()

    def current(self) -> tuple[str, bytes]:
        """ETag and JSON."""
        with self._lock:
            now = self._clock()
            if not 0 <= now - self._made_s < FRESH_S:
                body = json.dumps(self.make(now), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
                self._current = (f'"{blake2b(body, digest_size=12).hexdigest()}"', body)
                self._made_s = now
            return self._current

    def forget(self) -> None:
        """An order was given: the next look sees its outcome."""
        with self._lock:
            self._made_s = -1.0

    def make(self, now: float) -> Part:
        """The whole state; `now` is Unix time."""
        project, store = self._project, self._project.store
        aliases = store.aliases()
        serving = _said(lambda: production.serving(project))
        rollout = _said(lambda: production.rollout(Controller(store).read(), now))
        monitor = _said(
            lambda: production.monitor(self._report(), project.spec.monitor, now, up=bool(serving.get("up")))
        )
        rounds = _said(lambda: self._rounds(now))
        self._look_at_records(aliases)
        busy = lifecycle.busy(store.root)
        parts: Part = {
            "name": project.spec.name,
            "read_only": self._read_only,
            "aliases": aliases,
            "releases": self._releases(aliases),
            "run": lifecycle.run(self._history, busy=busy),
            "rollout": rollout,
            "monitor": monitor,
            "rounds": rounds,
            "gate": self._gate(),
            "serving": serving,
        }
        parts["lifecycle"] = lifecycle.steps(self._history, parts, busy=busy)
        parts["problems"] = production.problems(parts, options=project.options)
        parts["headline"] = production.headline(parts)
        return parts

    def _look_at_records(self, aliases: Mapping[str, str]) -> None:
        store = self._project.store
        runs = sorted(folder for folder in store.runs.glob("*") if folder.is_dir()) if store.runs.is_dir() else []
        newest = runs[-1] if runs else None
        events = newest / "events.jsonl" if newest else None
        grown = events.stat().st_size if events and events.is_file() else 0
        stamp = (newest, grown, tuple(sorted(aliases.items())), self._clock() // RECORDS_S)
        if stamp != self._stamp:
            self._records = store.records()
            self._history = read_history(store, newest) if newest else None
            self._stamp = stamp

    def _report(self) -> DriftReport | None:
        path = self._project.store.root / DRIFT / "report.json"
        if not path.is_file():
            return None
        return DriftReport.model_validate({**json.loads(path.read_bytes()), "path": path.parent})

    def _releases(self, aliases: Mapping[str, str]) -> list[Part]:
        """What could be rolled out, the newest first."""
        champion = aliases.get("champion")
        found = [record for record in self._records if record.kind == Release.kind and record.key != champion]
        return [{"key": record.key, "created": record.created} for record in found[: -SHOWN_RELEASES - 1 : -1]]

    def _rounds(self, now: float) -> Part:
        rounds, policy = Rounds(self._project.store.root).all(), self._project.spec.loop
        automatic = [each for each in rounds if each.trigger.cause != "person" and now - each.began_s < WEEK_S]
        # Asked as if new data lay there: the answer names what stands in the way.
        probe = Trigger(cause="new data", stage="pretrain", why="new data")
        decision = decide((probe,), rounds, policy, now)
        return {
            "rounds": [_round(each) for each in rounds[: -SHOWN_ROUNDS - 1 : -1]],
            "automatic": len(automatic),
            "per_week": policy.rounds_per_week,
            "approval": policy.approval,
            "waits": None if decision.trigger else decision.reason.removeprefix("new data, but "),
        }

    def _gate(self) -> Part | None:
        """The newest decision, and what every tested round has left of the error budget."""
        gates = [record for record in self._records if record.kind == "gate"]
        if not gates:
            return None
        decision = GateDecision.model_validate({**gates[-1].artifact, "path": gates[-1].key})
        alpha, tested = decision.alpha, decision.rounds
        shown = decision.model_dump(mode="json", include={"verdict", "reasons", "level", "p_value", "wealth", "alpha"})
        rounds = [
            {**each.model_dump(mode="json"), "wealth": spending.wealth(tested[: place + 1], alpha)}
            for place, each in enumerate(tested)
        ]
        return {
            **shown, "key": gates[-1].key, "created": gates[-1].created, "rounds": rounds,
            "start": spending.wealth((), alpha), "next_level": spending.level(tested, alpha),
        }  # fmt: skip


def _round(each: Round) -> Part:
    return each.model_dump(mode="json", include={
        "number", "phase", "began_s", "changed_s", "release", "outcome", "reason", "champion", "trigger",
    })  # fmt: skip


def _said(read: Callable[[], Part | None]) -> Any:
    """A part of the state; in its place what is wrong with its files."""
    try:
        return read()
    except (FmopsError, ValueError, OSError) as error:
        return {"error": str(error)}
