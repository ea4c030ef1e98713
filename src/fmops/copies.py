"""Local copies of what lies in a bucket: compared with their digests, bounded, the longest unused dropped first.

Enters: a workspace, a record. Leaves: a folder with exactly the record's files, which stays while this process lives.
Refuses: bytes that are not the record's; to drop what a process uses, or what the bucket does not hold.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fmops.errors import FmopsError, IntegrityError
from fmops.locks import Busy, hold, locked
from fmops.shared import Shared
from fmops.store import RECORD, Record, Store

LONGEST_FETCH_S = 24 * 3600.0


def bring(store: Store, shared: Shared, record: Record) -> Path:
    """The artifact's folder in this workspace, fetched unless a whole copy is there.

    Raises:
        IntegrityError: the bucket does not hold what the record says; the artifact is set aside there.
    """
    folder = store.folder(record.stage, record.fingerprint)
    hold(store.use_lock(record.key))
    with locked(store.root / "locks" / record.key, wait_s=LONGEST_FETCH_S):
        here = store.made_here(record.stage, record.fingerprint)
        if here is None or here.digest != record.digest:
            make_room(store, shared, _bytes(record))
            try:
                shared.fetch(record, folder)
            except IntegrityError as error:
                raise IntegrityError(f"{error} {_set_aside(shared, record)}") from None
            store.commit_here(record)
    return folder


def make_room(store: Store, shared: Shared, needed: int) -> None:
    """Drop local copies of what the bucket holds, the longest unused first, until `needed` bytes fit the bound."""
    here = store.here()
    bound = shared.cache_bytes if shared.cache_bytes is not None else shutil.disk_usage(store.root).total // 2
    excess = needed + sum(_bytes(record) for record in here) - bound
    if excess <= 0:
        return
    there = {record.key: record.digest for record in shared.records()}
    copies = [record for record in here if there.get(record.key) == record.digest]
    for record in sorted(copies, key=lambda copy: _last_used(store.use_lock(copy.key))):
        if excess <= 0:
            return
        try:
            with locked(store.use_lock(record.key)):
                # From here on it does not exist, also if this process is killed.
                (store.folder(record.stage, record.fingerprint) / RECORD).unlink()
                shutil.rmtree(store.folder(record.stage, record.fingerprint))
        except Busy:
            continue
        excess -= _bytes(record)


def _set_aside(shared: Shared, record: Record) -> str:
    try:
        return f"It is set aside in {shared.set_aside(record)}; `fmops run` makes it again."
    except FmopsError as error:
        return f"It could not be set aside: {error}"


def _bytes(record: Record) -> int:
    return sum(entry.bytes for entry in record.files.values())


def _last_used(lock: Path) -> float:
    """Time stamp; a copy that was never used comes first."""
    return lock.stat().st_mtime if lock.is_file() else 0.0
