"""The store on S3 when something goes wrong: kills, torn uploads, damage, races, refusals; each says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import local_s3
import pytest
from local_s3 import BUCKET, Fault, LocalS3

from fmops.artifacts import Conversations
from fmops.copies import make_room
from fmops.errors import FmopsError, IntegrityError
from fmops.shared import Shared
from fmops.store import Record, Store, content_digest, file_entries, utc_now

PART = 16 * 1024 * 1024
ADDRESS = f"s3://{BUCKET}/project"


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    with local_s3.serve() as served:
        yield served


@pytest.fixture
def s3(server, monkeypatch) -> Iterator[LocalS3]:
    for name, value in {**server.environment, "AWS_MAX_ATTEMPTS": "2"}.items():
        monkeypatch.setenv(name, value)
    server.requests.clear()
    yield server
    server.faults.clear()
    for name in server.names():
        server.client.delete_object(Bucket=BUCKET, Key=name)


def machine(root: Path, *, address: str = ADDRESS, cache_bytes: int | None = None) -> Store:
    return Store(root, shared=Shared(address, cache=root / "records", cache_bytes=cache_bytes))


def make(store: Store, files: dict[str, bytes], *, fingerprint: str = "ab" * 32) -> Record:
    folder = store.folder("conversations", fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    entries = file_entries(folder)
    artifact = Conversations(path=folder, conversations=1, held_out=0)
    return Record(
        node="conversations", stage="conversations", kind="conversations", version=1, fingerprint=fingerprint,
        digest=content_digest(entries), seed=0, config={}, inputs={}, files=entries,
        artifact=artifact.model_dump(mode="json"), created=utc_now(),
    )  # fmt: skip


COMMIT = """
import sys
from pathlib import Path
from fmops.shared import Shared
from fmops.store import Record, Store

