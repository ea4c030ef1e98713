"""Which training checkpoints may be trusted after a crash.

Enters: the folder in which a trainer writes `checkpoint-<step>`. Leaves: the newest one that is whole.
Refuses: a checkpoint without a manifest (torn while it was written) or with a file that is not what the manifest says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from fmops.faults import fault_site
from fmops.integrity import sha256
from fmops.store import sync

MANIFEST = "manifest.json"
KEPT = 2
"""Good checkpoints kept: one more than needed, for a disk that corrupts the newest."""
ALARM_S = 30.0
"""After so long, and again each time, somebody is told that training waits for the disk."""


class Sealer:
    """Seals checkpoints beside training: digests and fsyncs run in a thread while the next steps are computed.

    The bytes of a checkpoint are a snapshot already: they lie in files that nobody changes. At most one checkpoint is
    being sealed; who asks for a second waits for the first, so a slow disk slows training and never fills memory.
    """

    def __init__(self, *, report: Callable[[str], None], alarm_s: float = ALARM_S) -> None:
        self._report, self._alarm_s = report, alarm_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seal")
        self._pending: tuple[Path, Future[None]] | None = None

    def seal(self, checkpoint: Path, *, planned: Collection[int]) -> None:
        """Begin to seal `checkpoint`, then prune; `planned` as in `prune`. Errors are raised by the next `wait`."""
        self.wait()
        self._pending = checkpoint, self._thread.submit(_seal_and_prune, checkpoint, planned)

    def wait(self) -> None:
        """Return when nothing is pending.

        Raises:
            OSError: the pending checkpoint could not be sealed; it does not count.
        """
        while self._pending is not None:
            checkpoint, future = self._pending
            if not wait([future], timeout=self._alarm_s).done:
                self._report(
                    f"{checkpoint.name} has not reached the disk after {self._alarm_s:g} s; training waits for it"
                )
                continue
            self._pending = None
            future.result()

    @property
    def pending(self) -> Path | None:
        """The checkpoint that is being sealed."""
        return self._pending[0] if self._pending else None


def _seal_and_prune(checkpoint: Path, planned: Collection[int]) -> None:
    seal(checkpoint)
    prune(checkpoint.parent, planned=planned)


def seal(checkpoint: Path) -> None:
    """Make a checkpoint good: every file on disk, then the manifest of their digests, then its folder entry.

    The manifest's existence is the commit. Until its rename is durable the checkpoint does not exist.
    """
    files = {}
    for path in _files(checkpoint):
        sync(path)
        files[path.relative_to(checkpoint).as_posix()] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    fault_site("checkpoint-before-manifest")
    draft = checkpoint / (MANIFEST + ".tmp")
    draft.write_text(json.dumps({"files": files}, indent=1, sort_keys=True))
    sync(draft)
    fault_site("checkpoint-before-rename")
    draft.replace(checkpoint / MANIFEST)
    for folder in {path.parent for path in _files(checkpoint)} | {checkpoint}:
        sync(folder)
    sync(checkpoint.parent)
    fault_site("checkpoint-sealed")


def prune(folder: Path, *, planned: Collection[int]) -> None:
    """Remove all but the newest good checkpoints of the `planned` steps, and the newest of all.

    Others are written when the process is told to leave. They must not push out those that a rollback may need:
    where it goes back to would then depend on how often a run was interrupted.
    """
    good = [path for path in _newest_first(folder) if (path / MANIFEST).is_file()]
    kept = {*good[:1], *[path for path in good if step_of(path) in planned][:KEPT]}
    for path in good:
        if path in kept:
            continue
        fault_site("checkpoint-prune")
        # The manifest goes first: a half-removed checkpoint is then torn, not corrupt.
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def newest_good(folder: Path, *, report: Callable[[str], None], planned: Collection[int] | None = None) -> Path | None:
    """The newest whole checkpoint under `folder`, of the `planned` steps if they are given, or None.

    Torn ones are removed, a corrupt one is set aside as `rejected-…`; both are reported in one sentence each.
    """
    for path in _newest_first(folder):
        if planned is not None and step_of(path) not in planned:
            continue
        if not (path / MANIFEST).is_file():
            report(f"{path.name} was torn while it was written; passing over it")
            shutil.rmtree(path)
            continue
        fault = _fault(path)
        if fault is None:
            return path
        report(f"{path.name} is corrupt ({fault}); set aside, going back to the one before")
        _set_aside(path)
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a sealed checkpoint, or None."""
    try:
        stated = json.loads((checkpoint / MANIFEST).read_text("utf-8"))["files"]
        files = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in stated.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    found = {path.relative_to(checkpoint).as_posix() for path in _files(checkpoint)}
    for name, (digest, size) in sorted(files.items()):
        path = checkpoint / name
        if name not in found:
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != digest:
            return f"{name} does not match its digest"
    extra = sorted(found - set(files))
    return f"{extra[0]} does not belong to it" if extra else None


def _set_aside(checkpoint: Path) -> None:
    target = checkpoint.with_name(f"rejected-{checkpoint.name}")
    # One is enough to look into; more would fill the disk.
    for old in checkpoint.parent.glob("rejected-*"):
        shutil.rmtree(old)
    checkpoint.replace(target)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST))
