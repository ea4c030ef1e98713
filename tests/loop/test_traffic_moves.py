"""Routes move under load, engines come and go: no request fails, ends early or mixes two releases.

600 requests here, or FMOPS_ROLLOUT_REQUESTS; over real engines with `fmops up`: `python -m benchmarks.rollout`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine
from gateway_process import HELLO, asking, gateway, until

from benchmarks.rollout import Outcome, capacity, find_fault, open_loop, seconds_to_leave
from fmops.deployment.serving.gateway.desk import Limits
from fmops.deployment.serving.routes import Routes, Target
from fmops.deployment.serving.server import bind

CHAT = "/v1/chat/completions"
NO_LIMITS = Limits(tokens_per_minute=10**9, in_flight=10**6, in_flight_of_tenant=10**6)
"""On a machine that is busy otherwise requests pile up: that is not what is counted here."""
REQUESTS = int(os.environ.get("FMOPS_ROLLOUT_REQUESTS", "600"))


def target(engine) -> Target:
    return Target(release=engine.release, url=engine.url)


def test_ramp_promotion_and_rollback_under_load_lose_no_request(tmp_path):
    with (
        FakeEngine("release-old", token_s=0.002) as old,
        FakeEngine("release-new", token_s=0.002) as new,
        gateway(tmp_path, old, limits=NO_LIMITS) as door,
    ):

        def move(**changes):
            now = door.routes.current()
            door.routes.compare_and_swap(Routes(**changes), expected=now.version)

        both = {"champion": target(old), "challenger": target(new)}
        moves = [
            (0.1, lambda: move(**both, shadow_share=0.3)),
            (0.2, lambda: move(**both, canary_share=0.01)),
            (0.3, lambda: move(**both, canary_share=0.5)),
            (0.5, lambda: move(champion=target(new))),
            (0.6, lambda: move(champion=target(new), challenger=target(old), canary_share=0.5)),
            (0.8, lambda: move(champion=target(new))),
        ]
        most = asyncio.run(capacity(door.url, door.secret, requests=200))
        outcomes = asyncio.run(
            open_loop(door.url, door.secret, rate=min(200, most / 2), requests=REQUESTS, moves=moves)
        )
    assert [outcome.fault for outcome in outcomes if outcome.fault] == []
    assert {outcome.release for outcome in outcomes} == {"release-old", "release-new"}
    assert {outcome.release for outcome in outcomes[-60:]} == {"release-new"}


def test_the_count_would_notice():
    whole = '{"system_fingerprint":"a","choices":[{"finish_reason":"stop"}]}'
    assert find_fault(200, whole, release="a", stream=False) is None
    assert find_fault(200, whole, release="b", stream=False).startswith("mixed")
    assert find_fault(503, "", release=None, stream=False).startswith("failed")
    assert find_fault(200, f"data: {whole}\n\n", release="a", stream=True).startswith("truncated")
    assert find_fault(200, f"data: {whole}\n\ndata: [DONE]\n\n", release="a", stream=True) is None


def test_the_time_to_roll_back_is_that_of_the_last_request_that_the_release_took():
    outcomes = [Outcome(at, 5.0, release, None) for at, release in ((1.0, "b"), (2.5, "b"), (3.0, "a"), (9.0, "c"))]
    assert seconds_to_leave(outcomes, release="b", begin=2.0) == 0.5
    assert seconds_to_leave(outcomes, release="b", begin=2.5) == 0.0


def test_a_draining_engine_hands_its_requests_to_where_the_routes_now_point(tmp_path):
    with FakeEngine("release-old") as old, FakeEngine("release-new") as new, gateway(tmp_path, old, new) as door:
        version = door.routes.current().version
        # The request is drawn for the old engine, which is ending; meanwhile the new one is champion.
        arm = Routes(champion=target(new), challenger=target(old), canary_share=1.0)
        door.routes.compare_and_swap(arm, expected=version)
        for stream in (False, True):
            answer = door.client.post(CHAT, json=asking("hello", stream=stream))
            assert answer.headers["x-fmops-release"] == "release-old"
        old.draining = True
        for stream in (False, True):
            answer = door.client.post(CHAT, json=asking("hello", stream=stream))
            assert (answer.status_code, answer.headers["x-fmops-release"]) == (200, "release-new")


@pytest.fixture
def killable(tmp_path):
    """An engine in a process of its own, slow enough to be killed in the middle of an answer."""
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    fake = Path(__file__).resolve().parents[1] / "fake_engine.py"
    process = subprocess.Popen([sys.executable, str(fake), str(port), "release-old", "400", "0.05"])
    engine = FakeEngine.__new__(FakeEngine)
    engine.release, engine.url, engine.process = "release-old", f"http://127.0.0.1:{port}", process
    until(lambda: _answers(engine.url))
    yield engine
    process.kill()
    process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_an_engine_killed_by_minus_nine_in_mid_stream_is_no_silent_end(tmp_path, killable):
    with gateway(tmp_path, killable) as door:
        texts: list[str] = []

        def read(stream: bool) -> None:
            answer = door.client.post(CHAT, json={**HELLO, "stream": stream})
            texts.append(answer.text)

        threads = [threading.Thread(target=read, args=(True,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: door.desk.in_flight == 4)
        until(lambda: "fmops_gateway_requests_in_flight 4.0" in httpx.get(f"{door.admin}/metrics").text)
        os.kill(killable.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(20)
        assert len(texts) == 4
        assert all('"code":"stream_failed"' in text or '"code":"engine_failed"' in text for text in texts)
        assert not any("[DONE]" in text for text in texts)
        refused = door.client.post(CHAT, json=HELLO)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "left alone" in refused.json()["error"]["message"], "the circuit is open"
        assert {trace.finish_reason for trace in door.traces(5)[:4]} == {"error"}


def test_five_times_the_load_is_turned_away_in_order_and_forgotten_at_once(tmp_path):
    """Open loop far beyond what may be under way: answers keep coming, the rest is told when to come back."""
    limits = Limits(in_flight=8, in_flight_of_tenant=8, tokens_per_minute=10**9)
    with FakeEngine("release-old", token_s=0.02) as engine, gateway(tmp_path, engine, limits=limits) as door:
        # Eight places, four tokens of 20 ms a stream and none for the rest: some 200 a second; 1,000 come.
        outcomes = asyncio.run(open_loop(door.url, door.secret, rate=1000, requests=1500, moves=[]))
        served = [one for one in outcomes if one.fault is None]
        turned_away = [one for one in outcomes if one.fault]
        # However slow the machine: the places are used again and again.
        assert len(served) >= 3 * limits.in_flight
        assert turned_away
        assert all("failed: 503" in one.fault or "failed: 429" in one.fault for one in turned_away)
        until(lambda: door.desk.in_flight == 0)
        assert door.client.post(CHAT, json=HELLO).status_code == 200, "it recovers at once"
        assert len(engine.seen) == len(served) + 1
