"""Engines that compute for all their requests in steps: the loop around them, and the rules they share.

Enters: something that starts, advances and stops requests (`Steps`). Leaves: an `Engine`.
Refuses: to let an outside engine decide where an answer ends; end tokens and stop strings are judged here.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from fmops.adapters.serving_tokenizer import ServingTokenizer, finish_of
from fmops.deployment.serving.engine import Emit, EngineError, Generation, Token
from fmops.deployment.serving.text import TextStream


@dataclass(frozen=True)
class Made:
    """One token that a step has made for one request; log-probabilities as in `Token`."""

    number: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Steps(Protocol):
    """An outside engine, used from one thread. It must not end an answer before `max_tokens` tokens."""

    def start(self, number: int, generation: Generation) -> None:
        """Take a request under this number."""

    def step(self) -> Iterable[Made]:
        """Advance every request that was started; may wait a moment for the next token. Raises to end the engine."""

    def stop(self, number: int) -> None:
        """Forget a request, finished or not."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(eq=False)
class _Stream:
    """One request under way."""

    number: int
    generation: Generation
    emit: Emit
    text: TextStream
    produced: int = 0
    cancelled: bool = False


class SteppedEngine:
    """See `fmops.deployment.serving.engine.Engine`; subclasses state what they can, and build their `Steps`."""

    name: str
    slots: int
    alternatives: int
    tolerance: float
    batch_tolerance: float

    def __init__(self, tokenizer: ServingTokenizer, steps: Steps) -> None:
        self.tokenizer, self._steps = tokenizer, steps
        self._arrived: queue.SimpleQueue[_Stream | None] = queue.SimpleQueue()
        self._running: dict[int, _Stream] = {}
        self._numbers = 0
        self._closing = False
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._loop, name="fmops-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped for good, or None."""
        return self._failure

    def submit(self, generation: Generation, emit: Emit) -> Callable[[], None]:
        """Start a request; returns what cancels it."""
        self.tokenizer.check(generation, alternatives=self.alternatives)
        with self._lock:
            if self._failure or self._closing:
                raise EngineError(self._failure or "the engine is closed")
            self._numbers += 1
            stream = _Stream(self._numbers, generation, emit, TextStream(self.tokenizer.decode, generation.stop))
            self._arrived.put(stream)

        def cancel() -> None:
            stream.cancelled = True

        return cancel

    def close(self) -> None:
        """End the thread, and fail what is still running."""
        with self._lock:
            self._closing = True
            self._arrived.put(None)
        self._thread.join()

    def _loop(self) -> None:
        """The engine's thread: take what has arrived, advance, tell."""
        try:
            while self._admit():
                for made in self._steps.step():
                    if stream := self._running.get(made.number):
                        self._produce(stream, made)
        except Exception as error:
            self._failure = f"the engine stopped: {error}"
            raise
        finally:
            with self._lock:
                self._failure = self._failure or "the engine is closed"
                left = list(self._running.values())
                while not self._arrived.empty():
                    left += [stream for stream in (self._arrived.get(),) if stream]
            for stream in left:
                if not stream.cancelled:
                    stream.emit(EngineError(self._failure))
            self._steps.close()

    def _admit(self) -> bool:
        """Hand over what has arrived; wait while there is nothing to do. False ends the loop."""
        while not self._closing:
            for stream in [one for one in self._running.values() if one.cancelled]:
                self._drop(stream)
            while not self._arrived.empty() or not self._running:
                arrived = self._arrived.get()
                if arrived is None:
                    return False
                if not arrived.cancelled:
                    self._steps.start(arrived.number, arrived.generation)
                    self._running[arrived.number] = arrived
            return True
        return False

    def _produce(self, stream: _Stream, made: Made) -> None:
        """Emit a token; end the answer where it ends."""
        if not math.isfinite(made.logprob):
            stream.emit(EngineError("the model computed values that are not finite; the answer ends here"))
            self._drop(stream)
            return
        stream.produced += 1
        ended = made.token in self.tokenizer.end_tokens
        text = "" if ended else stream.text.push(made.token)
        stopped = ended or stream.text.stopped
        last = stopped or stream.produced == stream.generation.max_tokens
        if last:
            text += stream.text.finish()
            self._drop(stream)
        finish = finish_of(stopped=stopped) if last else None
        if not stream.cancelled:
            stream.emit(Token(id=made.token, text=text, logprob=made.logprob, top=made.top, finish=finish))

    def _drop(self, stream: _Stream) -> None:
        del self._running[stream.number]
        self._steps.stop(stream.number)
