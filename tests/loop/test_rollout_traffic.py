"""A rollout through the real gateway: real requests, real traces, and nobody sees a failure."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine
from gateway_process import asking, gateway, until

from fmops.deployment.evalues import Count
from fmops.deployment.rollout.controller import Controller, Saved
from fmops.deployment.rollout.evidence import SIGNALS, Evidence
from fmops.deployment.rollout.machine import State
from fmops.production import Rollout
from fmops.store import Store, write_atomically

# Wide margins, so that some hundred requests suffice; the machine's own tests use the usual ones.
POLICY = Rollout(steps=(0.5,), shadow=1.0, answers=15, margins=dict.fromkeys(SIGNALS, 0.3))


def begin(store: Store) -> Controller:
    """A rollout whose checks have passed: fake engines have no golden answers."""
    store.move_aliases({"champion": "release-old"}, expected={"champion": None}, why="test")
    controller = Controller(store)
    now = 0.0
    state = State(id="r", champion="release-old", challenger="release-new", started_s=now, entered_s=now)
    policy = POLICY.model_copy(update={"deadline_hours": 1e9, "silence_minutes": 1e9})
    saved = Saved(
        policy=policy, state=state, evidence=Evidence.none_yet("release-old", "release-new", policy.margins), refused=()
    )
    write_atomically(store.root / "rollout.json", saved.model_dump_json())
    return controller


def ask(door, count: int) -> list[tuple[int, str]]:
    answers = [door.client.post("/v1/chat/completions", json=asking(f"question {n}")) for n in range(count)]
    return [(answer.status_code, answer.headers["x-fmops-release"]) for answer in answers]


def finished(door, controller: Controller, clients: int) -> None:
    """Traces are written after the client has its answer; mirrored ones later still."""
    until(lambda: sum(t.arm != "shadow" and not t.retry_of for t in door.desk.traces.read()[0]) >= clients)


def test_from_shadow_to_champion_without_one_failed_answer(tmp_path):
    store = Store(tmp_path)
    with FakeEngine("release-old") as old, FakeEngine("release-new") as new, gateway(tmp_path, old, new) as door:
        controller = begin(store)
        assert controller.look().state.phase == "shadow"
        seen = ask(door, 30)
        assert {release for _, release in seen} == {"release-old"}  # a shadow answers nobody
        until(lambda: controller.look().state.phase == "canary")
        for _ in range(15):
            seen += ask(door, 30)
            finished(door, controller, len(seen))
            saved = controller.look()
            if saved.state.settled:
                break
        assert saved.state.phase == "promoted"
        assert {status for status, _ in seen} == {200}
        assert {release for _, release in seen} == {"release-old", "release-new"}
        assert {release for _, release in ask(door, 5)} == {"release-new"}
        assert store.aliases() == {"champion": "release-new", "previous": "release-old"}
        signal = saved.evidence.signals["refused"]
        assert signal.canary + signal.champion == Count(events=0, n=signal.canary.n + signal.champion.n)
        assert saved.evidence.pairs >= 15


def test_a_challenger_that_fails_is_rolled_back_while_clients_get_answers(tmp_path):
    store = Store(tmp_path)
    with FakeEngine("release-old") as old, FakeEngine("release-new") as new, gateway(tmp_path, old, new) as door:
        new.draining = True
        controller = begin(store)
        controller.look()
        seen = ask(door, 60)
        finished(door, controller, len(seen))
        until(lambda: controller.look().state.settled)
        saved = controller.read()
        assert saved.state.phase == "rolled back"
        assert "failed +" in saved.state.reason
        assert {status for status, _ in seen} == {200}
        assert door.routes.current().challenger is None
        assert store.aliases()["champion"] == "release-old"
