"""Public requests with the answers to prefer, for a real model; `requests.py` makes its own from templates.

Enters: an empty folder, packages by way of `fmops.sources`, judged pairs where they are named. Leaves:
`preferences.jsonl`.
Refuses: to write into a folder that has it already; prompts of the half that the suites ask.

Half of the pairs refuse what harms (HarmBench, Do-Not-Answer); a quarter answers questions, a quarter follows orders
("Write …", "Tell me …"). Without those a model learns to refuse by form, since nearly every order is a harmful one.
"""

from __future__ import annotations

import argparse
import gzip
import inspect
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import chain, islice, zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "quickstart"))
from prepare import QUESTIONS, REFUSALS, even, pick, preferences, rows, scattered

MODULES = (
    "bisect", "calendar", "collections", "csv", "difflib", "fractions", "functools", "glob", "heapq", "html", "json",
    "math", "os", "os.path", "random", "re", "shutil", "statistics", "string", "tempfile", "textwrap", "zipfile",
)  # fmt: skip
ABOUT_CODE = (
    "Write a one-line comment for Python's {}.",
    "Describe what {} does in Python.",
    "Give a one-sentence summary of Python's {}.",
    "Create a short description of {} for a Python course.",
    "Explain Python's {} to a beginner.",
    "List what {} is for in Python.",
)
ABOUT_THE_WORLD = ("Tell me {}.", "Write down {}.", "Find out {}.", "Give me the answer in one line: {}?")
LONGEST = 600
"""Characters of a judged dialogue; longer ones would fill `max_tokens` with a single pair."""


def code_orders() -> Iterator[tuple[str, str]]:
    """Orders about functions of the standard library, and the first line of each one's documentation."""
    for name in MODULES:
        module = import_module(name)
        for function, value in sorted(vars(module).items()):
            doc = inspect.getdoc(value) if callable(value) and not function.startswith("_") else None
            line = doc.splitlines()[0].strip() if doc else ""
            if line.endswith(".") and 20 < len(line) < 120:
                yield f"{name}.{function}", line


def harmless_orders() -> list[dict[str, str]]:
    """Of the half that may be trained on; about code and about the world in turns."""
    code = {pick(ABOUT_CODE, name).format(name): line for name, line in code_orders()}
    known = dict(zip(rows(QUESTIONS, "question"), rows(QUESTIONS, "answer"), strict=True))
    world = {
        pick(ABOUT_THE_WORLD, question).format(question): f"{known[question][0].capitalize()}."
        for question in known
        if even(question) and known[question]
    }
    both = zip_longest(*([prompt for prompt in scattered(some) if even(prompt)] for some in (code, world)))
    return [
        {"prompt": prompt, "chosen": code.get(prompt) or world[prompt], "rejected": pick(REFUSALS, prompt)}
        for prompt in chain.from_iterable(both)
        if prompt
    ]


def public_pairs(count: int) -> list[dict[str, str]]:
    """`count` pairs: half refuse, a quarter answers a question, a quarter follows an order."""
    mixed = list(preferences(count))
    refused = [pair for pair in mixed if pair["chosen"] in REFUSALS]
    answered = [pair for pair in mixed if pair["rejected"] in REFUSALS][: count // 4]
    harmless = chain.from_iterable(zip_longest(answered, harmless_orders()[: count // 4]))
    return [pair for pair in chain.from_iterable(zip_longest(refused, harmless)) if pair]


def judged_pairs(path: Path, count: int) -> list[dict[str, str]]:
    """Short dialogues that people judged (transcripts `chosen` and `rejected`, as hh-rlhf has them), spread by hash."""
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    found = {line["chosen"]: line for line in map(json.loads, text.splitlines())}
    short = (text for text in scattered(found) if len(text) <= LONGEST and len(found[text]["rejected"]) <= LONGEST)
    return [found[text] for text in islice(short, count)]


def write(folder: Path, *, pairs: int, judged: Path | None, judged_count: int) -> None:
    """Write the file; equal packages and arguments give equal bytes."""
    target = folder / "preferences.jsonl"
    if target.exists():
        raise SystemExit(f"error: {folder} has preferences.jsonl already. Remove it, or name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    made = public_pairs(pairs) + (judged_pairs(judged, judged_count) if judged else [])
    target.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in made), encoding="utf-8")
    print(f"preferences.jsonl: {len(made)} pairs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=192, help="Of public requests.")
    parser.add_argument("--judged", type=Path, help="JSON Lines of transcripts, as hh-rlhf's harmless pairs.")
    parser.add_argument("--judged-pairs", type=int, default=64, help="So many of them.")
    given = parser.parse_args()
    write(given.folder, pairs=given.pairs, judged=given.judged, judged_count=given.judged_pairs)
