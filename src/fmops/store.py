"""Content-addressed artifacts in a workspace folder, and in a bucket that several workspaces share.

Enters: a folder that a stage has filled, and the record that describes it. Leaves: committed, verified artifacts.
Refuses: to overwrite, to load what fails its digest, and to move an alias that somebody else has moved.
With a bucket, records and aliases there are the truth, and the workspace keeps verified copies of what it has used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from fmops.artifacts import KINDS, Artifact, Frozen, Source
from fmops.errors import READ_ONLY, FmopsError, IntegrityError, alias_moved, first_mistake
from fmops.faults import fault_site
from fmops.integrity import read_json, sha256
from fmops.locks import hold, locked

if TYPE_CHECKING:
    from fmops.shared import Shared

RECORD = "record.json"
WORK = ".work"
"""Scratch and resume state inside an artifact folder; gone when the record is written."""


class FileEntry(Frozen):
    """One file of an artifact."""

    sha256: str
    bytes: int


class InputRef(Frozen):
    """What went into an artifact."""

    kind: Literal["artifact", "source"]
    ref: str = Field(description="Artifact key (`stage-fingerprint16`) or source URIs.")
    digest: str = Field(description="Of the content; this is what the fingerprint sees.")


class Record(Frozen):
    """Why an artifact is what it is. Written last: a folder without it does not exist."""

    node: str
    stage: str
    kind: str
    version: int
    fingerprint: str
    digest: str
    seed: int
    config: dict[str, Any]
    inputs: dict[str, InputRef]
    files: dict[str, FileEntry]
    artifact: dict[str, Any]
    environment: dict[str, Any] = Field(default={}, description="Versions, commits, machine.")
    cost: dict[str, float] = Field(
        default={}, description="wall_s, cpu_s, peak_bytes, tokens_per_s… of the last attempt."
    )
    created: str = Field(description="UTC, ISO 8601.")

    @property
    def key(self) -> str:
        """Folder name in the store."""
        return artifact_key(self.stage, self.fingerprint)


class AliasMove(Frozen):
    """One move of an alias."""

    alias: str
    before: str | None
    after: str
    why: str
    moved: str


def artifact_key(stage: str, fingerprint: str) -> str:
    """Folder name of an artifact: stage and the first 16 digits of its fingerprint."""
    return f"{stage}-{fingerprint[:16]}"


def fingerprint_of(*, stage: str, version: int, seed: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash of everything that decides an artifact's content; `inputs` maps names to content digests."""
    return _hash_json({"stage": stage, "version": version, "seed": seed, "config": config, "inputs": inputs})


def source_digest(source: Source) -> str:
    """Hash of a source's file names and contents, in name order."""
    return _hash_json([[file.name, file.sha256] for file in source.files])


