"""Which tokens of a dialogue the assistant is to learn.

Enters: messages, a tokenizer with a chat template. Leaves: token ids, and for each whether it is the assistant's.
Refuses: templates in which an answer cannot be told apart, or does not end in a token that stops generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fmops.errors import FmopsError

Message = Mapping[str, Any]


class Unusable(Exception):
    """This one dialogue cannot be learnt from; the text says why."""


@dataclass(frozen=True)
class Encoded:
    """A dialogue as tokens."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    """True on the assistant's tokens, the end of its turn included."""

    pictures: tuple[Any, ...] = ()
    """What the model sees, in order; for one that reads pictures."""

    def split(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Everything before the last answer, and the last answer."""
        start = len(self.ids)
        while start and self.learnt[start - 1]:
            start -= 1
        return self.ids[:start], self.ids[start:]


def encode_dialogue(messages: Sequence[Message], *, tokenizer: Any) -> Encoded:
    """Tokenise a dialogue as the chat template renders it, up to the end of the last answer.

    Most templates carry no `{% generation %}` marks, so an answer is what the template adds between the prompt for it
    and the end of its turn.

    Raises:
        Unusable: this dialogue has control tokens in its text, or a token that is half prompt, half answer.
        FmopsError: the template is ambiguous for every dialogue.
    """
    if not messages or messages[0]["role"] == "assistant":
        raise Unusable("it begins with an answer to nothing")
    specials = special_tokens(tokenizer)
    for message in messages:
        found = next((token for token in specials if token in message["content"]), None)
        if found is not None:
            raise Unusable(f"its text contains the control token {found}")
    whole, spans = _answers(messages, tokenizer=tokenizer, specials=specials)
    text = whole[: spans[-1][1]]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    learnt = [any(start <= left and right <= end for start, end in spans) for left, right in offsets]
    for start, end in spans:
        chosen = [
            token
            for token, (left, right), mine in zip(ids, offsets, learnt, strict=True)
            if mine and start <= left and right <= end
        ]
        if tokenizer.decode(chosen).strip() != text[start:end].strip():
            raise Unusable(f"a token crosses the border before or after the answer {text[start:end].strip()[:40]!r}")
    return Encoded(tuple(ids), tuple(learnt))


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Every token that no text may contain."""
    return tuple(sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special))


def _answers(
    messages: Sequence[Message], *, tokenizer: Any, specials: Iterable[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered dialogue, and where in it each answer begins and its turn ends."""
    whole = _render(messages, tokenizer=tokenizer, prompt=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer=tokenizer, prompt=True)
        after = _render(messages[: index + 1], tokenizer=tokenizer, prompt=False)
        if not after.startswith(before) or not whole.startswith(after):
            raise FmopsError(
                "the chat template renders an answer differently by what follows it, so the assistant's tokens cannot "
                "be told apart. Use a base model whose template renders each turn on its own."
            )
        end = max((after.rfind(token) + len(token) for token in specials if token in after[len(before) :]), default=-1)
        if end <= len(before):
            raise FmopsError(
                "the chat template ends an assistant's turn with no special token, so the model could not learn to "
                "stop. Use a base model whose template does."
            )
        spans.append((len(before), end))
    if not spans:
        raise Unusable(f"none of its {len(messages)} messages is an answer of the assistant")
    return whole, spans


def _render(messages: Sequence[Message], *, tokenizer: Any, prompt: bool) -> str:
    """The dialogue's text, by Transformers' sandboxed template environment."""
    if not tokenizer.chat_template:
        raise FmopsError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template. Use an instruction-tuned base "
            "model, or add one."
        )
    from jinja2.exceptions import TemplateError

    # A tokenizer knows nothing of pictures; who calls has given each message the form that its template takes.
    plain = [message.get("parts") or {"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise Unusable(f"the chat template refuses it: {error}") from error
