"""What every store does, in a folder and in a bucket: whole or not at all, never overwritten, found by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import local_s3
import pytest

from fmops.artifacts import Conversations
from fmops.errors import FmopsError, IntegrityError
from fmops.shared import Shared
from fmops.store import Record, Store, content_digest, file_entries, utc_now


class Folder:
    """One workspace on one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def store(self) -> Store:
        return Store(self.root / ".fmops")

    def another(self) -> Store:
        """The same store, seen by another process."""
        return Store(self.root / ".fmops")

    def overwrite(self, record: Record, name: str, content: bytes) -> None:
        (self.store().folder(record.stage, record.fingerprint) / name).write_bytes(content)

    def tear_record(self, record: Record) -> None:
        self.overwrite(record, "record.json", b'{"node": ')


class InBucket:
    """Two machines, each with its own disk."""

    def __init__(self, root: Path, s3: local_s3.LocalS3) -> None:
        self.root, self.s3 = root, s3

    def store(self) -> Store:
        return self._on("laptop")

    def another(self) -> Store:
        return self._on("cluster")

    def _on(self, machine: str) -> Store:
        root = self.root / machine
        return Store(root, shared=Shared(f"s3://{local_s3.BUCKET}/project", cache=root / "records"))

    def overwrite(self, record: Record, name: str, content: bytes) -> None:
        key = f"project/artifacts/{record.key}/{record.digest[:16]}/{name}"
        self.s3.client.put_object(Bucket=local_s3.BUCKET, Key=key, Body=content)

    def tear_record(self, record: Record) -> None:
        key = f"project/records/{record.key}.json"
        self.s3.client.put_object(Bucket=local_s3.BUCKET, Key=key, Body=b'{"node": ')


@pytest.fixture(scope="module")
def s3() -> Iterator[local_s3.LocalS3]:
    with local_s3.serve() as served:
        yield served


@pytest.fixture(params=["folder", "bucket"])
def home(request, tmp_path, monkeypatch):
    if request.param == "folder":
        yield Folder(tmp_path)
        return
    s3 = request.getfixturevalue("s3")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    yield InBucket(tmp_path, s3)
    for name in s3.names():
        s3.client.delete_object(Bucket=local_s3.BUCKET, Key=name)


def make(store: Store, *, fingerprint: str = "ab" * 32, text: str = "hello", node: str = "conversations") -> Record:
    folder = store.folder("conversations", fingerprint)
    (folder / ".work").mkdir(parents=True)
    (folder / ".work" / "scratch").write_text("not part of it")
    (folder / "deep").mkdir()
    (folder / "deep" / "train.jsonl").write_text(text)
    (folder / "held_out.jsonl").write_text("asked later")
    files = file_entries(folder)
    artifact = Conversations(path=folder, conversations=1, held_out=0)
    return Record(
        node=node, stage="conversations", kind="conversations", version=1, fingerprint=fingerprint,
        digest=content_digest(files), seed=0, config={"a": 1}, inputs={}, files=files,
        artifact=artifact.model_dump(mode="json"), created=utc_now(),
    )  # fmt: skip


def test_what_is_not_committed_does_not_exist_and_what_is_does_for_everybody(home):
    record = make(home.store())
    assert home.store().find("conversations", record.fingerprint) is None
    assert home.another().records() == []
    assert home.store().commit(record) == record
    assert home.another().find("conversations", record.fingerprint) == record
    assert home.another().get(record.key) == record
    assert home.another().records() == [record]


def test_its_files_are_there_for_everybody_and_scratch_is_not(home):
    record = make(home.store())
    home.store().commit(record)
    loaded = home.another().load(record)
    assert isinstance(loaded, Conversations)
    assert (loaded.path / "deep" / "train.jsonl").read_text() == "hello"
    home.another().verify(record)
    assert home.another().intact(record) is None
    assert sorted(record.files) == ["deep/train.jsonl", "held_out.jsonl"]


def test_artifacts_are_found_by_any_unambiguous_name(home):
    store = home.store()
    first, second = make(store), make(store, fingerprint="cd" * 32, node="other")
    store.commit(first)
    store.commit(second)
    assert home.another().by_key("conversations-abab") == first
    assert home.another().by_key("cdcd") == second
    assert home.another().by_key("other") == second
    with pytest.raises(FmopsError, match="fits 2 artifacts"):
        store.by_key("conversations-")
    with pytest.raises(FmopsError, match="Known: conversations-abab"):
        store.by_key("zz")
    with pytest.raises(FmopsError, match="the record of release-none is gone from"):
        store.get("release-none")


def test_an_alias_moves_only_from_where_it_was_seen(home):
    home.store().root.mkdir()
    home.store().move_aliases({"champion": "release-a"}, expected={"champion": None}, why="first")
    home.another().move_aliases(
        {"champion": "release-b", "previous": "release-a"}, expected={"champion": "release-a"}, why="second"
    )
    with pytest.raises(FmopsError, match="points at release-b, expected release-a: somebody moved it"):
        home.store().move_aliases({"champion": "release-c"}, expected={"champion": "release-a"}, why="late")
    assert home.store().aliases() == home.another().aliases() == {"champion": "release-b", "previous": "release-a"}


@pytest.mark.parametrize(
    ("content", "said"), [(b"hell", "has 4 bytes.* its record says 5"), (b"", "has 0 bytes.* its record says 5")]
)
def test_a_shortened_file_is_noticed_before_it_is_used(home, content, said):
    record = make(home.store())
    home.store().commit(record)
    home.overwrite(record, "deep/train.jsonl", content)
    with pytest.raises(AssertionError, match=said):
        assert home.another().intact(record) is None, home.another().intact(record)


def test_one_changed_byte_is_noticed_before_it_is_used(home):
    record = make(home.store())
    home.store().commit(record)
    home.overwrite(record, "deep/train.jsonl", b"jello")
    with pytest.raises(IntegrityError, match=r"deep/train\.jsonl is not what its record says"):
        home.another().verify(record)


def test_a_damaged_artifact_is_kept_aside_and_made_again(home):
    record = make(home.store())
    home.store().commit(record)
    home.overwrite(record, "deep/train.jsonl", b"jello")
    assert record.key in home.another().quarantine(record)
    assert home.store().find("conversations", record.fingerprint) is None
    assert home.another().records() == []
    # Aliases still name it: a champion's record says what a candidate has to beat.
    assert home.another().remembered(record.key).digest == record.digest
    again = home.another()
    assert again.commit(make(again)).digest == record.digest
    home.another().verify(record)
    assert home.store().get(record.key).digest == record.digest


def test_a_torn_record_names_itself_and_the_remedy(home):
    record = make(home.store())
    home.store().commit(record)
    home.tear_record(record)
    with pytest.raises(IntegrityError, match=f"{record.key}.* is not a record"):
        home.another().find("conversations", record.fingerprint)


def test_a_shared_store_is_named_by_its_address(tmp_path):
    with pytest.raises(FmopsError, match=r"unknown scheme of a store 'gs'\. .*Known: s3\."):
        Shared("gs://bucket/prefix", cache=tmp_path)
