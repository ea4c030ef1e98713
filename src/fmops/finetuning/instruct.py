"""Instruction tuning: the model learns the assistant's part of dialogues.

Enters: a checkpoint with a chat template, conversations. Leaves: a checkpoint.
Refuses: dialogues longer than a block, and templates whose answers it cannot tell apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmops.artifacts import Benchmarks, Checkpoint, Conversations, Corpus
from fmops.curve import best_note, kept_row, summary
from fmops.errors import FmopsError
from fmops.finetuning.dialogue import Encoded, Unusable, encode_dialogue
from fmops.integrity import read_lines
from fmops.lifecycle import Instruct
from fmops.pictures import for_template, reads_pictures, to_url
from fmops.stage import StageContext

if TYPE_CHECKING:
    from fmops.adapters.eyes import Eyes


def instruct(
    config: Instruct, *, checkpoint: Checkpoint, conversations: Conversations, out: Path, context: StageContext,
    corpus: Corpus | None = None, benchmarks: Benchmarks | None = None,
) -> Checkpoint:  # fmt: skip
    """Tune `checkpoint` on `conversations`; killed, and called again, it goes on where it was.

    Args:
        corpus: brings the documents that `config.documents` asks for.
        benchmarks: bring the items that `config.suites` asks for.

    Raises:
        FmopsError: a dialogue is too long, none is usable, or the chat template is ambiguous.
        StageFailed: a loss is not finite, or a resume state cannot be written.
    """
    from fmops.adapters.model_files import load_tokenizer

    if config.framework != "trl" and (corpus or reads_pictures(checkpoint.model)):
        raise FmopsError(
            f"instruct.framework {config.framework} is given dialogues of text alone: no pictures, no "
            "instruct.documents. Set framework to trl."
        )
    if corpus and reads_pictures(checkpoint.model):
        raise FmopsError("instruct.documents: a model that reads pictures learns from dialogues alone. Leave it out.")
    if benchmarks and reads_pictures(checkpoint.model):
        raise FmopsError("instruct.suites: of a model that reads pictures only the loss is watched. Leave it out.")
    tokenizer = load_tokenizer(checkpoint.model)
    train_set = read_dialogues(conversations.path / "train.jsonl", config, tokenizer=tokenizer, context=context)
    held_out = read_dialogues(conversations.path / "held_out.jsonl", config, tokenizer=tokenizer, context=context)
    if not train_set:
        raise FmopsError(
            f"none of the {conversations.conversations} conversations can be learnt from. See the notes above, "
            "and name another source."
        )
    if config.keep == "best" and config.metric == "held_out_loss" and not held_out:
        raise FmopsError(
            f"instruct.keep is best, but none of the {conversations.held_out} held-out conversations can be measured. "
            "Raise conversations in number, or set keep to last."
        )
    if reads_pictures(checkpoint.model):
        from fmops.adapters import seeing_sft

        result = seeing_sft.train(
            config, source=checkpoint.model, dialogues=train_set, held_out=held_out, out=out, context=context
        )
    elif config.framework == "llama-factory":
        from fmops.adapters import llamafactory_sft

        result = llamafactory_sft.train(
            config, source=checkpoint.model, dialogues=train_set, held_out=held_out, out=out, context=context
        )
    else:
        from fmops.adapters import trl_sft

        result = trl_sft.train(
            config, source=checkpoint.model, dialogues=train_set, held_out=held_out, out=out, context=context,
            corpus=corpus, benchmarks=benchmarks,
        )  # fmt: skip
    (out / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in result.curve))
    kept = kept_row(result.curve, result.kept_step)
    if kept is not result.curve[-1]:
        context.note(best_note(result.curve, kept=kept, metric=config.metric, stopped=result.stopped))
    return Checkpoint(
        path=out,
        stage="instruct",
        parameters=result.parameters,
        trained_tokens=result.trained_tokens,
        metrics=summary(result.curve, last=kept),
        licence=checkpoint.licence,
    )


def _eyes(model: str) -> Eyes | None:
    """Of a model that reads pictures."""
    if not reads_pictures(Path(model)):
        return None
    from fmops.adapters.eyes import Eyes

    return Eyes(Path(model))


def _seen_dialogue(messages: list[dict[str, Any]], folder: Path, *, eyes: Eyes, tokenizer: Any) -> Encoded:
    """A dialogue whose tokens have room for its pictures, which are files of `folder`."""
    shown = [{**message, "parts": for_template(message, sees=True)} for message in messages]
    encoded = encode_dialogue(shown, tokenizer=tokenizer)
    files = tuple(folder / name for message in messages for name in message.get("pictures", ()))
    looks = [eyes.look(to_url(file.name, file.read_bytes())) for file in files]
    ids, learnt = eyes.expand_learnt(encoded.ids, encoded.learnt, looks)
    return Encoded(tuple(ids), tuple(learnt), files)


def read_dialogues(path: Path, config: Instruct, *, tokenizer: Any, context: StageContext) -> list[Encoded]:
    """The dialogues of a JSON Lines file as tokens. What cannot be used is counted and said, never dropped silently."""
    encoded, unusable = [], {}
    eyes = _eyes(tokenizer.name_or_path)
    for row in read_lines(path) if path.is_file() else []:
        try:
            if eyes is None:
                dialogue = encode_dialogue(row["messages"], tokenizer=tokenizer)
            else:
                dialogue = _seen_dialogue(row["messages"], path.parent, eyes=eyes, tokenizer=tokenizer)
        except Unusable as reason:
            unusable[row["id"]] = str(reason)
            continue
        if len(dialogue.ids) > config.block_tokens:
            raise FmopsError(
                f"conversation {row['id']} has {len(dialogue.ids)} tokens, more than instruct.block_tokens "
                f"{config.block_tokens}. Raise block_tokens, or shorten it."
            )
        encoded.append(dialogue)
    if unusable:
        first = next(iter(unusable))
        context.note(f"{len(unusable)} conversations in {path.name} left out; {first}: {unusable[first]}")
    return encoded
