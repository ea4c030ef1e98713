"""Items: rows of a source file become documents of a task.

Enters: one verified source and a task's description. Leaves: documents with a stable `id` and a `cluster`.
Refuses: formats it does not know, rows without the key, options without a label, sources in which nothing is left.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from fmops.artifacts import Source, SourceFile
from fmops.errors import FmopsError
from fmops.evaluation.bbq import read_bbq
from fmops.evaluation.forms import lettered, require
from fmops.evaluation.protocol import digest
from fmops.evaluation.suites import SuiteTask

FORMATS = (".csv", ".json", ".jsonl", ".parquet", ".prompt", ".txt", ".yaml", ".yml")
KEPT_OUT = "kept_out"
"""Field of an item that names the only field which training data may not hold."""
_FORMS: dict[str, Callable[[dict[str, Any], str], dict[str, Any] | None]] = {
    "rows": lambda row, _: dict(row),
    "lettered": lettered,
    "bbq": read_bbq,
}
"""What each form makes of a row; None for a row without a label."""


def odd(text: str) -> bool:
    """Whether a prompt is of the half that evaluation may use; training data takes the other one."""
    return bool(hashlib.sha256(text.strip().lower().encode()).digest()[-1] & 1)


def read_items(name: str, task: SuiteTask, source: Source | None) -> list[dict[str, Any]]:
    """Every usable document of a task, in source order, each once.

    Raises:
        FmopsError: an unreadable file, a missing field, no usable label, or nothing left.
    """
    documents: dict[str, dict[str, Any]] = {}
    rows = 0
    for where, row in _rows(task, source):
        rows += 1
        require(task.key, row, where)
        if not _wanted(task, row, where):
            continue
        document = _FORMS[task.form](row, where)
        if document is None:
            continue
        identity = f"{name}-{digest(document)[:16]}"
        cluster = str({**row, **document}[task.cluster or task.key])
        if task.checks:
            document = {**document, "checks": list(task.checks)}
        if task.kept_out == "key":
            document = {**document, KEPT_OUT: task.key}
        documents.setdefault(identity, {**document, "id": identity, "cluster": digest([name, cluster])[:16]})
    if not documents:
        where = source.uri if source else "its suite"
        raise FmopsError(
            f"task {name}: none of the {rows} rows of {where} is usable. Look at `only`, `half` and `form` in its "
            "suite, or name the split that has labels."
        )
    return list(documents.values())


def choose(documents: list[dict[str, Any]], limit: int | None, *, seed: int | str, name: str) -> list[dict[str, Any]]:
    """At most `limit` documents, by seed, in source order; a larger limit keeps those of a smaller one."""
    if limit is None or len(documents) <= limit:
        return documents
    order = list(range(len(documents)))
    random.Random(f"{seed}/{name}").shuffle(order)
    return [documents[index] for index in sorted(order[:limit])]


def most(share: float, limit: int | None) -> int | None:
    """How many items a limit allows a task that takes this share of it."""
    return None if limit is None else max(2, round(share * limit))


def _rows(task: SuiteTask, source: Source | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(task.items or (), start=1):
        yield f"item {number} of the suite", row
    for file in source.files if source else ():
        for number, row in _file_rows(file, key=task.key, at=task.at):
            if not isinstance(row, dict):
                raise FmopsError(f"{file.name}:{number}: an item is an object of fields, not {type(row).__name__}.")
            yield f"{file.name}:{number}", row


def _file_rows(file: SourceFile, *, key: str, at: str | None) -> Iterator[tuple[int, Any]]:
    suffix = suffix_of(file.name) if suffix_of(file.name) in FORMATS else suffix_of(file.path.name)
    if suffix not in FORMATS:
        raise FmopsError(f"{file.name}: items are read from {', '.join(FORMATS)} files. Convert it first.")
    if suffix == ".parquet":
        from fmops.adapters.parquet import read_table

        yield from enumerate(read_table(file.path), start=1)
        return
    opened = gzip.open if file.path.suffix == ".gz" else open
    try:
        with opened(file.path, "rt", encoding="utf-8-sig", newline="") as stream:
            yield from _parse(stream.read().replace("\r\n", "\n"), suffix, key=key, at=at)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise FmopsError(f"{file.name} is no valid {suffix.removeprefix('.')} in UTF-8: {error}.") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise FmopsError(f"{file.name} is a broken gzip file: {error}. Fetch it again.") from None


def suffix_of(name: str) -> str:
    """The format by its suffix, whether packed by gzip or not."""
    return Path(name.removesuffix(".gz")).suffix


def _parse(text: str, suffix: str, *, key: str, at: str | None) -> Iterator[tuple[int, Any]]:
    # Split at \n only: items may hold U+2028, which str.splitlines would take for an end of line.
    lines = enumerate(text.split("\n"), start=1)
    if suffix == ".txt":
        yield from ((number, {key: line.strip()}) for number, line in lines if line.strip())
    elif suffix == ".jsonl":
        yield from ((number, json.loads(line)) for number, line in lines if line.strip())
    elif suffix == ".csv":
        yield from enumerate(csv.DictReader(io.StringIO(text)), start=2)
    else:
        value = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
        if at is not None:
            require(at, value if isinstance(value, dict) else {}, "the document")
            value = value[at]
        yield from enumerate(value if isinstance(value, list) else [value], start=1)


def _wanted(task: SuiteTask, row: dict[str, Any], where: str) -> bool:
    for field, pattern in task.only.items():
        require(field, row, where)
        if not re.search(pattern, str(row[field]), re.IGNORECASE):
            return False
    return task.half is None or odd(str(row[task.key]))
