"""What the benchmark's users ask about: functions of the standard library and what their documentation says of them.

Enters: names of modules of this interpreter. Leaves: facts, and questions about them in several wordings.
Refuses: nothing; a module that this Python lacks is passed over.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KNOWN = (
    "textwrap", "statistics", "random", "fractions", "calendar", "datetime", "difflib", "bisect", "heapq", "string",
    "colorsys", "graphlib", "numbers", "shlex", "pprint", "decimal", "operator", "functools", "copy",
)  # fmt: skip
"""Modules that the first corpus is about."""
NEW = (
    "ftplib", "smtplib", "imaplib", "poplib", "socketserver", "nntplib", "telnetlib", "http.client", "http.server",
    "http.cookiejar", "urllib.request", "urllib.parse", "xmlrpc.client", "xmlrpc.server", "email.message",
    "email.utils", "mailbox", "asyncio.streams", "asyncio.events", "wsgiref.handlers", "socket",
)  # fmt: skip
"""Modules that nobody asks about, until they do: the network."""
GENERAL = ("logging", "argparse", "zipfile", "tarfile", "unittest.case", "pathlib", "threading", "queue", "csv")
"""Modules of the old domain: read beside the others against forgetting, never asked about."""
WORDS = (4, 14)
"""Fewest and most words of a sentence that can be an answer."""
ASKED = ("What does {} do?", "Explain {}.", "What is {} for?")
"""How people ask; the model has been taught all of these."""
_NAME = re.compile(r"[A-Za-z]\w*(?:\.\w+)*")


@dataclass(frozen=True)
class Fact:
    """One name and the first sentence of its docstring."""

    name: str
    says: str


def facts_of(modules: Sequence[str], *, most: int) -> list[Fact]:
    """The first `most` facts, taken from all modules in turn, each sentence once."""
    queues = [iter(_of_module(module)) for module in modules]
    found: dict[str, Fact] = {}
    while queues and len(found) < most:
        for queue in list(queues):
            fact = next((one for one in queue if one.says not in found), None)
            if fact is None:
                queues.remove(queue)
            elif len(found) < most:
                found[fact.says] = fact
    return list(found.values())


def _of_module(module: str) -> Iterator[Fact]:
    path = Path(sysconfig.get_path("stdlib")) / Path(*module.split("."))
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    if not source.is_file():
        return
    last = module.rpartition(".")[2]
    for name, node in _public(ast.parse(source.read_bytes()), prefix=last):
        sentence = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
        if sentence.isascii() and sentence[:1].isupper() and WORDS[0] <= len(sentence.split()) <= WORDS[1]:
            yield Fact(name=name, says=f"{sentence}.")


def _public(tree: ast.AST, *, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _public(node, prefix=f"{prefix}.{node.name}")


def likeness(answer: str, wanted: str) -> float:
    """F1 of the words of two texts, between 0 and 1: how much of what should be said is said, and nothing else."""
    said, right = _NAME.findall(answer.lower()), _NAME.findall(wanted.lower())
    if not said or not right:
        return 0.0
    both = sum(min(said.count(word), right.count(word)) for word in set(right))
    return 2 * both / (len(said) + len(right))
