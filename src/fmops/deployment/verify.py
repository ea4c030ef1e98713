"""Is a release on disk the one that was certified?

Enters: a release folder and the digests of its record. Leaves: its `Parity`.
Refuses: a missing, changed or extra file, a symbolic link, and parity that is missing, failed, or of other weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fmops.artifacts import Parity
from fmops.errors import IntegrityError
from fmops.integrity import sha256

PARITY = "parity.json"
RECORD = "record.json"
REMEDY = "Do not serve it. `fmops run` sets the artifact aside and makes it again."


def verify_release(path: Path, files: Mapping[str, str]) -> Parity:
    """Check every file of a release before it is loaded; `files` maps names to SHA-256 from its record.

    Raises:
        IntegrityError: names the first file that is wrong, and the remedy.
    """
    present = _present(path)
    if extra := sorted(present - files.keys() - {RECORD}):
        raise IntegrityError(f"{path.name} holds {extra[0]!r}, which its record does not list. {REMEDY}")
    for name, digest in sorted(files.items()):
        if name not in present:
            raise IntegrityError(f"{path.name} lacks {name!r}, which its record lists. {REMEDY}")
        if sha256(path / name) != digest:
            raise IntegrityError(f"{path.name}/{name} is not what its record says (sha256 {digest[:12]}…). {REMEDY}")
    return _certified(path, files)


def _present(path: Path) -> set[str]:
    """Names of all files below `path`."""
    names = set()
    for entry in path.rglob("*"):
        name = entry.relative_to(path).as_posix()
        if entry.is_symlink():
            raise IntegrityError(f"{path.name}/{name} is a symbolic link; a release holds plain files only. {REMEDY}")
        if not entry.is_dir():
            names.add(name)
    return names


def _certified(path: Path, files: Mapping[str, str]) -> Parity:
    if PARITY not in files:
        raise IntegrityError(f"{path.name} has no {PARITY}: nobody compared trainer and server. {REMEDY}")
    try:
        stated = json.loads((path / PARITY).read_bytes())
        parity, certified = Parity.model_validate(stated["parity"]), dict(stated["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path.name}/{PARITY} is not a parity report: {error!r}. {REMEDY}") from None
    if not parity.passed:
        raise IntegrityError(f"{path.name} failed parity: {'; '.join(parity.reasons) or 'no reason given'}. {REMEDY}")
    model = {name: digest for name, digest in files.items() if name.startswith("model/")}
    if certified != model:
        changed = sorted(name for name in certified.keys() | model.keys() if certified.get(name) != model.get(name))
        raise IntegrityError(f"{path.name}/{PARITY} certifies other files: {', '.join(changed)} differ. {REMEDY}")
    return parity
