"""What a file really is: its digest, and whether its bytes are what its name says.

Enters: a local file. Leaves: its sha256, remembered for as long as the file stands untouched.
Refuses: pickles under any name, also inside zip and gzip, and files whose magic bytes contradict their suffix.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from fmops.errors import FmopsError, IntegrityError

# These suffixes promise a pickle; nothing here ever opens one.
PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill", ".bin"})
_MAGIC: dict[str, tuple[bytes, ...]] = {
    ".parquet": (b"PAR1",),
    ".gguf": (b"GGUF",),
    ".zip": (b"PK\x03\x04", b"PK\x05\x06"),
    ".whl": (b"PK\x03\x04",),
    ".gz": (b"\x1f\x8b",),
}
_SAFETENSORS_HEADER_LIMIT = 100_000_000
_NESTED_ARCHIVES = 3
# A file changed this shortly before it is read may change again without a new time stamp. File systems with whole
# seconds tick every one or two; the others as often as the kernel's clock, which is worth waiting for.
_COARSE_TICK_NS = 2_000_000_000
_FINE_TICK_NS = 20_000_000
_REMEMBERED = 100_000


class Digests:
    """sha256 of files, remembered by (device, inode, size, mtime, ctime) in one JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        self._changed = False
        if path.is_file():
            try:
                self._known = json.loads(path.read_bytes())
            except ValueError:
                # Only a memory: when it is torn, the files are hashed again.
                self._known = {}

    def of(self, path: Path) -> str:
        """The file's sha256; reads the file only when it is new or was touched."""
        key = _identity(path)
        if key in self._known:
            return self._known[key]
        settled = _settled(path)
        value = sha256(path)
        if settled and _identity(path) == key:
            self._known[key] = value
            self._changed = True
        return value

    def save(self) -> None:
        """Write what is new, atomically. A lost race costs only another hashing."""
        if not self._changed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        recent = dict(list(self._known.items())[-_REMEMBERED:])
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(recent))
        temporary.replace(self._path)
        self._changed = False


def _settled(path: Path) -> bool:
    """Whether any change from now on gives the file another time stamp; waits for a fine clock's next tick."""
    changed = path.stat().st_ctime_ns
    tick = _FINE_TICK_NS if changed % 1_000_000_000 else _COARSE_TICK_NS
    left = tick - (time.time_ns() - changed)
    if 0 < left <= _FINE_TICK_NS:
        time.sleep(left / 1e9)
        left = 0
    return left <= 0


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def read_json(path: Path, *, remedy: str) -> Any:
    """What a JSON file holds that only programs write.

    Raises:
        IntegrityError: it is torn or damaged; says `remedy`.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged: {error}. {remedy}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON Lines that only programs write. A row ends at a line feed alone: texts may hold U+2028 and its like."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file if line.strip()]


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pickle(path: Path) -> None:
    """Raise when the file is, or holds, a pickle; looks at names and first bytes only.

    Raises:
        IntegrityError: names the file, the member, and the formats that are read instead.
    """
    with path.open("rb") as file:
        found = _pickle_in(file, path.name, path.suffix.lower(), depth=0)
    if found:
        raise IntegrityError(
            f"{found}. A pickle runs code when it is opened, so none ever is. "
            "Give weights as safetensors or GGUF, and data as text, JSON Lines or Parquet."
        )


def refuse_disguised(path: Path) -> None:
    """Raise when the magic bytes are not those that the suffix promises.

    Raises:
        IntegrityError: names the file, its suffix and its first bytes.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(8)
        if suffix == ".safetensors":
            honest = _is_safetensors(file, path.stat().st_size)
        elif suffix in _MAGIC:
            honest = start.startswith(_MAGIC[suffix])
        else:
            return
        if honest and suffix == ".parquet":
            file.seek(-4, os.SEEK_END)
            honest = file.read(4) == b"PAR1"
    if not honest:
        raise IntegrityError(
            f"{path.name} is named {suffix} but is none: it starts with {start!r}, or is cut short. "
            "Fetch it again, or give it its right name."
        )


def _pickle_in(file: IO[bytes], name: str, suffix: str, *, depth: int) -> str | None:
    """Say where a pickle is, or nothing."""
    if suffix in PICKLE_SUFFIXES:
        return f"{name} has a suffix of pickles ({suffix})"
    start = file.read(9)
    file.seek(0)
    # Opcode PROTO, versions 2 to 5. A safetensors file may start so too, with its header length; whether it is one,
    # `refuse_disguised` looks.
    tensors = suffix == ".safetensors" and start[8:9] == b"{"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and not tensors:
        return f"{name} is a pickle"
    if start.startswith((b"PK\x03\x04", b"\x1f\x8b")) and depth >= _NESTED_ARCHIVES:
        return f"{name} nests archives more than {_NESTED_ARCHIVES} deep, and cannot be looked into"
    if start.startswith(b"PK\x03\x04"):
        return _pickle_in_zip(file, name, depth=depth)
    if start.startswith(b"\x1f\x8b"):
        inner = Path(name.removesuffix(".gz"))
        try:
            with gzip.open(file, "rb") as opened:
                return _pickle_in(BytesIO(opened.read(4096)), inner.name, inner.suffix.lower(), depth=depth + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise IntegrityError(f"{name} is a broken gzip file ({error}). Fetch it again.") from None
    return None


def _pickle_in_zip(file: IO[bytes], name: str, *, depth: int) -> str | None:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        # The head of a gzipped zip is no whole zip; a broken .zip is refused when it is read.
        return None
    with archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            suffix = Path(member.filename).suffix.lower()
            if suffix in PICKLE_SUFFIXES:
                return f"{name} holds {member.filename}, which has a suffix of pickles"
            if member.flag_bits & 0x1:
                raise FmopsError(f"{name}: {member.filename} is encrypted. Give the archive without a password.")
            with archive.open(member) as opened:
                start = opened.read(9)
                nested = start.startswith((b"PK\x03\x04", b"\x1f\x8b"))
                content = start + opened.read() if nested else start
            found = _pickle_in(BytesIO(content), f"{name}:{member.filename}", suffix, depth=depth + 1)
            if found:
                return found
    return None


def safetensors_header(file: IO[bytes]) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of a safetensors file that is open at its start, and where their bytes begin.

    Each tensor has `dtype`, `shape` and `data_offsets`, counted from there (https://huggingface.co/docs/safetensors).

    Raises:
        ValueError: it is none.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= _SAFETENSORS_HEADER_LIMIT:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(file.read(length))
    try:
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for entry in tensors.values():
            int(entry["data_offsets"][1])
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"no header of tensors: {error!r}") from error
    return tensors, 8 + length


def _is_safetensors(file: IO[bytes], size: int) -> bool:
    file.seek(0)
    try:
        tensors, start = safetensors_header(file)
    except ValueError:
        return False
    return start + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0) == size
