"""OpenVINO GenAI as a serving engine on CPU: eight-bit weights, continuous batching.

Enters: a Hugging Face model folder. Leaves: an `Engine`.
Refuses: architectures that `gguf_writer` does not know, and log-probabilities of tokens that were not chosen.

The release is written as a Q8_0 GGUF, read by OpenVINO, and thrown away. By default OpenVINO also rounds the
activations of every layer to eight bits: on SmolLM2-135M that moved log-probabilities by 0.5 nats and made the capital
of France "L'Étoile". It is off here, and keys, values and arithmetic stay in float32.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import openvino_genai

from fmops.adapters.gguf_writer import write_gguf
from fmops.adapters.serving_tokenizer import ServingTokenizer, finish_of
from fmops.deployment.serving.engine import Emit, EngineError, Generation, Token
from fmops.deployment.serving.text import TextStream

SLOTS = 16
"""Answers that advance at once. Sixteen gave 3.2 times the tokens of one, on one core."""
PREFILL_TOKENS = 256
"""Tokens a step may read or write, over all requests."""


@dataclass(eq=False)
class _Stream:
    """One request under way."""

    number: int
    generation: Generation
    emit: Emit
    text: TextStream
    handle: Any = None
    produced: int = 0
    cancelled: bool = False
    finished: bool = False


class OpenVinoEngine:
    """See `fmops.deployment.serving.engine.Engine`."""

    name = "openvino"
    slots = SLOTS
    alternatives = 0
    tolerance = 0.35
    """Of eight-bit weights against float32, in nats; SmolLM2-135M reached 0.21 on 192 tokens."""
    batch_tolerance = 1e-3
    """Its matrix products sum in another order for another number of rows; 5e-5 was measured."""

    def __init__(self, folder: Path, *, max_tokens: int, threads: int) -> None:
        self.tokenizer = ServingTokenizer(folder, max_tokens=max_tokens)
        self._pipeline = _load(folder, threads=threads)
        self._arrived: queue.SimpleQueue[_Stream | None] = queue.SimpleQueue()
        self._running: list[_Stream] = []
        self._numbers = 0
        self._closing = False
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._loop, name="fmops-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        return self._failure

    def submit(self, generation: Generation, emit: Emit) -> Callable[[], None]:
        self.tokenizer.check(generation, alternatives=self.alternatives)
        with self._lock:
            if self._failure or self._closing:
                raise EngineError(self._failure or "the engine is closed")
            self._numbers += 1
            stream = _Stream(self._numbers, generation, emit, TextStream(self.tokenizer.decode, generation.stop))
            self._arrived.put(stream)

        def cancel() -> None:
            stream.cancelled = True

        return cancel

    def close(self) -> None:
        with self._lock:
            self._closing = True
            self._arrived.put(None)
        self._thread.join()

    def _loop(self) -> None:
        """The engine's thread: take what has arrived, advance every answer by a token, tell."""
        try:
            while self._admit():
                self._pipeline.step()
                for stream in self._running:
                    self._tell(stream)
                self._running = [stream for stream in self._running if not stream.finished]
        except Exception as error:
            self._failure = f"the engine stopped: {error}"
            raise
        finally:
            with self._lock:
                self._failure = self._failure or "the engine is closed"
                left = list(self._running)
                while not self._arrived.empty():
                    left += [stream for stream in (self._arrived.get(),) if stream]
            for stream in left:
                if not (stream.cancelled or stream.finished):
                    stream.emit(EngineError(self._failure))

    def _admit(self) -> bool:
        """Hand over what has arrived; wait while there is nothing to do. False ends the loop."""
        while not self._closing:
            while not self._arrived.empty() or not self._running:
                stream = self._arrived.get()
                if stream is None:
                    return False
                if not stream.cancelled:
                    prompt = openvino.Tensor(np.array([stream.generation.prompt], dtype=np.int64))
                    stream.handle = self._pipeline.add_request(stream.number, prompt, _settings(stream.generation))
                    self._running.append(stream)
            for stream in self._running:
                if stream.cancelled and not stream.finished:
                    self._drop(stream)
            self._running = [stream for stream in self._running if not stream.finished]
            if self._running:
                return True
        return False

    def _tell(self, stream: _Stream) -> None:
        """Emit the tokens that a step has made for one request."""
        while not stream.finished and stream.handle.can_read():
            for output in stream.handle.read().values():
                for token, logprob in zip(output.generated_ids, output.generated_log_probs, strict=True):
                    if not stream.finished:
                        self._produce(stream, int(token), float(logprob))

    def _produce(self, stream: _Stream, token: int, logprob: float) -> None:
        if not np.isfinite(logprob):
            stream.emit(EngineError("the model computed values that are not finite; the answer ends here"))
            self._drop(stream)
            return
        stream.produced += 1
        ended = token in self.tokenizer.end_tokens
        text = "" if ended else stream.text.push(token)
        stopped = ended or stream.text.stopped
        last = stopped or stream.produced == stream.generation.max_tokens
        if last:
            text += stream.text.finish()
            self._drop(stream)
        finish = finish_of(stopped=stopped) if last else None
        if not stream.cancelled:
            stream.emit(Token(id=token, text=text, logprob=logprob, finish=finish))

    def _drop(self, stream: _Stream) -> None:
        stream.finished = True
        stream.handle.cancel()


def _settings(generation: Generation) -> Any:
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens = generation.max_tokens
    # Ends and stop strings are ours: the same rules for every engine.
    settings.ignore_eos = True
    settings.logprobs = 1
    settings.do_sample = generation.temperature > 0
    if settings.do_sample:
        settings.temperature = generation.temperature
        settings.top_p = generation.top_p
        settings.rng_seed = (generation.seed if generation.seed is not None else _random_seed()) % 2**32
    return settings


def _random_seed() -> int:
    return int(np.random.default_rng().integers(2**32))


def _load(folder: Path, *, threads: int) -> Any:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = SLOTS
    scheduler.max_num_batched_tokens = PREFILL_TOKENS
    scheduler.dynamic_split_fuse = True
    # No cache over requests: the time to the first token would tell one tenant what another has asked.
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_PRECISION_HINT": openvino.Type.f32,
        "KV_CACHE_PRECISION": openvino.Type.f32,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": threads,
    }
    with TemporaryDirectory(prefix="fmops-gguf-") as scratch:
        file = Path(scratch) / "model.gguf"
        write_gguf(folder, file)
        return openvino_genai.ContinuousBatchingPipeline(
            str(file), scheduler_config=scheduler, device="CPU", properties=properties
        )
