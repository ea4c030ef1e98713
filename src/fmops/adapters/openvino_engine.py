"""OpenVINO GenAI as a serving engine on CPU: eight-bit weights, continuous batching.

Enters: a Hugging Face model folder. Leaves: an `Engine`.
Refuses: architectures that `gguf_writer` does not know, and log-probabilities of tokens that were not chosen.

The release is written as a Q8_0 GGUF, read by OpenVINO, and thrown away. By default OpenVINO also rounds the
activations of every layer to eight bits: on SmolLM2-135M that moved log-probabilities by 0.5 nats and made the capital
of France "L'Étoile". It is off here, and keys, values and arithmetic stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import openvino_genai

from fmops.adapters.gguf_writer import write_gguf
from fmops.adapters.serving_tokenizer import ServingTokenizer
from fmops.adapters.stepped_engine import Made, SteppedEngine
from fmops.deployment.serving.engine import Generation

SLOTS = 16
"""Answers that advance at once. Sixteen gave 3.2 times the tokens of one, on one core."""
PREFILL_TOKENS = 256
"""Tokens a step may read or write, over all requests."""


class OpenVinoEngine(SteppedEngine):
    """See `fmops.deployment.serving.engine.Engine`."""

    name = "openvino"
    slots = SLOTS
    alternatives = 0
    tolerance = 0.35
    """Of eight-bit weights against float32, in nats; SmolLM2-135M reached 0.21 on 192 tokens."""
    batch_tolerance = 1e-3
    """Its matrix products sum in another order for another number of rows; 5e-5 was measured."""

    def __init__(self, folder: Path, *, max_tokens: int, threads: int) -> None:
        super().__init__(ServingTokenizer(folder, max_tokens=max_tokens), _Steps(folder, threads=threads))


class _Steps:
    """OpenVINO's pipeline behind `Steps`."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        self._pipeline = _load(folder, threads=threads)
        self._handles: dict[int, Any] = {}

    def start(self, number: int, generation: Generation) -> None:
        prompt = openvino.Tensor(np.array([generation.prompt], dtype=np.int64))
        self._handles[number] = self._pipeline.add_request(number, prompt, _settings(generation))

    def step(self) -> Iterator[Made]:
        self._pipeline.step()
        for number, handle in list(self._handles.items()):
            while number in self._handles and handle.can_read():
                for output in handle.read().values():
                    for token, logprob in zip(output.generated_ids, output.generated_log_probs, strict=True):
                        yield Made(number, int(token), float(logprob))

    def stop(self, number: int) -> None:
        self._handles.pop(number).cancel()

    def close(self) -> None:
        for number in list(self._handles):
            self.stop(number)


def _settings(generation: Generation) -> Any:
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens = generation.max_tokens
    settings.ignore_eos = True
    settings.logprobs = 1
    settings.do_sample = generation.temperature > 0
    if settings.do_sample:
        settings.temperature = generation.temperature
        settings.top_p = generation.top_p
        seed = generation.seed if generation.seed is not None else int(np.random.default_rng().integers(2**32))
        settings.rng_seed = seed % 2**32
    return settings


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
