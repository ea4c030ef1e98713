"""What conversations and preferences have in common: cleaning, splitting, writing.

Enters: examples as messages. Leaves: `train.jsonl` and `held_out.jsonl`, and what was dropped, by reason.
Refuses: files in no known form, with the keys found and the forms known.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fmops.artifacts import Benchmarks, Dropped, Source
from fmops.data.contamination import read_contamination, write_contaminated
from fmops.data.read import Policy, Unreadable, read_rows
from fmops.data.spool import Ledger
from fmops.data.text import comparable_words, content_key, normalise, opening
from fmops.errors import FmopsError
from fmops.jobs import ExampleJob
from fmops.pictures import SUFFIXES
from fmops.redaction import redact
from fmops.stage import StageContext

Message = dict[str, Any]
"""`role`, `content`, and `pictures` where there are some: files of the artifact."""
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
HELD_OUT_EXAMPLES = 200


class Unfit(Exception):
    """Why an example is dropped; caught where examples are counted."""


class UnknownForm(Exception):
    """A row in no known form."""


@dataclass(frozen=True)
class Example:
    """One example: what it is known by, what the benchmarks are compared with, and the row to write."""

    texts: tuple[str, ...]
    asked: str
    row: dict[str, Any]


@dataclass
class Kept:
    """The outcome over a source."""

    train: int = 0
    held_out: int = 0
    redactions: Counter[str] = field(default_factory=Counter)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        return tuple(
            Dropped(step=step, documents=count, examples=tuple(self.ledger.examples.get(step, ())))
            for step, count in sorted(self.ledger.counts.items())
        )


Clean = Callable[[str], str]
Read = Callable[[dict[str, Any], Clean], Example]


def keep_examples(
    config: ExampleJob,
    source: Source,
    *,
    read: Read,
    forms: str,
    benchmarks: Benchmarks | None,
    out: Path,
    context: StageContext,
) -> Kept:
    """Read every row, clean it, drop what is unfit, repeated or in a benchmark, and split the rest by content.

    Args:
        read: makes an example of a row's fields; gets the function that cleans a text.
        forms: the known forms, for the error.

    Raises:
        FmopsError: the first row of a file is in no known form, or nothing is left.
    """
    kept = Kept()
    contamination = read_contamination(benchmarks.path if benchmarks else None)
    seen: set[bytes] = set()
    out.mkdir(parents=True, exist_ok=True)
    with (
        (out / "train.jsonl").open("w", encoding="utf-8") as train,
        (out / "held_out.jsonl").open("w", encoding="utf-8") as held_out,
    ):
        for place, own, example, redactions in _fit(config, source, read=read, forms=forms, ledger=kept.ledger):
            key = content_key([word for text in example.texts for word in (*comparable_words(text), "\0")])
            if key in seen:
                kept.ledger.add("exact-duplicate", f"{place}: {opening(example.asked)}")
                continue
            seen.add(key)
            held = [label for text in (example.asked, *example.texts) for label in contamination.held(text)]
            if held:
                kept.ledger.items.update(held)
                kept.ledger.add("contaminated", f"{place} ({held[0].partition('/')[0]}): {opening(example.asked)}")
                continue
            kept.redactions.update(redactions)
            row = {"id": place, "source": source_name(place), **({"of": own} if own else {}), **example.row}
            # The question decides the side, so that no question is on both.
            chosen = kept.held_out < HELD_OUT_EXAMPLES and _lot(example.asked, context.seed) < config.held_out
            (held_out if chosen else train).write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
            kept.held_out += chosen
            kept.train += not chosen
    if unreadable := kept.ledger.unreadable():
        context.note(unreadable)
    if config.held_out and not kept.held_out:
        context.note(f"none of the {kept.train} examples is held out, so nothing will be measured on unseen ones")
    write_contaminated(kept.ledger.items, out / "contaminated.jsonl")
    context.progress(kept.train + kept.held_out, kept.train + kept.held_out, unit="examples")
    if not kept.train:
        reasons = "; ".join(f"{item.step} {item.documents} (e.g. {item.examples[:1]})" for item in kept.dropped)
        raise FmopsError(f"no example of {source.uri} is left to train on: {reasons or 'the files are empty'}.")
    return kept


def source_name(place: str) -> str:
    """The file that an example came from."""
    return place.rpartition(":")[0]


def _fit(
    config: ExampleJob,
    source: Source,
    *,
    read: Read,
    forms: str,
    ledger: Ledger,
) -> Iterator[tuple[str, str, Example, Counter[str]]]:
    """Place, the row's own id (of feedback: the answer's; "" without one), example, redactions."""
    for place, fields in _rows(source, ledger, policy=config.unreadable):
        redactions: Counter[str] = Counter()

        def clean(text: str, found: Counter[str] = redactions) -> str:
            text = normalise(text)
            if config.redact:
                text, counts = redact(text)
                found.update(counts)
            return text.strip()

        try:
            yield place, str(fields.get("id") or ""), read(fields, clean), redactions
        except Unfit as reason:
            ledger.add(str(reason), f"{place}: {opening(json.dumps(fields, ensure_ascii=False))}")
        except UnknownForm:
            raise FmopsError(
                f"{place} is in no known form; its keys: {', '.join(sorted(fields))}. Known forms: {forms}"
            ) from None


def _rows(source: Source, ledger: Ledger, *, policy: Policy) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in source.files:
        if PurePosixPath(file.name).suffix.lower() in SUFFIXES:
            continue
        for row in read_rows(file):
            if isinstance(row, Unreadable):
                ledger.add("unreadable", row.left_out(policy))
            elif row.whole_file:
                raise FmopsError(f"{row.place} is a text file. Examples come as JSON Lines, JSON or Parquet.")
            else:
                yield row.place, row.fields


def _lot(text: str, seed: int) -> float:
    """A number in [0, 1) that the text's words and the seed decide."""
    lot = hashlib.sha256(b"%d/" % seed + content_key(comparable_words(text))).digest()
    return int.from_bytes(lot[:8], "big") / 2**64


