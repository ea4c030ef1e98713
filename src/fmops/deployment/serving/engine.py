"""What a serving engine is: token ids in, a stream of tokens out.

Enters: a model folder of a release. Leaves: an `Engine` that several requests use at once.
Refuses: an engine name that no adapter carries, and requests longer than the context.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

from fmops.errors import EXIT_FAILED, FmopsError, unknown

ENGINES = {"transformers": "fmops.adapters.transformers_engine:TransformersEngine"}
DEFAULT_ENGINE = "transformers"

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""


class EngineError(FmopsError):
    """The engine could not go on with a request, or at all."""

    exit_code = EXIT_FAILED


class PromptError(FmopsError):
    """The prompt cannot be turned into tokens: the caller's mistake, answered with 400."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What to generate. Zero temperature takes the likeliest token each time."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0


@dataclass(frozen=True, kw_only=True)
class Token:
    """One generated token.

    `text` is what may be shown now: it lags behind the ids while a character is incomplete or a stop string may be
    starting. Log-probabilities are natural logarithms under the model itself, before temperature and top-p.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    finish: Literal["stop", "length"] | None = None


Emit = Callable[[Token | EngineError], None]
"""Receives each token, from the engine's own thread; an error is the last call, as is a token with `finish`."""


class Engine(Protocol):
    """A loaded model. Methods may be called from any thread."""

    name: str
    context_tokens: int
    """Most tokens of prompt and answer together."""
    slots: int
    """Requests that advance at once; others wait in order."""
    end_tokens: frozenset[int]
    """Token ids that end an answer."""
    has_template: bool

    def __init__(self, folder: Path, *, max_tokens: int, threads: int) -> None: ...

    def render(self, messages: Sequence[Message]) -> str:
        """The chat template's text, ready for the assistant's turn. Raises PromptError."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue; control tokens inside messages stay plain text. Raises PromptError."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, as a completion prompt."""

    def token_text(self, token: int) -> tuple[str, bytes]:
        """One token as text (a piece of a character shows as U+FFFD) and as its bytes."""

    def submit(self, generation: Generation, emit: Emit) -> Callable[[], None]:
        """Start a request; returns what cancels it. After a cancel nothing more needs to be emitted.

        Raises:
            PromptError: prompt and answer together exceed `context_tokens`, or an id is no token.
        """

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped for good, or None while it works."""

    def close(self) -> None:
        """End the engine's thread and fail what is still running."""


def engine_name(asked: str) -> str:
    """The engine behind `auto`, or the one that was asked for."""
    name = DEFAULT_ENGINE if asked == "auto" else asked
    if name not in ENGINES:
        raise unknown("engine", name, [*ENGINES, "auto"])
    return name


def load_engine(name: str, folder: Path, *, max_tokens: int, threads: int) -> Engine:
    """Load a model folder into the engine of that name.

    Raises:
        FmopsError: no such engine, or the model cannot be served by it.
    """
    module, _, attribute = ENGINES[engine_name(name)].partition(":")
    kind: Callable[..., Engine] = getattr(import_module(module), attribute)
    return kind(folder, max_tokens=max_tokens, threads=threads)


def generate_all(engine: Engine, generations: Sequence[Generation]) -> list[list[Token]]:
    """Run requests side by side to their ends; one list of tokens each, in the order given.

    Raises:
        EngineError: a request failed.
    """
    inboxes: list[queue.SimpleQueue[Token | EngineError]] = []
    for generation in generations:
        inbox: queue.SimpleQueue[Token | EngineError] = queue.SimpleQueue()
        engine.submit(generation, inbox.put)
        inboxes.append(inbox)
    return [_drain(inbox) for inbox in inboxes]


def _drain(inbox: queue.SimpleQueue[Token | EngineError]) -> list[Token]:
    tokens: list[Token] = []
    while not (tokens and tokens[-1].finish):
        event = inbox.get()
        if isinstance(event, EngineError):
            raise event
        tokens.append(event)
    return tokens
