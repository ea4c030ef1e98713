"""The server as a process: it says where it listens, ends in order, and `fmops chat` talks to it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest

from fmops.artifacts import Checkpoint
from fmops.deployment.release import release
from fmops.deployment.serving.chat import ChatFailed, chat
from fmops.deployment.serving.server import bind
from fmops.errors import FmopsError
from fmops.integrity import sha256
from fmops.jobs import ReleaseJob
from fmops.stage import StageContext

SERVE = """
import json, sys
from pathlib import Path
from fmops.artifacts import Release
from fmops.deployment.serving.app import serve
from fmops.production import Serve
path = Path(sys.argv[1])
stated = json.loads(sys.stdin.read())
serve(
    Release(path=path, **stated["release"]), Serve(port=0, max_tokens=1024), files=stated["files"], threads=1,
    version="tiny@0123456789ab",
)
"""


@pytest.fixture(scope="module")
def released(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("released")
    (root / "base").mkdir()
    (root / "base" / "model").symlink_to(tiny_model)
    base = Checkpoint(path=root / "base", stage="base", parameters=1, trained_tokens=0)
    (root / "release").mkdir()
    context = StageContext(stream=io.StringIO())
    made = release(ReleaseJob(name="tiny"), checkpoint=base, out=root / "release", context=context)
    files = {p.relative_to(made.path).as_posix(): sha256(p) for p in made.path.rglob("*") if p.is_file()}
    return made, files


@contextmanager
def served(released):
    """A server process; yields it and its URL."""
    made, files = released
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(made.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        json.dump({"release": made.model_dump(mode="json"), "files": files}, process.stdin)
        process.stdin.close()
        line = process.stdout.readline()
        found = re.fullmatch(r"tiny@0123456789ab listens on (http://127\.0\.0\.1:\d+)/v1 .*\n", line)
        assert found, line
        yield process, found.group(1)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        process.stdout.close()


@pytest.fixture(scope="module")
def url(released):
    with served(released) as (_, url):
        yield url


LONG = {"model": "tiny", "prompt": "def f(", "temperature": 1.0, "seed": 5, "max_tokens": 200, "stream": True}


def test_sigterm_lets_a_running_answer_finish_and_exits_with_zero(released):
    with served(released) as (process, url), httpx.Client(timeout=60) as client:
        stream = client.send(client.build_request("POST", f"{url}/v1/completions", json=LONG), stream=True)
        lines = stream.iter_lines()
        first = next(lines)
        os.kill(process.pid, signal.SIGTERM)
        rest = [line for line in lines if line]
        assert first.startswith("data: {")
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(30) == 0


def test_an_idle_server_ends_at_once_at_ctrl_c(released):
    with served(released) as (process, _):
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 0


def test_a_taken_port_is_refused_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FmopsError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*in use.*--port"):
            bind("127.0.0.1", port)


def test_one_prompt_prints_one_answer(url, capsys):
    chat(url, system=None, prompt="What is a tuple?")
    assert capsys.readouterr().out.strip()


def test_a_conversation_remembers_resets_and_ends_with_ctrl_d(url, capsys, monkeypatch):
    typed = iter(["first", "second", "/reset", "/what", "third"])
    sent = []

    def answer(client, model, messages):
        sent.append([turn["content"] for turn in messages])
        return f"answer {len(sent)}"

    def ask(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("fmops.deployment.serving.chat._answer", answer)
    chat(f"{url}/v1/", system="Be brief.", prompt=None)
    assert sent == [
        ["Be brief.", "first"],
        ["Be brief.", "first", "answer 1", "second"],
        ["Be brief.", "third"],
    ]
    shown = capsys.readouterr().out
    assert "tiny@0123456789ab at http://127.0.0.1" in shown
    assert "Unknown command /what" in shown


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(url, capsys, monkeypatch):
    from fmops.deployment.serving import chat as module

    real = module._stream

    def interrupted(client, body):
        for count, piece in enumerate(real(client, body)):
            if count == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(module, "_stream", interrupted)
    typed = iter(["go on"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or (_ for _ in ()).throw(EOFError))
    chat(url, system=None, prompt=None)
    assert "…" in capsys.readouterr().out


def test_what_the_server_refuses_is_said_in_its_words(url):
    with pytest.raises(ChatFailed, match="exceed the context of 1024 tokens"):
        chat(url, system=None, prompt="word " * 3000)


def test_without_a_server_the_error_says_how_to_start_one():
    with bind("127.0.0.1", 0) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ChatFailed, match=rf"no model answers at {dead} .*`fmops serve`"):
            chat(dead, system=None, prompt="hello")


def test_a_server_that_is_no_model_is_no_crash():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ChatFailed, match="no model answers"):
            chat(f"http://127.0.0.1:{listener.getsockname()[1]}", system=None, prompt="hello")
        thread.join(30)
