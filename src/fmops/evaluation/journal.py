"""What an evaluation has finished so far, shared by the processes that work on it.

Enters: a file under `out/.work`, one name a process. Leaves: JSON Lines, appended and synced; a lock a chunk of work.
Refuses: nothing; a torn last line, as a power cut leaves it, is ignored.

Chunks are claimed by record locks, which the system takes back from a process that dies. On a shared folder they need
a file system with locks (NFS 4 has them).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fmops.faults import fault_site


class Journal:
    """Finished chunks by key. Every process appends to a file of its own and reads those of all."""

    def __init__(self, path: Path | None = None, *, worker: int = 0) -> None:
        """`path` ends in `.jsonl`: worker 0 writes there, the n-th to `<stem>.n.jsonl`. None: nothing is kept."""
        self._done: dict[str, Any] = {}
        self.path = self._group = path
        if path is None:
            return
        self.path = path.with_suffix(f".{worker}.jsonl") if worker else path
        self._seen: dict[Path, int] = {}
        self._locks = os.open(path.with_suffix(".locks"), os.O_RDWR | os.O_CREAT, 0o644)
        if self.path.exists():
            # A line without its end was being written when the process died.
            whole = self.path.read_bytes().rpartition(b"\n")[0]
            self.path.write_bytes(whole + b"\n" if whole else b"")
        self.refresh()

    def get(self, key: str) -> Any:
        """The value of a finished chunk, None where it is not known to be finished."""
        return self._done.get(key)

    def add(self, key: str, value: Any) -> None:
        """Keep a finished chunk, so that no process does it again."""
        if self.path is None:
            return
        self._done[key] = value
        line = (json.dumps({"key": key, "value": value}) + "\n").encode()
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._seen[self.path] = self._seen.get(self.path, 0) + len(line)
        fault_site("evaluate.chunk")

    def refresh(self) -> None:
        """Read what other processes have finished meanwhile."""
        if self._group is None:
            return
        for path in (self._group, *sorted(self._group.parent.glob(f"{self._group.stem}.*.jsonl"))):
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._seen.get(path, 0))
                whole = file.read().rpartition(b"\n")[0]
            for line in whole.splitlines():
                entry = json.loads(line)
                self._done[entry["key"]] = entry["value"]
            self._seen[path] = self._seen.get(path, 0) + (len(whole) + 1 if whole else 0)

    def claim(self, key: str, *, wait: bool = False) -> bool:
        """Take a chunk for this process; False when another one has it. With `wait`, until that one lets go."""
        if self._group is None:
            return True
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, _place(key))
        except BlockingIOError:
            return False
        self.refresh()
        return True

    def release(self, key: str) -> None:
        """Let other processes have the chunk."""
        if self._group is not None:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, _place(key))

    def close(self) -> None:
        """Let go of every chunk. The journal must not be used after it."""
        if self._group is not None:
            os.close(self._locks)


def _place(key: str) -> int:
    """The byte of the lock file that stands for a key. Two keys on one byte only wait for each other."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
