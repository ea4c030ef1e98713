"""A workspace that has a history, and its console on a free port: real controller and monitor, made-up traffic.

Enters: a folder, and what should have happened. Leaves: the project; a console that answers HTTP.
Refuses: nothing.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import uvicorn
from example_run import write_example

from benchmarks.simulated import Production
from fmops.console.access import Token
from fmops.console.app import build_console
from fmops.console.talk import Talk
from fmops.deployment.monitoring.monitor import Watcher
from fmops.deployment.rollout.controller import Controller
from fmops.deployment.serving.routes import RoutesFile
from fmops.deployment.serving.server import address, bind, configure
from fmops.orchestration.project import Project
from fmops.orchestration.rounds import Round, Rounds, Trigger
from fmops.orchestration.up import gateway_url
from fmops.production import Monitor, Rollout
from fmops.store import Store, write_atomically
from fmops.traces import DayLog, Trace

POLICY = Rollout(steps=(0.1, 0.5), answers=40)


def write_workspace(folder: Path, *, ends: str = "promote", port: int = 9) -> Project:
    """A run that has ended; its release is champion, and there is a newer one. Nothing serves on port 9."""
    store, _ = write_example(folder, ends=ends, spec={"serve": {"port": port}})
    releases = [record for record in store.records() if record.kind == "release"]
    if releases:
        champion = releases[0]
        newer = champion.model_copy(update={"fingerprint": "b" * 64, "created": "2026-09-22T09:00:00.000000+00:00"})
        source, target = (store.folder("release", one.fingerprint) for one in (champion, newer))
        target.mkdir()
        for name in champion.files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((source / name).read_bytes())
        store.commit(newer)
        store.move_aliases({"champion": champion.key}, expected={"champion": None}, why="the first")
    return Project.open(folder / "lifecycle.yaml")


def roll_out(project: Project, *, until: str = "canary", harm: dict[str, float] | None = None) -> Controller:
    """A rollout, over traffic of known truth that ends now, as far as the phase `until` (or `promoted`)."""
    store, clock = project.store, [time.time() - 7200]
    controller = Controller(store, clock=lambda: clock[0])
    champion, challenger = store.aliases()["champion"], newest(store)
    saved = controller.start(challenger, POLICY)
    # Made-up weights have no golden answers: their checks are taken as passed.
    write_atomically(store.root / "rollout.json", saved.model_copy(update={"refused": ()}).model_dump_json())
    log = DayLog(store.root / "traces", Trace)
    production = Production(
        seed=3, champion=champion, challenger=challenger, harm=harm or {}, now_s=clock[0], per_second=0.5
    )
    for _ in range(60):
        saved = controller.look()
        assert saved is not None
        if saved.state.settled or (saved.state.phase == until and saved.evidence.step_answers > 10):
            break
        routes = RoutesFile(store.root / "routes.json").current()
        for trace in production.serve(40, canary=routes.canary_share, shadow=routes.shadow_share):
            log.append(trace, at_s=trace.started_s)
        clock[0] = production.now_s
    log.close()
    Watcher(store, Monitor(reference=100), engine=lambda url: None, clock=lambda: time.time()).look()
    return controller


def newest(store: Store) -> str:
    """The release that is not the champion."""
    return next(r.key for r in store.records() if r.kind == "release" and r.key != store.aliases()["champion"])


def add_rounds(project: Project) -> None:
    """One that was promoted, and one that waits for a person."""
    rounds, champion, now = Rounds(project.store.root), project.store.aliases()["champion"], time.time()
    trigger = Trigger(cause="new data", stage="pretrain", why="new files: 12 in python-docs")
    rounds.save(Round(number=1, trigger=trigger, champion=champion, began_s=now - 90_000, changed_s=now - 80_000,
                      phase="ended", outcome="promoted", reason="not worse beyond any margin"))  # fmt: skip
    asked = Trigger(cause="alarm", stage="align", why="unsafe answers: refused fell", identities=4)
    rounds.save(Round(number=2, trigger=asked, champion=champion, began_s=now - 60, changed_s=now - 60,
                      phase="waiting for approval"))  # fmt: skip


@contextmanager
def console(project: Project, *, read_only: bool = False, port: int = 0) -> Iterator[SimpleNamespace]:
    """Yields url, token, port."""
    token = Token(project.store.root).make(anew=True)
    listener = bind("127.0.0.1", port)
    box = SimpleNamespace(url=address(listener), token=token, port=listener.getsockname()[1])
    ready = threading.Event()

    async def main() -> None:
        talk = Talk(project.store.root, gateway_url(project.spec.serve), model=project.spec.name)
        app = build_console(project, talk, host="127.0.0.1", port=box.port, read_only=read_only)
        box.server = uvicorn.Server(configure(app))
        asyncio.get_running_loop().call_soon(ready.set)
        await box.server.serve(sockets=[listener])
        await talk.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(30)
    try:
        yield box
    finally:
        box.server.should_exit = True
        thread.join(30)


def set_serving_port(project: Project, url: str) -> Project:
    """The same project, whose spec says that its gateway is at `url`."""
    spec = json.loads(project.spec_path.read_text())
    spec["serve"]["port"] = int(url.rpartition(":")[2])
    project.spec_path.write_text(json.dumps(spec))
    return Project.open(project.spec_path)
