"""Stages as forks of one process, so that a run imports what they share once: torch and Transformers take seconds.

Enters: a stage's arguments, its environment, its log. Leaves: its process, which reports on a pipe, and its exit code.
Refuses: to lend a stage another environment than its own; to outlive who started it; to run two stages at a time.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import IO, Self

from fmops.orchestration.execute import PARENT, die_with_parent
from fmops.orchestration.watchdog import children

STOPS = (signal.SIGINT, signal.SIGTERM)
"""Held back from the server while a stage lives: they reach a whole group, and the stage must have its time to end."""
REQUEST_BYTES = 65_536
MODELS, SCORER, TRAINER = (f"fmops.adapters.{name}" for name in ("model_files", "lm_eval", "training_stage"))
IMPORTS = {
    "gate": "", "benchmarks": SCORER, "evaluate": SCORER, "pretrain": TRAINER, "instruct": TRAINER, "align": TRAINER,
}  # fmt: skip
"""By stage, the module that brings most of what its process imports. Those of another stage cost memory, not time:
30 MB, for who trains after evaluating."""


@dataclass
class Forked:
    """The process of one stage; speaks as `subprocess.Popen` does."""

    server: subprocess.Popen[bytes]
    channel: socket.socket
    stdout: IO[str]
    returncode: int | None = None

    @property
    def pid(self) -> int:
        """The server's, whose processor time includes that of its forks."""
        return self.server.pid

    def poll(self) -> int | None:
        """The exit code, once it has been waited for."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the stage; to the server while that still imports."""
        with suppress(OSError):
            for pid in list(children(self.pid)) or [self.pid]:
                os.kill(pid, number)

    def kill(self) -> None:
        """End the server; the kernel ends the stage with it."""
        self.server.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        code = b""
        with suppress(OSError):
            code = self.channel.recv(REQUEST_BYTES)
        self.returncode = int(code) if code else self.server.wait()


@dataclass
class ForkServer:
    """Starts the stages of one run. Its process is started with the first of them, and ends with the `with` block."""

    _environment: dict[str, str] = field(default_factory=dict)
    _server: subprocess.Popen[bytes] | None = None
    _channel: socket.socket | None = None

    def start(self, arguments: Sequence[str], *, kind: str, environment: dict[str, str], log: IO[bytes]) -> Forked:
        """Fork a process for a stage.

        Args:
            arguments: of `fmops`, from `stage` on.
            kind: the stage's name, which says what it imports.
            environment: libraries read theirs at import, so another one takes another server.
        """
        if self._server is None or self._server.poll() is not None or environment != self._environment:
            self.stop()
            self._begin(environment, log)
        assert self._server is not None
        assert self._channel is not None
        reads, writes = os.pipe()
        request = json.dumps({"arguments": list(arguments), "imports": IMPORTS.get(kind, MODELS)}).encode()
        # A server that has died meanwhile is noticed where its stage is waited for.
        with suppress(OSError):
            socket.send_fds(self._channel, [request], [writes, log.fileno()])
        os.close(writes)
        return Forked(self._server, self._channel, os.fdopen(reads, encoding="utf-8"))

    def _begin(self, environment: dict[str, str], log: IO[bytes]) -> None:
        # Packets, so that a request and its descriptors come as one.
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "fmops", "fork-server", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=environment,
            )  # fmt: skip
        self._environment = environment

    def stop(self) -> None:
        """End the process; a stage that still runs ends with it."""
        if self._server is None:
            return
        assert self._channel is not None
        self._channel.close()
        self._server.kill()
        self._server.wait()
        self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve(channel: socket.socket) -> list[str] | None:
    """Fork a process for each stage that is asked for, one after the other.

    Returns:
        In a fork, the arguments of `fmops` that it was made for; in the server, None when nobody asks any more.
    """
    die_with_parent()
    server = os.getpid()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    while True:
        message, descriptors, *_ = socket.recv_fds(channel, REQUEST_BYTES, 2)
        if not message:
            return None
        request = json.loads(message)
        reports, log = descriptors
        os.dup2(log, 2)
        os.close(log)
        if request["imports"]:
            # What is wrong with it the stage finds again, and says.
            with suppress(Exception):
                import_module(request["imports"])
        # Modules stay: the collector of a fork need not look at them, and their pages stay shared.
        gc.freeze()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        stage = os.fork()
        if stage == 0:
            channel.close()
            os.dup2(reports, 1)
            os.close(reports)
            os.environ[PARENT] = str(server)
            signal.signal(signal.SIGINT, interrupt)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            arguments: list[str] = request["arguments"]
            return arguments
        os.close(reports)
        _, status = os.waitpid(stage, 0)
        channel.send(str(os.waitstatus_to_exitcode(status)).encode())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
