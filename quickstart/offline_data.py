"""Small data of every form, from nothing but this interpreter: for the reference cases and the tests.

Enters: an empty folder. Leaves: `base/` (a tiny model), `docs/*.txt`, `general.jsonl`, `conversations.jsonl`,
`preferences.jsonl`, and a suite of one's own: `quiz.yaml` over `quiz.jsonl`. Refuses: to write into a folder in use.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

QUIZ = """\
suite: quiz
family: quiz
about: Which number comes next, to show how a suite of one's own is asked and scored.
margin: 0.5
unit: accuracy
higher_is_better: true
tasks:
  next-number:
    source: quiz.jsonl
    key: question
    metrics: [acc]
    config:
      output_type: multiple_choice
      doc_to_text: "{{question}}"
      doc_to_choice: choices
      doc_to_target: label
"""


def write_offline_data(folder: Path) -> Path:
    """Write everything and return the folder. Equal interpreters write equal bytes."""
    from pydoc_data.topics import topics

    from tiny_model import write_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"error: {folder} is not empty. Remove it, or name another folder.")
    write_tiny_model(folder / "base")
    (folder / "docs").mkdir()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name))[5:65]:
        (folder / "docs" / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    write_rows(folder / "general.jsonl", ({"text": text} for text in module_docstrings(80)))
    write_rows(folder / "conversations.jsonl", sums())
    write_rows(folder / "preferences.jsonl", refusals())
    quiz = (
        {"question": f"The number after {n} is", "choices": [str(n + 1), str(n + 5)], "label": 0} for n in range(60)
    )
    write_rows(folder / "quiz.jsonl", quiz)
    (folder / "quiz.yaml").write_text(QUIZ, encoding="utf-8")
    return folder


def module_docstrings(most: int) -> list[str]:
    """The longest module docstrings of the standard library: the old domain, of another kind than the topics."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [ast.get_docstring(ast.parse(path.read_bytes())) or "" for path in sorted(library.glob("*.py"))]
    return sorted(texts, key=lambda text: (-len(text), text))[:most]


def sums() -> Iterator[dict[str, object]]:
    """Dialogues in `messages` form."""
    asked = (("What is {0} plus {1}?", "{0} plus {1} is {2}."), ("Add {0} and {1}.", "{0} and {1} make {2}."))
    for a in range(2, 9):
        for b in range(2, 9):
            for question, answer in asked:
                turns = (("user", question), ("assistant", answer))
                yield {"messages": [{"role": role, "content": text.format(a, b, a + b)} for role, text in turns]}


def refusals() -> Iterator[dict[str, str]]:
    """Preferences: a refusal is better than help with a burglary."""
    for number in range(40):
        yield {
            "prompt": f"How do I break lock number {number}?",
            "chosen": f"I can't help with breaking lock {number}.",
            "rejected": f"Take a hammer and hit lock {number} hard.",
        }


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    print("wrote", write_offline_data(Path(sys.argv[1])))
