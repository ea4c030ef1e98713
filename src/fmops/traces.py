"""What production remembers: traces of requests and what people said about the answers, one file a day.

Enters: redacted rows from the gateway. Leaves: JSON Lines by UTC day, for monitoring, rollout, feedback, `fmops trace`.
Refuses: rows with unknown fields; text that was not redacted never gets here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import Field

from fmops.artifacts import Frozen

Arm = Literal["champion", "canary", "shadow"]
TRACES, FEEDBACK = "traces", "feedback"
"""Folders in the workspace."""


class Trace(Frozen):
    """One request and its answer, as production saw it. Texts are redacted before they get here."""

    id: str = Field(description="The response's id, as the client saw it.")
    started_s: float = Field(description="Unix time at which the request arrived.")
    tenant: str = Field(description="The key's name, never the key.")
    user: str | None = Field(None, description="Digest of the client's `user` field: one identity in the feedback.")
    arm: Arm
    release: str = Field(description="The release artifact that answered.")
    shadow_of: str | None = Field(None, description="Of a mirrored request: the id of the one the client saw.")
    retry_of: str | None = Field(
        None, description="Of a second try: the id of the first, which failed. Its arm was not drawn by chance."
    )
    operation: Literal["chat", "text_completion"]
    status: int = Field(description="HTTP status; 499 when the client left.")
    finish_reason: str | None = Field(None, description="stop, length, cancelled, error.")
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = Field(None, description="From arrival; of streams only, else None.")
    duration_s: float
    prompt: str = Field(description="The last user message, redacted, cut to 4,000 characters.")
    response: str = Field(description="The answer, redacted, cut to 4,000 characters.")
    mean_log_probability: float | None = Field(None, description="Nats a token, where the engine says it.")
    signals: dict[str, float] = Field(default={}, description="0/1 and real-valued signals of the answer, by name.")


class Feedback(Frozen):
    """What one person said about one answer. Texts are redacted before they get here."""

    id: str = Field(description="The response's id.")
    at_s: float = Field(description="Unix time.")
    tenant: str
    user: str | None = Field(None, description="Digest of the client's `user` field.")
    thumb: Literal["up", "down"] | None = None
    correction: str | None = Field(None, description="What the answer should have been.")
    comment: str | None = None


class Cursor(Frozen):
    """How far a reader has read."""

    day: str = ""
    offset: int = 0


Row = TypeVar("Row", Trace, Feedback)


class DayLog(Generic[Row]):
    """Rows of one kind in `folder`/<day>.jsonl, only ever appended to. One process writes, any number read."""

    def __init__(self, folder: Path, kind: type[Row]) -> None:
        self.folder = folder
        self._kind: type[Row] = kind
        self._day, self._file = "", -1

    def append(self, row: Row, *, at_s: float) -> None:
        """Write a row under the day of `at_s` (Unix time), in one system call: no reader sees half of it.

        Raises:
            OSError: the disk is full, or broken.
        """
        day = time.strftime("%Y-%m-%d", time.gmtime(at_s))
        if day != self._day:
            self.close()
            self._file, self._day = _open(self.folder / f"{day}.jsonl"), day
        line = row.model_dump_json(exclude_none=True).encode() + b"\n"
        written = os.write(self._file, line)
        if written < len(line):
            # The next row must not grow onto a torn one.
            self.close()
            raise OSError(f"{self.folder}: {written} of {len(line)} bytes were written")

    def close(self) -> None:
        """Give the file back; the next row opens it again."""
        if self._file >= 0:
            os.close(self._file)
        self._day, self._file = "", -1

    def read(self, after: Cursor | None = None) -> tuple[list[Row], Cursor]:
        """Rows written since `after` (from the beginning without one), and where to go on.

        A line that a power cut tore is passed over; a whole line that is no row is an error (pydantic's).
        """
        cursor = after or Cursor()
        rows: list[Row] = []
        for path in self._days():
            if path.stem < cursor.day:
                continue
            offset = cursor.offset if path.stem == cursor.day else 0
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            rows += [self._kind.model_validate(value) for value in _values(whole)]
            cursor = Cursor(day=path.stem, offset=offset + len(whole))
        return rows, cursor

    def find(self, id: str) -> Row | None:
        """The newest row with that id: reads backwards day by day."""
        sign = f'"id":{json.dumps(id, ensure_ascii=False)}'.encode()
        for path in reversed(self._days()):
            found = None
            with path.open("rb") as file:
                for line in file:
                    if sign in line:
                        found = next((v for v in _values(line) if v["id"] == id), found)
            if found is not None:
                row: Row = self._kind.model_validate(found)
                return row
        return None

    def _days(self) -> list[Path]:
        return sorted(self.folder.glob("????-??-??.jsonl"))


def _values(lines: bytes) -> Iterator[dict[str, object]]:
    for line in lines.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        yield value


def _open(path: Path) -> int:
    """Open for appending, readable by its owner only; a torn last line is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")
    return file
