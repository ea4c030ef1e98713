"""Sums, as dialogues to begin with and as prompts to be rewarded.

Enters: a folder. Leaves: `talk.jsonl` (each sum answered in two sentences and by the number alone) and `sums.jsonl`
(`prompt`, and `expected` for the reward). Refuses: nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

ASKED = ("What is {0} plus {1}?", "Add {0} and {1}.")
ANSWERED = ("The sum of {0} and {1} is {2}.", "The answer to that is {2}.", "{2}.")


def write_sums(folder: Path) -> Path:
    """Every sum of two numbers from 2 to 8, asked in two ways."""
    sums = [(a, b, a + b) for a in range(2, 9) for b in range(2, 9)]
    talk = (
        {"messages": [_turn("user", question.format(*each)), _turn("assistant", answer.format(*each))]}
        for each in sums
        for question in ASKED
        for answer in ANSWERED
    )
    _write(folder / "talk.jsonl", talk)
    asked = ((question.format(*each), each[2]) for each in sums for question in ASKED)
    _write(folder / "sums.jsonl", ({"prompt": prompt, "expected": str(total)} for prompt, total in asked))
    return folder


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _write(path: Path, rows: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    print("wrote", write_sums(Path(sys.argv[1])))
