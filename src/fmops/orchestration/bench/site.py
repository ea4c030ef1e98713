"""One machine under the benchmark: the real gateway, supervisor, engines and loop, on a clock of the benchmark's own.

Enters: a project with a champion, users. Leaves: served answers, and what the loop knew after each look.
Refuses: to fake a part. Requests go through the gateway's application to engines in processes of their own.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from fmops.artifacts import DriftReport, GateDecision
from fmops.deployment.rollout.controller import Controller, Saved
from fmops.deployment.serving.gateway.app import build_gateway
from fmops.deployment.serving.gateway.desk import Desk, Limits
from fmops.deployment.serving.gateway.keys import KEYS, KeyRing
from fmops.deployment.serving.routes import ROUTES, Routes, RoutesFile, Target
from fmops.deployment.serving.server import workspace_secret
from fmops.deployment.serving.supervisor import FOLDER, Supervisor, read_state
from fmops.errors import FmopsError
from fmops.feedback.gather import Counts
from fmops.orchestration.bench.facts import likeness
from fmops.orchestration.bench.users import Mix, Question, Users
from fmops.orchestration.bench.world import NAME, World
from fmops.orchestration.events import LineView
from fmops.orchestration.loop import LoopRunner
from fmops.orchestration.project import Project
from fmops.orchestration.rounds import Round
from fmops.store import Record, Store

REQUEST_EVERY_S = 240.0
"""Between two requests, on the benchmark's clock: 360 a day."""
AT_ONCE = 8
LOOK_EVERY = 16
"""Requests between two looks of the loop: about an hour."""
BEGINNING_S = 1_700_006_400.0
"""A midnight."""
ANSWER_TOKENS = 64
"""The longest right answer takes 51 in the small tokenizer."""
START_S = 600.0
"""Longest wait for an engine."""


@dataclass(frozen=True)
class Served:
    """One request and its answer."""

    question: Question
    status: int
    text: str
    release: str | None

    @property
    def quality(self) -> float:
        """Likeness to the right answer; 0 where there was none."""
        return likeness(self.text, self.question.wanted) if self.status == 200 else 0.0


@dataclass(frozen=True)
class Look:
    """What was known after one look of the loop."""

    requests: int
    """Served so far."""
    at_s: float
    said: tuple[str, ...]
    report: DriftReport
    rollout: Saved | None
    rounds: tuple[Round, ...]
    champion: str
    cpu_s: float
    """Spent by the look itself and by the stages that it ran."""
    wall_s: float


