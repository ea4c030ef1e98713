"""The console in a real browser: every view, every order, with the mouse and with the keyboard alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "loop"))

from chrome import BROWSER, Chrome
from console_workspace import add_rounds, console, newest, roll_out, set_serving_port, write_workspace
from fake_engine import FakeEngine
from gateway_process import gateway, until

from fmops.console.access import Token
from fmops.deployment.rollout.controller import Controller
from fmops.orchestration.project import Project
from fmops.store import write_atomically
from fmops.traces import DayLog, Feedback

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium here; `apt-get install chromium` brings it"),
    pytest.mark.xdist_group("console-page"),
]
WALL = "document.body.dataset.view === 'wall'"
EVIL = "<script>document.body.dataset.ran = 1</script><img src=x onerror='document.body.dataset.ran = 1'>"


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    with Chrome(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def project(tmp_path) -> Project:
    return write_workspace(tmp_path / "project")


def enter(chrome, box, **options):
    page = chrome.open(f"{box.url}/#{box.token}", **options)
    page.until(WALL)
    return page


def phase(project) -> str:
    return Controller(project.store).read().state.phase


def test_the_wall_shows_every_part(chrome, project):
    roll_out(project)
    add_rounds(project)
    with console(project) as box:
        page = enter(chrome, box)
        assert page.run("location.hash") == "", "the token does not stay in the address"
        assert "canary 10 %" in page.text("#circle")
        assert page.run("document.querySelectorAll('#circle li').length") == 10
        assert "rolls back at 25" in page.text("#evidence")
        assert "proven at 20" in page.text("#evidence")
        assert page.run(
            "[...document.querySelectorAll('#evidence svg[role=img]')].every(e => e.querySelector('desc').textContent)"
        )
        assert "answers of release-" in page.text("#monitor")
        assert "fmops loop --approve 2" in page.text("#rounds")
        assert "left" in page.text("#gate")
        assert "Nothing is up." in page.text("#serving")
        assert "Nothing serves the champion. Start it with fmops up" in page.text("#problems")
        page.close()


def test_an_empty_workspace_is_no_blank_page(chrome, tmp_path):
    (tmp_path / "lifecycle.yaml").write_text("name: new\nbase: base\nserve: {port: 9}\n")
    with console(Project.open(tmp_path / "lifecycle.yaml")) as box:
        page = enter(chrome, box)
        assert "Nothing is released yet. fmops run" in page.text("#problems")
        for card, words in {
            "rollout": "Nothing is released yet", "monitor": "has not looked yet", "rounds": "No round yet",
            "gate": "has not judged", "serving": "Nothing is up",
        }.items():  # fmt: skip
            assert words in page.text(f"#{card}"), card
        assert page.run("[...document.querySelectorAll('#orders button')].every(e => e.hidden)")
        page.close()


@pytest.mark.parametrize(("order", "ends"), [("hold", "held"), ("promote", "promoted"), ("rollback", "rolled back")])
def test_an_order_is_confirmed_before_it_is_given(chrome, project, order, ends):
    roll_out(project)
    with console(project) as box:
        page = enter(chrome, box)
        page.click(f"[data-order={order}]")
        page.until("document.querySelector('#confirm').open")
        if order == "promote":
            assert "without proof on" in page.text("#confirm-words")
        assert phase(project) == "canary", "nothing happens before the confirmation"
        page.click("#confirm-why")
        page.type("seen on the wall")
        page.click("#confirm-do")
        page.until("!document.querySelector('#confirm').open")
        assert "seen on the wall" in page.text("#toast")
        page.until(f"document.querySelector('#circle').innerText.includes({json.dumps(ends)})")
        page.close()
    assert phase(project) == ends


def test_a_rollout_begins_from_the_page(chrome, project):
    with console(project) as box:
        page = enter(chrome, box)
        page.click("[data-order=start]")
        page.until("document.querySelector('#confirm').open")
        assert page.run("document.querySelector('#confirm-release').value") == newest(project.store)
        page.click("#confirm-do")
        page.until("document.querySelector('#circle').innerText.includes('checking')")
        page.close()
    assert phase(project) == "checking"


def test_an_order_that_comes_too_late_is_said_and_changes_nothing(chrome, project):
    controller = roll_out(project)
    with console(project) as box:
        page = enter(chrome, box)
        page.click("[data-order=promote]")
        page.until("document.querySelector('#confirm').open")
        controller.look("rollback", why="somebody was quicker")
        page.click("#confirm-do")
        page.until("document.querySelector('#confirm-wrong').innerText.includes('has ended: rolled back')")
        page.close()
    assert phase(project) == "rolled back"


def test_the_keyboard_reaches_everything_and_escape_closes(chrome, project):
    roll_out(project)
    with console(project) as box:
        page = enter(chrome, box)
        reached = set()
        for _ in range(30):
            page.press("Tab")
            reached.add(page.run("document.activeElement.dataset.order ?? document.activeElement.id"))
            assert page.run(
                "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle"
            ) not in ("none", False)
        assert {"hold", "promote", "rollback", "chat-text", "chat-send"} <= reached
        page.run("document.querySelector('[data-order=rollback]').focus()")
        page.press("Enter")
        page.until("document.querySelector('#confirm').open")
        page.press("Escape")
        page.until("!document.querySelector('#confirm').open")
        assert page.run("document.activeElement.dataset.order") == "rollback", "the focus is where it was"
        assert phase(project) == "canary"
        page.press(" ")
        page.until("document.querySelector('#confirm').open")
        page.run("document.querySelector('#confirm-do').focus()")
        page.press("Enter")
        page.until("document.querySelector('#circle').innerText.includes('rolled back')")
        page.close()


def test_a_narrow_screen_never_scrolls_sideways(chrome, project):
    roll_out(project)
    add_rounds(project)
    with console(project) as box:
        for dark in (False, True):
            page = enter(chrome, box, width=360, height=740, dark=dark)
            assert page.run("document.documentElement.scrollWidth") <= 360
            page.click("[data-order=promote]")
            page.until("document.querySelector('#confirm').open")
            assert page.run("document.querySelector('#confirm').getBoundingClientRect().right") <= 360
            page.close()


def test_without_a_token_there_is_a_door(chrome, project):
    with console(project) as box:
        page = chrome.open(box.url)
        page.until("document.body.dataset.view === 'door'")
        assert project.spec.name not in page.text()
        for token, ends in (("guess", "door"), (box.token, "wall")):
            page.click("#token")
            page.type(token)
            page.press("Enter")
            page.until(
                f"document.body.dataset.view === '{ends}'"
                + " && document.querySelector('#door-wrong').innerText.includes('not the token')" * (ends == "door")
            )
            page.run("document.querySelector('#token').value = ''")
        page.send("Page.reload")
        page.until(WALL)
        assert page.run("document.cookie") == "", "no script can read the cookie"
        Token(project.store.root).make(anew=True)
        page.until("document.body.dataset.view === 'door'")
        page.close()


def test_what_is_broken_or_gone_is_said_over_what_was_last_known(chrome, project):
    roll_out(project)
    with console(project) as box:
        page = enter(chrome, box)
        (project.store.root / "rollout.json").write_text(EVIL)
        page.until("document.querySelector('#rollout').innerText.includes('is no rollout')")
        assert "python-assistant" in page.text("#name")
    page.until("document.querySelector('#problems').innerText.includes('The console does not answer')")
    assert page.text("#live") == "no answer"
    assert page.run("document.querySelectorAll('#circle li').length") == 10
    assert page.run("document.body.dataset.ran") is None
    page.close()


def test_read_only_has_no_orders_and_no_chat(chrome, project):
    roll_out(project)
    with console(project, read_only=True) as box:
        page = enter(chrome, box)
        assert page.run("[...document.querySelectorAll('#orders button')].every(e => e.hidden)")
        assert page.run("document.querySelector('#chat').hidden")
        page.close()


def test_an_answer_shows_its_release_takes_feedback_and_runs_nothing(chrome, project):
    champion, root = project.store.aliases()["champion"], project.store.root
    # The gateway of these tests knows its model by this name.
    project.spec_path.write_text(json.dumps(json.loads(project.spec_path.read_text()) | {"name": "tiny"}))
    with FakeEngine(champion) as engine, gateway(root, engine) as door:
        write_atomically(root / "local.key", door.secret)
        engine.words = [EVIL, "x"]
        with console(set_serving_port(project, door.url)) as box:
            page = enter(chrome, box)
            page.click("#chat-text")
            page.type(f"what is {EVIL}?")
            page.press("Enter")
            page.until("document.querySelector('.feedback')")
            assert page.text(".turn.user") == f"what is {EVIL}?"
            assert EVIL in page.text(".turn.model .answer")
            assert page.run("document.body.dataset.ran") is None
            assert page.text(".release") == champion[:16]
            [trace] = door.traces(1)
            assert page.text(".meta .id") == trace.id
            page.click("[aria-label='Bad answer']")
            page.until("document.querySelector('.told').innerText === 'Bad answer: kept'")
            page.click(".feedback .quiet")
            page.run("document.querySelector('.correction textarea').select()")
            page.type("It is markup.")
            page.click(".correction button")
            page.until("document.querySelector('.told').innerText === 'correction kept'")
            page.click("#chat-text")
            page.type("[break]")
            page.press("Enter")
            page.until("document.querySelector('.turn.model .wrong')?.innerText.includes('the engine')")
            page.click("#chat-text")
            page.type("[500]")
            page.press("Enter")
            page.until("document.querySelectorAll('.turn.model .wrong').length === 2")
            page.close()
        votes = DayLog(root / "feedback", Feedback).read()[0]
        assert [(vote.id, vote.thumb, vote.correction) for vote in votes] == [
            (trace.id, "down", None), (trace.id, None, "It is markup."),
        ]  # fmt: skip


def test_an_answer_under_way_can_be_stopped_and_the_engine_stops_too(chrome, project):
    champion, root = project.store.aliases()["champion"], project.store.root
    project.spec_path.write_text(json.dumps(json.loads(project.spec_path.read_text()) | {"name": "tiny"}))
    with FakeEngine(champion) as engine, gateway(root, engine) as door:
        write_atomically(root / "local.key", door.secret)
        with console(set_serving_port(project, door.url)) as box:
            page = enter(chrome, box)
            page.click("#chat-text")
            page.type("[wait]")
            page.press("Enter")
            assert engine.waiting.acquire(timeout=20)
            page.click("#chat-stop")
            page.until("document.querySelector('.turn.model').innerText.includes('Stopped.')")
            [trace] = door.traces(1)
            assert trace.status == 499 or trace.finish_reason == "cancelled"
            page.close()


def test_an_engine_that_dies_is_seen(chrome, project):
    champion, root = project.store.aliases()["champion"], project.store.root
    project.spec_path.write_text(json.dumps(json.loads(project.spec_path.read_text()) | {"name": "tiny"}))
    engine = FakeEngine(champion)
    with gateway(root, engine) as door, console(set_serving_port(project, door.url)) as box:
        with engine:
            page = enter(chrome, box)
            page.until("document.querySelector('#headline').innerText.endsWith('serves.')")
        hello = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
        said = "document.querySelector('#problems').innerText.includes('Users get errors')"
        until(lambda: (door.client.post("/v1/chat/completions", json=hello), page.run(said))[1])
        assert "engine failing" in page.text("#circle")
        page.close()
