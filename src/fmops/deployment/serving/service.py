"""Requests between the network and the engine: admission, streams, draining.

Enters: a `Generation`. Leaves: tokens, as they come, to the one client that asked.
Refuses: more requests than may wait (429), and new ones while it drains (503), both with a time to come back.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable

from fmops.deployment.serving.bodies import RequestError
from fmops.deployment.serving.engine import Engine, EngineError, Generation, PromptError, Token
from fmops.deployment.serving.metrics import ServerMetrics

WAITING_PER_SLOT = 4
"""How many requests may wait for each one that advances: a queue longer than that outlasts a client's patience."""
FIRST_GUESS_S = 2.0
"""Duration of a request before one has been measured; for Retry-After."""


class Answer:
    """One admitted request: iterate over its tokens once; `close` in any case."""

    def __init__(self, service: Service, generation: Generation, operation: str) -> None:
        self.prompt_tokens = len(generation.prompt)
        self._service, self._operation = service, operation
        self._inbox: asyncio.Queue[Token | EngineError] = asyncio.Queue()
        self._started = service.clock()
        self._outcome = "cancelled"
        self._closed = False
        loop = asyncio.get_running_loop()
        self._cancel: Callable[[], None] = service.engine.submit(
            generation, lambda event: _post(loop, self._inbox, event)
        )

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Tokens up to and with the last.

        Raises:
            EngineError: the answer cannot be completed.
        """
        metrics, first, count = self._service.metrics, 0.0, 0
        while True:
            event = await self._inbox.get()
            now = self._service.clock()
            if isinstance(event, EngineError):
                self._outcome = "error"
                raise event
            count += 1
            metrics.generated()
            if count == 1:
                first = now
                metrics.first_token.labels(self._operation).observe(now - self._started)
            if event.finish:
                self._outcome = event.finish
                if count > 1:
                    metrics.per_token.labels(self._operation).observe((now - first) / (count - 1))
            yield event
            if event.finish:
                return

    def interrupt(self, reason: str) -> None:
        """End the answer with an error."""
        self._inbox.put_nowait(EngineError(reason))

    def close(self) -> None:
        """Give the place back; stops the engine's work when the answer is not complete."""
        if self._closed:
            return
        self._closed = True
        self._cancel()
        self._service.leave(self, seconds=self._service.clock() - self._started, outcome=self._outcome)

    @property
    def operation(self) -> str:
        """`chat` or `text_completion`, OpenTelemetry's names."""
        return self._operation


class Service:
    """A loaded engine, and who is using it. Lives on one event loop."""

    def __init__(self, engine: Engine, *, version: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine, self.version, self.clock = engine, version, clock
        self.draining = False
        self._answers: set[Answer] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._mean_s = FIRST_GUESS_S
        self.metrics = ServerMetrics(
            version=version,
            running=lambda: min(len(self._answers), engine.slots),
            waiting=lambda: max(0, len(self._answers) - engine.slots),
        )

    @property
    def limit(self) -> int:
        """Most requests under way, waiting ones included."""
        return self.engine.slots * (1 + WAITING_PER_SLOT)

    def status(self) -> str:
        """`ok`, `draining`, or `failed`."""
        if self.engine.failure:
            return "failed"
        return "draining" if self.draining else "ok"

    def refuse_early(self) -> None:
        """Say no before any work is spent on the request.

        Raises:
            RequestError: 503 while draining or failed, 429 when too many wait.
        """
        if self.engine.failure:
            raise RequestError(f"{self.engine.failure}; restart the server", code="engine_failed", status=503)
        if self.draining:
            raise RequestError("this server is shutting down", code="draining", status=503, retry_after_s=1)
        if len(self._answers) >= self.limit:
            rounds = len(self._answers) / self.engine.slots
            raise RequestError(
                f"{len(self._answers)} requests are under way, as many as may be; try again later",
                code="overloaded", status=429, retry_after_s=max(1, math.ceil(self._mean_s * rounds / 2)),
            )  # fmt: skip

    def open(self, generation: Generation, *, operation: str) -> Answer:
        """Admit a request; the caller closes the answer.

        Raises:
            RequestError: not now, or prompt and answer are longer than the context.
        """
        self.refuse_early()
        try:
            answer = Answer(self, generation, operation)
        except PromptError as error:
            raise RequestError(str(error), code="context_length_exceeded") from None
        except EngineError as error:
            raise RequestError(str(error), code="engine_failed", status=503) from None
        self._answers.add(answer)
        self._empty.clear()
        self.metrics.read(answer.prompt_tokens)
        return answer

    def leave(self, answer: Answer, *, seconds: float, outcome: str) -> None:
        """An answer has ended."""
        self._answers.discard(answer)
        if not self._answers:
            self._empty.set()
        self._mean_s += 0.2 * (seconds - self._mean_s)
        self.metrics.duration.labels(answer.operation, outcome).observe(seconds)

    async def drain(self, *, grace_s: float) -> None:
        """Take nothing new; wait for what runs, and end it with an error when the grace is over."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), grace_s)
        except TimeoutError:
            for answer in list(self._answers):
                answer.interrupt(
                    f"the server shut down after a grace of {grace_s:g} s, before this answer was complete"
                )


def _post(
    loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Token | EngineError], event: Token | EngineError
) -> None:
    """From the engine's thread to the event loop; a loop that has ended has no reader left."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(inbox.put_nowait, event)
