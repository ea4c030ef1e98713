"""One writer at a time, by file locks that die with their holder.

Enters: a lock path. Leaves: exclusive possession while the context lasts, or an error that says who has it.
Refuses: to wait for ever. A lock of a dead process is free at once, since the kernel drops it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from fmops.errors import FmopsError

_held: set[IO[str]] = set()
_shared: dict[Path, IO[str]] = {}


def _let_go_in_forked_child() -> None:
    # A forked child shares the lock; one that outlives its parent would go on holding it.
    for stream in _held:
        stream.close()
    _held.clear()
    for stream in _shared.values():
        stream.close()
    _shared.clear()


os.register_at_fork(after_in_child=_let_go_in_forked_child)


class Busy(FmopsError):
    """Somebody else holds the lock; later it may be free."""


@contextmanager
def locked(path: Path, *, wait_s: float = 0.0) -> Iterator[Callable[[], None]]:
    """Hold the lock at `path`. Given is a check that raises `Busy` when somebody else has got it meanwhile.

    The kernel does not let that happen on a local disk, not to a process that is stopped either. A network file system
    may, after a long silence; and who removes the lock's file lets a second holder in.

    Raises:
        Busy: another process holds it after `wait_s` seconds; names its pid, host, command and start.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        deadline = time.monotonic() + wait_s
        while not _try_lock(stream.fileno()):
            if time.monotonic() >= deadline:
                raise Busy(_refusal(path))
            time.sleep(0.02)
        _held.add(stream)
        try:
            stream.seek(0)
            stream.truncate()
            me = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv), "since": _now()}
            mine = json.dumps({**me, "token": uuid4().hex})
            stream.write(mine)
            stream.flush()

            def still_mine() -> None:
                if not path.is_file() or path.read_text() != mine:
                    raise Busy(f"{path.stem} was taken over by {holder(path) or 'another process'}; this one ends.")

            yield still_mine
        finally:
            _held.discard(stream)


def hold(path: Path) -> None:
    """Share the lock at `path` until this process ends: meanwhile nobody gets it for himself.

    Where its folder was removed and made anew meanwhile, it is the new file's lock that is shared.
    """
    held = _shared.get(path)
    if held is None or not path.exists() or not os.path.samestat(os.fstat(held.fileno()), path.stat()):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
        # Whoever has it alone does not keep it for long.
        fcntl.flock(stream, fcntl.LOCK_SH)
        _shared[path] = stream
        if held:
            held.close()
    os.utime(path)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(path: Path) -> str | None:
    """Who holds the lock at `path`, or None when it is free."""
    if not path.is_file():
        return None
    # A network file system wants the right to write for this lock; who has none may still look on a local disk.
    with path.open("a+" if os.access(path, os.W_OK) else "r") as stream:
        if _try_lock(stream.fileno()):
            return None
    found = json.loads(path.read_text() or "{}")
    if not found:
        return "another process"
    return f"pid {found['pid']} on {found['host']} since {found['since']} ({found['command']})"


def _refusal(path: Path) -> str:
    who = holder(path) or "a process that has just ended"
    return f"{path.parent} is held by {who}. Wait until it ends, or stop it; two writers would mix their work."


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
