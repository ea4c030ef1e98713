"""From one exchange with an engine to its trace.

Enters: what was asked, and the bytes that came back. Leaves: a redacted `Trace`.
Refuses: nothing; an answer it cannot read is traced as an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from fmops.deployment.serving.bodies import ChatBody, CompletionBody
from fmops.redaction import redact
from fmops.traces import Arm, Trace

if TYPE_CHECKING:
    from fmops.adapters.otel import OpenSpan

KEPT_CHARACTERS = 4_000
MARGIN = 2_000
"""Read beyond what is kept, so that a secret across the edge is seen whole."""

Operation = Literal["chat", "text_completion"]
Measure = Callable[..., dict[str, float]]
"""As `fmops.deployment.monitoring.signals.measure`."""


@dataclass
class Exchange:
    """One request to one engine, as it goes."""

    id: str
    operation: Operation
    tenant: str
    user: str | None
    prompt: str
    arm: Arm
    release: str
    system: str
    """The system prompt; compared with the answer, not kept."""
    started_s: float
    """Unix time."""
    started: float
    """Of the monotonic clock."""
    shadow_of: str | None = None
    retry_of: str | None = None
    status: int = 0
    error: str | None = None
    cancelled: bool = False
    first: float | None = None
    received: list[bytes] = field(default_factory=list)
    is_stream: bool = False
    span: OpenSpan | None = None

    def trace(self, *, now: float, measure: Measure) -> Trace:
        """What is remembered of it; `now` is of the monotonic clock."""
        try:
            answer = read_answer(self.received, is_stream=self.is_stream) if self.status == 200 else Answer()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            answer = Answer()
            self.error = self.error or f"the engine's answer cannot be read: {error!r}"
        # Who was turned away for want of a place got no answer: that is no failure of the release.
        broken = self.error and self.status != 429
        finish = "cancelled" if self.cancelled else "error" if broken else answer.finish_reason
        prompt, (response, found) = kept(self.prompt), _redacted(answer.text)
        signals = {}
        if self.status == 200 and not self.cancelled:
            signals = measure(
                prompt, response, finish_reason=finish, system=self.system, found=found,
                cut=len(answer.text) > KEPT_CHARACTERS,
            )  # fmt: skip
        return Trace(
            id=self.id, started_s=self.started_s, tenant=self.tenant, user=self.user, arm=self.arm,
            release=self.release, shadow_of=self.shadow_of, retry_of=self.retry_of, operation=self.operation,
            status=499 if self.cancelled else self.status, finish_reason=finish, error=self.error,
            prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens,
            first_token_s=None if self.first is None else self.first - self.started, duration_s=now - self.started,
            prompt=prompt, response=response, mean_log_probability=answer.mean_logprob, signals=signals,
        )  # fmt: skip


@dataclass
class Answer:
    """What an engine said, read back from its bytes."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    mean_logprob: float | None = None


def read_answer(received: list[bytes], *, is_stream: bool) -> Answer:
    """The answer in a whole body, or in the events of a stream up to where it ended."""
    if not is_stream:
        return _read([json.loads(b"".join(received) or b"{}")])
    lines = b"".join(received).split(b"\n")
    # Read as one array: half of the time that event by event takes.
    return _read(json.loads(b"[" + b",".join(line[6:] for line in lines if line.startswith(b"data: {")) + b"]"))


def _read(objects: list[dict[str, Any]]) -> Answer:
    answer, pieces, pieces_seen = Answer(), [], 0
    for value in objects:
        for choice in value.get("choices") or ():
            said = choice.get("message") or choice.get("delta") or choice
            pieces.append(said.get("content") or said.get("text") or "")
            pieces_seen += bool(pieces[-1])
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        if usage := value.get("usage"):
            answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            answer.mean_logprob = usage.get("mean_logprob")
    answer.text = "".join(pieces)
    # A stream that was cut never came to its usage: its pieces are the best count there is.
    answer.completion_tokens = answer.completion_tokens or pieces_seen
    return answer


def last_user_text(body: ChatBody | CompletionBody) -> str:
    """What the person asked."""
    if isinstance(body, ChatBody):
        last = next((turn for turn in reversed(body.messages) if turn.role == "user"), None)
        # That something was shown is kept; the picture itself never is.
        return "[picture] " * len(last.pictures) + last.text if last else ""
    return body.prompt if isinstance(body.prompt, str) else ""


def system_text(body: ChatBody | CompletionBody) -> str:
    """The system prompt of a chat."""
    if isinstance(body, ChatBody):
        return "\n".join(turn.text for turn in body.messages if turn.role in ("system", "developer"))
    return ""


def identity(secret: str, tenant: str, user: object) -> str | None:
    """Keyed digest of the client's `user` field: tells people of one tenant apart; nobody can try names on it."""
    if not isinstance(user, str) or not user:
        return None
    text = f"{tenant}\0{user}".encode("utf-8", "replace")
    return blake2b(text, key=secret.encode()[:64], digest_size=8).hexdigest()


def kept(text: str) -> str:
    """Redacted, and cut to what is kept."""
    return _redacted(text)[0]


def _redacted(text: str) -> tuple[str, Mapping[str, int]]:
    clean, found = redact(text[: KEPT_CHARACTERS + MARGIN])
    return clean[:KEPT_CHARACTERS], found
