"""The monitor tells harm from change, keeps its memory, and lets no single user raise an alarm."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulated import RATES, Production
from fmops.artifacts import DriftReport
from fmops.deployment.monitoring.judge import sample
from fmops.deployment.monitoring.monitor import Watcher, describe
from fmops.deployment.monitoring.watch import Watch, next_release, watch, worse_than_before
from fmops.errors import FmopsError
from fmops.production import Monitor, MonitorJudge
from fmops.store import Store
from fmops.traces import DayLog, Feedback, Trace

ROOT = Path(__file__).resolve().parents[2]
POLICY = Monitor(reference=400, observations_per_false_alarm=2000)


def talk_of(seed: int, **options) -> Production:
    return Production(seed=seed, **{"topics": {"python": 1.0}, "log_probability": -1.0, **options})


def reference(seed: int, **options) -> tuple[Production, Watch]:
    talk = talk_of(seed, **options)
    return talk, watch(Watch(release=talk.champion), talk.serve(600), (), POLICY)


def alarmed(state: Watch) -> set[tuple[str, str]]:
    return {(alarm.signal, alarm.kind) for alarm in state.alarms}


def test_an_ordinary_week_is_quiet():
    talk, state = reference(1)
    # 2,100 answers: P(any alarm) ≤ 0.042 at the usual threshold, and the seed is fixed.
    state = watch(state, talk.serve(1500), (), Monitor(reference=400))
    assert state.alarms == ()
    assert state.rates["refused"].since.n > 1000


@pytest.mark.parametrize("name", ["empty", "refused", "secret", "failed"])
def test_harm_is_found_and_shown(name):
    talk, state = reference(2)
    talk.rates = {**RATES, name: RATES[name] + 0.25}
    state = watch(state, talk.serve(300), (), POLICY)
    assert (name, "harm") in alarmed(state)
    first = next(alarm for alarm in state.alarms if alarm.signal == name)
    assert first.now > first.reference + 0.03
    assert first.examples
    assert all(example.startswith("r2-") for example in first.examples)


def test_another_topic_is_a_shift_and_no_harm():
    talk, state = reference(3)
    talk.topics = {"medicine": 1.0}
    state = watch(state, talk.serve(400), (), POLICY)
    assert ("topic", "shift") in alarmed(state)
    assert not any(alarm.kind == "harm" for alarm in state.alarms)


def test_known_topics_by_turns_are_no_new_topic():
    talk, state = reference(3, topics={"python": 0.7, "cooking": 0.3})
    for _ in range(5):
        for topic in ("cooking", "python"):
            talk.topics = {topic: 1.0}
            state = watch(state, talk.serve(100), (), POLICY)
    assert ("topic", "shift") not in alarmed(state)


@pytest.mark.parametrize(("users", "shifted"), [(3, False), (200, True)])
def test_a_few_who_flood_the_traffic_do_not_look_like_everybody(users, shifted):
    talk, state = reference(4)
    honest = [trace.model_copy(update={"user": f"u{i % 200}"}) for i, trace in enumerate(talk.serve(900))]
    talk.topics = {"cooking": 1.0}
    flood = [trace.model_copy(update={"user": f"f{i % users}"}) for i, trace in enumerate(talk.serve(450))]
    usual = Monitor(reference=400)
    state = watch(state, honest[:500], (), usual)
    mixed = [trace for pair in zip(honest[500:], flood, strict=False) for trace in pair]
    state = watch(state, mixed, (), usual)
    assert (("topic", "shift") in alarmed(state)) is shifted


def test_a_failure_counts_whoever_sees_it():
    talk, state = reference(4)
    talk.rates = {**RATES, "failed": 0.5}
    honest = [trace.model_copy(update={"user": f"u{i}"}) for i, trace in enumerate(talk_of(5).serve(200))]
    one = [trace.model_copy(update={"user": "one"}) for trace in talk.serve(200)]
    state = watch(state, [trace for pair in zip(honest, one, strict=True) for trace in pair], (), POLICY)
    assert ("failed", "harm") in alarmed(state)


def test_the_same_alarm_is_not_raised_again_while_it_cools_down():
    talk, state = reference(4)
    talk.rates = {**RATES, "empty": 0.5}
    state = watch(state, talk.serve(1500), (), POLICY)
    assert sum(alarm.signal == "empty" for alarm in state.alarms) == 1
    talk.now_s += 25 * 3600
    state = watch(state, talk.serve(300), (), POLICY)
    assert sum(alarm.signal == "empty" for alarm in state.alarms) == 2


def test_how_it_is_cut_into_looks_changes_nothing():
    talk = talk_of(5)
    traces = [*talk.serve(700)]
    whole = watch(Watch(release=talk.champion), traces, (), POLICY)
    state = Watch(release=talk.champion)
    for start in range(0, 700, 33):
        # Through JSON, as a restart does it.
        state = Watch.model_validate_json(watch(state, traces[start : start + 33], (), POLICY).model_dump_json())
    assert state == whole


def votes(count: int, down: float, *, users: int, seed: int = 0, at_s: float = 1.9e9) -> list[Feedback]:
    chance = random.Random(seed)
    return [
        Feedback(
            id=f"r{n}",
            at_s=at_s + n,
            tenant="t",
            user=f"u{n % users}",
            thumb="down" if chance.random() < down else "up",
        )
        for n in range(count)
    ]


def test_thumbs_down_from_many_are_heard_from_one_are_not():
    _, state = reference(6)
    state = watch(state, (), votes(100, 0.1, users=50), POLICY)
    many = watch(state, (), votes(300, 0.7, users=150, at_s=1.91e9), POLICY)
    assert alarmed(many) == {("disliked", "harm")}
    one = watch(state, (), votes(300, 1.0, users=1, at_s=1.91e9), POLICY)
    assert one.alarms == ()


def test_a_new_release_is_compared_with_the_one_before():
    talk, state = reference(7)
    fresh = next_release(state, talk.challenger)
    assert fresh.answers == 0
    good, bad = (talk_of(8, champion=talk.challenger, rates={**RATES, "refused": rate}) for rate in (0.04, 0.3))
    assert worse_than_before(watch(fresh, good.serve(600), (), POLICY), {}) == ()
    assert worse_than_before(watch(fresh, bad.serve(600), (), POLICY), {}) == ("refused",)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / ".fmops")
    store.move_aliases({"champion": "release-champion"}, expected={"champion": None}, why="test")
    return store


def write(store: Store, talk: Production, count: int, *, response: str = "") -> None:
    log = DayLog(store.root / "traces", Trace)
    for trace in talk.serve(count):
        log.append(trace.model_copy(update={"response": response}), at_s=trace.started_s)
    log.close()


def test_one_look_reads_judges_and_reports(store):
    talk = talk_of(9)
    clock = lambda: talk.now_s  # noqa: E731
    watcher = Watcher(store, POLICY, clock=clock)
    write(store, talk, 600)
    assert "nothing found" in describe(watcher.look())
    talk.rates = {**RATES, "repeated": 0.4}
    write(store, talk, 200)
    # Another process, as after a restart, goes on where this one was.
    report = Watcher(store, POLICY, clock=clock).look()
    assert (report.diagnosis.cause, report.diagnosis.stage) == ("behaviour", "instruct")
    told = describe(report)
    assert "diagnosis: behaviour → instruct" in told
    assert "look at: r9-" in told
    saved = json.loads((store.root / "drift" / "report.json").read_text())
    assert DriftReport.model_validate({**saved, "path": store.root}).answers == report.answers
    assert len((store.root / "drift" / "alarms.jsonl").read_text().splitlines()) == 1
    metrics = (store.root / "metrics" / "monitor.prom").read_text()
    assert 'fmops_alarms{kind="harm"} 1' in metrics
    assert watcher.look().answers == report.answers  # nothing is read twice
    assert len((store.root / "drift" / "alarms.jsonl").read_text().splitlines()) == 1


LOOK = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from unit.test_monitor import POLICY, Store, Watcher
Watcher(Store(Path(sys.argv[1])), POLICY, clock=lambda: 1.8e9).look()
"""


