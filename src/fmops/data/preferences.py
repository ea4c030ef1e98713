"""The preferences stage: pairs of a better and a worse answer, in one form.

Enters: prompt/chosen/rejected as strings or messages, or whole transcripts. Leaves: `train.jsonl`, `held_out.jsonl`.
Refuses: pairs with equal or empty answers, different prompts, too long, repeated, or from a benchmark; each is counted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fmops.artifacts import Benchmarks, Checkpoint, Preferences, Source
from fmops.data.examples import Clean, Example, Message, Unfit, UnknownForm, keep_examples, read_messages, require_order
from fmops.jobs import ExampleJob
from fmops.stage import StageContext

FORMS = (
    "prompt, chosen, rejected, each a string or messages; chosen and rejected as messages with a common start; "
    "chosen and rejected as transcripts with \\n\\nHuman: and \\n\\nAssistant: turns."
)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def prepare_preferences(
    config: ExampleJob,
    *,
    base: Checkpoint,
    source: Source,
    out: Path,
    context: StageContext,
    benchmarks: Benchmarks | None = None,
) -> Preferences:
    """Clean the pairs and split them; a prompt is never on both sides.

    Args:
        config: redaction, held-out share, longest prompt with answer in tokens.
        base: its tokenizer counts.

    Raises:
        FmopsError: a file in no known form, or nothing left.
    """
    from fmops.adapters.tokens import DocumentTokenizer

    tokenizer = DocumentTokenizer(base.model)

    def read(fields: dict[str, Any], clean: Clean) -> Example:
        prompt, chosen, rejected = read_pair(fields, clean)
        require_order(prompt, last="user")
        if not chosen or not rejected:
            raise Unfit("empty-answer")
        if chosen == rejected:
            raise Unfit("chosen-equals-rejected")
        longest = max((chosen, rejected), key=len)
        if tokenizer.count_chat([*prompt, {"role": "assistant", "content": longest}]) > config.max_tokens:
            raise Unfit("too-long")
        texts = (*(message["content"] for message in prompt), chosen, rejected)
        return Example(texts, prompt[-1]["content"], {"prompt": prompt, "chosen": chosen, "rejected": rejected})

    kept = keep_examples(config, source, read=read, forms=FORMS, benchmarks=benchmarks, out=out, context=context)
    return Preferences(
        path=out,
        pairs=kept.train,
        held_out=kept.held_out,
        redactions=dict(sorted(kept.redactions.items())),
        dropped=kept.dropped,
    )


def read_pair(fields: dict[str, Any], clean: Clean) -> tuple[list[Message], str, str]:
    """(prompt, chosen answer, rejected answer) of a row in any known form.

    Raises:
        UnknownForm: it is in none.
        Unfit: the two sides answer different prompts, or hold no text.
    """
    if "chosen" not in fields or "rejected" not in fields:
        raise UnknownForm
    start = _prompt(fields.get("prompt"), clean)
    chosen, rejected = (_side(fields[key], clean) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Unfit("different-prompts")
    prompt, answers = chosen[:-1], (chosen[-1], rejected[-1])
    if any(answer["role"] != "assistant" for answer in answers):
        raise Unfit("last-is-no-assistant")
    # UltraFeedback repeats the prompt in both sides, others leave it out there, or leave only the system message out.
    if not prompt and not start:
        raise UnknownForm
    if prompt == start[len(start) - len(prompt) :]:
        prompt = start
    elif prompt[: len(start)] != start:
        prompt = [*start, *prompt]
    return prompt, answers[0]["content"], answers[1]["content"]


def _prompt(value: Any, clean: Clean) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, str):
        return read_messages(value, clean)
    turns = _transcript(value, clean)
    # A transcript may stop at "Assistant:", where the answer comes in its own field.
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns or [{"role": "user", "content": clean(value)}]


def _side(value: Any, clean: Clean) -> list[Message]:
    """One side: the answer alone, or the dialogue that ends with it."""
    if isinstance(value, str):
        return _transcript(value, clean) or [{"role": "assistant", "content": clean(value)}]
    if isinstance(value, dict):
        value = [value]
    return read_messages(value, clean)


def _transcript(text: str, clean: Clean) -> list[Message]:
    """Turns of an hh-rlhf transcript; empty when it is none."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": clean(content)} for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