def read_messages(value: Any, clean: Clean, *, picture: Callable[[Any], str] | None = None) -> list[Message]:
    """Messages in `role`/`content` or ShareGPT's `from`/`value` keys, cleaned.

    With `picture`, which finds a picture of a part, a content may be a list of parts: pictures, then one text.

    Raises:
        UnknownForm: `value` is no list of messages.
        Unfit: a role is unknown or a content is no text.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UnknownForm
    messages = []
    for message in value:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role is None:
            raise UnknownForm
        if str(role).lower() not in ROLES:
            raise Unfit("unknown-role")
        pictures: list[str] = []
        if picture and isinstance(content, list):
            content, pictures = _parts(content, picture)
        if not isinstance(content, str):
            raise Unfit("no-text")
        seen = {"pictures": pictures} if pictures else {}
        messages.append({"role": ROLES[str(role).lower()], "content": clean(content), **seen})
    return messages


def _parts(content: list[Any], picture: Callable[[Any], str]) -> tuple[Any, list[str]]:
    """The text of a list of parts, and the pictures before it."""
    if not all(isinstance(part, dict) for part in content):
        raise Unfit("no-text")
    *before, last = content or [{}]
    if last.get("type") != "text" or any(part.get("type") != "image" for part in before):
        raise Unfit("pictures-not-before-the-text")
    return last.get("text"), [picture(part.get("image")) for part in before]


def require_order(messages: Iterable[Message], *, last: str) -> None:
    """Raise `Unfit` unless roles run system?, user, assistant, user, … and end with `last`, none of them empty."""
    messages = list(messages)
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    expected = ["user" if number % 2 == 0 else "assistant" for number in range(len(turns))]
    if [turn["role"] for turn in turns] != expected:
        raise Unfit("roles-out-of-order")
    if not turns or turns[-1]["role"] != last:
        raise Unfit(f"last-is-no-{last}")
    if not all(message["content"] for message in messages):
        raise Unfit("empty-message")
