"""The conversations stage: dialogues for instruction tuning, in one form.

Enters: `messages`, ShareGPT or alpaca rows. Leaves: `train.jsonl` and `held_out.jsonl` in `messages` form.
Refuses: dialogues out of order, without an answer, too long, repeated, or from a benchmark; each is counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fmops.artifacts import Benchmarks, Checkpoint, Conversations, Source
from fmops.data.examples import Clean, Example, Message, Unfit, UnknownForm, keep_examples, read_messages, require_order
from fmops.jobs import ExampleJob
from fmops.stage import StageContext

FORMS = (
    "messages: [{role, content}, …]; ShareGPT, conversations: [{from, value}, …]; "
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

    def read(fields: dict[str, Any], clean: Clean) -> Example:
        messages = read_dialogue(fields, clean)
        require_order(messages, last="assistant")
        if tokenizer.count_chat(messages) > config.max_tokens:
            raise Unfit("too-long")
        asked = next(message["content"] for message in messages if message["role"] == "user")
        return Example(tuple(message["content"] for message in messages), asked, {"messages": messages})

    kept = keep_examples(config, source, read=read, forms=FORMS, benchmarks=benchmarks, out=out, context=context)
    return Conversations(
        path=out,
        conversations=kept.train,
        held_out=kept.held_out,
        redactions=dict(sorted(kept.redactions.items())),
        dropped=kept.dropped,
    )


def read_dialogue(fields: dict[str, Any], clean: Clean) -> list[Message]:
    """Messages of a row in any known form.

    Raises:
        UnknownForm: it is in none.
        Unfit: it is, but holds no text.
    """
    for key in ("messages", "conversations", "conversation"):
        if key in fields:
            return read_messages(fields[key], clean)
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
