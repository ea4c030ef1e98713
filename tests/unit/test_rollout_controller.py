"""A rollout survives its controller: decisions are saved before they are acted on, and acts may be repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulated import Production, write_traces
from fmops.artifacts import Parity, Release
from fmops.deployment.parity import CHAT_PROBES
from fmops.deployment.rollout.controller import Controller
from fmops.deployment.rollout.machine import RolloutConflict
from fmops.deployment.serving.routes import Routes, RoutesFile, Target
from fmops.errors import FmopsError
from fmops.integrity import sha256
from fmops.production import Rollout
from fmops.store import Record, Store, content_digest, file_entries, utc_now
from fmops.traces import DayLog, Trace

ROOT = Path(__file__).resolve().parents[2]
POLICY = Rollout(steps=(0.5,), shadow=0.0, answers=30)
NOW = 1_800_000_000.0


def add_release(store: Store, letter: str) -> str:
    """A release with parity and golden answers, but weights that are only bytes."""
    folder = store.folder("release", letter * 64)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_text(letter)
    parity = Parity(
        passed=True, prompts=2, engine="transformers", token_ids_equal=True, template_equal=True, greedy_equal=True,
        max_logprob_difference=0.0, tolerance=1e-3,
    )  # fmt: skip
    report = {
        "parity": parity.model_dump(mode="json"),
        "files": {"model/model.safetensors": sha256(folder / "model" / "model.safetensors")},
        "probes": [{"name": f"chat/{name}", "answer": f"{letter} to {name}"} for name in ("question", "turns")],
    }
    (folder / "parity.json").write_text(json.dumps(report))
    files = file_entries(folder)
    release = Release(path=folder, name="tiny", parity=parity, licence=None, verdict="promote")
    record = Record(
        node="release", stage="release", kind="release", version=1, fingerprint=letter * 64,
        digest=content_digest(files), seed=0, config={}, inputs={}, files=files,
        artifact=release.model_dump(mode="json"), created=utc_now(),
    )  # fmt: skip
    store.commit(record)
    return record.key


def golden(letter: str):
    """An engine that repeats what the release of that letter was certified with."""

    def ask(path, body):
        name = next(name for name, messages in CHAT_PROBES.items() if messages == body["messages"])
        return {"choices": [{"message": {"content": f"{letter} to {name}"}}]}

    return ask


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / ".fmops")
    champion, _ = add_release(store, "a"), add_release(store, "b")
    store.move_aliases({"champion": champion}, expected={"champion": None}, why="the first")
    return store


def controller(store: Store, clock: Clock, engine=None) -> Controller:
    return Controller(store, clock=clock, engine=lambda url: engine or golden("b"))


def engine_up(store: Store) -> None:
    """What the supervisor does: start an engine for the challenger, write down where it answers."""
    file = RoutesFile(store.root / "routes.json")
    now = file.current()
    routes = now.model_copy(update={"challenger": Target(release=now.challenger.release, url="http://127.0.0.1:9")})
    file.compare_and_swap(routes, expected=now.version)


def routes(store: Store) -> Routes:
    return RoutesFile(store.root / "routes.json").current()


def serve(store: Store, clock: Clock, requests: int, **options) -> None:
    production = Production(
        seed=int(clock.now),
        champion="release-" + "a" * 16,
        challenger="release-" + "b" * 16,
        now_s=clock.now,
        **options,
    )
    shares = routes(store)
    write_traces(store.root, production, requests, canary=shares.canary_share, shadow=shares.shadow_share)
    clock.now = production.now_s


def run(store: Store, clock: Clock, **options):
    rollout = controller(store, clock)
    rollout.start("release-" + "b" * 16, POLICY)
    engine_up(store)
    for _ in range(20):
        saved = rollout.look()
        if saved.state.settled:
            return saved
        serve(store, clock, 200, **options)
    return saved


def test_from_release_to_champion(store):
    clock = Clock()
    saved = run(store, clock)
    assert saved.state.phase == "promoted"
    assert store.aliases() == {"champion": "release-" + "b" * 16, "previous": "release-" + "a" * 16}
    now = routes(store)
    assert (now.champion.release, now.champion.url) == ("release-" + "b" * 16, "http://127.0.0.1:9")
    assert now.challenger is None
    assert [event.phase for event in saved.events] == ["checking", "canary", "promoted"]
    assert saved.events[1].detectable["refused"] > 0
    assert (store.root / "rollouts" / f"{saved.state.id}.json").is_file()


def test_harm_takes_the_traffic_away_and_leaves_the_champion(store):
    clock = Clock()
    saved = run(store, clock, harm={"empty": 0.3})
    assert saved.state.phase == "rolled back"
    assert store.aliases()["champion"] == "release-" + "a" * 16
    assert routes(store).challenger is None


def test_traffic_waits_for_the_engine_and_its_checks(store):
    clock = Clock()
    rollout = controller(store, clock)
    rollout.start("release-" + "b" * 16, POLICY)
    saved = rollout.look()
    assert saved.state.phase == "checking"
    assert routes(store).canary_share == 0
    engine_up(store)
    assert rollout.look().state.phase == "canary"
    assert routes(store).canary_share == 0.5


def test_an_engine_that_answers_otherwise_gets_no_traffic(store):
    clock = Clock()
    rollout = controller(store, clock, engine=golden("x"))
    rollout.start("release-" + "b" * 16, POLICY)
    engine_up(store)
    saved = rollout.look()
    assert saved.state.phase == "rolled back"
    assert "2 of 2 golden answers are not the certified ones: chat/question, chat/turns" in saved.state.reason
    assert all(event.share == 0 for event in saved.events)


def test_a_release_whose_bytes_changed_gets_no_traffic(store):
    clock = Clock()
    rollout = controller(store, clock)
    rollout.start("release-" + "b" * 16, POLICY)
    engine_up(store)
    (store.folder("release", "b" * 64) / "model" / "model.safetensors").write_text("c")
    saved = rollout.look()
    assert "model/model.safetensors is not what its record says" in saved.state.reason


def test_an_engine_that_does_not_answer_gets_no_traffic(store):
    def broken(path, body):
        raise OSError("connection refused")

    clock = Clock()
    rollout = controller(store, clock, engine=broken)
    rollout.start("release-" + "b" * 16, POLICY)
    engine_up(store)
    saved = rollout.look()
    assert "its engine does not answer the golden prompts: OSError: connection refused" in saved.state.reason


def test_only_one_rollout_at_a_time(store):
    """S11."""
    clock = Clock()
    rollout = controller(store, clock)
    saved = rollout.start("release-" + "b" * 16, POLICY)
    with pytest.raises(RolloutConflict, match=f"rollout {saved.state.id} of release-b+ is checking"):
        rollout.start("release-" + "b" * 16, POLICY)
    assert rollout.look("rollback").state.settled
    with pytest.raises(RolloutConflict, match="has ended: rolled back"):
        rollout.look("promote")
    clock.now += 60
    assert rollout.start("release-" + "b" * 16, POLICY).state.phase == "checking"


def test_a_champion_that_somebody_else_moved_is_not_overwritten(store):
    """S11: promote from a stale view."""
    clock = Clock()
    rollout = controller(store, clock)
    rollout.start("release-" + "b" * 16, POLICY)
    engine_up(store)
    rollout.look()
    other = add_release(store, "d")
    store.move_aliases({"champion": other}, expected={"champion": "release-" + "a" * 16}, why="by hand")
    saved = rollout.look("promote", why="I like it")
    assert saved.state.phase == "rolled back"
    assert f"champion is {other}, not release-{'a' * 16}" in saved.state.reason
    assert store.aliases()["champion"] == other


@pytest.mark.parametrize(
    ("key", "message"),
    [("release-" + "a" * 16, "is the champion already"), ("nothing", "no artifact 'nothing'")],
)
def test_what_cannot_be_rolled_out(store, key, message):
    with pytest.raises(FmopsError, match=message):
        controller(store, Clock()).start(key, POLICY)


def test_orders_need_a_rollout(store):
    assert controller(store, Clock()).look() is None
    with pytest.raises(RolloutConflict, match="there is no rollout to promote"):
        controller(store, Clock()).look("promote")


LOOK = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from unit.test_rollout_controller import Clock, Store, controller
clock = Clock()
clock.now = float(sys.argv[2])
controller(Store(Path(sys.argv[1])), clock).look(*sys.argv[3:])
"""
SITES = [
    "rollout-before-save:1", "rollout-after-save:1", "rollout-between-acts:1", "rollout-between-acts:2",
    "rollout-before-settled:1", "rollout-after-save:2", "aliases-between-log-and-file:1",
]  # fmt: skip


