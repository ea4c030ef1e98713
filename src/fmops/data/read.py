"""Readers: the rows of a source's files, in order, one at a time.

Enters: text, JSON, JSON Lines or Parquet, also gzipped or zipped. Leaves: rows with their place, or what is unreadable.
Refuses: nothing silently: a bad row is handed on as `Unreadable`, with file and line.
"""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

from fmops.artifacts import SourceFile
from fmops.errors import FmopsError, nearest

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
TEXT_SUFFIXES = (
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".adoc", ".org", ".html", ".xml",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".go", ".rs", ".java", ".js", ".ts", ".sh", ".sql", ".rb", ".tf",
    ".yaml", ".yml", ".toml", ".cfg", ".ini", "",
)  # fmt: skip
Policy = Literal["skip", "stop"]
"""What is done about rows and files that cannot be read."""
# A longer text file becomes several documents, cut at empty lines, so that no document fills the memory.
LONGEST_TEXT = 1_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One row: an object's fields, or the text of a text file under `text`."""

    place: str
    fields: dict[str, Any]
    whole_file: bool = False
    """Whether `fields` is a text file under `text`, so that no name of a field applies."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row or file that could not be read."""

    place: str
    reason: str

    def left_out(self, policy: Policy, *, of: str = "") -> str:
        """What the ledger says of it; `of` is a prefix of its place.

        Raises:
            FmopsError: the policy is to stop.
        """
        said = f"{of}{self.place}: {self.reason}"
        if policy == "stop":
            raise FmopsError(
                f"{said}. Mend or remove it; with `curate.unreadable: skip` such rows are left out and counted."
            )
        return said


def read_rows(file: SourceFile) -> Iterator[Row | Unreadable]:
    """Rows of one source file; `place` is `name:line` (`name` for a whole text file, `name:row` for Parquet)."""
    if not file.bytes:
        yield Unreadable(file.name, "empty")
    with file.path.open("rb") as stream:
        yield from _read(stream, file.name)


def read_texts(file: SourceFile, *, text_field: str) -> Iterator[tuple[str, str] | Unreadable]:
    """(place, text) of every document in the file.

    Raises:
        FmopsError: the first row lacks `text_field`; names the keys it has.
    """
    first = True
    for row in read_rows(file):
        if isinstance(row, Unreadable):
            yield row
            continue
        text = row.fields.get("text" if row.whole_file else text_field)
        if text is None and first and text_field not in row.fields:
            raise FmopsError(
                f"{row.place} has no key {text_field!r}.{nearest(text_field, row.fields)} Its keys: "
                f"{', '.join(sorted(row.fields))}. Name the one that holds the text as `text_field` of the corpus."
            )
        first = False
        if isinstance(text, str):
            yield row.place, text
        else:
            yield Unreadable(row.place, f"{text_field} is {'missing' if text is None else type(text).__name__}")


def _kind(name: str) -> str:
    path = PurePosixPath(name)
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _read(stream: IO[bytes], name: str) -> Iterator[Row | Unreadable]:
    suffix = Path(name).suffix.lower()
    if suffix == ".zip":
        yield from _read_zip(stream, name)
    elif suffix == ".gz":
        try:
            with gzip.open(stream) as opened:
                yield from _read_plain(cast(IO[bytes], opened), name, _kind(name))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Unreadable(name, f"broken gzip: {error}")
    else:
        yield from _read_plain(stream, name, suffix)


def _read_zip(stream: IO[bytes], name: str) -> Iterator[Row | Unreadable]:
    try:
        with zipfile.ZipFile(stream) as archive:
            for member in sorted(archive.namelist()):
                if not member.endswith("/"):
                    with archive.open(member) as opened:
                        yield from _read(opened, f"{name}/{member}")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        yield Unreadable(name, f"broken zip: {error}")


def _read_plain(stream: IO[bytes], name: str, suffix: str) -> Iterator[Row | Unreadable]:
    if suffix in (".jsonl", ".ndjson"):
        yield from _read_json_lines(stream, name)
    elif suffix == ".json":
        yield from _read_json(stream, name)
    elif suffix == ".parquet":
        from fmops.adapters.parquet import read_parquet

        yield from read_parquet(stream, name)
    elif suffix in TEXT_SUFFIXES:
        yield from _read_text(stream, name)
    else:
        yield Unreadable(name, f"{suffix} files are not read; known: {', '.join((*ROW_SUFFIXES, *TEXT_SUFFIXES[:-1]))}")


def _read_json_lines(stream: IO[bytes], name: str) -> Iterator[Row | Unreadable]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _parsed(line, f"{name}:{number}")


def _parsed(line: bytes, place: str) -> Row | Unreadable:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Unreadable(place, f"no UTF-8 at byte {error.start}")
    except ValueError as error:
        return Unreadable(place, f"no JSON: {error}")
    except RecursionError:
        return Unreadable(place, "no JSON: nested too deep")
    return _as_row(value, place)


def _as_row(value: Any, place: str) -> Row | Unreadable:
    return Row(place, value) if isinstance(value, dict) else Unreadable(place, f"no object but {type(value).__name__}")


def _read_json(stream: IO[bytes], name: str) -> Iterator[Row | Unreadable]:
    """A list of objects, or one object."""
    try:
        value = json.loads(stream.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        # JSON Lines are often named .json.
        stream.seek(0)
        if len(first := stream.readline()) and not isinstance(_parsed(first, name), Unreadable):
            stream.seek(0)
            yield from _read_json_lines(stream, name)
        else:
            yield Unreadable(name, f"no JSON: {error}")
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _as_row(item, f"{name}:{number}")


def _read_text(stream: IO[bytes], name: str) -> Iterator[Row | Unreadable]:
    """One document a file, or several of a long one."""
    lines: list[str] = []
    characters = part = 0
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield Unreadable(
                f"{name}:{number}",
                f"no UTF-8 at byte {error.start} of the line; convert the file, for example with iconv",
            )
            return
        if "\0" in text:
            yield Unreadable(f"{name}:{number}", "holds a zero byte; no text")
            return
        lines.append(text)
        characters += len(text)
        if characters >= LONGEST_TEXT and (not text.strip() or characters >= 2 * LONGEST_TEXT):
            part += 1
            yield Row(f"{name}#{part}", {"text": "".join(lines)}, whole_file=True)
            lines, characters = [], 0
    if lines:
        yield Row(f"{name}#{part + 1}" if part else name, {"text": "".join(lines)}, whole_file=True)
