"""The write protocol of resume states, against every crash, every damaged byte, and slow or full disks.

The crash states are enumerated as ALICE does (Pillai et al., OSDI 2014): the operations of a real save are recorded;
after each prefix, whatever was not synced may be lost, kept, torn or out of order.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fmops.adapters import resume
from fmops.stage import StageContext

SECTOR = 512


def contents(step: int) -> dict[str, bytes]:
    """Files of a resume state, distinct for each step; one spans several sectors."""
    return {
        "model.safetensors": bytes((step * 31 + i) % 251 for i in range(3 * SECTOR + 17)),
        "optimizer.pt": f"moments {step}".encode() * 40,
        "fmops.json": b'{"step": %d}' % step,
    }


def write_state(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name, raw in contents(step).items():
        (checkpoint / name).write_bytes(raw)
    return checkpoint


def read_state(checkpoint: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in checkpoint.iterdir() if not p.name.startswith(resume.MANIFEST)}


@dataclass
class Operation:
    """One change of the file system; `durable` from this many operations on, whatever happens."""

    kind: str
    path: Path
    other: Path | None = None
    data: bytes = b""
    durable: int = sys.maxsize


class Recorder:
    """What this process changes under a folder: audit events, and fsync by way of a shim."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[Operation] = []
        self.acknowledged: list[tuple[int, int]] = []
        """(operations so far, step) at each moment the protocol says that a step is safe."""
        self._on = False
        self._fsync = os.fsync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple) -> None:
        if not self._on or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = Path(os.fsdecode(args[0])) if isinstance(args[0], str | bytes | os.PathLike) else None
        if path is None or not path.is_relative_to(self.root):
            # rmtree names entries relative to a descriptor.
            descriptor = args[-1] if isinstance(args[-1], int) and args[-1] >= 0 else None
            if path is None or path.is_absolute() or descriptor is None or event == "open":
                return
            path = Path(f"/proc/self/fd/{descriptor}").readlink() / path
            if not path.is_relative_to(self.root):
                return
        if event == "open":
            if args[2] & (os.O_WRONLY | os.O_RDWR):
                self.operations.append(Operation("write", path))
        elif event == "os.rename":
            self._fill()
            self.operations.append(Operation("rename", path, other=Path(os.fsdecode(args[1]))))
        else:
            self._fill()
            self.operations.append(Operation(event.removeprefix("os."), path))

    def _fill(self) -> None:
        """A write's bytes are known once the next operation on the folder begins."""
        for operation in self.operations:
            if operation.kind == "write" and not operation.data and operation.path.is_file():
                operation.data = operation.path.read_bytes()

    def fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self._on = False
        self._fill()
        now = len(self.operations)
        self.operations.append(Operation("fsync", path, durable=now))
        for operation in self.operations[:now]:
            data_safe = operation.kind == "write" and operation.path == path
            entry_safe = operation.kind != "write" and path in (
                operation.path.parent, operation.other.parent if operation.other else None
            )  # fmt: skip
            if data_safe or entry_safe:
                operation.durable = min(operation.durable, now)
        self._fsync(descriptor)
        self._on = True

    @contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(os, "fsync", self.fsync)
        self._on = True
        try:
            yield
        finally:
            self._on = False
            self._fill()
            monkeypatch.undo()


def replay(operations: list[Operation], kept: dict[int, float], root: Path, onto: Path) -> None:
    """Apply the operations whose index is in `kept`; of a write, that share of its bytes, cut at a sector."""
    for index, operation in enumerate(operations):
        if index not in kept or operation.kind == "fsync":
            continue
        path = onto / operation.path.relative_to(root)
        if operation.kind == "mkdir":
            path.mkdir(parents=True, exist_ok=True)
        elif operation.kind == "write" and path.parent.is_dir():
            share = kept[index]
            size = len(operation.data) if share == 1 else int(len(operation.data) * share) // SECTOR * SECTOR
            path.write_bytes(operation.data[:size])
        elif operation.kind == "rename" and path.exists():
            path.replace(onto / operation.other.relative_to(root))
        elif operation.kind == "remove":
            path.unlink(missing_ok=True)
        elif operation.kind == "rmdir" and path.is_dir() and not any(path.iterdir()):
            # With a lost removal inside, the folder stays, as a file system would have it.
            path.rmdir()


def crash_states(operations: list[Operation], *, seed: int) -> Iterator[tuple[int, dict[int, float]]]:
    """For each prefix: all that was not synced lost, all kept, each one alone lost or kept or torn, and at random."""
    dice = random.Random(seed)
    for end in range(len(operations) + 1):
        safe = {index: 1.0 for index in range(end) if operations[index].durable < end}
        loose = [index for index in range(end) if index not in safe and operations[index].kind != "fsync"]
        everything = safe | dict.fromkeys(loose, 1.0)
        yield end, safe
        yield end, everything
        for index in loose:
            yield end, {key: share for key, share in everything.items() if key != index}
            yield end, safe | {index: 1.0}
            if operations[index].kind == "write":
                yield end, everything | {index: 0.0}
                yield end, everything | {index: 0.5}
        for _ in range(6 if loose else 0):
            yield end, safe | {index: dice.choice((0.0, 0.5, 1.0)) for index in loose if dice.random() < 0.5}


