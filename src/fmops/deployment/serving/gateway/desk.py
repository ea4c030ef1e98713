"""What all requests at the gateway share: keys, budgets, routes, engines, and how many are under way.

Enters: settings and a workspace. Leaves: a place for each request, and traces on disk when it has ended.
Refuses: more requests than may be under way (503), more than one tenant may have (429), and new ones while draining.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fmops.deployment.monitoring.signals import measure
from fmops.deployment.serving.bodies import ChatBody, CompletionBody, RequestError
from fmops.deployment.serving.gateway.budget import Budgets, Loan
from fmops.deployment.serving.gateway.keys import KEYS, KeyRing
from fmops.deployment.serving.gateway.metrics import GatewayMetrics
from fmops.deployment.serving.gateway.tracing import Exchange, Operation
from fmops.deployment.serving.gateway.upstream import Upstream
from fmops.deployment.serving.routes import ROUTES, RoutesFile
from fmops.traces import FEEDBACK, TRACES, DayLog, Feedback, Trace

if TYPE_CHECKING:
    from fmops.adapters.otel import Spans

REMEMBERED_ANSWERS = 10_000
"""Whose answer it was is looked up in memory for so many; older ones are read from the traces."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one gateway lets through."""

    tokens_per_minute: int = 60_000
    """Of a tenant whose keys state no budget."""
    context_tokens: int = 2048
    in_flight: int = 256
    in_flight_of_tenant: int = 128
    wait_s: float = 10.0
    """Longest time from arrival to a place at an engine."""
    request_s: float = 300.0
    """Longest time from arrival to the end of an answer."""
    shadows: int = 8
    """Mirrored requests under way; more are left out, so that mirroring never piles up."""


@dataclass(kw_only=True)
class Job:
    """One admitted request."""

    operation: Operation
    body: ChatBody | CompletionBody
    tenant: str
    user: str | None
    arrived: float
    """Of the monotonic clock."""
    prompt_guess: int
    """Tokens, before the engine has counted."""
    loan: Loan
    headers: Mapping[str, str]
    """Of the request; the trace context is read from them."""
    used: int = 0
    """Tokens of all engines' answers that the client asked for."""


@dataclass(eq=False)
class Place:
    """A request's place among those under way."""

    desk: Desk = field(repr=False)
    tenant: str
    _open: bool = True

    def close(self) -> None:
        """Give it back, once."""
        if self._open:
            self._open = False
            self.desk.leave(self.tenant)


class Desk:
    """The gateway's state. Lives on one event loop."""

    version = "gateway"

    def __init__(
        self, workspace: Path, *, secret: str, limits: Limits | None = None, per_user: bool = False,
        wall_clock: Callable[[], float] = time.time, spans: Spans | None = None,
    ) -> None:  # fmt: skip
        self.spans = spans
        self.limits, self.secret, self.per_user = limits or Limits(), secret, per_user
        self.clock, self.wall_clock = time.monotonic, wall_clock
        self.keys = KeyRing(workspace / KEYS)
        self.budgets = Budgets()
        self.routes = RoutesFile(workspace / ROUTES)
        self.engines = Upstream(key=secret)
        self.traces: DayLog[Trace] = DayLog(workspace / TRACES, Trace)
        self.feedback: DayLog[Feedback] = DayLog(workspace / FEEDBACK, Feedback)
        self.draining = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the grace is over: what still runs is cut."""
        self.mirrors: set[asyncio.Task[None]] = set()
        self._places: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()
        self._owners: OrderedDict[str, str] = OrderedDict()
        self.metrics = GatewayMetrics(
            in_flight=lambda: self.in_flight, waiting=lambda: self.engines.waiting,
            routes_version=lambda: self.routes.current().version,
        )  # fmt: skip

    @property
    def in_flight(self) -> int:
        """Requests under way, mirrors not counted."""
        return self._places.total()

    def status(self) -> str:
        """`ok`, `draining`, or why nothing can be answered."""
        if self.draining:
            return "draining"
        champion = self.routes.current().champion
        if champion is None or champion.url is None:
            return "no champion"
        return "engine failing" if self.engines.circuit(champion).is_open else "ok"

    def admit(self, tenant: str) -> Place:
        """Let a request in.

        Raises:
            RequestError: 503 while draining or full, 429 when this tenant has enough under way.
        """
        if self.draining:
            raise RequestError("this server is shutting down", code="draining", status=503, retry_after_s=1)
        if self.in_flight >= self.limits.in_flight:
            raise RequestError(
                f"{self.in_flight} requests are under way, as many as may be; try again later",
                code="overloaded", status=503, retry_after_s=1,
            )  # fmt: skip
        if self._places[tenant] >= self.limits.in_flight_of_tenant:
            raise RequestError(
                f"{self._places[tenant]} of your requests are under way, as many as may be; wait for one to end",
                code="too_many_requests", status=429, retry_after_s=1,
            )  # fmt: skip
        self._places[tenant] += 1
        self._empty.clear()
        return Place(self, tenant)

    def leave(self, tenant: str) -> None:
        """A request has ended."""
        self._places[tenant] -= 1
        if not self._places[tenant]:
            del self._places[tenant]
        if not self._places:
            self._empty.set()

    def remember(self, exchange: Exchange) -> Trace:
        """Write the trace of an exchange and count it. A disk that fails costs the trace, not the answer."""
        trace = exchange.trace(now=self.clock(), measure=measure)
        self.metrics.answered(trace)
        if exchange.span:
            exchange.span.end(trace)
        if trace.shadow_of is None:
            self._owners[trace.id] = trace.tenant
            if len(self._owners) > REMEMBERED_ANSWERS:
                self._owners.popitem(last=False)
        try:
            self.traces.append(trace, at_s=trace.started_s)
        except OSError as error:
            self.metrics.lost.inc()
            log.error("a trace was lost: %s", error)
        return trace

    async def owner(self, answer: str) -> str | None:
        """The tenant who got an answer."""
        if answer in self._owners:
            return self._owners[answer]
        trace = await asyncio.to_thread(self.traces.find, answer)
        return trace.tenant if trace and trace.shadow_of is None else None

    async def drain(self, *, grace_s: float) -> None:
        """Take nothing new; wait for what runs, and cut it with an error when the grace is over."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), grace_s)
        except TimeoutError:
            self.ended.set_result(None)
            await self._empty.wait()
        for mirror in self.mirrors:
            mirror.cancel()
        await asyncio.gather(*self.mirrors, return_exceptions=True)
        await self.engines.close()
        if self.spans:
            await asyncio.to_thread(self.spans.close)
        self.traces.close()
        self.feedback.close()