root = Path(sys.argv[1])
store = Store(root, shared=Shared(sys.argv[2], cache=root / "records"))
print(store.commit(Record.model_validate_json(sys.stdin.read())).digest)
"""


def commit_elsewhere(store: Store, record: Record, **environment: str) -> subprocess.CompletedProcess:
    """Commit in a process of its own, which a fault may kill."""
    return subprocess.run(
        [sys.executable, "-c", COMMIT, str(store.root), ADDRESS],
        input=record.model_dump_json(), capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_killed_between_upload_and_record_nothing_exists_and_the_next_try_sends_no_file_again(s3, tmp_path):
    store = machine(tmp_path)
    record = make(store, {"a.txt": b"first", "b.txt": b"second"})
    assert commit_elsewhere(store, record, FMOPS_FAULT="bucket-before-record:1").returncode == -9
    assert s3.names("project/records/") == []
    assert machine(tmp_path / "other").records() == []
    sent = s3.count("PUT", "/artifacts/")
    assert sent == 2
    kept = store.made_here("conversations", record.fingerprint)
    assert kept is not None
    assert store.commit(kept).digest == record.digest
    assert s3.count("PUT", "/artifacts/") == sent
    machine(tmp_path / "other").verify(record)


def test_killed_after_the_record_it_exists(s3, tmp_path):
    store = machine(tmp_path)
    record = make(store, {"a.txt": b"first"})
    assert commit_elsewhere(store, record, FMOPS_FAULT="bucket-after-record:1").returncode == -9
    assert machine(tmp_path / "other").records() == [record]


def test_an_upload_in_parts_goes_on_where_it_was_torn(s3, tmp_path):
    store = machine(tmp_path)
    content = os.urandom(PART) * 3 + b"end"
    record = make(store, {"weights": content})
    # Two parts arrive, then the network is gone for longer than anybody tries again.
    s3.faults.append(Fault("PUT", "partNumber=3", 503, "SlowDown", times=99))
    with pytest.raises(FmopsError, match=r"cannot write artifacts/.*/weights in s3://.*SlowDown.*run again then"):
        store.commit(record)
    s3.faults.clear()
    s3.requests.clear()
    assert store.commit(record) == record
    resent = [path for verb, path in s3.requests if verb == "PUT" and "partNumber" in path]
    assert 1 <= len(resent) <= 2
    assert all("partNumber=3" in path or "partNumber=4" in path for path in resent)
    machine(tmp_path / "other").verify(record)


def test_killed_within_an_upload_the_parts_that_arrived_are_not_sent_again(s3, tmp_path):
    store = machine(tmp_path)
    record = make(store, {"weights": os.urandom(PART) * 2 + b"end"})
    assert commit_elsewhere(store, record, FMOPS_FAULT="upload-after-part:1").returncode == -9
    assert s3.names("project/") == []
    s3.requests.clear()
    store.commit(record)
    assert s3.count("PUT", "partNumber=1") == 0
    machine(tmp_path / "other").verify(record)


def test_an_upload_that_was_aborted_there_begins_anew(s3, tmp_path):
    store = machine(tmp_path)
    record = make(store, {"weights": b"x" * (PART + 1)})
    s3.faults.append(Fault("PUT", "partNumber=2", 503, "SlowDown", times=99))
    with pytest.raises(FmopsError, match="SlowDown"):
        store.commit(record)
    s3.faults.clear()
    name = f"project/artifacts/{record.key}/{record.digest[:16]}/weights"
    [upload] = s3.client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    s3.client.abort_multipart_upload(Bucket=BUCKET, Key=name, UploadId=upload["UploadId"])
    assert store.commit(record) == record
    machine(tmp_path / "other").verify(record)


def test_a_part_that_changed_on_the_way_is_refused_by_the_store(s3, tmp_path, monkeypatch):
    from fmops.adapters import s3 as adapter

    store = machine(tmp_path)
    record = make(store, {"weights": b"x" * (PART + 1)})
    monkeypatch.setattr(adapter._Upload, "part", lambda upload, number: b"y")
    with pytest.raises(FmopsError, match="BadDigest"):
        store.commit(record)
    assert s3.names("project/records/") == []


@pytest.mark.parametrize("size", [5, PART + 1])
def test_a_flipped_byte_is_found_set_aside_and_mended_from_the_machine_that_made_it(s3, tmp_path, size):
    maker, reader = machine(tmp_path / "maker"), machine(tmp_path / "reader")
    record = maker.commit(make(maker, {"a.txt": b"x" * size, "b.txt": b"whole"}))
    name = f"project/artifacts/{record.key}/{record.digest[:16]}/a.txt"
    s3.flip(name)
    with pytest.raises(IntegrityError, match=rf"{name}.* is not what its record says.*`fmops run` makes it again"):
        reader.load(record)
    assert reader.find("conversations", record.fingerprint) is None
    [kept] = [found for found in s3.names("project/quarantine/") if found.endswith("a.txt")]
    assert s3.client.get_object(Bucket=BUCKET, Key=kept)["Body"].read(1) == b"y"
    # The file of the very same name and size there is not taken for the good one.
    assert maker.commit(maker.made_here("conversations", record.fingerprint)).digest == record.digest
    reader.verify(reader.get(record.key))


def test_whoever_comes_late_to_a_quarantine_does_not_end_what_was_made_since(s3, tmp_path):
    first, second = machine(tmp_path / "first"), machine(tmp_path / "second")
    bad = first.commit(make(first, {"a.txt": b"bad"}))
    first.quarantine(bad)
    good = make(first, {"a.txt": b"good"})
    first.commit(good)
    second.quarantine(bad)
    assert second.get(good.key) == good


def test_two_writers_with_other_bytes_one_wins_and_the_other_sees_it(s3, tmp_path):
    barrier, stands = threading.Barrier(6), {}

    def write(number: int) -> None:
        store = machine(tmp_path / str(number))
        record = make(store, {"a.txt": f"made by {number}".encode()})
        barrier.wait()
        stands[number] = store.commit(record).digest

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(set(stands.values())) == 1
    texts = set()
    for number in range(6):
        store = machine(tmp_path / str(number))
        [record] = store.records()
        texts.add((store.files(record) / "a.txt").read_text())
        store.verify(record)
    assert len(texts) == 1


def test_whoever_is_second_by_a_moment_gets_the_record_that_stands(s3, tmp_path):
    first, second = machine(tmp_path / "first"), machine(tmp_path / "second")
    winner = first.commit(make(first, {"a.txt": b"first"}))
    # The second one looks just before the first one has written.
    s3.faults.append(Fault("GET", "/records/", 404, "NoSuchKey"))
    assert second.commit(make(second, {"a.txt": b"second"})) == winner
    assert (second.files(winner) / "a.txt").read_bytes() == b"first"


def test_many_move_one_alias_and_each_move_follows_the_one_it_saw(s3, tmp_path):
    done, refused = [], []

    def move(number: int) -> None:
        store = machine(tmp_path / str(number))
        for _ in range(4):
            seen = store.aliases().get("champion")
            try:
                store.move_aliases({"champion": f"r{number}"}, expected={"champion": seen}, why="test")
                done.append(number)
            except FmopsError:
                refused.append(number)

    movers = [threading.Thread(target=move, args=(number,)) for number in range(4)]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join()
    log = s3.client.get_object(Bucket=BUCKET, Key="project/aliases.jsonl")["Body"].read().splitlines()
    assert len(log) == len(done)
    moves = [json.loads(line) for line in log]
    assert [move["before"] for move in moves] == [None, *(move["after"] for move in moves[:-1])]
    assert len(done) + len(refused) == 16


def test_a_move_of_another_alias_meanwhile_is_no_conflict(s3, tmp_path):
    first, second = machine(tmp_path / "1"), machine(tmp_path / "2")
    first.move_aliases({"champion": "a"}, expected={"champion": None}, why="first")
    # The answer to the first write is "somebody was quicker", as if second had moved in between.
    s3.faults.append(Fault("PUT", "aliases.jsonl", 412, "PreconditionFailed"))
    second.move_aliases({"challenger": "b"}, expected={"challenger": None}, why="second")
    assert first.aliases() == {"champion": "a", "challenger": "b"}


def test_a_write_whose_answer_was_lost_is_not_taken_for_anothers(s3, tmp_path):
    store = machine(tmp_path)
    s3.faults.append(Fault("PUT", "aliases.jsonl", 500, "InternalError", answered=True))
    store.move_aliases({"champion": "a"}, expected={"champion": None}, why="once")
    assert store.aliases() == {"champion": "a"}
    record = make(store, {"a.txt": b"first"})
    s3.faults.append(Fault("PUT", "/records/", 500, "InternalError", answered=True))
    assert store.commit(record) == record


def test_two_conditional_writes_that_meet_are_tried_again(s3, tmp_path):
    store = machine(tmp_path)
    s3.faults.append(Fault("PUT", "aliases.jsonl", 409, "ConditionalRequestConflict", times=2))
    store.move_aliases({"champion": "a"}, expected={"champion": None}, why="once")
    assert store.aliases() == {"champion": "a"}


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "AccessDenied", "Give this identity s3:GetObject, s3:PutObject and s3:ListBucket"),
        (403, "RequestTimeTooSkewed", "clock is wrong by more than 15 minutes"),
        (400, "ExpiredToken", "have expired: log in again"),
        (503, "SlowDown", "what is done is kept, run again then"),
        (501, "NotImplemented", "knows no conditional writes"),
        (400, "InvalidRequest", "InvalidRequest"),
    ],
)
def test_what_s3_refuses_is_said_with_the_remedy(s3, tmp_path, status, code, said):
    store = machine(tmp_path)
    record = make(store, {"a.txt": b"first"})
    s3.faults.append(Fault("PUT", "/records/", status, code, times=99))
    with pytest.raises(FmopsError, match=rf"cannot write records/{record.key}\.json in {ADDRESS}: {code}\. .*{said}"):
        store.commit(record)


def test_a_store_that_is_busy_for_a_moment_is_asked_again(s3, tmp_path):
    store = machine(tmp_path)
    s3.faults.append(Fault("PUT", "/artifacts/", 503, "SlowDown"))
    record = store.commit(make(store, {"a.txt": b"first"}))
    s3.faults.append(Fault("GET", "/artifacts/", 500, "InternalError"))
    machine(tmp_path / "other").verify(record)


def test_a_bucket_that_is_not_there(s3, tmp_path):
    with pytest.raises(FmopsError, match=r"in s3://no-such/prefix: NoSuchBucket\. Check the name, or make the bucket"):
        machine(tmp_path, address="s3://no-such/prefix").records()


def test_no_credentials(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(FmopsError, match=r"no credentials\. Log in"):
        machine(tmp_path).records()


def test_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    for name, value in {**local_s3.KEYS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FmopsError, match=r"Could not connect to the endpoint.*run again then"):
        machine(tmp_path).records()


def test_a_record_that_points_outside_its_folder_is_refused(s3, tmp_path):
    store = machine(tmp_path)
    record = make(store, {"a.txt": b"first"})
    evil = record.model_copy(update={"files": {"../../../evil": record.files["a.txt"]}})
    with pytest.raises(IntegrityError, match="points outside its folder"):
        machine(tmp_path / "other").load(evil)


def test_a_record_of_a_stage_that_points_outside_is_refused(s3, tmp_path):
    store = machine(tmp_path)
    record = make(store, {"a.txt": b"first"})
    evil = record.model_copy(update={"stage": "../../evil"})
    name = f"project/records/{evil.key}.json"
    s3.client.put_object(Bucket=BUCKET, Key=name, Body=evil.model_dump_json().encode())
    with pytest.raises(IntegrityError, match="Restore its version before"):
        machine(tmp_path / "other").records()


def test_a_damaged_copy_is_fetched_again_and_the_bucket_is_not_blamed(s3, tmp_path):
    maker, reader = machine(tmp_path / "maker"), machine(tmp_path / "reader")
    record = maker.commit(make(maker, {"a.txt": b"first", "b.txt": b"second"}))
    folder = reader.files(record)
    (folder / "a.txt").write_bytes(b"FIRST")
    (folder / "stray.txt").write_bytes(b"nobody's")
    s3.requests.clear()
    assert reader.intact(record) is None
    reader.verify(record)
    assert file_entries(folder) == record.files
    assert s3.count("GET", "b.txt") == 0
    assert reader.find("conversations", record.fingerprint) == record


def test_copies_are_bounded_the_longest_unused_goes_first_and_none_that_is_in_use(s3, tmp_path):
    maker = machine(tmp_path / "maker")
    records = [maker.commit(make(maker, {"a.txt": bytes([n]) * 100}, fingerprint=f"{n}" * 64)) for n in range(1, 5)]
    reader = machine(tmp_path / "reader", cache_bytes=250)
    # Copies of processes that are gone: used in this order.
    for at, record in enumerate(records[:2]):
        in_another_process(reader, record)
        os.utime(reader.use_lock(record.key), (at, at))
    assert [record.key for record in reader.here()] == [record.key for record in records[:2]]
    reader.files(records[2])
    assert {record.key for record in reader.here()} == {records[1].key, records[2].key}
    reader.files(records[3])
    assert {record.key for record in reader.here()} == {records[2].key, records[3].key}
    # Both are in use by this process, so the bound gives way, not they.
    reader.files(records[0])
    assert len(reader.here()) == 3
    assert records[0] in reader.records()


def test_what_the_bucket_does_not_hold_is_never_dropped(s3, tmp_path):
    store = machine(tmp_path, cache_bytes=0)
    only_here = make(store, {"a.txt": b"not sent yet"})
    store.commit_here(only_here)
    assert store.shared is not None
    make_room(store, store.shared, 1000)
    assert store.here() == [only_here]


FILES = COMMIT.replace("print(store.commit(", "print(store.files(").replace(").digest)", "))")


def in_another_process(store: Store, record: Record) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILES, str(store.root), ADDRESS], input=record.model_dump_json(), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_records_already_seen_are_not_read_again(s3, tmp_path):
    maker, reader = machine(tmp_path / "maker"), machine(tmp_path / "reader")
    for n in range(1, 4):
        maker.commit(make(maker, {"a.txt": b"x"}, fingerprint=f"{n}" * 64))
    reader.records()
    s3.requests.clear()
    assert len(machine(tmp_path / "reader").records()) == 3
    assert s3.count("GET", "/records/") == 0
