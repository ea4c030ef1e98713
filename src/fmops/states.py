"""Resume states in the bucket: what a training stage needs to go on when its machine is gone, disk and all.

Enters: a stage's folder of work while it runs. Leaves: its sealed checkpoints and small files in the bucket, and back.
Refuses: a checkpoint without a manifest, which is torn; what arrives is compared with its digests by who resumes. The
states of a machine that was thought lost, once another one has taken over.

In the bucket: files by their digest, so that two machines never touch each other's, and one index of them that moves by
compare-and-swap. It names who holds it: the machine that began last.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fmops.errors import FmopsError
from fmops.integrity import sha256
from fmops.shared import Shared, inside

EVERY_S = 15.0
SMALL_BYTES = 1_000_000
INDEX = "states.json"
"""Written last: the manifests of checkpoints, the digests of other files, and who holds it."""


@contextmanager
def mirrored(
    shared: Shared, key: str, work: Path, *, report: Callable[[str], None], every_s: float = EVERY_S
) -> Iterator[None]:
    """Fetch what an earlier attempt left, then send each checkpoint that is sealed while the block runs.

    The last ones are sent when the block ends, also by SIGTERM: a spot instance has two minutes for it. A bucket that
    cannot be reached is said once, and does not stop the training.
    """
    states = States(shared, key, work)
    # Who cannot write is told so as soon as there is something to send.
    with suppress(FmopsError):
        states.take_over()
    found = states.restore()
    if found:
        report(f"{found} was left in {shared.address} by another machine; going on from there")
    stop, last_error = threading.Event(), ""

    def send() -> None:
        nonlocal last_error
        try:
            states.send()
        except FmopsError as error:
            if str(error) != last_error:
                last_error = str(error)
                report(f"resume states do not reach the store: {error}")

    def watch() -> None:
        while not stop.wait(every_s):
            send()

    thread = threading.Thread(target=watch, name="resume states", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        send()


class States:
    """The resume states of one stage's work."""

    def __init__(self, shared: Shared, key: str, work: Path) -> None:
        self._bucket, self._work = shared.bucket, work
        self._place = self._bucket.outside(f"work/{{prefix}}{key}")
        self._me = uuid4().hex
        self._before: str | None = None
        """Who held it when this one began; without a right to write it still does."""
        self._sent: dict[str, Any] = {}
        self._there: set[str] = set()

    def take_over(self) -> None:
        """From now on nobody who began earlier changes what is there."""
        index, version = self._read()
        self._before = index.get("holder")
        self._write({**index, "holder": self._me}, version)

    def send(self) -> None:
        """Bring there what is sealed here and was not sent yet; the index last.

        Raises:
            FmopsError: another machine has taken over.
        """
        try:
            manifests = {path.name: (path / _manifest()).read_text("utf-8") for path in _sealed(self._work)}
            # After the checkpoints: what lies beside them is never older than they are.
            files = {path.name: sha256(path) for path in sorted(self._work.glob("*")) if _small(path)}
            sent = {"checkpoints": manifests, "files": files}
            if not manifests or sent == self._sent:
                return
            index, version = self._read()
            if index.get("holder") not in (self._me, self._before):
                raise FmopsError("another machine has taken over this stage, this one's are not wanted. Stop it.")
            for name, manifest in manifests.items():
                for file, entry in json.loads(manifest)["files"].items():
                    self._upload(self._work / name / file, entry["sha256"])
            for name, digest in files.items():
                self._upload(self._work / name, digest)
        except FileNotFoundError:
            # Training has removed an old one meanwhile: the next look finds what is there then.
            return
        self._write({**sent, "holder": self._me}, version)
        self._sent = sent

    def restore(self) -> str | None:
        """Fetch the newest set if it is newer than what is here; returns its newest checkpoint."""
        index, _ = self._read()
        manifests = index.get("checkpoints", {})
        if not manifests:
            return None
        newest = max(manifests, key=_step)
        if any(_step(path.name) >= _step(newest) for path in _sealed(self._work)):
            return None
        for name, digest in index["files"].items():
            self._bucket.download(f"{self._place}/{digest}", self._work / inside(name))
        for name in sorted(manifests, key=_step):
            self._fetch(inside(name), manifests[name])
        return str(newest)

    def _upload(self, path: Path, digest: str) -> None:
        if digest not in self._there:
            self._bucket.upload(path, f"{self._place}/{digest}", sha256=digest, memory=self._work / "upload")
            self._there.add(digest)

    def _fetch(self, name: str, manifest: str) -> None:
        folder = self._work / name
        if (folder / _manifest()).is_file():
            return
        for file, entry in json.loads(manifest)["files"].items():
            self._bucket.download(f"{self._place}/{entry['sha256']}", folder / inside(file))
        (folder / _manifest()).write_text(manifest, "utf-8")

    def _read(self) -> tuple[dict[str, Any], str | None]:
        """The index and its version."""
        found = self._bucket.read(f"{self._place}/{INDEX}")
        return (json.loads(found[0]), found[1]) if found else ({}, None)

    def _write(self, index: dict[str, Any], version: str | None) -> None:
        from fmops.adapters.s3 import Moved

        try:
            self._bucket.write(f"{self._place}/{INDEX}", json.dumps(index).encode(), seen=version)
        except Moved:
            raise FmopsError("another machine has taken over this stage at this moment. Run again.") from None


def _manifest() -> str:
    from fmops.adapters.resume import MANIFEST

    return MANIFEST


def _sealed(work: Path) -> list[Path]:
    found = [path.parent for path in work.glob(f"checkpoint-*/{_manifest()}")]
    return sorted(found, key=lambda path: _step(path.name))


def _step(name: str) -> int:
    return int(name.removeprefix("checkpoint-"))


def _small(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".tmp", ".jsonl") and path.stat().st_size <= SMALL_BYTES
