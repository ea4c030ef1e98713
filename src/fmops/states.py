"""Resume states in the bucket: what a training stage needs to go on when its machine is gone, disk and all.

Enters: a stage's folder of work while it runs. Leaves: its whole checkpoints and small files in the bucket, and back.
Refuses: a checkpoint without the file that is written last, which is torn; our own are compared with their digests by
who resumes, other frameworks' here. The states of a machine that was thought lost, once another one has taken over.

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

from fmops.errors import FmopsError, IntegrityError
from fmops.integrity import sha256
from fmops.shared import Shared, inside

EVERY_S = 15.0
SMALL_BYTES = 1_000_000
INDEX = "states.json"
"""Written last: the manifests of checkpoints, the digests of other files, and who holds it."""
OURS = "checkpoint-*"
OUTSIDE = {"torchtitan/checkpoint/step-*": ".metadata", "llama-factory/made/checkpoint-*": "trainer_state.json"}
"""Where other frameworks leave checkpoints, and the file that the first rank writes last into one. Of LLaMA-Factory's
other ranks a random state may come a moment later; its trainer goes on without."""
GROWING = ("torchtitan/curve.jsonl",)
"""Lines that belong to such a checkpoint and are written on while it is sent."""


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
        self._known: dict[str, str] = {}
        """Manifests of other frameworks' checkpoints: those have none of their own."""

    def take_over(self) -> None:
        """From now on nobody who began earlier changes what is there."""
        index, version = self._read()
        self._before = index.get("holder")
        self._write({**index, "holder": self._me}, version)

    def send(self) -> None:
        """Bring there what is whole here and was not sent yet; the index last.

        Raises:
            FmopsError: another machine has taken over.
        """
        try:
            manifests = {self._name(path): self._manifest_of(path, last) for path, last in _whole(self._work).items()}
            # After the checkpoints: what lies beside them is never older than they are.
            beside = {path.name: path for path in sorted(self._work.glob("*")) if _small(path)}
            files = {name: digest for name, digest in self._sent.get("files", {}).items() if name in GROWING}
            if manifests != self._sent.get("checkpoints"):
                beside |= self._snapshots()
            files |= {name: sha256(path) for name, path in beside.items()}
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
                self._upload(beside.get(name, self._work / name), digest)
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
        if any(_step(path.name) >= _step(newest) for path in _whole(self._work)):
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
        folder, ours = self._work / name, "/" not in name
        if ours and (folder / _manifest()).is_file():
            return
        for file, entry in json.loads(manifest)["files"].items():
            path = folder / inside(file)
            self._bucket.download(f"{self._place}/{entry['sha256']}", path)
            if not ours and sha256(path) != entry["sha256"]:
                path.unlink()
                raise IntegrityError(
                    f"{name}/{file} is not what was sent to {self._place}. Remove {self._place}/{INDEX} there to begin "
                    "anew, or run again."
                )
        if ours:
            (folder / _manifest()).write_text(manifest, "utf-8")

    def _name(self, checkpoint: Path) -> str:
        return checkpoint.relative_to(self._work).as_posix()

    def _manifest_of(self, checkpoint: Path, last: str) -> str:
        """Its own, or one made here that ends with the file which makes it whole: it is fetched in this order."""
        if last == _manifest():
            return (checkpoint / last).read_text("utf-8")
        name = self._name(checkpoint)
        if name not in self._known:
            paths = sorted(
                (path for path in checkpoint.rglob("*") if path.is_file()),
                key=lambda path: (path == checkpoint / last, path),
            )
            files = {
                path.relative_to(checkpoint).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
                for path in paths
            }
            self._known[name] = json.dumps({"files": files})
        return self._known[name]

    def _snapshots(self) -> dict[str, Path]:
        """Copies of what grows, up to the last whole line."""
        found = {}
        for name in GROWING:
            if (self._work / name).is_file():
                lines = (self._work / name).read_bytes()
                found[name] = self._work / "upload" / Path(name).name
                found[name].parent.mkdir(exist_ok=True)
                found[name].write_bytes(lines[: lines.rfind(b"\n") + 1])
        return found

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


def _whole(work: Path) -> dict[Path, str]:
    """Checkpoints by step, with the file that makes each whole."""
    found = [(path.parent, path.name) for path in work.glob(f"{OURS}/{_manifest()}")]
    for pattern, last in OUTSIDE.items():
        # The newest alone: a framework removes older ones when it likes, also while they are read.
        theirs = sorted(work.glob(f"{pattern}/{last}"), key=lambda path: _step(path.parent.name))
        found += [(path.parent, last) for path in theirs[-1:]]
    return dict(sorted(found, key=lambda each: _step(each[0].name)))


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def _small(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".tmp", ".jsonl") and path.stat().st_size <= SMALL_BYTES
