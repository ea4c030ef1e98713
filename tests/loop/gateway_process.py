"""A gateway on a free port, in a thread of the test's process, over fake engines."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import uvicorn

from fmops.deployment.serving.gateway.app import build_admin, build_gateway
from fmops.deployment.serving.gateway.desk import Desk, Limits
from fmops.deployment.serving.gateway.keys import KeyRing
from fmops.deployment.serving.gateway.process import by_port
from fmops.deployment.serving.routes import Routes, RoutesFile, Target
from fmops.deployment.serving.server import address, bind, configure
from fmops.traces import Trace

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def asking(text: str, **more) -> dict:
    """A chat request."""
    return {**HELLO, "messages": [{"role": "user", "content": text}], **more}


@contextmanager
def gateway(workspace: Path, *engines, limits: Limits | None = None, spans=None, **shares) -> Iterator[SimpleNamespace]:
    """Yields url, admin (metrics), client (with a valid key), desk, loop, routes (file), keys, traces()."""
    keys, routes = KeyRing(workspace / "keys.json"), RoutesFile(workspace / "routes.json")
    targets = [Target(release=one.release, url=one.url) for one in engines]
    if targets:
        named = dict(zip(("champion", "challenger"), targets, strict=False))
        routes.compare_and_swap(Routes(**named, **shares), expected=0)
    _, secret = keys.add("team-a")
    public, admin = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    box = SimpleNamespace(url=address(public), admin=address(admin), routes=routes, keys=keys, secret=secret)
    ready = threading.Event()

    async def main() -> None:
        box.loop = asyncio.get_running_loop()
        box.desk = Desk(workspace, secret="engine-secret", limits=limits, spans=spans)
        app = by_port(build_gateway(box.desk, name="tiny"), admin=build_admin(box.desk), port=public.getsockname()[1])
        box.server = uvicorn.Server(configure(app))
        serving = asyncio.ensure_future(box.server.serve(sockets=[public, admin]))
        box.loop.call_soon(ready.set)
        await serving
        if not box.desk.draining:
            await box.desk.drain(grace_s=0)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(30)
    box.client = httpx.Client(base_url=box.url, headers={"Authorization": f"Bearer {secret}"}, timeout=20)
    box.traces = lambda count: wait_for_traces(box.desk, count)
    try:
        yield box
    finally:
        box.client.close()
        box.server.should_exit = True
        thread.join(30)


def wait_for_traces(desk: Desk, count: int) -> list[Trace]:
    """The traces on disk, as soon as there are `count`: the last is written after its client has read the answer."""
    until(lambda: len(desk.traces.read()[0]) >= count)
    found = desk.traces.read()[0]
    assert len(found) == count
    return found


def until(condition, *, within_s: float = 20) -> None:
    """Wait for what another thread is about to do; fail when it does not."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.005)
