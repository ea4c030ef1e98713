"""Resume states in the bucket: what a training stage needs to go on when its machine is gone, disk and all.

Enters: a stage's folder of work while it runs. Leaves: its sealed checkpoints and small files in the bucket, and back.
Refuses: a checkpoint without a manifest, which is torn; what arrives is compared with its digests by who resumes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fmops.errors import FmopsError
from fmops.shared import Shared, inside

EVERY_S = 15.0
SMALL_BYTES = 1_000_000
INDEX = "states.json"
"""Written last: which checkpoints and files belong together."""


@contextmanager
def mirrored(
    shared: Shared, key: str, work: Path, *, report: Callable[[str], None], every_s: float = EVERY_S
) -> Iterator[None]:
    """Fetch what an earlier attempt left, then send each checkpoint that is sealed while the block runs.

    The last ones are sent when the block ends, also by SIGTERM: a spot instance has two minutes for it. A bucket that
    cannot be reached is said once, and does not stop the training.
    """
    states = States(shared, key, work)
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
        self._sent: set[str] = set()
        self._index = b""

    def send(self) -> None:
        """Bring there what is sealed here and was not sent yet; the index last."""
        names = [path.name for path in _sealed(self._work)]
        for name in names:
            if name not in self._sent:
                # Training may remove an old one meanwhile; then it is no longer wanted.
                with suppress(FileNotFoundError):
                    self._send(name)
                    self._sent.add(name)
        if not names:
            return
        # After the checkpoints: what lies beside them is never older than they are.
        files = [path for path in sorted(self._work.glob("*")) if path.is_file() and _small(path)]
        for path in files:
            self._bucket.replace(f"{self._place}/{path.name}", path.read_bytes())
        index = json.dumps({"checkpoints": names, "files": [path.name for path in files]}).encode()
        if index != self._index:
            self._bucket.replace(f"{self._place}/{INDEX}", index)
            self._index = index

    def restore(self) -> str | None:
        """Fetch the newest set if it is newer than what is here; returns its newest checkpoint."""
        found = self._bucket.read(f"{self._place}/{INDEX}")
        if found is None:
            return None
        index = json.loads(found[0])
        newest = max(index["checkpoints"], key=_step)
        if any(_step(path.name) >= _step(newest) for path in _sealed(self._work)):
            return None
        for name in index["files"]:
            self._bucket.download(f"{self._place}/{name}", self._work / inside(name))
        for name in sorted(index["checkpoints"], key=_step):
            self._fetch(inside(name))
        return str(newest)

    def _send(self, name: str) -> None:
        from fmops.adapters.resume import MANIFEST

        folder = self._work / name
        manifest = (folder / MANIFEST).read_bytes()
        for file, entry in json.loads(manifest)["files"].items():
            self._bucket.upload(
                folder / file, f"{self._place}/{name}/{file}", sha256=entry["sha256"], memory=self._work / "upload"
            )
        self._bucket.replace(f"{self._place}/{name}/{MANIFEST}", manifest)

    def _fetch(self, name: str) -> None:
        from fmops.adapters.resume import MANIFEST

        found = self._bucket.read(f"{self._place}/{name}/{MANIFEST}")
        folder = self._work / name
        if found is None or (folder / MANIFEST).is_file():
            return
        for file in json.loads(found[0])["files"]:
            self._bucket.download(f"{self._place}/{name}/{file}", folder / inside(file))
        (folder / MANIFEST).write_bytes(found[0])


def _sealed(work: Path) -> list[Path]:
    from fmops.adapters.resume import MANIFEST

    found = [path.parent for path in work.glob(f"checkpoint-*/{MANIFEST}")]
    return sorted(found, key=lambda path: _step(path.name))


def _step(name: str) -> int:
    return int(name.removeprefix("checkpoint-"))


def _small(path: Path) -> bool:
    return path.stat().st_size <= SMALL_BYTES and not path.name.endswith(".tmp")