@pytest.mark.parametrize("site", ["monitor-before-save:1", "monitor-after-save:1"])
def test_killed_inside_a_look_nothing_counts_twice(store, site):
    talk = talk_of(10)
    write(store, talk, 500)
    script = LOOK.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", script, str(store.root)]
    done = subprocess.run(command, env={**os.environ, "FMOPS_FAULT": site}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Watcher(store, POLICY, clock=lambda: 1.8e9).look().answers == 500


def test_without_a_champion_there_is_nothing_to_watch(tmp_path):
    with pytest.raises(FmopsError, match="has no champion to watch"):
        Watcher(Store(tmp_path), POLICY).look()


def of_another_version(state: dict) -> dict:
    """As it was written before topics were new words."""
    del state["watch"]["known_words"]
    return {**state, "watch": {**state["watch"], "centroid": {"3": 0.5}, "centroid_prompts": 40}}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: {}, "watch: Field required"),
        (of_another_version, "watch.centroid: Extra inputs are not permitted"),
    ],
)
def test_a_state_that_cannot_be_read_is_kept_and_the_way_on_is_said_and_true(store, spoil, said):
    watcher, path = Watcher(store, POLICY, clock=lambda: 1.8e9), store.root / "monitor.json"
    write(store, talk_of(1), 40)
    before = watcher.look()
    other = json.dumps(spoil(json.loads(path.read_text())))
    path.write_text(other)
    with pytest.raises(FmopsError) as refused:
        watcher.look()
    assert f"{path} is broken, or of another version of FMOps: {said}" in str(refused.value)
    assert f"`mv {path} {path}.old`" in str(refused.value)
    assert path.read_text() == other
    path.rename(f"{path}.old")
    assert watcher.look() == before


