"""What a client may ask: the bodies of OpenAI's chat and completions requests.

Enters: a JSON object. Leaves: a typed, checked request.
Refuses: wrong types, unknown fields, and known fields that this server has no meaning for, each by name.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fmops.pictures import from_url

MAX_SEED = 2**63 - 1

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "functions": ([],), "function_call": ("none", "auto"), "store": (False,),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (), "web_search_options": (),
    "service_tier": ("auto", "default"), "verbosity": ("medium",),
}  # fmt: skip
"""Fields that are accepted only at values that change nothing; null is always one. Anything else would be a lie."""

IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
"""Fields about the caller, with no effect on the answer."""


BRANCHES = ("str", "list")
PARTS = ("text", "image_url")
MOST_PICTURES = 8
"""In a request."""


class RequestError(Exception):
    """A mistake of the caller, as OpenAI's clients expect to read it."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400,
        retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.param = param and _sendable(param)
        self.code, self.status, self.retry_after_s = code, status, retry_after_s

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "invalid_request_error" if self.status < 429 else "rate_limit_error"
        if self.status >= 500:
            kind = "server_error"
        return {"error": {"message": _sendable(str(self)), "type": kind, "param": self.param, "code": self.code}}


def _sendable(text: str) -> str:
    """JSON may spell half a surrogate pair, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _only_one(value: Any) -> Any:
    """The prompt of a list that holds one, as evaluation harnesses send it."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list) else value


def _whole_characters(text: str) -> str:
    if text != _sendable(text):
        raise ValueError("half a surrogate pair is no text")
    return text


def _is_picture(url: str) -> str:
    from_url(url)
    return url


Text = Annotated[str, AfterValidator(_whole_characters)]
SomeText = Annotated[str, Field(min_length=1), AfterValidator(_whole_characters)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Body):
    """A piece of a message that is text."""

    type: Literal["text"]
    text: Text


class PictureUrl(_Body):
    """Where a picture is: in the request itself."""

    url: Annotated[str, AfterValidator(_is_picture)]
    detail: Literal["auto"] | None = None


class PicturePart(_Body):
    """A piece of a message that is a picture."""

    type: Literal["image_url"]
    image_url: PictureUrl


Part = Annotated[TextPart | PicturePart, Field(discriminator="type")]


class ChatMessage(_Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def pictures(self) -> list[str]:
        """Data URLs of what is shown; they stand before the text, wherever the client put them."""
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, PicturePart)]

    def plain(self) -> str | list[dict[str, Any]]:
        """The content in its simplest form: a text, where nothing is shown."""
        if isinstance(self.content, str) or not self.pictures:
            return self.text
        return [part.model_dump(exclude_none=True) for part in self.content]


class StreamOptions(_Body):
    """What a stream carries beside text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(_Body):
    """What both kinds of request share."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stop: Annotated[list[SomeText], Field(max_length=4), BeforeValidator(_as_list)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    """vLLM's: requests with another salt share no cached prefix. The gateway sets it, by tenant."""

    @property
    def wants_usage(self) -> bool:
        """True when a stream shall end with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionBody(Sampling):
    """`POST /v1/completions`. One prompt a request: a text or token ids, alone or in a list."""

    prompt: Annotated[
        SomeText | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)], BeforeValidator(_only_one)
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    """The answer begins with the prompt and its log-probabilities: how evaluation harnesses score."""


Body = TypeVar("Body", ChatBody, CompletionBody)


def parse_body(value: Any, kind: type[Body]) -> Body:
    """Check a request.

    Raises:
        RequestError: names the field, what was given, and what is possible.
    """
    if not isinstance(value, dict):
        raise RequestError(f"the request body must be a JSON object, not {type(value).__name__}")
    asked = {key: given for key, given in value.items() if key not in IGNORED}
    for name in [name for name in asked if name in NEUTRAL and name not in kind.model_fields]:
        given = asked.pop(name)
        if given is not None and not any(given == same and type(given) is type(same) for same in _same(name)):
            raise RequestError(_unsupported(name, given), param=name, code="unsupported_parameter")
    try:
        body = kind.model_validate(asked)
    except ValidationError as error:
        raise _explain(error, kind) from None
    _possible(body)
    return body


def _same(name: str) -> tuple[Any, ...]:
    """Neutral values, numbers also in their other type: clients send 0 or 0.0, never true for 1."""
    values = NEUTRAL[name]
    return (*values, *(float(value) for value in values if type(value) is int))


def _unsupported(name: str, given: Any) -> str:
    shown = str(given) if len(str(given)) < 60 else f"{str(given)[:57]}…"
    allowed = " or ".join(str(value) for value in NEUTRAL[name])
    remedy = f"Only {allowed} is possible" if allowed else "Leave it out"
    return f"this server does not support {name!r} = {shown}. {remedy}."


def _possible(body: Sampling) -> None:
    if body.stream_options and not body.stream:
        raise RequestError("'stream_options' needs 'stream': true", param="stream_options")
    if isinstance(body, CompletionBody) and body.echo and (body.stream or body.logprobs is None):
        raise RequestError("'echo' needs 'logprobs', and no 'stream'", param="echo")
    if isinstance(body, ChatBody):
        if (shown := sum(len(turn.pictures) for turn in body.messages)) > MOST_PICTURES:
            raise RequestError(f"{shown} pictures are more than {MOST_PICTURES}", param="messages")
        if body.top_logprobs and not body.logprobs:
            raise RequestError(f"'top_logprobs': {body.top_logprobs} needs 'logprobs': true", param="top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise RequestError(
                f"give one of 'max_tokens' ({body.max_tokens}) and 'max_completion_tokens' "
                f"({body.max_completion_tokens}), not both",
                param="max_tokens",
            )


def _explain(error: ValidationError, kind: type[BaseModel]) -> RequestError:
    """The first mistake, with its path as a client writes it."""
    mistakes = error.errors(include_url=False)
    # Where several types are possible each complains; the one that got furthest is what the client meant.
    here = _path(mistakes[0]["loc"])
    first = max(
        (item for item in mistakes if _path(item["loc"])[: len(here)] == here), key=lambda item: len(item["loc"])
    )
    path = _path(first["loc"])
    param = ".".join(path)
    if first["type"] == "extra_forbidden":
        near = get_close_matches(path[-1], list(kind.model_fields), n=1) if len(path) == 1 else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return RequestError(f"unknown field {param!r}.{hint}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(f"the field {param!r} is required", param=param, code="missing_required_parameter")
    return RequestError(f"{param!r}: {first['msg']}", param=param, code="invalid_value")


def _path(steps: tuple[int | str, ...]) -> list[str]:
    """Pydantic also lists the branch of a union that it tried; a client knows nothing of those."""
    path = []
    for before, step in zip((None, *steps), steps, strict=False):
        kind = isinstance(before, int) and step in PARTS
        if isinstance(step, int) or (step.isidentifier() and step not in BRANCHES and not kind):
            path.append(str(step))
    return path