class Store:
    """A workspace: `artifacts/`, `runs/`, `quarantine/`, `aliases.json`; or one of several round a bucket."""

    def __init__(self, root: Path, *, shared: Shared | None = None) -> None:
        self.root = root
        self.artifacts = root / "artifacts"
        self.runs = root / "runs"
        self.shared = shared

    @property
    def place(self) -> str:
        """Where records and aliases are kept, for people."""
        return self.shared.address if self.shared else str(self.root)

    def folder(self, stage: str, fingerprint: str) -> Path:
        """Where an artifact lies, or will lie once it is made or brought here."""
        return self.artifacts / artifact_key(stage, fingerprint)

    def uri(self, record: Record) -> str:
        """Where an artifact's files can be had from."""
        return self.shared.uri(record) if self.shared else self.folder(record.stage, record.fingerprint).as_uri()

    def find(self, stage: str, fingerprint: str) -> Record | None:
        """The committed record, or None."""
        if self.shared:
            return self.shared.find(artifact_key(stage, fingerprint))
        return self._read(self.folder(stage, fingerprint))

    def get(self, key: str) -> Record:
        """The record of a whole key.

        Raises:
            FmopsError: there is none; nothing may stand in for it.
        """
        record = self.shared.find(key) if self.shared else self._read(self.artifacts / key)
        if record is None:
            raise FmopsError(f"the record of {key} is gone from {self.place}. Put it back from a copy.")
        return record

    def remembered(self, key: str) -> Record:
        """As `get`, though the artifact may be set aside and not made again yet."""
        if self.shared:
            return self.shared.find(key) or self.shared.set_aside_before(key) or self.get(key)
        folders = [self.artifacts / key, *sorted(self.root.glob(f"quarantine/{key}-*"), reverse=True)]
        return next((record for record in map(self._read, folders) if record), None) or self.get(key)

    def by_key(self, key: str) -> Record:
        """The one record that is meant: by alias, by node (its newest), or by the beginning of a key or fingerprint.

        Raises:
            FmopsError: none or several match.
        """
        key, records = self.aliases().get(key, key), self.records()
        found = [record for record in records if record.node == key][-1:] or [
            record for record in records if record.key.startswith(key) or record.fingerprint.startswith(key)
        ]
        if len(found) == 1:
            return found[0]
        if not found:
            known = ", ".join(sorted({record.key for record in records})) or "none yet"
            raise FmopsError(f"no artifact {key!r} in {self.place}. Known: {known}.")
        raise FmopsError(f"{key!r} fits {len(found)} artifacts: {', '.join(r.key for r in found)}. Give more of it.")

    def records(self) -> list[Record]:
        """Every committed record, oldest first."""
        return self.shared.records() if self.shared else self.here()

    def load(self, record: Record) -> Artifact:
        """The typed artifact behind a record, its files here. They are not all read; see `verify`."""
        return KINDS[record.kind].model_validate({**record.artifact, "path": self.files(record)})

    def files(self, record: Record) -> Path:
        """The folder of a committed artifact on this machine; it stays while this process lives.

        Raises:
            IntegrityError: the bucket does not hold what the record says; the artifact is set aside there.
        """
        from fmops.copies import bring

        return bring(self, self.shared, record) if self.shared else self.folder(record.stage, record.fingerprint)

    def made_here(self, stage: str, fingerprint: str) -> Record | None:
        """What this workspace made, whole, whether or not it has reached the bucket."""
        record = self._read(self.folder(stage, fingerprint))
        return record if record and not self._fault(record) else None

    def commit(self, record: Record) -> Record:
        """Make an artifact exist: its files are on disk before its record is, and the record appears whole or not.

        Returns the record that stands: in a bucket another machine may have been quicker.
        """
        self.commit_here(record)
        if self.shared is None:
            return record
        hold(self.use_lock(record.key))
        folder = self.folder(record.stage, record.fingerprint)
        return self.shared.publish(record, folder, memory=folder / WORK / "upload")

    def commit_here(self, record: Record) -> None:
        """Make it exist in this workspace."""
        folder = self.folder(record.stage, record.fingerprint)
        for name in record.files:
            sync(folder / name)
        for sub in {(folder / name).parent for name in record.files} | {folder}:
            sync(sub)
        fault_site("commit-before-record")
        write_atomically(folder / RECORD, record.model_dump_json(indent=1) + "\n")
        fault_site("commit-after-record")
        sync(self.artifacts)

    def intact(self, record: Record) -> str | None:
        """None if every file is what the record says, else the first fault.

        Files that nobody touched since they were last verified are not read again: a file's change time cannot be set
        back, and the record's own time moves forward with each verification. Of what is in the bucket alone, sizes are
        compared; bytes are when it is brought here.
        """
        if self.shared is None:
            return self._fault(record)
        here = self._read(self.folder(record.stage, record.fingerprint))
        if here and here.digest == record.digest and not self._fault(here):
            return None
        return self.shared.fault(record)

    def _fault(self, record: Record) -> str | None:
        folder = self.folder(record.stage, record.fingerprint)
        verified_ns = (folder / RECORD).stat().st_mtime_ns
        reread = False
        for name, entry in record.files.items():
            path = folder / name
            if not path.is_file() or path.is_symlink():
                return f"{name} is missing"
            status = path.stat()
            if status.st_size != entry.bytes:
                return f"{name} has {status.st_size} bytes, its record says {entry.bytes}"
            if max(status.st_ctime_ns, status.st_mtime_ns) >= verified_ns:
                reread = True
                if sha256(path) != entry.sha256:
                    return f"{name} differs from its digest {entry.sha256[:12]}…"
        if reread:
            try:
                os.utime(folder / RECORD)
            except OSError as error:
                # On a disk that may only be read nothing is remembered: the files are read again next time.
                if error.errno not in READ_ONLY:
                    raise
        return None

    def verify(self, record: Record) -> None:
        """Read every file of an artifact again.

        Raises:
            IntegrityError: names the file and the remedy.
        """
        folder = self.files(record)
        for name, entry in record.files.items():
            path = folder / name
            if not path.is_file() or sha256(path) != entry.sha256:
                raise IntegrityError(
                    f"{record.key}/{name} is not what its record says (sha256 {entry.sha256[:12]}…). "
                    "`fmops run` sets the artifact aside and makes it again."
                )

    def quarantine(self, record: Record) -> str:
        """Move a damaged artifact out of the way, keeping it for inspection; returns where it lies."""
        if self.shared:
            return self.shared.set_aside(record)
        target = self.root / "quarantine" / f"{record.key}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        self.folder(record.stage, record.fingerprint).rename(target)
        return str(target)

    def aliases(self) -> dict[str, str]:
        """Alias → artifact key, as of now."""
        if self.shared:
            return self.shared.aliases()
        path = self.root / "aliases.json"
        remedy = "Write it again as {alias: artifact}, each with the `after` of its last line in aliases.jsonl."
        moved: dict[str, str] = read_json(path, remedy=remedy) if path.is_file() else {}
        return moved

    def move_aliases(self, targets: Mapping[str, str], *, expected: Mapping[str, str | None], why: str) -> None:
        """Point aliases at artifacts, all or none, if each in `expected` still points where the caller last saw it.

        Raises:
            FmopsError: somebody moved one in between; nothing is changed.
        """
        if self.shared:
            self.shared.move_aliases(targets, expected=expected, why=why)
            return
        with locked(self.root / "aliases.lock", wait_s=10):
            now = self.aliases()
            for alias, seen in expected.items():
                if now.get(alias) != seen:
                    raise alias_moved(alias, now.get(alias), seen)
            self._log_moves(targets, now=now, why=why)
            fault_site("aliases-between-log-and-file")
            write_atomically(self.root / "aliases.json", json.dumps({**now, **targets}, indent=1) + "\n")

    def use_lock(self, key: str) -> Path:
        """The lock that says which local copies are in use, and when they last were."""
        return self.root / "locks" / f"{key}.use"

    def here(self) -> list[Record]:
        """Every record whose files are in this workspace, oldest first."""
        found = [self._read(folder) for folder in self.artifacts.glob("*")] if self.artifacts.is_dir() else []
        return sorted((record for record in found if record), key=lambda record: (record.created, record.key))

    def _log_moves(self, targets: Mapping[str, str], *, now: Mapping[str, str], why: str) -> None:
        """Append the moves; those that a killed process logged, but did not make, stand there already."""
        path, stamp = self.root / "aliases.jsonl", utc_now()
        lines = path.read_bytes().splitlines() if path.is_file() else []
        # A power cut may have torn the last line.
        moves = [AliasMove.model_validate_json(line) for line in lines if line.endswith(b"}")]
        logged = {move.alias: (move.before, move.after) for move in moves}
        with path.open("a") as log:
            for alias, after in targets.items():
                move = AliasMove(alias=alias, before=now.get(alias), after=after, why=why, moved=stamp)
                if logged.get(alias) != (move.before, move.after):
                    log.write(move.model_dump_json() + "\n")
            log.flush()
            os.fsync(log.fileno())

    @staticmethod
    def _read(folder: Path) -> Record | None:
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            return Record.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise IntegrityError(
                f"{path} is not a record: {first_mistake(error)}. Move {folder.name} away; `fmops run` makes it again."
            ) from None


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Digest every file of an artifact folder, in name order; scratch is left out.

    Raises:
        IntegrityError: a symbolic link, which could point anywhere later.
    """
    entries = {}
    for path in _files(folder):
        if path.is_symlink():
            raise IntegrityError(f"{path} is a symbolic link; an artifact holds plain files only.")
        entries[path.relative_to(folder).as_posix()] = FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
    return entries


def content_digest(files: Mapping[str, FileEntry]) -> str:
    """Hash of file names and contents: the identity of what an artifact holds."""
    return _hash_json([[name, files[name].sha256] for name in sorted(files)])


def discard_work(folder: Path) -> None:
    """Remove scratch and resume state of a finished stage."""
    shutil.rmtree(folder / WORK, ignore_errors=True)


def write_atomically(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a file that appears whole or not at all, even through a power cut; `mode` as open(2), less the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(partial, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync(path.parent)


def utc_now(clock: Callable[[], float] = time.time) -> str:
    """The time in UTC, ISO 8601, to the microsecond, so that records sort in the order they were made."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(clock(), UTC).isoformat(timespec="microseconds")


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if relative.parts[0] == WORK or relative.as_posix() == RECORD or path.name.endswith(".tmp"):
            continue
        if path.is_symlink() or path.is_file():
            yield path


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_json(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
