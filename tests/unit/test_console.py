"""The console's API: who may, what it says, and what it refuses to do."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "loop"))

from console_workspace import add_rounds, console, newest, roll_out, set_serving_port, write_workspace
from fake_engine import FakeEngine
from gateway_process import gateway

from fmops.console.access import HEADER, Token, names
from fmops.console.production import traffic
from fmops.console.state import Snapshots
from fmops.deployment.rollout.controller import MARKS, Controller, _marked
from fmops.deployment.rollout.evidence import Evidence
from fmops.deployment.serving.supervisor import FOLDER, STATE, Running, State
from fmops.errors import FmopsError
from fmops.orchestration.project import Project
from fmops.orchestration.up import console_url
from fmops.store import write_atomically
from fmops.traces import DayLog, Feedback

OWN = {HEADER: "1"}


@contextmanager
def client(box, *, enter: bool = True) -> Iterator[httpx.Client]:
    """A browser that has shown the token."""
    with httpx.Client(base_url=box.url, headers=OWN, timeout=20) as found:
        if enter:
            assert found.post("/api/session", json={"token": box.token}).status_code == 200
        yield found


def told(answer: httpx.Response) -> str:
    return answer.json()["error"]["message"]


@pytest.fixture
def project(tmp_path) -> Project:
    return write_workspace(tmp_path / "project")


def look(project: Project, now: float = 1_790_100_000.0) -> dict:
    return Snapshots(project, read_only=False).make(now)


def test_without_the_token_nothing_is_told(project):
    with console(project) as box, client(box, enter=False) as stranger:
        for method, path in (
            ("GET", "/api/state"),
            ("POST", "/api/orders"),
            ("POST", "/api/chat"),
            ("POST", "/api/feedback"),
        ):
            refused = stranger.request(method, path)
            assert (refused.status_code, "`fmops console --new-token`" in told(refused)) == (401, True), path
        wrong = stranger.post("/api/session", json={"token": "guess"})
        assert (wrong.status_code, told(wrong).split(".")[0]) == (401, "that is not the token")
        assert not wrong.cookies
        assert stranger.get("/health").json() == {"status": "ok"}
        page = stranger.get("/")
        assert page.status_code == 200
        assert project.spec.name not in page.text


def test_the_cookie_is_for_the_server_alone_and_ends_with_a_new_token(project):
    with console(project) as box, client(box, enter=False) as browser:
        entered = browser.post("/api/session", json={"token": box.token})
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert cookie.startswith(f"fmops-console-{box.port}=")
        assert browser.get("/api/state").status_code == 200
        Token(project.store.root).make(anew=True)
        assert browser.get("/api/state").status_code == 401


def test_the_token_is_kept_as_a_digest_readable_by_its_owner_only(project):
    token = Token(project.store.root)
    first = token.make()
    assert first is not None
    assert token.make() is None, "it is shown once"
    path = project.store.root / "console.json"
    assert first not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert (token.is_right(first), token.is_right(first + "x"), token.is_right("")) == (True, False, False)


def test_leaving_ends_the_session(project):
    with console(project) as box, client(box) as browser:
        assert browser.delete("/api/session").status_code == 200
        assert browser.get("/api/state").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "same-site"},
        {HEADER: ""},
    ],
)
def test_another_page_gives_no_orders(project, headers):
    with console(project) as box, client(box) as browser:
        refused = browser.post("/api/orders", json={"order": "promote", "seen": "x"}, headers=headers)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "foreign"


def test_a_name_that_is_not_this_server_sees_nothing(project):
    with console(project) as box, client(box) as browser:
        for host in ("evil.example", f"evil.example:{box.port}", "127.0.0.1:1", ""):
            assert browser.get("/api/state", headers={"host": host}).status_code == 403, host
        assert browser.get("/api/state", headers={"host": f"LOCALHOST:{box.port}"}).status_code == 200


def test_it_does_not_listen_on_every_address():
    with pytest.raises(FmopsError, match=r"does not listen on 0\.0\.0\.0"):
        names("0.0.0.0", 80)
    assert "10.0.0.7:80" in names("10.0.0.7", 80)


def test_every_answer_forbids_foreign_scripts_and_frames(project):
    with console(project) as box, client(box) as browser:
        for path in ("/", "/console.js", "/api/state", "/nothing"):
            headers = browser.get(path).headers
            policy = headers["content-security-policy"]
            assert "script-src 'self';" in policy, path
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
        assert "<script>" not in browser.get("/").text


def test_an_unchanged_state_costs_no_bytes(project):
    with console(project) as box, client(box) as browser:
        first = browser.get("/api/state")
        again = browser.get("/api/state", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_the_lifecycle_says_how_far_the_run_is(project):
    steps = {step["name"]: (step["state"], step["words"]) for step in look(project)["lifecycle"]}
    assert list(steps) == [
        "data",
        "pretrain",
        "instruct",
        "align",
        "evaluate",
        "gate",
        "release",
        "rollout",
        "serve",
        "monitor",
    ]
    assert steps["data"] == ("done", "312 documents, 16,384 tokens, 11 dropped")
    assert steps["gate"] == ("done", "promote")
    assert steps["release"] == ("done", project.store.aliases()["champion"])
    assert steps["rollout"] == ("absent", "none yet")
    assert steps["serve"] == ("absent", "nothing is up")


@pytest.mark.parametrize(
    ("ends", "step", "expected"),
    [
        ("reject", "gate", "stopped"),
        ("failed", "pretrain", "failed"),
        ("killed", "pretrain", "stopped"),
        ("reject", "release", "waiting"),
        ("cached", "data", "kept"),
    ],
)
def test_a_run_that_ended_otherwise_is_seen_where_it_ended(tmp_path, ends, step, expected):
    state = look(write_workspace(tmp_path / "project", ends=ends))
    assert next(each["state"] for each in state["lifecycle"] if each["name"] == step) == expected


def test_an_empty_workspace_says_what_comes_first(tmp_path):
    (tmp_path / "lifecycle.yaml").write_text("name: x\nbase: base\nserve: {port: 9}\n")
    state = look(Project.open(tmp_path / "lifecycle.yaml"))
    assert state["headline"] == "No release yet."
    assert [(p["what"], p["remedy"].split("`")[1].split()[:2]) for p in state["problems"]] == [
        ("Nothing is released yet", ["fmops", "run"])
    ]
    assert (state["run"], state["rollout"], state["gate"], state["monitor"]) == (None, None, None, None)
    assert {step["state"] for step in state["lifecycle"]} == {"absent"}


def test_the_evidence_is_the_controllers_and_has_a_past(project):
    controller = roll_out(project, until="canary")
    saved, shown = controller.read(), look(project)["rollout"]
    assert (shown["phase"], shown["share"]) == ("canary", 0.1)
    assert shown["log_harm"] == pytest.approx(saved.evidence.log_harm)
    assert math.exp(shown["harm_limit"]) == pytest.approx(25)
    assert [mark["answers"] for mark in shown["marks"]] == sorted(mark["answers"] for mark in shown["marks"])
    assert shown["marks"][-1]["log_harm"] == pytest.approx(saved.evidence.log_harm, abs=1e-4)
    assert set(shown["orders"]) == {"promote", "hold", "rollback"}
    assert shown["orders"]["promote"]["reason"].startswith("by hand, without proof on failed")


def test_marks_stay_few_and_keep_the_first():
    evidence, marks = Evidence.none_yet("a", "b", {}), ()
    for moment in range(1000):
        marks = _marked(marks, evidence, float(moment))
    assert len(marks) <= MARKS
    assert (marks[0].at_s, marks[-1].at_s) == (0.0, 999.0)


def test_orders_are_those_of_the_command_line(project):
    roll_out(project)
    with console(project) as box, client(box) as browser:
        seen = browser.get("/api/state").json()["rollout"]["id"]
        held = browser.post("/api/orders", json={"order": "hold", "seen": seen, "why": "lunch"})
        assert (held.status_code, held.json()["said"]) == (
            200,
            f"{seen}: held, held by person in canary: by hand: lunch",
        )
        assert browser.get("/api/state").json()["rollout"]["orders"].keys() == {"promote", "resume", "rollback"}
        assert browser.post("/api/orders", json={"order": "resume", "seen": seen}).status_code == 200
        assert browser.post("/api/orders", json={"order": "rollback", "seen": seen}).status_code == 200
    saved = Controller(project.store).read()
    assert (saved.state.phase, saved.state.settled) == ("rolled back", True)


def test_a_promotion_moves_the_alias(project):
    roll_out(project)
    challenger = newest(project.store)
    with console(project) as box, client(box) as browser:
        seen = browser.get("/api/state").json()["rollout"]["id"]
        assert browser.post("/api/orders", json={"order": "promote", "seen": seen}).status_code == 200
        assert browser.get("/api/state").json()["aliases"]["champion"] == challenger
        late = browser.post("/api/orders", json={"order": "rollback", "seen": seen})
        assert late.status_code == 409
        assert "has ended: promoted" in told(late)


def test_an_order_for_a_rollout_that_is_over_is_refused(project):
    roll_out(project)
    with console(project) as box, client(box) as browser:
        late = browser.post("/api/orders", json={"order": "promote", "seen": "rollout-of-yesterday"})
        assert late.status_code == 409
        assert told(late).startswith("rollout-of-yesterday is over; rollout-")
    assert Controller(project.store).read().state.phase == "canary"


def test_a_rollout_begins_only_against_the_champion_that_was_seen(project):
    champion, challenger = project.store.aliases()["champion"], newest(project.store)
    with console(project) as box, client(box) as browser:
        assert [one["key"] for one in browser.get("/api/state").json()["releases"]] == [challenger]
        order = {"order": "start", "release": challenger, "seen": "release-of-yesterday"}
        late = browser.post("/api/orders", json=order)
        assert (late.status_code, "no longer release-of-yesterday" in told(late)) == (409, True)
        begun = browser.post("/api/orders", json={**order, "seen": champion})
        assert "checking" in begun.json()["said"]


@pytest.mark.parametrize(
    "body", [{"order": "explode", "seen": "x"}, {"order": "hold"}, {"order": "hold", "seen": "x", "a": 1}, []]
)
def test_an_order_that_is_none_is_refused_by_name(project, body):
    with console(project) as box, client(box) as browser:
        refused = browser.post("/api/orders", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_order")


def test_read_only_shows_and_obeys_nobody(project):
    roll_out(project)
    with console(project, read_only=True) as box, client(box) as browser:
        assert browser.get("/api/state").json()["read_only"] is True
        for path in ("/api/orders", "/api/chat", "/api/feedback"):
            refused = browser.post(path, json={})
            assert (refused.status_code, "only shows" in told(refused)) == (403, True)


def test_the_chat_goes_through_the_gateway_and_shows_who_answered(project):
    champion, root = project.store.aliases()["champion"], project.store.root
    with FakeEngine(champion) as engine, gateway(root, engine) as door:
        write_atomically(root / "local.key", door.secret)
        # The gateway of these tests knows its model by this name.
        named = json.loads(project.spec_path.read_text()) | {"name": "tiny"}
        project.spec_path.write_text(json.dumps(named))
        own = set_serving_port(project, door.url)
        with console(own) as box, client(box) as browser:
            state = browser.get("/api/state").json()
            assert state["serving"]["gateway"] == "ok"
            assert state["headline"] == f"{champion} serves."
            asked = browser.post("/api/chat", json={"messages": [{"role": "user", "content": "hello"}]})
            assert asked.headers["x-fmops-release"] == champion
            assert asked.text.endswith("data: [DONE]\n\n")
            first = json.loads(asked.text.split("\n\n")[0].removeprefix("data: "))
            [trace] = door.traces(1)
            assert trace.id == first["id"]
            assert door.secret not in asked.text
            assert browser.post("/api/feedback", json={"id": first["id"], "thumb": "down"}).json() == {"accepted": True}
            unknown = browser.post("/api/feedback", json={"id": "chatcmpl-0", "thumb": "up"})
            assert (unknown.status_code, told(unknown)) == (404, "there is no answer 'chatcmpl-0'")
            nothing = browser.post("/api/chat", json={"messages": []})
            assert nothing.status_code == 400
        [vote] = DayLog(root / "feedback", Feedback).read()[0]
        assert (vote.id, vote.thumb) == (first["id"], "down")
        counted = traffic(httpx.get(f"{door.admin}/metrics").text)
        assert [(arm["arm"], arm["release"], arm["requests"]) for arm in counted] == [("champion", champion, 1)]
        assert counted[0]["first_p50"] > 0
        door.keys.revoke(next(iter(door.keys.keys())))
        with console(own) as box, client(box) as browser:
            refused = browser.post("/api/chat", json={"messages": [{"role": "user", "content": "hello"}]})
            assert (refused.status_code, "Remove local.key" in told(refused)) == (502, True)


def test_a_gateway_that_is_gone_is_said_with_the_remedy(project):
    with console(project) as box, client(box) as browser:
        refused = browser.post("/api/chat", json={"messages": [{"role": "user", "content": "hello"}]})
        assert refused.status_code == 502
        assert "`fmops up` starts it." in told(refused)
        assert browser.get("/api/state").json()["problems"][0]["what"] == "Nothing serves the champion"


def test_processes_that_died_are_named_with_their_logs(project):
    champion, root = project.store.aliases()["champion"], project.store.root
    me = psutil.Process()
    engine = Running(name=f"engine {champion}", pid=me.pid, created=1.0, command=("x",), url="http://127.0.0.1:9",
                     release=champion, restarts=3, healthy=True)  # fmt: skip
    gone = Running(name="gateway", pid=me.pid, created=1.0, command=("x",), url="http://127.0.0.1:9", healthy=True)
    write_atomically(
        root / FOLDER / STATE,
        State(pid=os.getpid(), created=me.create_time(), processes=(gone, engine)).model_dump_json(),
    )
    (root / "routes.json").write_text(json.dumps({"champion": {"release": champion}}))
    state = look(project)
    assert [(p["what"], p["remedy"]) for p in state["problems"]] == [
        (
            "The gateway does not answer",
            "The supervisor starts it again. Why it ended is in up/gateway.log of the workspace.",
        ),
        (
            "The engine of the champion does not answer",
            "The supervisor starts it again, 3 times so far. "
            f"Why it ended is in up/engine-{champion}.log of the workspace.",
        ),
    ]
    assert [step["words"] for step in state["lifecycle"] if step["name"] == "serve"] == ["gateway: dead"]
    write_atomically(root / FOLDER / STATE, State(pid=1, created=1.0, processes=(gone,)).model_dump_json())
    assert look(project)["problems"][0]["what"] == "The supervisor has died"


def test_a_broken_file_is_said_in_its_place_and_the_rest_is_shown(project):
    roll_out(project)
    (project.store.root / "rollout.json").write_text("{")
    (project.store.root / "monitor.json").write_text("{")
    state = look(project)
    assert "is no rollout" in state["rollout"]["error"]
    assert state["problems"][0]["what"] == "rollout cannot be read"
    assert state["monitor"]["answers"] > 0
    assert next(step for step in state["lifecycle"] if step["name"] == "rollout")["state"] == "failed"


def test_rounds_say_what_the_next_one_waits_for(project):
    add_rounds(project)
    rounds = look(project)["rounds"]
    assert [(each["number"], each["phase"], each["outcome"]) for each in rounds["rounds"]] == [
        (2, "waiting for approval", None), (1, "ended", "promoted"),
    ]  # fmt: skip
    assert rounds["waits"] == "round 2 is waiting for approval"


def test_the_budget_falls_with_every_round_the_gate_tests(project):
    gate = look(project)["gate"]
    assert gate["verdict"] == "promote"
    assert 0 < gate["next_level"] < gate["alpha"]
    for before, after in zip([{"wealth": gate["start"]}, *gate["rounds"]], gate["rounds"], strict=False):
        assert after["wealth"] != before["wealth"]


def test_the_monitor_is_stale_when_it_should_look_and_does_not(project):
    roll_out(project)
    monitor = look(project, now=4e9)["monitor"]
    assert monitor["stale"] is False, "nothing is up: nobody should look"
    me = psutil.Process()
    write_atomically(project.store.root / FOLDER / STATE, State(pid=me.pid, created=me.create_time()).model_dump_json())
    state = look(project, now=4e9)
    assert state["monitor"]["stale"] is True
    assert "The monitor has stopped looking" in [problem["what"] for problem in state["problems"]]


def test_up_puts_it_three_ports_after_the_gateway(project):
    assert console_url(project.spec.serve) == "http://127.0.0.1:12"