@pytest.mark.parametrize("site", SITES)
def test_killed_anywhere_inside_a_promotion_there_is_exactly_one(store, site):
    """F18: SIGKILL between any two writes, then one more look."""
    clock = Clock()
    rollout = controller(store, clock)
    rollout.start("release-" + "b" * 16, POLICY)
    engine_up(store)
    rollout.look()
    serve(store, clock, 1500)
    script = LOOK.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", script, str(store.root), str(clock.now)]
    done = subprocess.run(command, env={**os.environ, "FMOPS_FAULT": site}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = rollout.look()
    assert (saved.state.phase, saved.state.settled) == ("promoted", True)
    assert saved.evidence.canary_answers == sum(
        t.arm == "canary" for t in DayLog(store.root / "traces", Trace).read()[0]
    )
    moves = [json.loads(line) for line in (store.root / "aliases.jsonl").read_text().splitlines()]
    assert [move["after"] for move in moves if move["alias"] == "champion"] == [
        "release-" + "a" * 16, "release-" + "b" * 16,
    ]  # fmt: skip
    assert [event.phase for event in saved.events].count("promoted") == 1
    assert routes(store).champion.release == "release-" + "b" * 16


def test_the_command_tells_the_whole_story(store, monkeypatch):
    from fmops.deployment.rollout import command

    clock = Clock()
    monkeypatch.setattr(command, "Controller", lambda store: controller(store, clock))
    assert "no rollout yet" in command.run_action(store, POLICY, "status")
    assert "checking: waiting for the challenger's engine" in command.run_action(store, POLICY, "start")
    engine_up(store)
    told = command.run_action(store, POLICY, "look")
    assert "canary share 50%" in told
    assert "finds with 80 % power: " in told
    serve(store, clock, 100)
    told = command.run_action(store, POLICY, "hold", why="lunch")
    assert "held, held by person in canary: by hand: lunch" in told
    assert "unproven: failed, empty" in told
    assert "within 0.05: e = " in told
    assert "rolled back: by hand" in command.run_action(store, POLICY, "rollback")
    assert store.aliases()["champion"] == "release-" + "a" * 16
