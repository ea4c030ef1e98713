"""The loop: one look at production and at the watched sources, and the one next step that follows from them.

Enters: a project with a champion. Leaves: what was done, in words; rounds, rollouts and aliases on disk.
Refuses: to begin what the spec's budget, cool-down or approval does not allow. Killed anywhere, it is called again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fmops.artifacts import Diagnosis, DriftReport, Release
from fmops.deployment.monitoring.monitor import Watcher
from fmops.deployment.rollout.controller import Controller
from fmops.deployment.rollout.machine import SetTraffic
from fmops.deployment.rollout.traffic import LocalTraffic
from fmops.deployment.serving.routes import ROUTES, RoutesFile
from fmops.errors import FmopsError, GateRejected, NeedMoreData
from fmops.faults import fault_site
from fmops.feedback.gather import Gathered, gather, write
from fmops.locks import Busy, locked
from fmops.orchestration.events import View
from fmops.orchestration.learnt import Learnt, Watched
from fmops.orchestration.own_suites import FEWEST_ANSWERS, write_suites
from fmops.orchestration.project import Project
from fmops.orchestration.round_spec import OWN_SUITES, write_round
from fmops.orchestration.rounds import STAGES, Decision, Round, Rounds, RoundStage, Trigger, decide
from fmops.orchestration.run import run
from fmops.store import Store
from fmops.traces import FEEDBACK, TRACES, DayLog, Feedback, Trace

ENDED = {"promoted": "promoted", "rolled back": "rolled back"}
FEEDBACK_STAGES: tuple[RoundStage, ...] = ("instruct", "align")


class LoopRunner:
    """One workspace's loop."""

    def __init__(
        self, project: Project, view: View, *, clock: Callable[[], float] = time.time,
        controller: Controller | None = None, watcher: Watcher | None = None,
    ) -> None:  # fmt: skip
        self.project, self.view, self.clock = project, view, clock
        self.store: Store = project.store
        self.rounds = Rounds(self.store.root)
        self.learnt = Learnt(project, self.rounds)
        self.controller = controller or Controller(self.store, clock=clock)
        self.watcher = watcher or Watcher(self.store, project.spec.monitor, clock=clock)

    def look(self, *, ask: Trigger | None = None, approve: int | None = None) -> list[str]:
        """Do the next step of the loop: monitor, go on with a rollout, end or begin a round.

        Args:
            ask: a person's wish for a round.
            approve: the number of a round that waits.

        Raises:
            FmopsError: there is no champion, or no such round waits.
            Busy: another loop looks right now.
        """
        if "champion" not in self.store.aliases():
            raise FmopsError(f"no champion in {self.store.root}: the loop begins when one serves. `fmops run` first.")
        with locked(self.store.root / "loop.lock"):
            return self._look(ask, approve)

    def _look(self, ask: Trigger | None, approve: int | None) -> list[str]:
        report = self.watcher.look()
        said = [f"monitor: {report.answers} answers, {len(report.alarms)} alarms{_told(report)}"]
        rollout = self.controller.look()
        if rollout:
            said.append(f"{rollout.state.id}: {rollout.state.phase}: {rollout.state.reason}")
        said += self._roll_back(report)
        for each in self.rounds.all():
            if each.phase != "ended":
                said.append(self._go_on(each, approve=approve))
        if approve is not None and not any(line.startswith(f"round {approve} ") for line in said):
            raise FmopsError(f"round {approve} does not wait for approval. `fmops loop --once` says what does.")
        rounds, policy = self.rounds.all(), self.project.spec.loop
        if any(each.phase != "ended" for each in rounds):
            # Sources and all traces are read only where a round could begin.
            return [*said, f"no round: {decide((), rounds, policy, self.clock()).reason}"]
        watched, gathered = self.learnt.watched(), self.gathered()
        said += _set_aside(gathered)
        if any(found.stage == "evaluate" for found in _findings(report)):
            said.append(self._new_items(gathered))
        said += [f"documents: {watched.in_vain}"] if watched.in_vain else []
        decision = decide(self._triggers(report, watched, gathered, ask), rounds, policy, self.clock())
        said.append(self._begin(decision, watched, gathered))
        return said

    def _triggers(
        self, report: DriftReport, watched: Watched, gathered: Gathered, ask: Trigger | None
    ) -> tuple[Trigger, ...]:
        """What asks for a round, the most urgent first: a person, an alarm, new data, feedback, the calendar."""
        assert gathered.counts is not None
        policy, counts = self.project.spec.loop, gathered.counts
        found = [ask] if ask else []
        for told in _findings(report):
            if told.stage in STAGES and not (told.stage == "pretrain" and watched.in_vain):
                voices = None if told.stage == "pretrain" else counts.identities
                why = f"{told.cause}: {'; '.join(told.because)}"
                found.append(Trigger(cause="alarm", stage=told.stage, why=why, identities=voices))
        untried = watched.untried
        if untried and sum(untried.values()) >= policy.new_files:
            names = ", ".join(f"{count} in {name}" for name, count in untried.items())
            found.append(Trigger(cause="new data", stage="pretrain", why=f"new files: {names}"))
        for stage in FEEDBACK_STAGES:
            fresh = self.learnt.fresh(counts.model_dump(), stage)
            if fresh >= policy.new_examples:
                why = f"{fresh} new examples from {counts.identities} identities"
                found.append(Trigger(cause="feedback", stage=stage, why=why, identities=counts.identities))
        began = max((each.began_s for each in self.rounds.all()), default=None)
        if policy.every_days and untried and (began is None or self.clock() - began > policy.every_days * 86400):
            found.append(Trigger(cause="schedule", stage="pretrain", why=f"{policy.every_days:g} days have passed"))
        return tuple(found)

    def _begin(self, decision: Decision, watched: Watched, gathered: Gathered) -> str:
        """Write a round's data and spec, then train unless it has to wait."""
        if decision.trigger is None:
            return f"no round: {decision.reason}"
        number = max((each.number for each in self.rounds.all()), default=0) + 1
        folder = self.rounds.path(number)
        champion = self.store.aliases()["champion"]
        write(gathered, folder / "feedback")
        write_suites(gathered, self.store, folder / OWN_SUITES)
        try:
            write_round(
                folder, spec=self.project.spec, root=self.project.graph.root, champion=self._model(champion),
                stage=decision.trigger.stage, new=watched.new, seen=watched.seen,
            )  # fmt: skip
        except FmopsError as error:
            return f"no round: {decision.trigger.why}. But {error}"
        fault_site("round-before-save")
        now = self.clock()
        phase = "waiting for approval" if self._must_wait(decision.trigger) else "training"
        each = self.rounds.save(
            Round(number=number, trigger=decision.trigger, champion=champion, began_s=now, changed_s=now, phase=phase)
        )
        return self._go_on(each, approve=None)

    def _new_items(self, gathered: Gathered) -> str:
        """Only the traffic changed: what people ask now, with answers they accepted, is measured from now on."""
        written, count = write_suites(gathered, self.store, self.store.root / OWN_SUITES)
        where = next((path for path in written if path.stem == "traffic"), None)
        if where is None:
            return f"evaluation: {count} of the {FEWEST_ANSWERS} held-out answers that new items are made from"
        return f"evaluation: {count} items of the new traffic in {where}: `fmops evaluate champion --suite {where}`"

    def _must_wait(self, trigger: Trigger) -> bool:
        return self.project.spec.loop.approval and trigger.cause != "person"

    def _go_on(self, each: Round, *, approve: int | None) -> str:
        """The next step of an open round."""
        if each.phase == "waiting for approval":
            if approve != each.number:
                return (
                    f"round {each.number} waits for approval: {each.trigger.why}. `fmops loop --approve {each.number}`"
                )
            each = self._changed(each, phase="training")
        if each.phase == "training":
            return self._train(each)
        return self._watch_rollout(each)

    def _train(self, each: Round) -> str:
        """Run the round's spec in this workspace; a run that was killed goes on."""
        path = self.rounds.path(each.number) / "lifecycle.yaml"
        project = Project.open(path, workspace=self.store.root)
        try:
            outcome = run(project, self.view, alias="challenger")
        except GateRejected as error:
            return self._end(each, "rejected", str(error))
        except NeedMoreData as error:
            return self._end(each, "need more data", str(error))
        except Busy as error:
            return f"round {each.number} waits: {error}"
        except FmopsError as error:
            return self._end(each, "failed", str(error))
        fault_site("round-before-rollout")
        assert outcome.champion is not None
        each = each.model_copy(update={"release": outcome.champion})
        running = self.controller.read()
        if running is None or running.state.challenger != outcome.champion:
            self.controller.start(outcome.champion, self.project.spec.rollout)
        each = self._changed(each, phase="rolling out")
        return f"round {each.number} made {each.release}; its rollout begins"

    def _watch_rollout(self, each: Round) -> str:
        rollout = self.controller.read()
        if rollout is None or rollout.state.challenger != each.release:
            return self._end(each, "refused", "its rollout is gone")
        if rollout.state.phase in ENDED and rollout.state.settled:
            return self._end(each, ENDED[rollout.state.phase], rollout.state.reason)
        return f"round {each.number} is rolling out: {rollout.state.phase}: {rollout.state.reason}"

    def _end(self, each: Round, outcome: str, reason: str) -> str:
        self.learnt.ended(each, outcome)
        self._changed(each, phase="ended", outcome=outcome, reason=reason)
        return f"round {each.number} ended, {outcome}: {reason.splitlines()[0]}"

    def _changed(self, each: Round, **changes: str) -> Round:
        return self.rounds.save(each.model_copy(update={**changes, "changed_s": self.clock()}))

    def _roll_back(self, report: DriftReport) -> list[str]:
        """A release fault: the release before serves again; what is wrong is looked into afterwards.

        Where a gateway serves, the release before gets an engine first, so that no request is lost.
        """
        aliases = self.store.aliases()
        previous, faulty = aliases.get("previous"), report.release
        if report.diagnosis is None or report.diagnosis.stage != "rollback" or faulty != aliases["champion"]:
            return []
        if previous is None or previous == faulty:
            return [f"release fault of {faulty}, and there is no release before it to go back to"]
        why = f"release fault: {'; '.join(report.diagnosis.because)}"
        rollout = self.controller.read()
        if rollout and not rollout.state.settled:
            self.controller.look("rollback", why=why)
        traffic, routes = LocalTraffic(self.store.root), RoutesFile(self.store.root / ROUTES).current()
        if routes.champion and routes.champion.release == faulty:
            if traffic.url(previous) is None:
                traffic.set(SetTraffic(champion=faulty, challenger=previous, canary=0.0, shadow=0.0))
                return [f"{why}. Rolling back from {faulty}: the engine of {previous} starts"]
            traffic.set(SetTraffic(champion=previous, challenger=None, canary=0.0, shadow=0.0))
            fault_site("loop-rolled-back-traffic")
        self.store.move_aliases({"champion": previous, "previous": faulty}, expected={"champion": faulty}, why=why)
        return [f"rolled back from {faulty} to {previous}: {why}"]

    def gathered(self) -> Gathered:
        """What all feedback so far would become, were a round to begin now."""
        traces, _ = DayLog(self.store.root / TRACES, Trace).read()
        feedback, _ = DayLog(self.store.root / FEEDBACK, Feedback).read()
        return gather(traces, feedback)

    def _model(self, key: str) -> Path:
        release = self.store.load(self.store.by_key(key))
        assert isinstance(release, Release)
        return release.model


def asked(stage: RoundStage, why: str) -> Trigger:
    """A person's wish."""
    return Trigger(cause="person", stage=stage, why=why or "asked for by a person")


def _findings(report: DriftReport) -> tuple[Diagnosis, ...]:
    return report.diagnosis.every if report.diagnosis else ()


def _told(report: DriftReport) -> str:
    return "".join(f"; {found.cause} → {found.stage}" for found in _findings(report))


def _set_aside(gathered: Gathered) -> list[str]:
    """A line on feedback that the screen keeps out of training, where there is any."""
    assert gathered.counts is not None
    aside = gathered.counts.quarantined
    if not aside:
        return []
    reasons = ", ".join(f"{n} {reason}" for reason, n in aside.items())
    return [f"feedback: {sum(aside.values())} of {gathered.counts.said} rows are set aside: {reasons}"]


def keep_going(runner: LoopRunner, *, say: Callable[[str], None], every_s: float = 60.0) -> None:
    """Look again and again, until interrupted; what is unchanged is said once."""
    last: list[str] = []
    while True:
        said = runner.look()
        for line in said:
            if line not in last:
                say(line)
        last = said
        time.sleep(every_s)
