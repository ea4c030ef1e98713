"""Sums to be answered, as prompts: each with what the reward needs to know.

Enters: an output file. Leaves: JSON Lines with `prompt` and `expected`. Refuses: nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def write_sums(path: Path) -> Path:
    """Every sum of two numbers from 2 to 8, asked in two ways, as in the conversations of `offline_data.py`."""
    asked = ("What is {0} plus {1}?", "Add {0} and {1}.")
    rows = [
        {"prompt": question.format(a, b), "expected": str(a + b)}
        for a in range(2, 9)
        for b in range(2, 9)
        for question in asked
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


if __name__ == "__main__":
    print("wrote", write_sums(Path(sys.argv[1])))
