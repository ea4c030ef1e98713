"""The process that looks: every few seconds at the rollout, every minute at the answers.

Enters: a workspace and the spec's keys. Leaves: decisions, reports; `/health` and `/metrics` on a port of this machine.
Refuses: to be healthy without looking; whoever supervises it starts it anew.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fmops.deployment.monitoring.monitor import Watcher, describe
from fmops.deployment.rollout.controller import Controller
from fmops.errors import FmopsError
from fmops.production import Monitor
from fmops.store import Store

ROLLOUT_S, ANSWERS_S = 5.0, 60.0
"""Time between two looks. Looking often changes no decision, only when it is made."""
STALE_S = 180.0
"""Without a look for so long the process is not healthy."""

Say = Callable[[str], None]


def run_monitor(store: Store, policy: Monitor, *, once: bool, port: int | None, say: Say) -> None:
    """Look once and say everything; or until SIGTERM or SIGINT, and say what changes.

    Raises:
        FmopsError: with `once`, when there is nothing to look at; or the port is taken.
    """
    if once:
        say(describe(Watcher(store, policy).look()))
        return
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    looks = Looks(store, policy, say=say)
    with served(store, looks.seconds_since, port) if port is not None else nullcontext():
        while not ended.is_set():
            looks.look()
            ended.wait(ROLLOUT_S)


class Looks:
    """What one turn of the loop does, and when it last went well."""

    def __init__(self, store: Store, policy: Monitor, *, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._controller, self._watcher = Controller(store), Watcher(store, policy)
        self._say, self._clock, self._said, self._alarms = say, clock, "", ""
        self._looked = clock()
        self._answers_due = self._looked

    def seconds_since(self) -> float:
        """Seconds since both looks last went well."""
        return self._clock() - self._looked

    def look(self) -> None:
        """Look at the rollout, and when it is time at the answers. A mistake is said, and tried again next time."""
        try:
            told = []
            saved = self._controller.look()
            if saved and not saved.state.settled:
                told.append(f"{saved.state.id}: {saved.state.phase}: {saved.state.reason}")
            elif saved:
                told.append(f"{saved.state.id}: {saved.state.phase}")
            if self._clock() >= self._answers_due:
                report = self._watcher.look()
                self._answers_due = self._clock() + ANSWERS_S
                self._alarms = describe(report) if report.alarms or report.diagnosis else f"{report.release}: no alarm"
            self._tell("\n".join([*told, self._alarms]))
            self._looked = self._clock()
        except FmopsError as error:
            self._tell(f"error: {error}")

    def _tell(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)


@contextmanager
def served(store: Store, seconds_since: Callable[[], float], port: int) -> Iterator[str]:
    """Serve `/health` and `/metrics` to this machine; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                status, code = ("failed", 503) if seconds_since() > STALE_S else ("ok", 200)
                self._answer(code, json.dumps({"status": status}), "application/json")
            elif self.path == "/metrics":
                texts = [path.read_text() for path in sorted((store.root / "metrics").glob("*.prom"))]
                self._answer(200, "".join(texts), "text/plain; version=0.0.4; charset=utf-8")
            else:
                self._answer(404, "known: /health, /metrics\n", "text/plain; charset=utf-8")

        def _answer(self, status: int, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not worth a line."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise FmopsError(f"port {port} of this machine cannot be taken: {error.strerror}. Name another.") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