class Site:
    """A workspace that serves."""

    def __init__(self, world: World, client: httpx.AsyncClient, desk: Desk, supervisor: Supervisor) -> None:
        self.world, self.store = world, Store(world.folder / ".fmops")
        self.now_s = BEGINNING_S
        self.served: list[Served] = []
        self.looks: list[Look] = []
        self._client, self._desk, self._supervisor = client, desk, supervisor
        self._gated: set[str] = set()
        self._stages = {record.key for record in self.store.records()}
        project = Project.open(world.spec)
        self._runner = LoopRunner(project, LineView(io.StringIO()), clock=lambda: self.now_s)
        self.controller: Controller = self._runner.controller

    @property
    def champion(self) -> str:
        """The release that should serve."""
        return self.store.aliases()["champion"]

    async def serve(self, users: Users, mix: Mix, requests: int) -> None:
        """Let people ask, a few at a time, and look when it is time."""
        for _ in range(requests // AT_ONCE):
            await asyncio.gather(*(self._one(users, mix) for _ in range(AT_ONCE)))
            if len(self.served) % LOOK_EVERY == 0:
                await self.look()

    async def _one(self, users: Users, mix: Mix) -> None:
        self.now_s += REQUEST_EVERY_S
        question = users.ask(mix, at_s=self.now_s)
        answer = await self.ask(question)
        if answer is None:
            return
        identity, text = answer
        said = users.judge(question, text)
        if said:
            await self.tell(identity, question.user, thumb=said.thumb, correction=said.correction)

    async def ask(self, question: Question) -> tuple[str, str] | None:
        """One request through the gateway; the answer's id and text, or None when there was none."""
        body = {
            "model": NAME, "messages": [{"role": "user", "content": question.prompt}], "user": question.user,
            "max_tokens": ANSWER_TOKENS, "temperature": 0,
        }  # fmt: skip
        reply = await self._client.post("/v1/chat/completions", json=body)
        text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else ""
        self.served.append(Served(question, reply.status_code, text, reply.headers.get("x-fmops-release")))
        return (reply.json()["id"], text) if reply.status_code == 200 else None

    async def tell(self, answer: str, user: str, *, thumb: str | None, correction: str | None = None) -> None:
        """Feedback through the gateway."""
        body = {"id": answer, "user": user, "thumb": thumb, "correction": correction}
        reply = await self._client.post("/v1/feedback", json={k: v for k, v in body.items() if v is not None})
        reply.raise_for_status()

    async def look(self) -> Look:
        """One look of the loop, whole: monitor, rollout, rounds; then wait for the engines that it asked for."""
        while self._desk.mirrors:
            await asyncio.gather(*self._desk.mirrors)
        wall, cpu = time.monotonic(), time.process_time()
        # In a thread of its own, as the loop is a process of its own: Dagster wants an event loop for itself.
        said = tuple(await asyncio.to_thread(self._runner.look))
        cpu_s = time.process_time() - cpu + sum(record.cost.get("cpu_s", 0.0) for record in self._new_stages())
        look = Look(
            requests=len(self.served), at_s=self.now_s, said=said,
            report=self._report(),
            rollout=self.controller.read(), rounds=self._runner.rounds.all(), champion=self.champion,
            cpu_s=cpu_s, wall_s=time.monotonic() - wall,
        )  # fmt: skip
        self.looks.append(look)
        await self.engines_ready()
        return look

    def roll_out(self, release: str) -> None:
        """Begin a rollout, as a person does with `fmops rollout start`."""
        self.controller.start(release, Project.open(self.world.spec).spec.rollout)

    async def engines_ready(self) -> None:
        """Wait until each release that should answer has an engine.

        Raises:
            FmopsError: one does not come up.
        """
        deadline = time.monotonic() + START_S
        while True:
            routes = self._desk.routes.current()
            targets = [target for target in (routes.champion, routes.challenger) if target]
            if targets and all(target.url for target in targets):
                return
            if time.monotonic() > deadline:
                raise FmopsError(f"an engine did not come up in {START_S:g} s. Its log is in {self.store.root}/up.")
            await asyncio.sleep(0.05)

    def kill_champion(self) -> None:
        """End the champion's engine as the kernel does when memory runs out."""
        state = read_state(self.store.root / FOLDER)
        assert state is not None
        pid = next(process.pid for process in state.processes if process.release == self.champion)
        os.kill(pid, signal.SIGKILL)

    def feedback_counts(self) -> Counts:
        """What the screen makes of everything said so far."""
        counts = self._runner.gathered().counts
        assert counts is not None
        return counts

    def gates(self) -> list[GateDecision]:
        """What the gate said of the rounds, the oldest first."""
        said = [self.store.load(record) for record in self.store.records() if record.key in self._gated]
        return [decision for decision in said if isinstance(decision, GateDecision)]

    def _report(self) -> DriftReport:
        path = self.store.root / "drift"
        return DriftReport.model_validate({**json.loads((path / "report.json").read_bytes()), "path": path})

    def _new_stages(self) -> list[Record]:
        made = [record for record in self.store.records() if record.key not in self._stages]
        self._stages |= {record.key for record in made}
        self._gated |= {record.key for record in made if record.kind == GateDecision.kind}
        return made


@asynccontextmanager
async def open_site(world: World) -> AsyncIterator[Site]:
    """Engines supervised as `fmops up` does it, a gateway in this process; everything ends with the block."""
    root = world.folder / ".fmops"
    champion = Store(root).aliases()["champion"]
    routes = RoutesFile(root / ROUTES)
    routes.compare_and_swap(Routes(champion=Target(release=champion)), expected=routes.current().version)
    _, key = KeyRing(root / KEYS).add("bench")
    supervisor = Supervisor(root / FOLDER, routes, engine=lambda *who: _engine(world.spec, *who), services={})
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    clock = _Clock()
    desk = Desk(
        root, secret=workspace_secret(root), limits=Limits(tokens_per_minute=10**8, context_tokens=128),
        wall_clock=clock,
    )  # fmt: skip
    transport = httpx.ASGITransport(app=build_gateway(desk, name=NAME))
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
            site = clock.site = Site(world, client, desk, supervisor)
            await site.engines_ready()
            yield site
    finally:
        await desk.drain(grace_s=0)
        supervisor.stop()
        thread.join()


class _Clock:
    """The site's time, for a gateway that is built before it."""

    site: Site | None = None

    def __call__(self) -> float:
        return self.site.now_s if self.site else BEGINNING_S


def _engine(spec: Path, release: str, port: int) -> list[str]:
    return [
        sys.executable, "-m", "fmops", "serve", "--release", release, "--host", "127.0.0.1", "--port", str(port),
        "--for-gateway", "--spec", str(spec), "--workspace", str(spec.parent / ".fmops"),
    ]  # fmt: skip
