"""Alignment: the model learns which of two answers people prefer.

Enters: a checkpoint with a chat template, preference pairs. Leaves: a checkpoint.
Refuses: pairs longer than `max_tokens`, and templates whose answers it cannot tell apart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmops.artifacts import Checkpoint, Preferences
from fmops.errors import FmopsError
from fmops.finetuning.dialogue import Unusable, encode_dialogue
from fmops.lifecycle import Align
from fmops.stage import StageContext


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, as tokens; both answers end their turn."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens a model reads to learn from the pair: the prompt counts twice."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def align(
    config: Align, *, checkpoint: Checkpoint, preferences: Preferences, out: Path, context: StageContext
) -> Checkpoint:
    """Align `checkpoint` to `preferences` by DPO; killed, and called again, it goes on where it was.

    Raises:
        FmopsError: a pair is too long, none is usable, or the chat template is ambiguous.
        StageFailed: a loss is not finite, or a resume state cannot be written.
    """
    from fmops.adapters.model_files import load_tokenizer
    from fmops.adapters.trl_dpo import train

    tokenizer = load_tokenizer(checkpoint.model)
    train_set = read_pairs(preferences.path / "train.jsonl", config, tokenizer=tokenizer, context=context)
    held_out = read_pairs(preferences.path / "held_out.jsonl", config, tokenizer=tokenizer, context=context)
    if not train_set:
        raise FmopsError("no preference pair can be learnt from. See the notes above, and name another source.")
    result, measured = train(
        config, source=checkpoint.model, pairs=train_set, held_out=held_out, out=out, context=context
    )
    (out / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in result.curve))
    losses = [row["loss"] for row in result.curve if "loss" in row]
    return Checkpoint(
        path=out,
        stage="align",
        parameters=result.parameters,
        trained_tokens=result.trained_tokens,
        metrics={
            "first_loss": losses[0],
            "last_loss": losses[-1],
            **measured,
        },
        licence=checkpoint.licence,
    )


def read_pairs(path: Path, config: Align, *, tokenizer: Any, context: StageContext) -> list[Pair]:
    """The pairs of a JSON Lines file as tokens. What cannot be used is counted and said, never dropped silently."""
    pairs, unusable = [], {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        row = json.loads(line)
        try:
            pair = _pair(row, tokenizer=tokenizer)
        except Unusable as reason:
            unusable[row["id"]] = str(reason)
            continue
        longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        if longest > config.max_tokens:
            raise FmopsError(
                f"preference pair {row['id']} has {longest} tokens, more than align.max_tokens {config.max_tokens}. "
                "Raise max_tokens, or shorten it."
            )
        pairs.append(pair)
    if unusable:
        first = next(iter(unusable))
        context.note(f"{len(unusable)} preference pairs in {path.name} left out; {first}: {unusable[first]}")
    return pairs


def _pair(row: dict[str, Any], *, tokenizer: Any) -> Pair:
    answers = {}
    prompts = set()
    for side in ("chosen", "rejected"):
        messages = [*row["prompt"], {"role": "assistant", "content": row[side]}]
        prompt, answers[side] = encode_dialogue(messages, tokenizer=tokenizer).split()
        prompts.add(prompt)
    if len(prompts) > 1:
        raise Unusable("its prompt is tokenised differently before the two answers")
    return Pair(prompts.pop(), answers["chosen"], answers["rejected"])
