"""Artifacts that several machines share: records, aliases and files in one bucket.

Enters: a committed folder and its record; keys. Leaves: the record that stands, verified files in a local folder.
Refuses: to overwrite a record or move an alias that somebody else has written, and files that fail their digest.

In the bucket: `records/<key>.json`, written last and only where none is: the commit. `artifacts/<key>/<digest>/…`, the
files below a digest of their contents: two writers with other bytes never touch each other's. `aliases.jsonl`: every
move; the last one of each alias holds. An empty record is one that was set aside. Nothing is ever deleted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fmops.errors import IntegrityError, alias_moved, unknown
from fmops.faults import fault_site
from fmops.integrity import sha256
from fmops.store import RECORD, AliasMove, Record, artifact_key, utc_now, write_atomically

if TYPE_CHECKING:
    from fmops.adapters.s3 import Bucket, Object

ALIASES = "aliases.jsonl"
FILES_AT_ONCE = 4
RECORDS_AT_ONCE = 16


class Shared:
    """One lifecycle's artifacts in a bucket."""

    def __init__(self, address: str, *, cache: Path, cache_bytes: int | None = None) -> None:
        """Open an address; nothing is asked of it yet.

        Args:
            address: s3://bucket/prefix.
            cache: a local folder that keeps records, which never change under one version.
            cache_bytes: bounds a workspace's copies of artifacts; None: half its disk.
        """
        scheme = address.partition("://")[0]
        if scheme != "s3":
            raise unknown("scheme of a store", scheme, ["s3"])
        self.address = address.rstrip("/")
        self.cache_bytes = cache_bytes
        self._cache = cache

    @cached_property
    def bucket(self) -> Bucket:
        """The objects behind it."""
        from fmops.adapters.s3 import Bucket

        return Bucket(self.address)

    def uri(self, record: Record) -> str:
        """Where an artifact's files lie."""
        return f"{self.address}/{_folder(record)}"

    def find(self, key: str) -> Record | None:
        """The committed record, or None."""
        found = self.bucket.read(_name(key))
        return self._record(_name(key), found[0]) if found and found[0] else None

    def records(self) -> list[Record]:
        """Every committed record, in the order in which the bucket's own clock saw them."""
        listed = [each for each in self.bucket.list("records/") if each.bytes]
        with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
            found = zip(listed, pool.map(self._listed, listed), strict=True)
            known = [(each.modified, record.created, record.key, record) for each, record in found if record]
        return [record for *_, record in sorted(known, key=lambda each: each[:3])]

    def publish(self, record: Record, folder: Path, *, memory: Path) -> Record:
        """Bring an artifact there, its record last; returns the record that stands, which may be another writer's."""
        bucket = self.bucket

        def send(name: str) -> None:
            bucket.upload(folder / name, f"{_folder(record)}/{name}", sha256=record.files[name].sha256, memory=memory)

        _each(send, record.files)
        fault_site("bucket-before-record")
        from fmops.adapters.s3 import Moved

        name, content = _name(record.key), (record.model_dump_json(indent=1) + "\n").encode()
        while True:
            found = bucket.read(name)
            if found and found[0]:
                return self._record(name, found[0])
            try:
                bucket.write(name, content, seen=found[1] if found else None)
            except Moved:
                continue
            fault_site("bucket-after-record")
            return record

    def fetch(self, record: Record, folder: Path) -> None:
        """Make a local folder what the record says: missing files come from the bucket, each compared with its digest.

        Raises:
            IntegrityError: the bucket does not hold what the record says; names the file.
        """

        def bring(name: str) -> None:
            path, entry = folder / inside(name), record.files[name]
            if not path.is_symlink() and path.is_file() and sha256(path) == entry.sha256:
                return
            if path.is_symlink():
                path.unlink()
            there = self.bucket.download(f"{_folder(record)}/{name}", path)
            found = sha256(path) if there else None
            if found != entry.sha256:
                path.unlink(missing_ok=True)
                raise IntegrityError(
                    f"{self.uri(record)}/{name} is not what its record says (sha256 {entry.sha256[:12]}…): "
                    + (f"its sha256 is {found[:12]}…." if found else "it is missing.")
                )

        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
        for path in sorted(folder.rglob("*"), reverse=True):
            if not path.is_dir() and path.relative_to(folder).as_posix() not in record.files:
                path.unlink()
        _each(bring, record.files)

    def fault(self, record: Record) -> str | None:
        """None if every file is there with its size, else the first that is not. Bytes are compared by `fetch`."""
        listed = {each.name: each.bytes for each in self.bucket.list(f"{_folder(record)}/")}
        for name, entry in record.files.items():
            size = listed.get(f"{_folder(record)}/{name}")
            if size is None:
                return f"{name} is missing in {self.uri(record)}"
            if size != entry.bytes:
                return f"{name} has {size} bytes in {self.uri(record)}, its record says {entry.bytes}"
        return None

    def set_aside(self, record: Record) -> str:
        """End a damaged artifact, keeping a copy for inspection; returns its address."""
        from fmops.adapters.s3 import Moved

        target = f"quarantine/{record.key}-{time.time_ns()}"
        for name in record.files:
            self.bucket.copy(f"{_folder(record)}/{name}", f"{target}/{name}")
        found = self.bucket.read(_name(record.key))
        if found and found[0] and self._record(_name(record.key), found[0]).digest == record.digest:
            self.bucket.replace(f"{target}/{RECORD}", found[0])
            # Moved: another machine found the same and was quicker; what it has made since stands.
            with suppress(Moved):
                self.bucket.write(_name(record.key), b"", seen=found[1])
        return f"{self.address}/{target}"

    def set_aside_before(self, key: str) -> Record | None:
        """The record of an artifact that was ended as damaged, the newest of several."""
        names = [each.name for each in self.bucket.list(f"quarantine/{key}-") if each.name.endswith(f"/{RECORD}")]
        found = self.bucket.read(max(names)) if names else None
        return self._record(_name(key), found[0]) if found else None

    def aliases(self) -> dict[str, str]:
        """Alias → artifact key, as of now."""
        return {alias: move.after for alias, move in self._moves()[0].items()}

    def move_aliases(self, targets: Mapping[str, str], *, expected: Mapping[str, str | None], why: str) -> None:
        """Point aliases at artifacts, all or none, if each in `expected` still points where the caller last saw it.

        Raises:
            FmopsError: somebody moved one in between; nothing is changed.
        """
        from fmops.adapters.s3 import Moved

        while True:
            moves, log, version = self._moves()
            now = {alias: move.after for alias, move in moves.items()}
            for alias, seen in expected.items():
                if now.get(alias) != seen:
                    raise alias_moved(alias, now.get(alias), seen)
            stamp = utc_now()
            made = [
                AliasMove(alias=alias, before=now.get(alias), after=after, why=why, moved=stamp)
                for alias, after in targets.items()
            ]
            lines = "".join(move.model_dump_json() + "\n" for move in made).encode()
            try:
                self.bucket.write(ALIASES, log + lines, seen=version)
            except Moved:
                continue
            return

    def keep(self, name: str, path: Path) -> None:
        """Put a small file beside the artifacts (a signature); a newer one takes its place."""
        self.bucket.replace(name, path.read_bytes())

    def bring(self, name: str, path: Path) -> None:
        """Fetch a small file that was kept, if there is one."""
        found = self.bucket.read(name)
        if found:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(found[0])

    def _moves(self) -> tuple[dict[str, AliasMove], bytes, str | None]:
        """The last move of each alias, the log as it is, and its version."""
        found = self.bucket.read(ALIASES)
        log, version = found if found else (b"", None)
        moves = [AliasMove.model_validate_json(line) for line in log.splitlines()]
        return {move.alias: move for move in moves}, log, version

    def _listed(self, listed: Object) -> Record | None:
        """A record of the listing, from the local cache when that holds this very version; None: set aside by now."""
        stem = PurePosixPath(listed.name).stem
        kept = self._cache / f"{stem}.{listed.version.strip(chr(34))}.json"
        if kept.is_file():
            return self._record(listed.name, kept.read_bytes())
        found = self.bucket.read(listed.name)
        if found is None or not found[0]:
            return None
        record = self._record(listed.name, found[0])
        write_atomically(kept, found[0].decode())
        return record

    def _record(self, name: str, content: bytes) -> Record:
        try:
            record = Record.model_validate_json(content)
        except ValueError as error:
            raise IntegrityError(
                f"{self.address}/{name} is not a record: {error}. Restore its version before, or empty the object; "
                "`fmops run` makes the artifact again."
            ) from None
        # A stage named `../x` would have its files put outside the workspace.
        if _name(artifact_key(record.stage, record.fingerprint)) != name or "/" in record.key:
            raise IntegrityError(f"{self.address}/{name} is the record of {record.key}. Restore its version before.")
        return record


def _name(key: str) -> str:
    return f"records/{key}.json"


def _folder(record: Record) -> str:
    return f"artifacts/{record.key}/{record.digest[:16]}"


def inside(name: str) -> str:
    """The name, if it stays inside a folder: a record may have been written by anybody."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise IntegrityError(f"a record names a file {name!r}, which points outside its folder.")
    return name


def _each(work: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for _ in pool.map(work, names):
            pass
