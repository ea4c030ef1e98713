"""The monitor on disk: one look reads what is new, judges it, diagnoses, and writes a report.

Enters: a workspace, the time. Leaves: `monitor.json` (state and cursors in one file), `drift/report.json`,
`drift/alarms.jsonl`, `metrics/monitor.prom`. Refuses: to begin anew after a restart; only a new release does that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from pydantic import Field, ValidationError

from fmops.artifacts import DriftReport, Frozen, Release
from fmops.deployment.golden import Ask, Golden, ask_golden, engine_at
from fmops.deployment.monitoring.detectors import kolmogorov_smirnov, population_stability
from fmops.deployment.monitoring.diagnosis import Findings, diagnose
from fmops.deployment.monitoring.judge import Ask as AskJudge
from fmops.deployment.monitoring.judge import ask_endpoint, sample, verdicts, with_verdicts
from fmops.deployment.monitoring.meaning import Code
from fmops.deployment.monitoring.watch import Watch, next_release, slow_harm, watch, watches, worse_than_before
from fmops.deployment.serving.routes import ROUTES, RoutesFile
from fmops.deployment.serving.server import workspace_secret
from fmops.errors import FmopsError, first_mistake
from fmops.faults import fault_site
from fmops.locks import locked
from fmops.production import Monitor
from fmops.store import Store, write_atomically
from fmops.traces import FEEDBACK, TRACES, Cursor, DayLog, Feedback, Trace

FILE = "monitor.json"
LOCK = "monitor.lock"
FOLDER = "drift"
GOLDEN_HOURS = 6
"""So often the golden prompts are asked again, while the champion's engine is known."""
ALARM_HOURS = 7 * 24
"""An alarm counts for the diagnosis for so long."""


class Saved(Frozen):
    """Everything that monitoring remembers."""

    watch: Watch
    traces: Cursor = Cursor()
    votes: Cursor = Cursor()
    golden: Golden | None = None
    golden_asked_s: float = 0.0
    judge_error: str | None = None
    meaning_error: str | None = None
    looked_s: float = Field(0.0, description="Unix time of the last look; the dead man's switch reads it.")


