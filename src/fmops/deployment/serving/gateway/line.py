"""Who goes to an engine now, and who waits before it.

Enters: a request's tenant. Leaves: a place at the engine; tenants in turn, in order of arrival within each.
Refuses: to let a request wait longer than it may, at once where the line is too long for that (429).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from fmops.deployment.serving.gateway.circuit import EngineDown

PER_SLOT = 2
"""Requests at an engine for each that it advances at once: when one ends, the next is already there. The others wait
here, where tenants take turns, and where who leaves or is sent elsewhere has cost the engine nothing."""
PACE_OF = 32
"""Ends of answers over which the pace is measured; a shorter memory would take one stall for the pace."""
LEAST_ENDS = 8
"""Ends of answers before the pace is believed."""


class Line:
    """The line before one engine. Lives on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.slots: int | None = None
        """Requests that the engine advances at once, as it says itself; until then nobody waits."""
        self.inside = 0
        self._clock = clock
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._ends: deque[float] = deque(maxlen=PACE_OF)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return sum(map(len, self._waiting.values()))

    @property
    def has_room(self) -> bool:
        """Whether the engine may get one more."""
        return self.slots is None or self.inside < PER_SLOT * self.slots

    async def enter(self, tenant: str, *, wait_s: float) -> None:
        """Return with a place at the engine; the caller gives it back by `leave`.

        Raises:
            EngineDown: 429, there is none within `wait_s`.
        """
        if self.has_room and not self._waiting:
            self.inside += 1
            return
        if (expected := self._expected_s(tenant)) > wait_s:
            raise _full(max(1, math.ceil(expected - wait_s)))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            async with asyncio.timeout(wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                # It was our turn in the very moment in which we gave up.
                self.leave()
            else:
                self._forget(tenant, turn)
            if isinstance(error, TimeoutError):
                raise _full(max(1, math.ceil(wait_s))) from None
            raise

    def leave(self) -> None:
        """A request at the engine has ended."""
        self.inside -= 1
        if self._waiting:
            self._ends.append(self._clock())
        else:
            # What ends while nobody waits says how often somebody asks, not how fast the engine is.
            self._ends.clear()
        self._move()

    def _move(self) -> None:
        """Let in who may."""
        while self._waiting and self.has_room:
            tenant, turns = self._waiting.popitem(last=False)
            if not (turn := turns.popleft()).done():
                turn.set_result(None)
                self.inside += 1
            if turns:
                self._waiting[tenant] = turns

    def _expected_s(self, tenant: str) -> float:
        """How long the next request of a tenant would wait, as things go now."""
        if len(self._ends) < LEAST_ENDS:
            return 0.0
        pace_s = (self._clock() - self._ends[0]) / len(self._ends)
        own = len(self._waiting.get(tenant, ()))
        return pace_s * min(self.waiting, (own + 1) * len(self._waiting))

    def _forget(self, tenant: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(tenant, deque())
        with contextlib.suppress(ValueError):
            turns.remove(turn)
        if not turns:
            self._waiting.pop(tenant, None)


def _full(retry_after_s: int) -> EngineDown:
    return EngineDown(
        "the engine is full, and so is the line before it; try again later",
        sent=False, status=429, retry_after_s=retry_after_s, code="overloaded",
    )  # fmt: skip
