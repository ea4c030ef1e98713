"""Answers in the shapes of OpenAI's API.

Enters: tokens of one answer. Leaves: JSON objects: one for a whole answer, or one for each piece of a stream.
Refuses: nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

from fmops.deployment.serving.engine import Engine, Token

Kind = Literal["chat", "text_completion"]


class Reply:
    """Builds the objects of one answer; every one carries the same id and the release that spoke."""

    def __init__(
        self, kind: Kind, *, engine: Engine, model: str, version: str, prompt_tokens: int, top_logprobs: int | None,
        request_id: str,
    ) -> None:  # fmt: skip
        self._kind, self._engine, self._top = kind, engine, top_logprobs
        self._prompt_tokens = prompt_tokens
        self._offset = 0
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._frame = {
            "id": f"{prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": version,
        }

    def whole(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The answer at once."""
        shown = [*tokens[0].prompt, *tokens]
        text = "".join(token.text for token in shown)
        choice: dict[str, Any] = {"index": 0, "finish_reason": tokens[-1].finish, "logprobs": self._logprobs(shown)}
        if self._kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        total = sum(token.logprob for token in tokens)
        return {**self._frame, "object": kind, "choices": [choice], "usage": self.usage(len(tokens), total)}

    def opening(self) -> dict[str, Any] | None:
        """What a stream says before the first token: in a chat, who speaks."""
        if self._kind != "chat":
            return None
        return self._piece({"delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None})

    def piece(self, token: Token) -> dict[str, Any] | None:
        """A token's part of a stream; None when it has nothing to show yet."""
        if not (token.text or token.finish or self._top is not None):
            return None
        choice: dict[str, Any] = {"finish_reason": token.finish, "logprobs": self._logprobs([token])}
        if self._kind == "chat":
            choice["delta"] = {"content": token.text} if token.text or not token.finish else {}
        else:
            choice["text"] = token.text
        return self._piece(choice)

    def closing(self, count: int, logprob: float) -> dict[str, Any]:
        """The token counts, when a stream was asked for them."""
        return {**self._piece({}), "choices": [], "usage": self.usage(count, logprob)}

    def usage(self, count: int, logprob: float) -> dict[str, float]:
        """Tokens read and generated; the token that ends an answer counts.

        Beyond OpenAI's fields `mean_logprob`: nats a generated token, of `logprob` in all.
        """
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": count,
            "total_tokens": self._prompt_tokens + count,
            "mean_logprob": round(logprob / count, 6) if count else 0.0,
        }

    def _piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        return {**self._frame, "object": kind, "choices": [{"index": 0, **choice}]}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        return self._chat_logprobs(tokens) if self._kind == "chat" else self._text_logprobs(tokens)

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            {**self._one(token.id, token.logprob), "top_logprobs": [self._one(i, value) for i, value in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._engine.tokenizer.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    def _text_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        texts = [self._engine.tokenizer.token_text(token.id)[0] for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if math.isnan(token.logprob) else token.logprob for token in tokens],
            "top_logprobs": [None if math.isnan(token.logprob) else self._alternatives(token) for token in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, token: Token) -> dict[str, float]:
        return {self._engine.tokenizer.token_text(i)[0]: value for i, value in token.top}
