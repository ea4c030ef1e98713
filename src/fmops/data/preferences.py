"""The preferences stage: pairs of a better and a worse answer, votes on answers, or prompts to answer; in one form.

Enters: prompt/chosen/rejected as strings or messages, transcripts, thumbs. Leaves: `train.jsonl`, `held_out.jsonl`.
Refuses: pairs with equal or empty answers, different prompts, too long, repeated, or from a benchmark; each is counted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fmops.artifacts import Benchmarks, Checkpoint, Preferences, Source
from fmops.data.examples import Clean, Example, Message, Unfit, UnknownForm, keep_examples, read_messages, require_order
from fmops.jobs import ExampleJob
from fmops.stage import StageContext

PAIRS = (
    "prompt, chosen, rejected, each a string or messages; chosen and rejected as messages with a common start; "
    "chosen and rejected as transcripts with \\n\\nHuman: and \\n\\nAssistant: turns."
)
VOTES = (
    "prompt, completion (or response), label (true, false) or thumb (up, down), where prompt and completion are "
    f"strings or messages; or pairs, which are taken apart: {PAIRS}"
)
PROMPTS = "prompt, a string or messages; every other key is handed to the reward by its name."
LABELS: dict[Any, bool] = {True: True, False: False, "up": True, "down": False}
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
    """Clean the examples and split them; a prompt is never on both sides.

    Args:
        config: redaction, held-out share, longest prompt with answer in tokens, and the form that is wanted.
        base: its tokenizer counts.

    Raises:
        FmopsError: a file in no known form, or nothing left.
    """
    from fmops.adapters.tokens import DocumentTokenizer

    tokenizer = DocumentTokenizer(base.model)
    read_form, forms = {"pairs": (_pair, PAIRS), "votes": (_vote, VOTES), "prompts": (_asked, PROMPTS)}[config.form]

    def read(fields: dict[str, Any], clean: Clean) -> Example:
        example, longest = read_form(fields, clean)
        prompt = example.row["prompt"]
        require_order(prompt, last="user")
        if tokenizer.count_chat([*prompt, {"role": "assistant", "content": longest}]) > config.max_tokens:
            raise Unfit("too-long")
        return example

    kept = keep_examples(config, source, read=read, forms=forms, benchmarks=benchmarks, out=out, context=context)
    return Preferences(
        path=out,
        pairs=kept.train,
        form=config.form,
        held_out=kept.held_out,
        redactions=dict(sorted(kept.redactions.items())),
        dropped=kept.dropped,
    )


def _pair(fields: dict[str, Any], clean: Clean) -> tuple[Example, str]:
    """A pair, and the longer of its answers."""
    prompt, chosen, rejected = read_pair(fields, clean)
    if not chosen or not rejected:
        raise Unfit("empty-answer")
    if chosen == rejected:
        raise Unfit("chosen-equals-rejected")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return _example(prompt, chosen, rejected, row=row), max((chosen, rejected), key=len)


def _vote(fields: dict[str, Any], clean: Clean) -> tuple[Example, str]:
    """One answer with a thumb, or a pair as it is: it is taken apart where it is learnt from."""
    if "chosen" in fields and "rejected" in fields:
        return _pair(fields, clean)
    completion = fields.get("completion", fields.get("response"))
    label = fields.get("label", fields.get("thumb"))
    if completion is None or label is None or "prompt" not in fields:
        raise UnknownForm
    if label not in LABELS:
        raise Unfit("no-vote")
    answer = _side(completion, clean)
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise Unfit("last-is-no-assistant")
    if not answer[0]["content"]:
        raise Unfit("empty-answer")
    prompt, text, liked = _prompt(fields["prompt"], clean), answer[0]["content"], LABELS[label]
    row = {"prompt": prompt, "completion": text, "label": liked}
    return _example(prompt, text, "liked" if liked else "disliked", row=row), text


def _asked(fields: dict[str, Any], clean: Clean) -> tuple[Example, str]:
    """A prompt, and what its reward may want to know."""
    if "prompt" not in fields:
        raise UnknownForm
    prompt = _prompt(fields["prompt"], clean)
    columns = {key: _cleaned(value, clean) for key, value in fields.items() if key != "prompt"}
    row = {"prompt": prompt, "columns": columns}
    return _example(prompt, json.dumps(columns, ensure_ascii=False, sort_keys=True), row=row), ""


def _example(prompt: list[Message], *texts: str, row: dict[str, Any]) -> Example:
    if not prompt:
        raise Unfit("empty-message")
    return Example((*(message["content"] for message in prompt), *texts), prompt[-1]["content"], row)


def _cleaned(value: Any, clean: Clean) -> Any:
    """Texts at any depth, cleaned as the prompt is."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(item, clean) for item in value]
    if isinstance(value, dict):
        return {key: _cleaned(item, clean) for key, item in value.items()}
    return value


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
