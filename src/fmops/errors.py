"""Mistakes that the user can mend, and how a command ends.

Enters: the wrong value, the choices, the remedy. Leaves: a message without traceback and an exit code.
Refuses: nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REJECTED = 3
EXIT_NEED_MORE_DATA = 4
EXIT_MEMORY = 5
EXIT_TERMINATED = 143
"""128 + SIGTERM, as a shell says it."""


READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""What the system says where nothing may be written."""


class FmopsError(Exception):
    """Something the user can put right; the message names the value, the choices and the remedy."""

    exit_code = EXIT_USAGE


class SpecMistake(FmopsError):
    """A part of the spec that does not go with the rest; `at` is the path of the key to change."""

    def __init__(self, at: tuple[str | int, ...], text: str) -> None:
        super().__init__(text)
        self.at = at


class SpecMistakes(ValueError):
    """All of them at once."""

    def __init__(self, mistakes: list[SpecMistake]) -> None:
        super().__init__(" ".join(map(str, mistakes)))
        self.mistakes = mistakes


class StageFailed(FmopsError):
    """A stage process ended without committing its artifact."""

    exit_code = EXIT_FAILED


class OutOfMemory(StageFailed):
    """A stage wanted more memory than there is; a smaller micro-batch may fit."""

    exit_code = EXIT_MEMORY


class Terminated(StageFailed):
    """A stage was told to leave (SIGTERM) and did; run again, it goes on."""

    exit_code = EXIT_TERMINATED


class IntegrityError(FmopsError):
    """A file is not what its digest says."""

    exit_code = EXIT_FAILED


class GateRejected(FmopsError):
    """The gate found a regression beyond a margin, or evidence was missing."""

    exit_code = EXIT_REJECTED


class NeedMoreData(FmopsError):
    """The gate could neither prove nor rule out a regression with the items it had."""

    exit_code = EXIT_NEED_MORE_DATA


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the choice nearest to `value`, or an empty string."""
    found = get_close_matches(value, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def unknown(what: str, value: str, choices: Iterable[str]) -> FmopsError:
    """An error for a name that is not one of `choices`, with the nearest one."""
    known = sorted(choices)
    return FmopsError(f"unknown {what} {value!r}.{nearest(value, known)} Known: {', '.join(known) or 'none'}.")


def first_mistake(error: ValidationError) -> str:
    """The first mistake of a file that only programs write: where it is, and what."""
    first = error.errors(include_url=False)[0]
    return ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one behind it, came from a full disk. SQLite and safetensors say it in words only."""
    behind: BaseException | None = error
    seen: set[int] = set()
    # An error raised again while it is handled can stand behind itself.
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        if isinstance(behind, OSError) and behind.errno == errno.ENOSPC:
            return True
        if "disk is full" in str(behind) or "No space left" in str(behind):
            return True
        behind = behind.__cause__ or behind.__context__
    return False


def memory_ran_out(error: BaseException) -> bool:
    """Whether the system, an allocator of torch's or a GPU had no memory left. Libraries in C say it in words only."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # Of torch, which is not imported here.
    said = str(error).replace("can't", "cannot").lower()
    return type(error).__name__ == "OutOfMemoryError" or "cannot allocate memory" in said


def out_of_memory(error: BaseException) -> str:
    """What is told of it, whatever was being done."""
    said = str(error).partition("\n")[0] or type(error).__name__
    return (
        f"out of memory ({said}). Free some, lower batch_tokens, block_tokens or max_tokens, train with LoRA, or take "
        "a smaller model."
    )


def may_not_be_used(error: BaseException) -> bool:
    """Whether the system refused a path: no right to it, or no such place for a file. SQLite says it in words only."""
    refused = (*READ_ONLY, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
    return (isinstance(error, OSError) and error.errno in refused) or "readonly database" in str(error)


def written_path(error: BaseException) -> str | None:
    """The file that could not be written. Copying names the source first and the copy second."""
    return getattr(error, "filename2", None) or getattr(error, "filename", None)


DISK_FULL = (
    "disk full while writing {where}. Free some space and run again: finished stages and good checkpoints are kept."
)


def alias_moved(alias: str, now: str | None, seen: str | None) -> FmopsError:
    """The error of a move that comes too late."""
    return FmopsError(
        f"alias {alias!r} points at {now or 'nothing'}, expected {seen or 'nothing'}: "
        f"somebody moved it meanwhile. Look with `fmops status`, then try again."
    )
