"""Engines over HTTP: one request to one of them, when it is its turn.

Enters: a target and a request body. Leaves: the engine's response, as it arrives.
Refuses: an engine that keeps failing (its circuit is open), one that stays full, and one that is another release.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import aiohttp

from fmops.deployment.serving.gateway.circuit import Circuit, EngineDown
from fmops.deployment.serving.gateway.line import Line
from fmops.deployment.serving.routes import Target
from fmops.deployment.serving.wire import SLOTS

CONNECT_S = 2.0
QUIET_S = 120.0
"""Longest silence of an engine: before its first byte, and between two."""
KEEP_S = 60.0
"""Idle connections are closed by us before the engine does it (75 s): no request meets a closing door."""


@dataclass
class Reply:
    """An engine's response under way."""

    status: int
    headers: dict[str, str]
    is_stream: bool
    _response: aiohttp.ClientResponse = field(repr=False)
    _circuit: Circuit = field(repr=False)
    _line: Line = field(repr=False)
    _open: bool = field(default=True, repr=False)
    _held: bytes = field(default=b"", repr=False)
    """The beginning of an event whose end has not come."""
    _waiting_since: float = field(default=math.inf, repr=False)
    """Of the loop's clock; infinite while nobody waits for the engine: a slow client is no silent engine."""
    _timer: asyncio.TimerHandle | None = field(default=None, repr=False)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, repr=False)

    def __post_init__(self) -> None:
        self._listen()

    async def body(self) -> bytes:
        """All of it.

        Raises:
            EngineDown: the engine broke off.
        """
        pieces = []
        try:
            while piece := await self._read():
                pieces.append(piece)
        finally:
            self.close()
        if self.status < 500:
            self._circuit.succeeded()
        return b"".join(pieces)

    async def events(self) -> bytes:
        """Server-sent events, as soon as one is whole, several where they came together; nothing at the end.

        Each ends with an empty line.

        Raises:
            EngineDown: the engine broke off.
        """
        while piece := await self._read():
            held = self._held + piece if self._held else piece
            end = held.rfind(b"\n\n") + 2
            if end > 1:
                self._held = held[end:]
                return held[:end]
            self._held = held
        self._circuit.succeeded()
        self.close()
        return b""

    async def _read(self) -> bytes:
        """What has come of the body, waited for; nothing at its end."""
        self._waiting_since = self._loop.time()
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._circuit.failed()
            self.close()
            raise EngineDown(_reason(error), sent=True) from error
        finally:
            self._waiting_since = math.inf

    def _listen(self) -> None:
        """End the wait for an engine that has been silent for too long; look again when that may be.

        One timer a response: aiohttp's own is set anew with every piece, a tenth of what a piece costs.
        """
        now = self._loop.time()
        if now - self._waiting_since >= QUIET_S:
            self._response.content.set_exception(TimeoutError())
        else:
            self._timer = self._loop.call_at(min(self._waiting_since, now) + QUIET_S, self._listen)

    def close(self) -> None:
        """Give the place back, once; hang up, unless the response is complete: the engine then stops its work."""
        if not self._open:
            return
        self._open = False
        if self._timer:
            self._timer.cancel()
        self._line.leave()
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Upstream:
    """Connections to every engine. Lives on one event loop."""

    def __init__(self, *, key: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)
        self._clock = clock
        self._engines: dict[str, tuple[Circuit, Line]] = {}

    def circuit(self, target: Target) -> Circuit:
        """The circuit of a target's engine."""
        return self._engine(target)[0]

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn at an engine."""
        return sum(line.waiting for _, line in self._engines.values())

    def _engine(self, target: Target) -> tuple[Circuit, Line]:
        key = f"{target.release} {target.url}"
        if key not in self._engines:
            self._engines[key] = Circuit(self._clock), Line(self._clock)
        return self._engines[key]

    async def ask(
        self, target: Target, path: str, body: bytes, *, headers: Mapping[str, str], tenant: str, wait_s: float
    ) -> Reply:
        """Send a request when it is its turn, which may take `wait_s`; returns when the engine's status is known.

        Raises:
            EngineDown: no answer, or one from another release than the target's.
        """
        line = self._engine(target)[1]
        last = self._clock() + wait_s
        await line.enter(tenant, wait_s=wait_s)
        reply = await self._post(target, path, body, headers=headers)
        if reply.status == 429 and line.slots is not None:
            # It got more than it has places for before it had said how many there are.
            reply.close()
            await line.enter(tenant, wait_s=max(0.0, last - self._clock()))
            reply = await self._post(target, path, body, headers=headers)
        return reply

    async def _post(self, target: Target, path: str, body: bytes, *, headers: Mapping[str, str]) -> Reply:
        """Ask with a place in hand; the reply, or the failure, gives it back."""
        circuit, line = self._engine(target)
        try:
            response = await self._send(target, path, body, headers=headers)
        except BaseException:
            line.leave()
            raise
        if response.headers.get(SLOTS, "").isdigit():
            line.slots = int(response.headers[SLOTS])
        is_stream = response.content_type == "text/event-stream"
        return Reply(response.status, dict(response.headers), is_stream, response, circuit, line)

    async def _send(
        self, target: Target, path: str, body: bytes, *, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        if target.url is None:
            raise EngineDown(f"{target.release} has no engine yet", sent=False, status=503, retry_after_s=1)
        circuit = self.circuit(target)
        circuit.enter()
        headers = {**headers, "Content-Type": "application/json"}
        try:
            async with asyncio.timeout(QUIET_S):
                response = await self._session.post(target.url + path, data=body, headers=headers)
        except (aiohttp.ClientError, TimeoutError) as error:
            circuit.failed()
            sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            raise EngineDown(_reason(error), sent=sent, status=503 if not sent else 502) from error
        except asyncio.CancelledError:
            circuit.abandoned()
            raise
        answered = response.headers.get("x-fmops-release", target.release)
        if answered != target.release:
            response.close()
            circuit.failed()
            raise EngineDown(f"{target.url} answers as {answered}, not as {target.release}", sent=False)
        if response.status >= 500 and response.status != 503:
            circuit.failed()
        else:
            circuit.answered()
        return response

    async def close(self) -> None:
        """End every connection."""
        await self._session.close()


def _reason(error: BaseException) -> str:
    """In words for a client: no address of ours."""
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return "the engine cannot be reached"
    if isinstance(error, TimeoutError):
        return "the engine was silent for too long"
    return "the engine broke off"