def test_after_a_crash_at_any_moment_a_whole_state_is_found_and_no_acknowledged_one_is_lost(tmp_path, monkeypatch):
    root = tmp_path / "real"
    root.mkdir()
    recorder = Recorder(root)
    for step in (1, 2, 3, 4):
        with recorder.recording(monkeypatch):
            checkpoint = write_state(root, step)
            resume.seal(checkpoint)
        recorder.acknowledged.append((len(recorder.operations), step))
        with recorder.recording(monkeypatch):
            resume.prune(root, planned=range(10))
    kinds = {operation.kind for operation in recorder.operations}
    assert kinds == {"mkdir", "write", "fsync", "rename", "remove", "rmdir"}, kinds
    tried = 0
    for end, kept in crash_states(recorder.operations, seed=0):
        onto = tmp_path / "crashed"
        onto.mkdir()
        replay(recorder.operations, kept, root, onto)
        found = resume.newest_good(onto, report=lambda _: None)
        safe = [step for moment, step in recorder.acknowledged if moment <= end]
        where = f"after {end} operations, kept {sorted(kept)}"
        if safe:
            assert found is not None, where
            assert resume.step_of(found) >= safe[-1], where
        if found is not None:
            assert read_state(found) == contents(resume.step_of(found)), where
        shutil.rmtree(onto)
        tried += 1
    assert tried > 800


def test_after_a_crash_in_the_middle_of_a_recovery_the_next_one_finds_the_same_state(tmp_path, monkeypatch):
    root = tmp_path / "real"
    root.mkdir()
    for step in (1, 2, 3):
        resume.seal(write_state(root, step))
    # 4 is torn, 3 corrupt, and of an earlier recovery one is still set aside.
    write_state(root, 4)
    (root / "checkpoint-3" / "optimizer.pt").write_bytes(b"other")
    (root / "checkpoint-2").rename(root / "rejected-checkpoint-2")
    found_before = tmp_path / "before"
    shutil.copytree(root, found_before)
    recorder = Recorder(root)
    with recorder.recording(monkeypatch):
        found = resume.newest_good(root, report=lambda _: None)
    assert found == root / "checkpoint-1"
    assert {operation.kind for operation in recorder.operations} == {"remove", "rmdir", "rename"}
    tried = 0
    for end, kept in crash_states(recorder.operations, seed=0):
        onto = tmp_path / "crashed"
        shutil.copytree(found_before, onto)
        replay(recorder.operations, kept, root, onto)
        found = resume.newest_good(onto, report=lambda _: None)
        where = f"after {end} operations, kept {sorted(kept)}"
        assert found == onto / "checkpoint-1", where
        assert read_state(found) == contents(1), where
        shutil.rmtree(onto)
        tried += 1
    assert tried > 100


def test_any_cut_of_any_file_and_any_flipped_bit_is_seen(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(range(100)))
    (checkpoint / "fmops.json").write_bytes(b'{"step": 1}')
    resume.seal(checkpoint)
    assert resume._fault(checkpoint) is None
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            assert resume._fault(checkpoint) is not None, f"{path.name} cut to {size} bytes"
        for bit in range(8 * len(whole)):
            harmed = bytearray(whole)
            harmed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(harmed)
            assert resume._fault(checkpoint) is not None, f"bit {bit} of {path.name} flipped"
        path.write_bytes(whole)
    assert resume._fault(checkpoint) is None


def test_a_slow_disk_is_told_and_a_second_state_waits_for_the_first(tmp_path, monkeypatch):
    context = StageContext(stream=io.StringIO())
    free, entered = threading.Event(), []
    real = resume.sync

    def stalled(path: Path) -> None:
        entered.append(path)
        free.wait()
        real(path)

    monkeypatch.setattr(resume, "sync", stalled)
    told = threading.Event()

    def report(text: str) -> None:
        context.note(text)
        told.set()

    sealer = resume.Sealer(report=report, alarm_s=0.05)
    sealer.seal(write_state(tmp_path, 1), planned=range(10))
    assert sealer.pending == tmp_path / "checkpoint-1"  # training went on: nobody waited
    second = write_state(tmp_path, 2)
    thread = threading.Thread(target=lambda: sealer.seal(second, planned=range(10)))
    thread.start()
    assert told.wait(30)
    assert "checkpoint-1 has not reached the disk after 0.05 s; training waits for it" in context.stream.getvalue()
    assert len(entered) == 1  # not a second one in the queue
    free.set()
    thread.join()
    sealer.wait()
    assert resume.newest_good(tmp_path, report=context.note) == second


@pytest.mark.parametrize("where", ["shard", "manifest"])
def test_a_disk_that_fills_up_while_a_state_is_sealed_raises_and_leaves_the_one_before(where, tmp_path, monkeypatch):
    resume.seal(write_state(tmp_path, 1))
    real = resume.sync

    def full(path: Path) -> None:
        if path.name.startswith(resume.MANIFEST) == (where == "manifest"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(resume, "sync", full)
    sealer = resume.Sealer(report=lambda _: None)
    sealer.seal(write_state(tmp_path, 2), planned=range(10))
    with pytest.raises(OSError, match="No space left"):
        sealer.wait()
    monkeypatch.undo()
    assert sealer.pending is None
    assert resume.newest_good(tmp_path, report=lambda _: None) == tmp_path / "checkpoint-1"


def test_states_written_for_an_interruption_do_not_push_out_planned_ones(tmp_path):
    for step in (2, 4, 5, 7):
        resume.seal(write_state(tmp_path, step))
        resume.prune(tmp_path, planned={2, 4, 6})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-7"]
    assert resume.newest_good(tmp_path, report=print, planned={2, 4, 6}) == tmp_path / "checkpoint-4"
