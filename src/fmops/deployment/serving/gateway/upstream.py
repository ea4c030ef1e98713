"""Engines over HTTP: one request to one of them, and whether it is worth asking it now.

Enters: a target and a request body. Leaves: the engine's response, as it arrives.
Refuses: an engine that keeps failing (its circuit is open), and one that is not the release it should be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import aiohttp

from fmops.deployment.serving.routes import Target

CONNECT_S = 2.0
QUIET_S = 120.0
"""Longest silence of an engine: before its first byte, and between two."""
FAILURES = 3
"""In a row, before a circuit opens."""
COOL_S = (1.0, 30.0)
"""First and longest time that a circuit stays open; it doubles with every failed trial."""
KEEP_S = 60.0
"""Idle connections are closed by us before the engine does it (75 s): no request meets a closing door."""


class EngineDown(Exception):
    """An engine gave no answer. `sent` says whether it may have begun one."""

    def __init__(self, reason: str, *, sent: bool, status: int = 502, retry_after_s: int | None = None) -> None:
        super().__init__(reason)
        self.sent, self.status, self.retry_after_s = sent, status, retry_after_s


@dataclass
class Circuit:
    """Closed while an engine answers; open for a while after `FAILURES` in a row; then one trial decides."""

    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    cool_s: float = COOL_S[0]
    open_until: float = 0.0
    trying: bool = False

    @property
    def is_open(self) -> bool:
        """True while no request is let through."""
        return self.failures >= FAILURES and (self.trying or self.clock() < self.open_until)

    def enter(self) -> None:
        """Let a request through.

        Raises:
            EngineDown: the circuit is open.
        """
        if self.is_open:
            wait = max(1, round(self.open_until - self.clock()))
            raise EngineDown(
                f"the engine failed {self.failures} times in a row and is left alone for a while",
                sent=False, status=503, retry_after_s=wait,
            )  # fmt: skip
        self.trying = self.failures >= FAILURES

    def answered(self) -> None:
        """The engine speaks: others may try it, too; one more failure before the end of this closes the door again."""
        self.failures, self.trying = min(self.failures, FAILURES - 1), False

    def succeeded(self) -> None:
        """The engine answered to the end."""
        self.failures, self.cool_s, self.trying = 0, COOL_S[0], False

    def failed(self) -> None:
        """It did not."""
        self.failures += 1
        self.trying = False
        # Requests that were under way when it opened add nothing: they failed of the same cause.
        if self.failures >= FAILURES and self.clock() >= self.open_until:
            self.open_until = self.clock() + self.cool_s
            self.cool_s = min(2 * self.cool_s, COOL_S[1])

    def abandoned(self) -> None:
        """The client left first: nothing was learnt."""
        self.trying = False


@dataclass
class Reply:
    """An engine's response under way."""

    status: int
    headers: dict[str, str]
    is_stream: bool
    _response: aiohttp.ClientResponse = field(repr=False)
    _circuit: Circuit = field(repr=False)

    async def body(self) -> bytes:
        """All of it.

        Raises:
            EngineDown: the engine broke off.
        """
        try:
            body = await self._response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._circuit.failed()
            raise EngineDown(_reason(error), sent=True) from error
        finally:
            self.close()
        if self.status < 500:
            self._circuit.succeeded()
        return body

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events as they come, several at once where they arrive so; each ends with an empty line.

        Raises:
            EngineDown: the engine broke off.
        """
        held = b""
        try:
            async for piece in self._response.content.iter_any():
                held += piece
                end = held.rfind(b"\n\n") + 2
                if end > 1:
                    yield held[:end]
                    held = held[end:]
        except (aiohttp.ClientError, TimeoutError) as error:
            self._circuit.failed()
            raise EngineDown(_reason(error), sent=True) from error
        else:
            self._circuit.succeeded()
        finally:
            self.close()

    def close(self) -> None:
        """Hang up, unless the response is complete; the engine then stops its work."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Upstream:
    """Connections to every engine. Lives on one event loop."""

    def __init__(self, *, key: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=QUIET_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)
        self._clock = clock
        self._circuits: dict[str, Circuit] = {}

    def circuit(self, target: Target) -> Circuit:
        """The circuit of a target's engine."""
        return self._circuits.setdefault(f"{target.release} {target.url}", Circuit(self._clock))

    async def ask(self, target: Target, path: str, body: bytes, *, headers: Mapping[str, str]) -> Reply:
        """Send a request; returns when the engine's status is known.

        Raises:
            EngineDown: no answer, or one from another release than the target's.
        """
        if target.url is None:
            raise EngineDown(f"{target.release} has no engine yet", sent=False, status=503, retry_after_s=1)
        circuit = self.circuit(target)
        circuit.enter()
        headers = {**headers, "Content-Type": "application/json"}
        try:
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
        is_stream = response.content_type == "text/event-stream"
        return Reply(response.status, dict(response.headers), is_stream, response, circuit)

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
