"""An artifact exists whole or not at all, is checked when used, and aliases move only from where they were seen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fmops.artifacts import Conversations
from fmops.errors import FmopsError, IntegrityError
from fmops.locks import Busy, hold, holder, locked
from fmops.store import RECORD, Record, Store, content_digest, file_entries, fingerprint_of, utc_now


def make(store: Store, *, fingerprint: str = "ab" * 32, text: str = "hello", node: str = "conversations") -> Record:
    folder = store.folder("conversations", fingerprint)
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(text)
    (folder / ".work").mkdir()
    (folder / ".work" / "scratch").write_text("not part of it")
    files = file_entries(folder)
    artifact = Conversations(path=folder, conversations=1, held_out=0)
    return Record(
        node=node, stage="conversations", kind="conversations", version=1, fingerprint=fingerprint,
        digest=content_digest(files), seed=0, config={"a": 1}, inputs={}, files=files,
        artifact=artifact.model_dump(mode="json"), created=utc_now(),
    )  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / ".fmops")


def test_a_folder_without_its_record_does_not_exist(store):
    record = make(store)
    assert store.find("conversations", record.fingerprint) is None
    assert store.records() == []
    store.commit(record)
    assert store.find("conversations", record.fingerprint) == record
    loaded = store.load(record)
    assert isinstance(loaded, Conversations)
    assert (loaded.path / "train.jsonl").read_text() == "hello"


def test_scratch_is_no_part_of_an_artifact(store):
    assert list(make(store).files) == ["train.jsonl"]


def test_one_changed_byte_is_noticed_even_with_its_old_times(store):
    record = make(store)
    store.commit(record)
    assert store.intact(record) is None
    path = store.folder("conversations", record.fingerprint) / "train.jsonl"
    before = path.stat()
    path.write_text("jello")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "differs from its digest" in (store.intact(record) or "")
    with pytest.raises(IntegrityError, match=r"train\.jsonl is not what its record says"):
        store.verify(record)


def test_a_missing_or_shortened_file_is_noticed(store):
    record = make(store)
    store.commit(record)
    path = store.folder("conversations", record.fingerprint) / "train.jsonl"
    path.write_text("hell")
    assert store.intact(record) == "train.jsonl has 4 bytes, its record says 5"
    path.unlink()
    assert store.intact(record) == "train.jsonl is missing"


def test_a_damaged_artifact_is_kept_aside_not_deleted(store):
    record = make(store)
    store.commit(record)
    target = store.quarantine(record)
    assert (Path(target) / "train.jsonl").read_text() == "hello"
    assert store.find("conversations", record.fingerprint) is None


def test_a_link_in_an_artifact_is_refused(store):
    record = make(store)
    folder = store.folder("conversations", record.fingerprint)
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(IntegrityError, match="symbolic link"):
        file_entries(folder)


def test_a_torn_record_names_itself_and_the_remedy(store):
    record = make(store)
    store.commit(record)
    path = store.folder("conversations", record.fingerprint) / RECORD
    path.write_text(path.read_text()[:50])
    with pytest.raises(IntegrityError, match="is not a record"):
        store.find("conversations", record.fingerprint)


def test_damaged_aliases_say_how_to_make_them_again(store):
    record = make(store)
    store.commit(record)
    store.move_aliases({"champion": record.key}, expected={"champion": None}, why="test")
    for text in ("{", ""):
        (store.root / "aliases.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"aliases.json is damaged: .* Write it again .* in aliases.jsonl"):
            store.aliases()


def test_artifacts_are_found_by_any_unambiguous_name(store):
    first, second = make(store), make(store, fingerprint="cd" * 32, node="other")
    store.commit(first)
    store.commit(second)
    assert store.by_key("conversations-abab") == first
    assert store.by_key("cdcd") == second
    assert store.by_key("other") == second
    with pytest.raises(FmopsError, match="fits 2 artifacts"):
        store.by_key("conversations-")
    with pytest.raises(FmopsError, match="Known: conversations-abab"):
        store.by_key("zz")


def test_an_alias_moves_only_from_where_it_was_seen(store):
    store.root.mkdir()
    store.move_aliases({"champion": "release-a"}, expected={"champion": None}, why="first")
    store.move_aliases(
        {"champion": "release-b", "previous": "release-a"}, expected={"champion": "release-a"}, why="second"
    )
    with pytest.raises(FmopsError, match="points at release-b, expected release-a"):
        store.move_aliases({"champion": "release-c"}, expected={"champion": "release-a"}, why="late")
    assert store.aliases() == {"champion": "release-b", "previous": "release-a"}
    assert len((store.root / "aliases.jsonl").read_text().splitlines()) == 3


def test_the_fingerprint_sees_config_inputs_seed_and_version_and_nothing_else():
    base = {"stage": "s", "version": 1, "seed": 0, "config": {"a": 1, "b": 2}, "inputs": {"x": "d"}}
    same = {**base, "config": {"b": 2, "a": 1}}
    assert fingerprint_of(**base) == fingerprint_of(**same)
    others = [{"version": 2}, {"seed": 1}, {"config": {"a": 1, "b": 3}}, {"inputs": {"x": "e"}}, {"inputs": {"y": "d"}}]
    prints = {fingerprint_of(**{**base, **change}) for change in others}
    assert len(prints | {fingerprint_of(**base)}) == len(others) + 1


def test_a_held_lock_says_who_holds_it_and_is_free_afterwards(tmp_path):
    lock = tmp_path / "ws" / "lock"
    with locked(lock):
        assert f"pid {os.getpid()}" in (holder(lock) or "")
        with pytest.raises(FmopsError, match=rf"held by pid {os.getpid()} .*two writers would mix"), locked(lock):
            pass
    assert holder(lock) is None
    with locked(lock):
        pass


def test_file_entries_are_in_name_order(tmp_path: Path):
    for name in ("b", "a", "c/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(file_entries(tmp_path)) == ["a", "b", "c/d"]


def test_a_folder_that_is_removed_and_made_anew_is_held_anew(tmp_path):
    lock = tmp_path / "workspace" / "copy.use"
    hold(lock)
    shutil.rmtree(lock.parent)
    hold(lock)
    with pytest.raises(Busy), locked(lock):
        pass


def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    import subprocess
    import sys

    # The parent takes the lock, forks a child that waits on a pipe, and dies; the child lives on.
    code = (
        "import os, sys; from pathlib import Path; from fmops.locks import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    up, down = os.pipe()\n"
        "    if os.fork() == 0: os.write(down, b'x'); sys.stdin.read(); os._exit(0)\n"
        "    os.read(up, 1); os._exit(0)\n"
    )
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE) as parent:
        parent.wait()
        assert holder(lock) is None
        assert parent.stdin is not None
        parent.stdin.close()
