"""llama.cpp's `llama-server` as a serving engine, where that program is on the PATH.

Enters: a Hugging Face model folder. Leaves: an `Engine` over a child process that dies with it.
Refuses: to start without the program. It never ran on the machine it was written on, which has none;
`tests/contract/test_engines.py` runs on it where it is installed.
"""

from __future__ import annotations

import json
import queue
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from fmops.adapters.gguf_writer import write_gguf
from fmops.adapters.serving_tokenizer import ServingTokenizer
from fmops.adapters.stepped_engine import Made, SteppedEngine
from fmops.deployment.serving.engine import ALTERNATIVES, EngineError, Generation
from fmops.errors import FmopsError

PROGRAM = "llama-server"
SLOTS = 16
START_S = 120.0


class LlamaCppEngine(SteppedEngine):
    """See `fmops.deployment.serving.engine.Engine`."""

    name = "llama.cpp"
    slots = SLOTS
    alternatives = ALTERNATIVES
    tolerance = 0.35
    """Of eight-bit weights against float32, in nats; as the OpenVINO engine, which reads the same file."""
    batch_tolerance = 0.05
    """Its kernels choose their order of summation by the size of the batch. Not measured here."""

    def __init__(self, folder: Path, *, max_tokens: int, threads: int) -> None:
        if shutil.which(PROGRAM) is None:
            raise FmopsError(f"{PROGRAM} is not on the PATH. Install llama.cpp, or set serve.engine to another engine.")
        tokenizer = ServingTokenizer(folder, max_tokens=max_tokens)
        super().__init__(tokenizer, _Steps(folder, context_tokens=tokenizer.context_tokens, threads=threads))


class _Steps:
    """The server behind `Steps`: a thread reads each request's stream, `step` takes what they have read."""

    def __init__(self, folder: Path, *, context_tokens: int, threads: int) -> None:
        self._scratch = TemporaryDirectory(prefix="fmops-gguf-")
        file = Path(self._scratch.name) / "model.gguf"
        write_gguf(folder, file)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        key = Path(self._scratch.name) / "key"
        key.write_text(secrets.token_urlsafe(32))
        key.chmod(0o600)
        command = [
            PROGRAM, "--model", str(file), "--host", "127.0.0.1", "--port", str(port), "--api-key-file", str(key),
            "--parallel", str(SLOTS), "--ctx-size", str(context_tokens * SLOTS), "--threads", str(threads),
        ]  # fmt: skip
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        headers = {"Authorization": f"Bearer {key.read_text()}"}
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120, trust_env=False)
        self._made: queue.SimpleQueue[Made | Exception] = queue.SimpleQueue()
        self._stopped: set[int] = set()
        self._wait()

    def start(self, number: int, generation: Generation) -> None:
        threading.Thread(target=self._read, args=(number, generation), daemon=True).start()

    def step(self) -> Iterator[Made]:
        try:
            made = self._made.get(timeout=0.05)
        except queue.Empty:
            return
        if isinstance(made, Exception):
            raise EngineError(f"{PROGRAM} failed: {made}") from made
        yield made

    def stop(self, number: int) -> None:
        self._stopped.add(number)

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()
        self._client.close()
        self._scratch.cleanup()

    def _read(self, number: int, generation: Generation) -> None:
        try:
            with self._client.stream("POST", "/completion", json=_body(generation)) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if number in self._stopped:
                        break
                    if line.startswith("data: {"):
                        for made in _tokens(number, json.loads(line[6:]), generation.top_logprobs):
                            self._made.put(made)
        except (httpx.HTTPError, ValueError, LookupError) as error:
            if number not in self._stopped:
                self._made.put(error)
        self._stopped.discard(number)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            if self._server.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise FmopsError(f"{PROGRAM} did not come up within {START_S:g} s. Run it by hand to see why.")
            try:
                if self._client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)


def _body(generation: Generation) -> dict[str, Any]:
    return {
        "prompt": list(generation.prompt), "n_predict": generation.max_tokens, "temperature": generation.temperature,
        "top_p": generation.top_p, "top_k": 0, "min_p": 0.0, "seed": -1 if generation.seed is None else
        generation.seed % 2**31, "n_probs": max(1, generation.top_logprobs), "post_sampling_probs": False,
        "ignore_eos": True, "stream": True, "cache_prompt": False, "return_tokens": True,
    }  # fmt: skip


def _tokens(number: int, value: dict[str, Any], asked: int) -> Iterator[Made]:
    for stated in value.get("completion_probabilities", ()):
        top = tuple((one["id"], one["logprob"]) for one in stated["top_logprobs"][:asked])
        yield Made(number, stated["id"], stated["logprob"], top)
