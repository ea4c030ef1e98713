"""s3://, http:// and every other fsspec URL — a download that goes on where it broke.

Enters: an address of a file, a folder or a glob. Leaves: local copies, of the size and version the remote states.
Refuses: chained URLs, files that change while they are read, and schemes whose client is not installed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from fmops.errors import FmopsError, IntegrityError
from fmops.sources import Fetched, Report

CHUNK_BYTES = 8 * 1024 * 1024
# Wrappers and references of fsspec that are no place where a file lies.
_NO_STORES = {
    "simplecache",
    "filecache",
    "blockcache",
    "cached",
    "reference",
    "dask",
    "generic",
    "data",
    "dir",
    "pyscript",
}
# What stores call the state of a file. Of each file those that its store knows are compared.
_VERSION_KEYS = ("ETag", "etag", "sha256", "mtime", "LastModified", "Last-Modified", "last_modified", "created", "size")


def known_schemes() -> set[str]:
    """Every scheme that fsspec has a client for, installed or not."""
    return set(fsspec.available_protocols()) - _NO_STORES


def fetch_remote(address: str, *, cache: Path, kept: Fetched | None, report: Report) -> Fetched:
    """Download every file that the address names, unless the remote says that nothing changed.

    Raises:
        FmopsError: no such file, no client for the scheme, or the store cannot be reached.
        IntegrityError: a file went on changing while it was downloaded.
    """
    folder = cache / "remote" / hashlib.sha256(address.encode()).hexdigest()[:24]
    try:
        fs, root = fsspec.core.url_to_fs(address, skip_instance_cache=True, use_listings_cache=False)
        paths = _paths(fs, root)
        versions = {path: _version(fs, path) for path in paths}
        version = hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()
        if kept is not None and kept.version == version:
            return kept
        files = {}
        for path, name in paths.items():
            report(f"downloading {name} from {_public(address)}")
            files[name] = _download(fs, path, target=folder / name)
    except ImportError as error:
        raise FmopsError(f"{_public(address)}: {error}. Install the client, e.g. `pip install 'fmops[s3]'`.") from None
    except _unreachable() as error:
        cause = error.__cause__
        if isinstance(error, FileNotFoundError) and _answered_no(cause):
            raise FmopsError(
                f"no file at {_public(address)}. Check the address; it may be a file, a folder or a glob."
            ) from None
        if kept is not None:
            report(f"{_public(address)} cannot be reached; using the copy fetched before")
            return kept
        raise FmopsError(
            f"{_public(address)} cannot be reached ({type(cause or error).__name__}). Check the network and the "
            "credentials, and run again: the download goes on where it broke."
        ) from None
    return Fetched(files=files, version=version, pinned=False)


def _answered_no(cause: BaseException | None) -> bool:
    """Whether the store itself said that there is no such file: fsspec says so of an unreachable server, too."""
    code = getattr(cause, "response", {}).get("Error", {}).get("Code")  # botocore's
    return cause is None or getattr(cause, "status", None) in (404, 410) or code in ("404", "NoSuchBucket", "NoSuchKey")


def _unreachable() -> tuple[type[BaseException], ...]:
    """What the clients in use raise when a store cannot be reached."""
    found: list[type[BaseException]] = [OSError]
    for module, name in (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def _public(address: str) -> str:
    """The address without user, password and query, which may be secrets."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _paths(fs: Any, root: str) -> dict[str, str]:
    """Remote path → stable name, in name order."""
    wildcard = min((root.find(sign) for sign in "*[" if sign in root), default=None)
    if wildcard is not None:
        found, base = [path for path in fs.glob(root) if fs.isfile(path)], root[:wildcard].rpartition("/")[0]
    elif fs.info(root)["type"] == "directory":
        found, base = fs.find(root), root
    else:
        found, base = [root], root.rpartition("/")[0]
    if not found:
        raise FileNotFoundError(root)
    depth = len(_segments(base))
    named = {path: "/".join(_segments(path)[depth:]) for path in sorted(found)}
    for name in named.values():
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise IntegrityError(f"the store names a file {name!r}, which points outside its folder.")
    return named


def _segments(path: str) -> list[str]:
    return [part for part in (urlsplit(path).path if "://" in path else path).split("/") if part]


def _version(fs: Any, path: str) -> dict[str, str]:
    info = fs.info(path)
    return {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}


def _download(fs: Any, path: str, *, target: Path) -> Path:
    """Fetch one file beside its target; a part that is there already is kept when the remote is unchanged."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part, state = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.state")
    for _ in range(2):
        version = _version(fs, path)
        if not (part.is_file() and state.is_file() and json.loads(state.read_bytes()) == version):
            part.unlink(missing_ok=True)
            state.write_text(json.dumps(version))
        _append(fs, path, part=part)
        size = int(version["size"]) if "size" in version else part.stat().st_size
        if _version(fs, path) == version and part.stat().st_size == size:
            part.replace(target)
            state.unlink()
            return target
        part.unlink()
    raise IntegrityError(f"{path} changed while it was downloaded, twice. Fetch it when nobody writes it.")


def _append(fs: Any, path: str, *, part: Path) -> None:
    with fs.open(path, "rb", block_size=CHUNK_BYTES) as source, part.open("ab") as file:
        if file.tell():
            if source.seekable():
                source.seek(file.tell())
            else:
                # The store cannot start in the middle: begin again.
                file.truncate(0)
        while chunk := source.read(CHUNK_BYTES):
            file.write(chunk)
            file.flush()
