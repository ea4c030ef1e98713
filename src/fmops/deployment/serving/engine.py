"""What a serving engine is: token ids in, a stream of tokens out.

Enters: a model folder of a release. Leaves: an `Engine` that several requests use at once.
Refuses: an engine name that no adapter carries, and requests longer than the context.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from fmops.errors import EXIT_FAILED, FmopsError, unknown
from fmops.pictures import reads_pictures

ENGINES = {
    "transformers": "fmops.adapters.transformers_engine:TransformersEngine",
    "openvino": "fmops.adapters.openvino_engine:OpenVinoEngine",
    "vllm": "fmops.adapters.vllm_engine:VllmEngine",
    "llama.cpp": "fmops.adapters.llama_cpp_engine:LlamaCppEngine",
}
READERS_PACE = 10.0
"""Tokens a second that one client should get at least: twice as fast as people read."""
BANDWIDTH = 1e10
"""Bytes a second that a small machine's memory delivers; every weight is read once a token."""
EIGHT_BIT_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""What can be written as GGUF here."""
ALTERNATIVES = 20
"""Most alternatives whose log-probabilities a request may ask for, in OpenAI's API."""

Message = dict[str, Any]
"""`role` (system, user or assistant), `content`, and `pictures`: data URLs of what is shown before it."""


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
    scores_prompt: bool = False
    """Also state how likely the prompt's own tokens are."""
    pictures: tuple[str, ...] = ()
    """Data URLs, in the order of their places in the prompt."""
    cache_salt: str = ""
    """Requests with another salt share no cached prefix, where an engine caches over requests."""


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
    prompt: tuple[Token, ...] = ()
    """With the first token, where it was asked for: the prompt's tokens. Nothing predicts the very first one (NaN)."""


Emit = Callable[[Token | EngineError], None]
"""Receives each token, from the engine's own thread; an error is the last call, as is a token with `finish`."""


class Tokenizer(Protocol):
    """The release's own tokenizer and chat template."""

    context_tokens: int
    """Most tokens of prompt and answer together."""
    end_tokens: frozenset[int]
    """Token ids that end an answer."""
    has_template: bool

    def render(self, messages: Sequence[Message]) -> str:
        """The chat template's text, ready for the assistant's turn. Raises PromptError."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue; control tokens inside messages stay plain text. Raises PromptError."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, as a completion prompt."""

    def token_text(self, token: int) -> tuple[str, bytes]:
        """One token as text (a piece of a character shows as U+FFFD) and as its bytes."""


class Engine(Protocol):
    """A loaded model. Methods may be called from any thread."""

    name: str
    slots: int
    """Requests that advance at once; others wait in order."""
    alternatives: int
    """Most alternatives whose log-probabilities it can state beside the chosen token's."""
    tolerance: float
    """Nats by which its log-probabilities may differ from the trainer's, float32: parity is certified within it."""
    batch_tolerance: float
    """Nats by which the company of other requests may move them; 0: not by a bit."""
    tokenizer: Tokenizer

    def __init__(self, folder: Path, *, max_tokens: int, threads: int) -> None: ...

    def submit(self, generation: Generation, emit: Emit) -> Callable[[], None]:
        """Start a request; returns what cancels it. After a cancel nothing more needs to be emitted.

        Raises:
            PromptError: prompt and answer together exceed the context, an id is no token, or too many alternatives.
        """

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped for good, or None while it works."""

    def close(self) -> None:
        """End the engine's thread and fail what is still running."""


def choose_engine(asked: str, folder: Path, *, parameters: int) -> str:
    """The engine for a model folder, where `asked` is `auto`; else what was asked for.

    On a GPU vLLM where it is installed. On a CPU the engine that needs least, Transformers in float32: nothing to
    convert, and it computes what was evaluated. Its limit is memory: 4 bytes a weight and token. A model for which that
    limit is below a reader's pace goes to OpenVINO, which reads a quarter of it, where that is installed and knows the
    architecture. Pictures are shown by Transformers alone.

    Raises:
        FmopsError: no engine of that name.
    """
    if asked != "auto":
        return engine_name(asked)
    if reads_pictures(folder):
        return "transformers"
    if Path("/dev/nvidiactl").exists() and find_spec("vllm"):
        return "vllm"
    architecture = json.loads((folder / "config.json").read_bytes()).get("architectures", ["?"])[0]
    slow = BANDWIDTH / (4 * parameters) < READERS_PACE
    known = architecture in EIGHT_BIT_ARCHITECTURES and find_spec("openvino_genai") is not None
    return "openvino" if slow and known else "transformers"


def engine_name(name: str) -> str:
    """The name itself, when there is such an engine."""
    if name not in ENGINES:
        raise unknown("engine", name, [*ENGINES, "auto"])
    return name


def load_engine(name: str, folder: Path, *, max_tokens: int, threads: int) -> Engine:
    """Load a model folder into the engine of that name.

    Raises:
        FmopsError: no such engine, or the model cannot be served by it.
    """
    module, _, attribute = ENGINES[engine_name(name)].partition(":")
    try:
        kind: Callable[..., Engine] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise FmopsError(
            f"the engine {name!r} needs the package {error.name!r}, which is not installed. Install it, or set "
            "serve.engine to another engine."
        ) from error
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
