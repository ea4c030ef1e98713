"""Rows of a preferences artifact as what each method of alignment learns from: pairs, votes, prompts.

Enters: JSON Lines, a tokenizer with a chat template. Leaves: tokens; what cannot be used is counted and said.
Refuses: examples longer than `max_tokens`, by their id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fmops.errors import FmopsError
from fmops.finetuning.dialogue import Unusable, encode_dialogue
from fmops.integrity import read_lines
from fmops.lifecycle import Align
from fmops.stage import StageContext

Tokens = tuple[int, ...]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, as tokens; both answers end their turn."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens

    @property
    def tokens(self) -> int:
        """Tokens a model reads to learn from the pair: the prompt counts twice."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Vote:
    """A prompt with one answer, as tokens, and whether people liked it."""

    prompt: Tokens
    answer: Tokens
    liked: bool

    @property
    def tokens(self) -> int:
        """Tokens a model reads to learn from the vote."""
        return len(self.prompt) + len(self.answer)

    @property
    def longest(self) -> int:
        """The same: there is one answer."""
        return self.tokens


@dataclass(frozen=True)
class Asked:
    """A prompt that the model answers itself, and what its reward may want to know."""

    id: str
    messages: tuple[dict[str, str], ...]
    columns: dict[str, Any]
    tokens: int
    """Of the prompt as the template renders it."""

    @property
    def longest(self) -> int:
        """Tokens of the prompt; its answer is bounded on its own."""
        return self.tokens


def read_pairs(path: Path, config: Align, *, tokenizer: Any, context: StageContext) -> list[Pair]:
    """The pairs of a file."""
    return _read(path, config, lambda row: [_pair(row, tokenizer=tokenizer)], context=context)


def read_votes(path: Path, config: Align, *, tokenizer: Any, context: StageContext) -> list[Vote]:
    """The votes of a file; of a pair the chosen answer is liked and the rejected one is not."""

    def votes(row: dict[str, Any]) -> list[Vote]:
        if "label" in row:
            prompt, answer = _split(row["prompt"], row["completion"], tokenizer=tokenizer)
            return [Vote(prompt, answer, row["label"])]
        pair = _pair(row, tokenizer=tokenizer)
        return [Vote(pair.prompt, pair.chosen, True), Vote(pair.prompt, pair.rejected, False)]

    return _read(path, config, votes, context=context)


def read_prompts(path: Path, config: Align, *, tokenizer: Any, context: StageContext) -> list[Asked]:
    """The prompts of a file."""

    def asked(row: dict[str, Any]) -> list[Asked]:
        # An answer of one letter shows where the prompt ends, and that the template can be learnt from.
        prompt, _ = _split(row["prompt"], "a", tokenizer=tokenizer)
        return [Asked(row["id"], tuple(row["prompt"]), row["columns"], len(prompt))]

    return _read(path, config, asked, context=context)


def _read(
    path: Path, config: Align, read: Callable[[dict[str, Any]], list[Kind]], *, context: StageContext
) -> list[Kind]:
    """Every example of a file. What cannot be used is counted and said, never dropped silently."""
    examples: list[Kind] = []
    unusable = {}
    for row in read_lines(path) if path.is_file() else []:
        try:
            found = read(row)
        except Unusable as reason:
            unusable[row["id"]] = str(reason)
            continue
        longest = max(example.longest for example in found)  # type: ignore[attr-defined]
        if longest > config.max_tokens:
            raise FmopsError(
                f"preference {row['id']} has {longest} tokens, more than align.max_tokens {config.max_tokens}. "
                "Raise max_tokens, or shorten it."
            )
        examples += found
    if unusable:
        first = next(iter(unusable))
        context.note(f"{len(unusable)} preferences in {path.name} left out; {first}: {unusable[first]}")
    return examples


def _pair(row: dict[str, Any], *, tokenizer: Any) -> Pair:
    prompt, chosen = _split(row["prompt"], row["chosen"], tokenizer=tokenizer)
    same, rejected = _split(row["prompt"], row["rejected"], tokenizer=tokenizer)
    if prompt != same:
        raise Unusable(
            f"its prompt is {len(prompt)} tokens before one answer, and {len(same)} or others before the other"
        )
    return Pair(prompt, chosen, rejected)


def _split(prompt: list[dict[str, str]], answer: str, *, tokenizer: Any) -> tuple[Tokens, Tokens]:
    return encode_dialogue([*prompt, {"role": "assistant", "content": answer}], tokenizer=tokenizer).split()
