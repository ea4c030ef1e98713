"""The rollout on disk: one look reads new traces, decides, remembers, and makes the world agree.

Enters: a workspace, the time, perhaps a person's order. Leaves: `rollout.json` (one file, so that evidence, state and
cursor can never disagree), traffic and aliases as the state wants them. Refuses: a second rollout beside a running one.
Killed at any point it is simply called again: decisions are saved before they are acted on, and acts are idempotent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import get_args

from pydantic import Field, ValidationError

from fmops.artifacts import Frozen, Release
from fmops.deployment.golden import Ask, engine_at
from fmops.deployment.rollout.checks import before_traffic
from fmops.deployment.rollout.evidence import Evidence, hear, observe
from fmops.deployment.rollout.machine import (
    ENDED,
    Action,
    MoveChampion,
    Order,
    Phase,
    RolloutConflict,
    State,
    advance,
    detectable,
    wanted,
)
from fmops.deployment.rollout.traffic import LocalTraffic, Traffic
from fmops.deployment.serving.server import workspace_secret
from fmops.errors import FmopsError, first_mistake
from fmops.faults import fault_site
from fmops.locks import locked
from fmops.production import Rollout
from fmops.store import Store, write_atomically
from fmops.traces import FEEDBACK, TRACES, Cursor, DayLog, Feedback, Trace

FILE = "rollout.json"
LOCK = "rollout.lock"
MARKS = 240
"""Looks that are kept for pictures; when there are more, every second one goes."""


class Event(Frozen):
    """One change of a rollout, for people."""

    at_s: float
    phase: str
    share: float
    reason: str
    detectable: dict[str, float] = Field(
        default={}, description="Smallest rise of each signal that the step which begins here finds with 80 % power."
    )


class Mark(Frozen):
    """The evidence at one look, for pictures; decisions never read it."""

    at_s: float
    answers: int = Field(description="Of the challenger to clients.")
    pairs: int
    share: float
    log_harm: float = Field(description="Log of the average e-value of harm.")
    log_fine: dict[str, float] = Field(description="Signal → log e-value of being within its margin.")


class Saved(Frozen):
    """Everything that a rollout remembers."""

    policy: Rollout
    state: State
    evidence: Evidence
    cursor: Cursor = Cursor()
    votes: Cursor = Cursor()
    refused: tuple[str, ...] | None = None
    events: tuple[Event, ...] = ()
    marks: tuple[Mark, ...] = Field(default=(), description="Oldest first; thinned, so that the file stays small.")


class Controller:
    """One workspace's rollout."""

    def __init__(
        self, store: Store, *, traffic: Traffic | None = None, engine: Callable[[str], Ask] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._clock = store, clock
        self._engine = engine or (lambda url: engine_at(url, secret=workspace_secret(store.root)))
        self._traffic: Traffic = traffic or LocalTraffic(store.root)
        self._traces = DayLog(store.root / TRACES, Trace)
        self._votes = DayLog(store.root / FEEDBACK, Feedback)

    def start(self, challenger: str, policy: Rollout, *, seen: str | None = None) -> Saved:
        """Begin to roll out a release; traffic follows only after its checks.

        Args:
            seen: the champion that it is meant to replace, where somebody looked at it before.

        Raises:
            RolloutConflict: another rollout is under way, or the champion is another by now.
            FmopsError: there is no champion to compare with, the challenger is it, or is no release.
        """
        with self._locked():
            saved = self.read()
            if saved and not saved.state.settled:
                raise RolloutConflict(
                    f"rollout {saved.state.id} of {saved.state.challenger} is {saved.state.phase}. "
                    "Wait until it ends, or `fmops rollout rollback`."
                )
            record = self._store.by_key(challenger)
            champion = self._store.aliases().get("champion")
            if record.kind != Release.kind:
                raise FmopsError(f"{record.key} is no release, but a {record.kind}. Name one of stage release.")
            if champion is None:
                raise FmopsError(
                    f"there is no champion to compare {record.key} with. The first release serves at once: `fmops up`."
                )
            if seen and seen != champion:
                raise RolloutConflict(f"the champion is {champion} by now, no longer {seen}. Look again, then decide.")
            if champion == record.key:
                raise FmopsError(f"{record.key} is the champion already; there is nothing to roll out.")
            now = self._clock()
            # What was written before belongs to other rollouts.
            (_, cursor), (_, votes) = self._traces.read(), self._votes.read()
            saved = Saved(
                policy=policy,
                state=State(
                    id=time.strftime("rollout-%Y%m%d-%H%M%S", time.gmtime(now)),
                    champion=champion, challenger=record.key, started_s=now, entered_s=now,
                ),
                evidence=Evidence.none_yet(champion, record.key, policy.margins),
                cursor=cursor,
                votes=votes,
            )  # fmt: skip
            return self._settle(self._save(_noted(saved, now)))

    def look(self, order: Order | None = None, *, why: str = "", seen: str | None = None) -> Saved | None:
        """Read what is new, decide, act. None when there has never been a rollout.

        Args:
            seen: id of the rollout that the order is meant for, where somebody looked at it before.

        Raises:
            RolloutConflict: the order does not fit, or another rollout has begun meanwhile.
        """
        # Asking the engine takes seconds: a person's order must not wait for it.
        checked = self._check(self.read()) if order is None else None
        with self._locked():
            saved = self.read()
            if saved is None:
                if order:
                    raise RolloutConflict(f"there is no rollout to {order}. Begin with `fmops rollout start`.")
                return None
            if seen and seen != saved.state.id:
                raise RolloutConflict(f"{seen} is over; {saved.state.id} has begun meanwhile. Look again, then decide.")
            traces, cursor = self._traces.read(saved.cursor)
            votes, votes_cursor = self._votes.read(saved.votes)
            evidence = hear(observe(saved.evidence, traces), votes)
            refused = saved.refused
            if refused is None and checked and checked[0] == saved.state.id:
                refused = checked[1]
            now = self._clock()
            state, _ = advance(saved.state, evidence, saved.policy, now, refused=refused, order=order)
            if state != saved.state and why:
                state = state.model_copy(update={"reason": f"{state.reason}: {why}"})
            share = _share(state, saved.policy)
            if share != (evidence.shares[-1][1] if evidence.shares else 0.0):
                evidence = evidence.share_changed(now, share)
            after = saved.model_copy(
                update={
                    "state": state, "evidence": evidence, "cursor": cursor, "votes": votes_cursor, "refused": refused,
                }
            )  # fmt: skip
            if evidence != saved.evidence:
                after = after.model_copy(update={"marks": _marked(saved.marks, evidence, now)})
            if (state.phase, state.step) != (saved.state.phase, saved.state.step):
                after = _noted(after, now)
            fault_site("rollout-before-save")
            return self._settle(after if after == saved else self._save(after))

    def read(self) -> Saved | None:
        """The rollout as it was last saved."""
        path = self._store.root / FILE
        if not path.is_file():
            return None
        try:
            return Saved.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise FmopsError(
                f"{path} is no rollout: {first_mistake(error)}. Move it away; the champion goes on serving, and "
                "`fmops rollout start` begins anew."
            ) from None

    def _check(self, saved: Saved | None) -> tuple[str, tuple[str, ...]] | None:
        """The rollout's id and the reasons against its challenger; None before their time, or while no engine is up."""
        if saved is None or saved.state.phase != "checking" or saved.refused is not None:
            return None
        challenger = saved.state.challenger
        url = self._traffic.url(challenger)
        if url is None:
            return None
        record = self._store.by_key(challenger)
        release = self._store.load(record)
        assert isinstance(release, Release)
        files = {name: entry.sha256 for name, entry in record.files.items()}
        return saved.state.id, before_traffic(release, files, self._engine(url))

    def _settle(self, saved: Saved) -> Saved:
        """Make the world agree; called again after a kill it finds what is done."""
        if saved.state.settled:
            return saved
        for action in wanted(saved.state, saved.policy):
            try:
                self._act(action)
            except RolloutConflict as error:
                state = saved.state.model_copy(update={"phase": "rolled back", "reason": str(error)})
                return self._settle(self._save(_noted(saved.model_copy(update={"state": state}), self._clock())))
            fault_site("rollout-between-acts")
        if saved.state.phase not in ENDED:
            return saved
        settled = saved.model_copy(update={"state": saved.state.model_copy(update={"settled": True})})
        write_atomically(self._store.root / "rollouts" / f"{settled.state.id}.json", settled.model_dump_json() + "\n")
        fault_site("rollout-before-settled")
        return self._save(settled)

    def _act(self, action: Action) -> None:
        if not isinstance(action, MoveChampion):
            self._traffic.set(action)
            return
        now = self._store.aliases().get("champion")
        if now == action.after:
            return
        if now != action.before:
            raise RolloutConflict(
                f"champion is {now}, not {action.before} with which the challenger was compared; it is not promoted"
            )
        targets = {"champion": action.after, "previous": action.before}
        self._store.move_aliases(targets, expected={"champion": action.before}, why=action.why)

    def _save(self, saved: Saved) -> Saved:
        write_atomically(self._store.root / FILE, saved.model_dump_json() + "\n")
        fault_site("rollout-after-save")
        write_atomically(self._store.root / "metrics" / "rollout.prom", metrics_text(saved))
        return saved

    def _locked(self) -> AbstractContextManager[object]:
        return locked(self._store.root / LOCK, wait_s=10)


def metrics_text(saved: Saved) -> str:
    """The rollout in Prometheus' text format, for a textfile collector or the gateway's /metrics."""
    state, evidence = saved.state, saved.evidence
    phases: tuple[str, ...] = get_args(Phase)
    lines = ["# TYPE fmops_rollout_phase gauge"]
    lines += [f'fmops_rollout_phase{{phase="{phase}"}} {int(phase == state.phase)}' for phase in phases]
    lines += [
        "# TYPE fmops_rollout_canary_share gauge",
        f"fmops_rollout_canary_share {0.0 if state.phase in ENDED else _share(state, saved.policy):g}",
        "# TYPE fmops_rollout_entered_seconds gauge",
        f"fmops_rollout_entered_seconds {state.entered_s:.0f}",
        "# HELP fmops_rollout_log_e Log e-value of a signal: of harm, and of being within the margin.",
        "# TYPE fmops_rollout_log_e gauge",
    ]
    for name, signal in evidence.signals.items():
        lines.append(f'fmops_rollout_log_e{{signal="{name}",test="harm"}} {signal.log_harm:.6g}')
        lines.append(f'fmops_rollout_log_e{{signal="{name}",test="within margin"}} {signal.log_fine:.6g}')
    lines.append(f'fmops_rollout_log_e{{signal="all",test="harm"}} {evidence.log_harm:.6g}')
    return "\n".join(lines) + "\n"


def _share(state: State, policy: Rollout) -> float:
    active = state.held_from if state.phase == "held" else state.phase
    return policy.steps[state.step] if active == "canary" else 0.0


def _marked(marks: tuple[Mark, ...], evidence: Evidence, now: float) -> tuple[Mark, ...]:
    """One mark more. The first stays, and what is thinned out is the same whoever looks."""
    fine = {name: round(s.log_fine, 4) for name, s in evidence.signals.items() if s.canary.n or s.shadow_fine.n}
    mark = Mark(
        at_s=now, answers=evidence.canary_answers, pairs=evidence.pairs,
        share=evidence.shares[-1][1] if evidence.shares else 0.0, log_harm=round(evidence.log_harm, 4), log_fine=fine,
    )  # fmt: skip
    kept = marks if len(marks) < MARKS else marks[::2]
    return (*kept, mark)


def _noted(saved: Saved, now: float) -> Saved:
    state = saved.state
    found = detectable(saved.evidence, saved.policy, state.step) if state.phase == "canary" else {}
    event = Event(
        at_s=now, phase=state.phase, share=_share(state, saved.policy), reason=state.reason,
        detectable={name: harm for name, harm in found.items() if harm < 1},
    )  # fmt: skip
    return saved.model_copy(update={"events": (*saved.events, event)})