def test_a_state_from_before_a_signal_was_watched_is_read_on(store):
    watcher, path, talk = Watcher(store, POLICY, clock=lambda: 1.8e9), store.root / "monitor.json", talk_of(1)
    write(store, talk, 40)
    watcher.look()
    state = json.loads(path.read_text())
    del state["watch"]["rates"]["refused"]
    path.write_text(json.dumps(state))
    write(store, talk, 40)
    report = watcher.look()
    assert (report.reference["empty"][1], report.reference["refused"][1]) == (80, 40)


def test_golden_prompts_are_asked_again_after_hours_and_tell_when_the_engine_is_another(store, monkeypatch):
    from fmops.deployment.golden import Golden
    from fmops.deployment.monitoring import monitor
    from fmops.deployment.serving.routes import Routes, RoutesFile, Target

    asked, answers, now = [], [Golden(asked=11), Golden(asked=11, differ=("chat/question", "chat/turns"))], [1e9]

    def ask(release, engine):
        asked.append(now[0])
        if not answers:
            raise OSError("connection refused")
        return answers.pop(0)

    monkeypatch.setattr(monitor, "ask_golden", ask)
    monkeypatch.setattr(store, "by_key", lambda key: key)
    monkeypatch.setattr(store, "load", lambda record: monitor.Release.model_construct(name="tiny"))
    watcher = Watcher(store, POLICY, engine=lambda url: None, clock=lambda: now[0])
    assert watcher.look().golden is None  # nobody knows an engine yet
    RoutesFile(store.root / "routes.json").compare_and_swap(
        Routes(champion=Target(release="release-champion", url="http://127.0.0.1:9")), expected=0
    )
    assert watcher.look().golden == 1.0
    now[0] += 3600
    assert watcher.look().golden == 1.0
    assert len(asked) == 1
    now[0] += 6 * 3600
    report = watcher.look()
    assert report.golden == pytest.approx(9 / 11)
    assert (report.diagnosis.cause, report.diagnosis.stage) == ("release fault", "rollback")
    assert "golden prompts answered as certified: 82%" in describe(report)
    now[0] += 7 * 3600
    report = watcher.look()
    assert report.golden is None
    assert "golden prompts could not be asked: OSError: connection refused" in describe(report)


def test_a_request_that_an_engine_turned_down_does_not_blind_the_monitor(store):
    """It has no finish reason, and rows are written without what is None."""
    talk = talk_of(11)
    log = DayLog(store.root / "traces", Trace)
    for trace in talk.serve(5):
        log.append(trace.model_copy(update={"status": 404, "finish_reason": None, "signals": {}}), at_s=talk.now_s)
    log.close()
    write(store, talk, 5)
    assert Watcher(store, POLICY, clock=lambda: talk.now_s).look().answers == 5


def test_a_judge_sees_a_sample_redacted_and_what_it_finds_is_harm(store):
    talk, seen, worse = talk_of(12), [], False

    def judge(question: str) -> str:
        seen.append(question)
        return ("BAD" if worse else "Good, because …") if len(seen) % 9 else "I cannot say."

    policy = POLICY.model_copy(
        update={"judge": MonitorJudge(endpoint="http://127.0.0.1:9/v1", model="judge", answers_a_look=60)}
    )
    watcher = Watcher(store, policy, judge=judge, clock=lambda: talk.now_s)
    for _ in range(6):
        write(store, talk, 100, response="It is a tuple, says <email>.")
        report = watcher.look()
    assert len(seen) == 6 * 60
    assert all("It is a tuple, says <email>." in question for question in seen)
    events, n = report.reference["judged_bad"]
    assert events == 0
    assert n >= policy.reference // 10
    assert not report.alarms
    worse = True
    for _ in range(6):
        write(store, talk, 100, response="It is a tuple, says <email>.")
        report = watcher.look()
    assert [alarm.signal for alarm in report.alarms] == ["judged_bad"]
    assert (report.diagnosis.cause, report.diagnosis.stage) == ("preference", "align")


def test_a_judge_that_is_away_is_told_and_blinds_nobody(store):
    talk = talk_of(13)
    judge = MonitorJudge(endpoint="http://127.0.0.1:9/v1", model="judge")
    watcher = Watcher(store, POLICY.model_copy(update={"judge": judge}), clock=lambda: talk.now_s)
    write(store, talk, 50, response="It is a tuple.")
    report = watcher.look()
    assert report.answers == 50
    assert "judged_bad" not in report.reference
    assert "the judge could not be asked: OSError: /v1/chat/completions" in describe(report)


def test_nobody_judges_what_was_mirrored_cut_or_another_releases():
    traces = [trace.model_copy(update={"response": "It is."}) for trace in talk_of(14).serve(40)]
    spoilt = [
        traces[0].model_copy(update={"arm": "shadow"}),
        traces[1].model_copy(update={"finish_reason": "cancelled", "status": 499}),
        traces[2].model_copy(update={"release": "release-other"}),
        traces[3].model_copy(update={"response": ""}),
    ]
    whole = [trace for trace in traces[4:] if trace.status == 200]
    assert sample(spoilt, release="release-champion", most=9) == []
    chosen = sample([*spoilt, *whole], release="release-champion", most=9)
    assert len(chosen) == 9
    assert chosen == sample(list(reversed(whole)), release="release-champion", most=9)
