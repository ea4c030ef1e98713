"""The conversations stage: dialogues for instruction tuning, in one form.

Enters: `messages`, ShareGPT or alpaca rows. Leaves: `train.jsonl` and `held_out.jsonl` in `messages` form.
Refuses: dialogues out of order, without an answer, too long, repeated, or from a benchmark; each is counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from fmops.artifacts import Benchmarks, Checkpoint, Conversations, Source
from fmops.data.examples import Clean, Example, Message, Unfit, UnknownForm, keep_examples, read_messages, require_order
from fmops.errors import FmopsError
from fmops.jobs import ExampleJob
from fmops.pictures import SUFFIXES, reads_pictures
from fmops.stage import StageContext

FORMS = (
    "messages: [{role, content}, …], where a content may be [{type: image, image: file}, …, {type: text, text: …}]; "
    "ShareGPT, conversations: [{from, value}, …]; "
    "alpaca, instruction, input (optional), output; prompt and completion."
)


def prepare_conversations(
    config: ExampleJob,
    *,
    base: Checkpoint,
    source: Source,
    out: Path,
    context: StageContext,
    benchmarks: Benchmarks | None = None,
) -> Conversations:
    """Clean the dialogues and split them.

    Args:
        config: redaction, held-out share, longest dialogue in tokens of the base's chat template.
        base: its tokenizer counts.

    Raises:
        FmopsError: a file in no known form, or nothing left.
    """
    from fmops.adapters.tokens import DocumentTokenizer

    tokenizer = DocumentTokenizer(base.model)
    album = _Album(source, out, sees=reads_pictures(base.model))

    def read(fields: dict[str, Any], clean: Clean) -> Example:
        messages = read_dialogue(fields, clean, picture=album.take)
        require_order(messages, last="assistant")
        if tokenizer.count_chat(messages) > config.max_tokens:
            raise Unfit("too-long")
        # Of two pictures the same may be asked: what was seen tells the dialogues apart.
        texts = tuple(text for message in messages for text in (*message.get("pictures", ()), message["content"]))
        asked = next(message for message in messages if message["role"] == "user")
        return Example(texts, " ".join((*asked.get("pictures", ()), asked["content"])), {"messages": messages})

    kept = keep_examples(config, source, read=read, forms=FORMS, benchmarks=benchmarks, out=out, context=context)
    return Conversations(
        path=out,
        conversations=kept.train,
        held_out=kept.held_out,
        redactions=dict(sorted(kept.redactions.items())),
        dropped=kept.dropped,
    )


class _Album:
    """The pictures of a source, kept in the artifact under the digests of their contents."""

    def __init__(self, source: Source, out: Path, *, sees: bool) -> None:
        self._files = {file.name: file for file in source.files if _is_picture(file.name)}
        self._out, self._sees = out / "pictures", sees

    def take(self, named: Any) -> str:
        """Copy a picture that a row names into the artifact, once, and return its name there.

        Raises:
            FmopsError: the base model reads no pictures, or the name fits no file of the source, or several.
        """
        if not self._sees:
            raise FmopsError(
                f"a conversation shows {named!r}, and the base model reads no pictures. Name one that does."
            )
        wanted = str(named).removeprefix("./")
        found = [file for name, file in self._files.items() if name == wanted or name.endswith(f"/{wanted}")]
        if len(found) != 1:
            raise FmopsError(
                f"a conversation shows the picture {wanted!r}, which fits {len(found)} of the {len(self._files)} "
                'picture files of its source. Name them beside the rows, as in `source: [rows.jsonl, "images/*.png"]`.'
            )
        [file] = found
        name = f"{file.sha256}{PurePosixPath(file.name).suffix.lower()}"
        if not (self._out / name).is_file():
            self._out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, self._out / name)
        return f"pictures/{name}"


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def read_dialogue(
    fields: dict[str, Any], clean: Clean, *, picture: Callable[[Any], str] | None = None
) -> list[Message]:
    """Messages of a row in any known form; `picture` finds what a row shows.

    Raises:
        UnknownForm: it is in none.
        Unfit: it is, but holds no text.
    """
    for key in ("messages", "conversations", "conversation"):
        if key in fields:
            return read_messages(fields[key], clean, picture=picture)
    if "instruction" in fields and "output" in fields:
        asked = "\n\n".join(str(fields[key]) for key in ("instruction", "input") if fields.get(key))
        return [*_system(fields, clean), *_exchange(asked, fields["output"], clean)]
    if isinstance(fields.get("prompt"), str) and "completion" in fields:
        return [*_system(fields, clean), *_exchange(fields["prompt"], fields["completion"], clean)]
    raise UnknownForm


def _system(fields: dict[str, Any], clean: Clean) -> list[Message]:
    system = fields.get("system")
    return [{"role": "system", "content": clean(system)}] if isinstance(system, str) and system.strip() else []


def _exchange(asked: str, answer: Any, clean: Clean) -> list[Message]:
    if not isinstance(answer, str):
        raise Unfit("no-text")
    return [{"role": "user", "content": clean(asked)}, {"role": "assistant", "content": clean(answer)}]
