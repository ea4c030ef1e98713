"""Which training checkpoints may be trusted after a crash.

Enters: the folder in which a trainer writes `checkpoint-<step>`. Leaves: the newest one that is whole.
Refuses: a checkpoint without a manifest (torn while it was written) or with a file that is not what the manifest says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from fmops.faults import fault_site
from fmops.integrity import sha256
from fmops.store import sync

MANIFEST = "manifest.json"
KEPT = 2
"""Good checkpoints kept: one more than needed, for a disk that corrupts the newest."""


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
    sync(checkpoint)
    sync(checkpoint.parent)
    fault_site("checkpoint-sealed")


def prune(folder: Path) -> None:
    """Remove all but the newest good checkpoints."""
    good = [path for path in _newest_first(folder) if (path / MANIFEST).is_file()]
    for path in good[KEPT:]:
        fault_site("checkpoint-prune")
        # The manifest goes first: a half-removed checkpoint is then torn, not corrupt.
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def newest_good(folder: Path, *, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint under `folder`, or None.

    Torn ones are removed, a corrupt one is set aside as `rejected-…`; both are reported in one sentence each.
    """
    for path in _newest_first(folder):
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


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a sealed checkpoint, or None."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    found = {path.relative_to(checkpoint).as_posix() for path in _files(checkpoint)}
    for name, entry in sorted(files.items()):
        path = checkpoint / name
        if name not in found:
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256(path) != entry["sha256"]:
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
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST))
