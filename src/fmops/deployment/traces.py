"""What production remembers of one request: the trace, and the folder of traces.

Enters: redacted traces from the gateway. Leaves: JSON Lines by day, for monitoring, rollout, feedback, `fmops trace`.
Refuses: a trace with unknown fields; text that was not redacted never gets here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fmops.artifacts import Frozen

Arm = Literal["champion", "canary", "shadow"]


class Trace(Frozen):
    """One request and its answer, as production saw it. Texts are redacted before they get here."""

    id: str = Field(description="The response's id, as the client saw it.")
    started_s: float = Field(description="Unix time at which the request arrived.")
    tenant: str = Field(description="The key's name, never the key.")
    user: str | None = Field(None, description="Digest of the client's `user` field: one identity in the feedback.")
    arm: Arm
    release: str = Field(description="The release artifact that answered.")
    shadow_of: str | None = Field(None, description="Of a mirrored request: the id of the one the client saw.")
    operation: Literal["chat", "text_completion"]
    status: int = Field(description="HTTP status; 499 when the client left.")
    finish_reason: str | None = Field(description="stop, length, cancelled, error.")
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = Field(None, description="From arrival; None when none came.")
    duration_s: float
    prompt: str = Field(description="The last user message, redacted, cut to 4,000 characters.")
    response: str = Field(description="The answer, redacted, cut to 4,000 characters.")
    mean_log_probability: float | None = Field(None, description="Nats a token, where the engine says it.")
    signals: dict[str, float] = Field(default={}, description="0/1 and real-valued signals of the answer, by name.")
