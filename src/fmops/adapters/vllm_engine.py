"""vLLM as a serving engine, for GPUs.

Enters: a Hugging Face model folder. Leaves: an `Engine`.
Refuses: custom code. It never ran on the machine it was written on: there is no GPU, and vLLM's CPU wheel does not
install beside the other packages. `tests/contract/test_engines.py` runs on it where it is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from fmops.adapters.serving_tokenizer import ServingTokenizer
from fmops.adapters.stepped_engine import Made, SteppedEngine
from fmops.deployment.serving.engine import ALTERNATIVES, Generation

SLOTS = 64
"""Answers that advance at once."""


class VllmEngine(SteppedEngine):
    """See `fmops.deployment.serving.engine.Engine`."""

    name = "vllm"
    slots = SLOTS
    alternatives = ALTERNATIVES
    tolerance = 0.1
    """Of bfloat16 against float32, in nats. Not measured here."""
    batch_tolerance = 0.1
    """Its kernels choose their order of summation by the size of the batch."""

    def __init__(self, folder: Path, *, max_tokens: int, threads: int) -> None:
        tokenizer = ServingTokenizer(folder, max_tokens=max_tokens)
        super().__init__(tokenizer, _Steps(folder, context_tokens=tokenizer.context_tokens))


class _Steps:
    """vLLM's engine behind `Steps`."""

    def __init__(self, folder: Path, *, context_tokens: int) -> None:
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder), skip_tokenizer_init=True, trust_remote_code=False, max_model_len=context_tokens,
                max_num_seqs=SLOTS, max_logprobs=ALTERNATIVES, enable_prefix_caching=True, disable_log_stats=True,
            )
        )  # fmt: skip
        self._asked: dict[int, int] = {}

    def start(self, number: int, generation: Generation) -> None:
        prompt: dict[str, Any] = {"prompt_token_ids": list(generation.prompt)}
        if generation.cache_salt:
            prompt["cache_salt"] = generation.cache_salt
        self._asked[number] = generation.top_logprobs
        self._engine.add_request(str(number), prompt, _settings(generation))

    def step(self) -> Iterator[Made]:
        for output in self._engine.step():
            made = output.outputs[0]
            number = int(output.request_id)
            for token, stated in zip(made.token_ids, made.logprobs or (), strict=True):
                ranked = sorted(stated.items(), key=lambda item: -item[1].logprob)
                top = tuple((index, value.logprob) for index, value in ranked)
                yield Made(number, token, stated[token].logprob, top[: self._asked.get(number, 0)])

    def stop(self, number: int) -> None:
        self._asked.pop(number, None)
        self._engine.abort_request([str(number)])

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _settings(generation: Generation) -> SamplingParams:
    return SamplingParams(
        max_tokens=generation.max_tokens, temperature=generation.temperature, top_p=generation.top_p,
        seed=None if generation.seed is None else generation.seed % 2**63, logprobs=generation.top_logprobs,
        ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
