"""Downloads against a small server: they go on where they broke, notice change, and keep secrets out of messages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fmops.errors import FmopsError
from fmops.sources import resolve

BODY = "".join(f'{{"text": "line {number}"}}\n' for number in range(1_200_000)).encode()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with ranges; breaks off as often as `server.breaks` says."""

    server: Any

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        content = self.server.files.get(self.path.partition("?")[0])
        if content is None:
            self.send_error(404)
            return
        first, last = 0, len(content) - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if not body:
            return
        self.server.served.append((first, last))
        if self.server.breaks and first > 0:
            self.server.breaks -= 1
            self.wfile.write(content[first : first + 1000])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(content[first : last + 1])

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[Any]:
    listening: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.files, listening.served, listening.breaks = {"/data.jsonl": BODY}, [], 0
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield listening
    listening.shutdown()
    listening.server_close()


def url(server: Any, path: str = "data.jsonl") -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def test_a_broken_download_goes_on_where_it_broke(server: Any, tmp_path: Path) -> None:
    server.breaks = 1
    get = partial(resolve, url(server), root=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(FmopsError, match="run again: the download goes on where it broke"):
        get()
    kept = sum(part.stat().st_size for part in (tmp_path / "cache").rglob("*.part"))
    assert 0 < kept < len(BODY)
    server.served.clear()
    assert get().files[0].sha256 == hashlib.sha256(BODY).hexdigest()
    assert min(first for first, last in server.served if last > first) >= kept


def test_a_remote_that_changed_starts_over_and_an_unchanged_one_is_not_fetched(server: Any, tmp_path: Path) -> None:
    server.breaks = 1
    get = partial(resolve, url(server), root=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(FmopsError):
        get()
    server.files["/data.jsonl"] = changed = BODY.replace(b"line", b"LINE")
    assert get().files[0].sha256 == hashlib.sha256(changed).hexdigest()
    server.served.clear()
    get()
    assert server.served == []
    server.files["/data.jsonl"] = BODY[:1000]
    assert get().files[0].bytes == 1000


def test_a_copy_serves_while_the_store_is_away_and_says_so(server: Any, tmp_path: Path) -> None:
    get = partial(resolve, url(server), root=tmp_path, cache=tmp_path / "cache")
    before = get()
    server.shutdown()
    server.server_close()
    said: list[str] = []
    assert get(report=said.append) == before
    assert said[-1].endswith("cannot be reached; using the copy fetched before")


def test_a_missing_file_and_a_dead_store_name_no_secret(server: Any, tmp_path: Path) -> None:
    port = server.server_port
    with pytest.raises(FmopsError, match="no file at http://127") as missing:
        resolve(f"http://user:hunter2@127.0.0.1:{port}/x.txt?token=hunter2", root=tmp_path, cache=tmp_path / "cache")
    server.shutdown()
    server.server_close()
    with pytest.raises(FmopsError, match="cannot be reached") as dead:
        resolve(f"http://user:hunter2@127.0.0.1:{port}/x.txt?token=hunter2", root=tmp_path, cache=tmp_path / "cache")
    assert "hunter2" not in f"{missing.value} {dead.value}"


def test_any_fsspec_store_gives_files_folders_and_globs(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe({"/shelf/a.txt": b"alpha", "/shelf/deep/b.txt": b"beta"})

    def found(uri: str) -> list[str]:
        return [file.name for file in resolve(uri, root=tmp_path, cache=tmp_path / "cache").files]

    assert found("memory://shelf/a.txt") == ["a.txt"]
    assert found("memory://shelf") == ["a.txt", "deep/b.txt"]
    assert found("memory://shelf/**/*.txt") == ["a.txt", "deep/b.txt"]
    with pytest.raises(FmopsError, match="is a chained URL"):
        found("simplecache::memory://shelf/a.txt")
    with pytest.raises(FmopsError, match="names nothing behind s3://"):
        found("s3://")


GET = """
import sys
from pathlib import Path
from fmops.sources import resolve
print(resolve(sys.argv[1], root=Path(), cache=Path(sys.argv[2])).files[0].sha256)
"""


def test_two_processes_that_want_one_file_fetch_it_once(server: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", GET, url(server), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = [process.communicate(timeout=120)[0].strip() for process in both]
    assert digests == [hashlib.sha256(BODY).hexdigest()] * 2
    assert sum(last - first + 1 for first, last in server.served if last > first) < 1.5 * len(BODY)


HUB = """
import sys
from pathlib import Path
from fmops.sources import resolve
from fmops.errors import FmopsError
try:
    for file in resolve(sys.argv[1], root=Path(), cache=Path(sys.argv[2]), report=lambda text: None).files:
        print(file.name, file.sha256)
except FmopsError as error:
    print("ERROR", error)
"""
COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(BaseHTTPRequestHandler):
    """The few routes of a hub that a snapshot needs."""

    server: Any

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        if re.match(r"/api/(models|datasets)/acme/(toy|rows)(/revision/[^/]+)?$", path):
            names = self.server.files
            self._send(
                json.dumps({"id": "acme/toy", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}).encode()
            )
        elif "/tree/" in path:
            tree = [
                {"type": "file", "oid": hashlib.sha1(c).hexdigest(), "size": len(c), "path": n}
                for n, c in self.server.files.items()
            ]
            self._send(json.dumps(tree).encode())
        elif "/resolve/" in path and (name := path.partition(f"{COMMIT}/")[2]) in self.server.files:
            self._send(self.server.files[name])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub() -> Iterator[Any]:
    listening: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    header = b'{"__metadata__":{}}'
    listening.asked = []
    listening.files = {
        "config.json": b"{}",
        "model.safetensors": len(header).to_bytes(8, "little") + header,
        "pytorch_model.bin": b"\x80\x04evil",
        "modeling_evil.py": b"import os",
        "data/train.jsonl": b"{}\n",
    }
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


def hub_files(hub: Any, address: str, cache: Path) -> str:
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, address, str(cache)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_of_a_hub_model_only_tensors_tokenizer_and_configuration_come(hub: Any, tmp_path: Path) -> None:
    found = hub_files(hub, f"hf://acme/toy@{COMMIT}", tmp_path)
    assert [line.split()[0] for line in found.splitlines()] == ["config.json", "model.safetensors"]
    assert not [path for path in hub.asked if "/resolve/" in path and (".bin" in path or ".py" in path)]
    hub.asked.clear()
    assert hub_files(hub, f"hf://acme/toy@{COMMIT}", tmp_path) == found
    assert hub.asked == []


def test_a_hub_data_set_gives_the_files_that_a_glob_names(hub: Any, tmp_path: Path) -> None:
    found = hub_files(hub, "hf://datasets/acme/rows@main/data/*.jsonl", tmp_path)
    assert found.startswith("data/train.jsonl ")
    assert "no such repository" in hub_files(hub, "hf://acme/none", tmp_path)
    assert "ERROR 'hf://acme' is no hub address" in hub_files(hub, "hf://acme", tmp_path)


def test_a_hub_that_is_not_there_is_named_and_a_copy_fetched_before_stands_in(hub: Any, tmp_path: Path) -> None:
    before = hub_files(hub, "hf://acme/toy@main", tmp_path)
    assert "model.safetensors" in before
    hub.shutdown()
    hub.server_close()
    assert hub_files(hub, "hf://acme/toy@main", tmp_path) == before
    refused = hub_files(hub, "hf://acme/other@main", tmp_path)
    assert "ERROR hf://acme/other@main: the hub cannot be reached" in refused
    assert "or name a local path" in refused