class Watcher:
    """One workspace's monitor."""

    def __init__(
        self, store: Store, policy: Monitor, *, engine: Callable[[str], Ask] | None = None,
        judge: AskJudge | None = None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._policy, self._clock = store, policy, clock
        self._engine = engine or (lambda url: engine_at(url, secret=workspace_secret(store.root)))
        self._judge = judge or (ask_endpoint(policy.judge) if policy.judge else None)
        self._coder: tuple[str, Callable[[str], Code]] | None = None
        self._traces = DayLog(store.root / TRACES, Trace)
        self._votes = DayLog(store.root / FEEDBACK, Feedback)

    def look(self) -> DriftReport:
        """Take in what is new since the last look.

        Raises:
            FmopsError: nothing is served, or the state on disk is broken.
        """
        champion = self._store.aliases().get("champion")
        if champion is None:
            raise FmopsError(f"{self._store.root} has no champion to watch. `fmops run` makes one.")
        # Asking the engine and the judge takes seconds: whoever else looks must not wait for it.
        asked = self._ask_golden(champion, self.read())
        judged, judge_error = self._ask_judge(champion, self.read())
        code, meaning_error = self._find_coder(champion)
        with self._locked():
            saved = self.read() or Saved(watch=Watch(release=champion))
            read, cursor = self._traces.read(saved.traces)
            traces = with_verdicts(read, judged)
            votes, votes_cursor = self._votes.read(saved.votes)
            now = self._clock()
            state, known = saved.watch, len(saved.watch.alarms)
            if state.release != champion:
                state, known = next_release(state, champion), 0
            codes = {trace.id: code(trace.prompt) for trace in traces if code and watches(champion, trace)}
            state = slow_harm(watch(state, traces, votes, self._policy, codes), now, self._policy)
            if code and not state.known_codes and state.answers >= self._policy.reference:
                meaning_error = "no prompt of the reference was put into a code; the next release's will be"
            golden, asked_s = asked or (saved.golden, saved.golden_asked_s)
            after = Saved(
                watch=state, traces=cursor, votes=votes_cursor, golden=golden, golden_asked_s=asked_s, looked_s=now,
                judge_error=judge_error, meaning_error=meaning_error,
            )  # fmt: skip
            fault_site("monitor-before-save")
            write_atomically(self._store.root / FILE, after.model_dump_json() + "\n")
            fault_site("monitor-after-save")
            return self._report(after, new=len(state.alarms) - known)

    def read(self) -> Saved | None:
        """The state as it was last saved."""
        path = self._store.root / FILE
        if not path.is_file():
            return None
        try:
            return Saved.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise FmopsError(
                f"{path} is broken, or of another version of FMOps: {first_mistake(error)}. "
                f"Set it aside: `mv {path} {path}.old`. The next look reads the traces on disk from the first on, and "
                "measures what is normal anew. Alarms may come again; how the release before did is forgotten."
            ) from None

    def _ask_golden(self, champion: str, saved: Saved | None) -> tuple[Golden | None, float] | None:
        """What the golden prompts say and when, or None when it is not their time yet.

        Nothing is said while nobody knows the champion's engine; one that does not answer is told in the report.
        """
        now = self._clock()
        known = saved is not None and saved.watch.release == champion
        if saved and known and now < saved.golden_asked_s + GOLDEN_HOURS * 3600:
            return None
        target = RoutesFile(self._store.root / ROUTES).current().champion
        if target is None or target.url is None or target.release != champion:
            return None, 0.0
        release = self._store.load(self._store.by_key(champion))
        assert isinstance(release, Release)
        try:
            return ask_golden(release, self._engine(target.url)), now
        except (OSError, ValueError, LookupError, TypeError, FmopsError) as error:
            return Golden(asked=0, error=f"{type(error).__name__}: {error}"), now

    def _ask_judge(self, champion: str, saved: Saved | None) -> tuple[dict[str, float], str | None]:
        """Verdicts on a sample of what is new, and why there are none. Answers that come meanwhile are not judged."""
        if self._judge is None:
            return {}, None
        traces, _ = self._traces.read(saved.traces if saved else None)
        most = self._policy.judge.answers_a_look if self._policy.judge else len(traces)
        try:
            return verdicts(sample(traces, release=champion, most=most), self._judge), None
        except (OSError, LookupError, TypeError, ValueError) as error:
            return {}, f"{type(error).__name__}: {error}"

    def _find_coder(self, champion: str) -> tuple[Callable[[str], Code] | None, str | None]:
        """What puts prompts into codes, by the embeddings of the champion's own files; or why there is nothing."""
        if self._coder is None or self._coder[0] != champion:
            try:
                from fmops.adapters.prompt_codes import PromptCodes

                # Nothing is fetched for this: in a bucket lie many gigabytes, and looks begin every minute.
                self._coder = (champion, PromptCodes(self._store.artifacts / champion / "model"))
            except (FmopsError, ImportError, OSError, ValueError) as error:
                return None, str(error)
        return self._coder[1], None

    def _report(self, saved: Saved, *, new: int) -> DriftReport:
        state, policy, golden = saved.watch, self._policy, saved.golden
        threshold = policy.observations_per_false_alarm
        recent = tuple(alarm for alarm in state.alarms if alarm.at_s > saved.looked_s - ALARM_HOURS * 3600)
        findings = Findings(
            alarms=recent,
            golden_agree=golden.agree if golden and not golden.error else None,
            worse_than_before=worse_than_before(state, policy.tolerances),
        )
        measures = {name: measure for name, measure in state.measures.items() if measure.reference}
        report = DriftReport(
            path=self._store.root / FOLDER,
            release=state.release,
            at_s=saved.looked_s,
            answers=state.answers,
            rates={name: (rate.since.events, rate.since.n) for name, rate in state.rates.items() if rate.since.n},
            reference={
                name: (rate.reference.events, rate.reference.n)
                for name, rate in state.rates.items()
                if rate.reference.n
            },
            levels={
                **{name: rate.detector.level / threshold for name, rate in state.rates.items() if rate.detector},
                **{name: measure.shift.level / threshold for name, measure in measures.items()},
            },
            pictures={
                name: {
                    "psi": population_stability(measure.reference, _counts(measure.latest)),
                    "ks": kolmogorov_smirnov(measure.reference, _counts(measure.latest)),
                }
                for name, measure in measures.items()
            },
            golden=1 - len(golden.differ) / golden.asked if golden and golden.asked else None,
            golden_error=golden.error if golden else None,
            judge_error=saved.judge_error,
            meaning_error=saved.meaning_error,
            alarms=recent,
            diagnosis=diagnose(findings),
        )
        write_atomically(report.path / "report.json", report.model_dump_json(indent=1) + "\n")
        write_atomically(self._store.root / "metrics" / "monitor.prom", metrics_text(report, policy))
        if new > 0:
            with (report.path / "alarms.jsonl").open("a", encoding="utf-8") as log:
                log.writelines(alarm.model_dump_json() + "\n" for alarm in state.alarms[-new:])
        return report

    def _locked(self) -> AbstractContextManager[object]:
        return locked(self._store.root / LOCK, wait_s=10)


def metrics_text(report: DriftReport, policy: Monitor) -> str:
    """The report in Prometheus' text format, for the node exporter's textfile collector or the gateway's /metrics."""
    lines = [
        "# TYPE fmops_monitor_last_look_seconds gauge",
        f"fmops_monitor_last_look_seconds {report.at_s:.0f}",
        "# TYPE fmops_monitor_answers_total counter",
        f"fmops_monitor_answers_total {report.answers}",
        "# HELP fmops_drift_level Level of a detector as a share of its threshold; 1 is an alarm.",
        "# TYPE fmops_drift_level gauge",
        *(f'fmops_drift_level{{signal="{name}"}} {_number(level)}' for name, level in report.levels.items()),
        "# TYPE fmops_signal_rate gauge",
        *(f'fmops_signal_rate{{signal="{name}"}} {events / n:.6g}' for name, (events, n) in report.rates.items()),
        "# TYPE fmops_alarms gauge",
    ]
    for kind in ("harm", "shift"):
        count = sum(
            alarm.kind == kind and alarm.at_s > report.at_s - policy.cool_down_hours * 3600 for alarm in report.alarms
        )
        lines.append(f'fmops_alarms{{kind="{kind}"}} {count}')
    if report.golden is not None:
        lines += ["# TYPE fmops_golden_agreement gauge", f"fmops_golden_agreement {report.golden:.6g}"]
    return "\n".join(lines) + "\n"


def describe(report: DriftReport) -> str:
    """The report in words."""
    lines = [f"{report.release}: {report.answers} answers"]
    if not report.rates:
        lines.append("normal is still being measured")
    for name, (events, n) in report.rates.items():
        had, of = report.reference.get(name, (0, 0))
        normal = f"{had / of:.2%}" if of else "unknown"
        level = report.levels.get(name, 0.0)
        lines.append(f"  {name:14} {events / n:.2%} of {n}, normal {normal}, level {level:.2g} of 1")
    for name, picture in report.pictures.items():
        level = report.levels.get(name, 0.0)
        lines.append(f"  {name:14} PSI {picture['psi']:.3f}, KS {picture['ks']:.3f}, level {level:.2g} of 1")
    if report.golden is not None:
        lines.append(f"golden prompts answered as certified: {report.golden:.0%}")
    if report.golden_error:
        lines.append(f"golden prompts could not be asked: {report.golden_error}")
    if report.judge_error:
        lines.append(f"the judge could not be asked: {report.judge_error}")
    if report.meaning_error:
        lines.append(f"what prompts mean is not watched: {report.meaning_error}")
    for alarm in report.alarms:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(alarm.at_s))
        known = alarm.reference is not None and alarm.now is not None
        change = f" {alarm.reference:.2%} → {alarm.now:.2%}" if known else ""
        lines.append(f"{moment} {alarm.kind}: {alarm.signal}{change}, after {alarm.answers} answers")
    for found in report.diagnosis.every if report.diagnosis else ():
        lines += [
            f"diagnosis: {found.cause} → {found.stage}",
            *(f"  because {reason}" for reason in found.because),
            f"  confirmed if: {found.confirm}",
            f"  refuted if: {found.refute}",
            *([f"  also possible: {', '.join(found.also_possible)}"] if found.also_possible else []),
            *([f"  look at: {', '.join(found.examples)}"] if found.examples else []),
        ]
    if report.diagnosis is None:
        lines.append("nothing found")
    return "\n".join(lines)


def _counts(places: tuple[int, ...]) -> dict[int, int]:
    return {place: places.count(place) for place in set(places)}


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "NaN"
