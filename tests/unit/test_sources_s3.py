"""s3:// against an S3 API: files, folders and globs come in, change is noticed, mistakes are named."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import pytest
from moto.backends import get_backend
from moto.server import ThreadedMotoServer

from fmops.errors import FmopsError
from fmops.sources import resolve


@pytest.fixture
def bucket(monkeypatch) -> Iterator:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpora", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    for key, text in {"docs/a.txt": "first", "docs/deep/b.txt": "second", "docs/c.md": "third"}.items():
        client.put_object(Bucket="corpora", Key=key, Body=text.encode())
    yield client
    # moto keeps its buckets in the process, beyond the server.
    get_backend("s3").reset()
    server.stop()


def contents(source) -> dict[str, str]:
    return {file.name: file.path.read_text() for file in source.files}


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://corpora/docs/a.txt", {"a.txt": "first"}),
        ("s3://corpora/docs/**/*.txt", {"a.txt": "first", "deep/b.txt": "second"}),
        ("s3://corpora/docs", {"a.txt": "first", "c.md": "third", "deep/b.txt": "second"}),
    ],
)
def test_a_file_a_glob_and_a_folder(bucket, tmp_path, uri, expected):
    assert contents(resolve(uri, root=tmp_path, cache=tmp_path / "cache")) == expected


def test_a_changed_object_is_fetched_again_and_an_unchanged_one_is_not(bucket, tmp_path):
    said: list[str] = []
    uri, cache = "s3://corpora/docs/a.txt", tmp_path / "cache"
    first = resolve(uri, root=tmp_path, cache=cache, report=said.append)
    resolve(uri, root=tmp_path, cache=cache, report=said.append)
    assert said == ["downloading a.txt from s3://corpora/docs/a.txt"]
    bucket.put_object(Bucket="corpora", Key="docs/a.txt", Body=b"First")
    changed = resolve(uri, root=tmp_path, cache=cache, report=said.append)
    assert contents(changed) == {"a.txt": "First"}
    assert changed.files[0].sha256 != first.files[0].sha256


@pytest.mark.parametrize("uri", ["s3://corpora/docs/missing.txt", "s3://no-such-bucket/a.txt"])
def test_what_is_not_there_is_named(bucket, tmp_path, uri):
    with pytest.raises(FmopsError, match=f"no file at {uri}. Check the address"):
        resolve(uri, root=tmp_path, cache=tmp_path / "cache")


def test_without_credentials_the_remedy_is_named(bucket, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(FmopsError, match="Check the network and the credentials"):
        resolve("s3://corpora/docs/a.txt", root=tmp_path, cache=tmp_path / "cache")
