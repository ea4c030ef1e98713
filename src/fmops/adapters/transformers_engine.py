"""Transformers as a serving engine on CPU, several requests at once.

Enters: a Hugging Face model folder. Leaves: an `Engine` (float32).
Refuses: custom code, pickled weights, models whose attention is more than causal or sliding-window softmax.

Linear layers run over all requests in one matrix product; attention runs for each request over its own cache. The
product always has `SLOTS` rows, filled or idle, and a prompt is always read in the same pieces: so a request takes the
same arithmetic, bit for bit, alone or beside others. Transformers' own continuous batching gave 8 tokens/s on two
cores where this gives 61 (SmolLM2-135M, four requests): it attends over all requests' keys under a mask.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from fmops.adapters.eyes import embed, load_seeing
from fmops.adapters.sampling import choose
from fmops.adapters.serving_tokenizer import ServingTokenizer, finish_of
from fmops.adapters.slot_attention import SlotCache, register
from fmops.deployment.serving.engine import ALTERNATIVES, Emit, EngineError, Generation, Token
from fmops.deployment.serving.text import TextStream
from fmops.errors import FmopsError
from fmops.pictures import reads_pictures

SLOTS = 8
"""Rows of every decoding step. On two cores eight rows cost a fifth more than one."""
PREFILL_TOKENS = 256
"""A prompt is read in pieces of this size, between steps of the running answers."""


@dataclass(eq=False)
class _Stream:
    """One request under way, with its cache."""

    generation: Generation
    emit: Emit
    text: TextStream
    random: torch.Generator
    cache: SlotCache
    produced: int = 0
    next_token: int = -1
    cancelled: bool = False
    prompt: list[Token] = field(default_factory=list)
    """The prompt's tokens as far as they are scored, where that is asked for."""
    seen: torch.Tensor | None = None
    """[tokens, width] the prompt with its pictures, where it shows any."""

    @property
    def prefilling(self) -> bool:
        return self.cache.length < len(self.generation.prompt)


class TransformersEngine:
    """See `fmops.deployment.serving.engine.Engine`."""

    name = "transformers"
    slots = SLOTS
    alternatives = ALTERNATIVES
    tolerance = 1e-3
    """Two orders of summation in float32 differ by about 1e-5."""
    batch_tolerance = 0.0

    def __init__(self, folder: Path, *, max_tokens: int, threads: int) -> None:
        transformers_logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.tokenizer = ServingTokenizer(folder, max_tokens=max_tokens)
        self._model = _load_model(folder)
        self._waiting: deque[_Stream] = deque()
        self._running: list[_Stream | None] = [None] * SLOTS
        self._work = threading.Condition()
        self._closing = False
        self._failure: str | None = None
        self._warm_up()
        self._thread = threading.Thread(target=self._loop, name="fmops-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        return self._failure

    def submit(self, generation: Generation, emit: Emit) -> Callable[[], None]:
        sees = self.tokenizer.eyes is not None
        self.tokenizer.check(generation, alternatives=ALTERNATIVES, scores_prompts=True, sees=sees)
        random = torch.Generator()
        if generation.seed is None:
            random.seed()
        else:
            random.manual_seed(generation.seed)
        cache = SlotCache(len(generation.prompt) + generation.max_tokens)
        stream = _Stream(generation, emit, TextStream(self.tokenizer.decode, generation.stop), random, cache)
        with self._work:
            if self._failure or self._closing:
                raise EngineError(self._failure or "the engine is closed")
            self._waiting.append(stream)
            self._work.notify()

        def cancel() -> None:
            stream.cancelled = True

        return cancel

    def close(self) -> None:
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join()

    def _warm_up(self) -> None:
        """Read two tokens: a model that this engine cannot compute is refused at load, not at the first request."""
        with torch.inference_mode():
            self._forward(torch.zeros(1, 2, dtype=torch.long), torch.arange(2)[None], [SlotCache(2)])

    def _loop(self) -> None:
        """The engine's thread: admit, read one piece of a prompt, advance every answer by a token."""
        try:
            with torch.inference_mode():
                while self._admit():
                    self._prefill()
                    self._step()
        except Exception as error:
            self._failure = f"the engine stopped: {error}"
            raise
        finally:
            with self._work:
                left = [stream for stream in (*self._running, *self._waiting) if stream and not stream.cancelled]
                self._failure = self._failure or "the engine is closed"
            for stream in left:
                stream.emit(EngineError(self._failure))

    def _admit(self) -> bool:
        """Fill free slots in order of arrival; wait while there is nothing to do. False ends the loop."""
        with self._work:
            while True:
                self._running = [None if stream and stream.cancelled else stream for stream in self._running]
                for slot in range(SLOTS):
                    while self._running[slot] is None and self._waiting:
                        stream = self._waiting.popleft()
                        self._running[slot] = None if stream.cancelled else stream
                if self._closing:
                    return False
                if any(self._running):
                    return True
                self._work.wait()

    def _prefill(self) -> None:
        """Read one piece of the prompt that came first."""
        slot, stream = next(((i, s) for i, s in enumerate(self._running) if s and s.prefilling), (0, None))
        if stream is None:
            return
        prompt = stream.generation.prompt
        piece = prompt[stream.cache.length : stream.cache.length + PREFILL_TOKENS]
        positions = torch.arange(stream.cache.length, stream.cache.length + len(piece))[None]
        kept = len(piece) if stream.generation.scores_prompt else 1
        read = self._see(stream)[positions] if stream.generation.pictures else torch.tensor([piece])
        logits = self._forward(read, positions, [stream.cache], kept=kept)
        if stream.generation.scores_prompt:
            self._score_prompt(stream, logits[0])
        stream.cache.length += len(piece)
        if not stream.prefilling:
            self._produce(slot, stream, logits[0, -1])

    def _see(self, stream: _Stream) -> torch.Tensor:
        """The prompt as the language tower reads it, made once."""
        if stream.seen is None:
            eyes = self.tokenizer.eyes
            assert eyes is not None
            looks = [eyes.look(url) for url in stream.generation.pictures]
            stream.seen = embed(self._model, stream.generation.prompt, looks)
        return stream.seen

    def _score_prompt(self, stream: _Stream, logits: torch.Tensor) -> None:
        """Keep how likely the prompt's next tokens are after this piece's `logits` (length, vocabulary)."""
        prompt = stream.generation.prompt
        begin = stream.cache.length
        if not begin:
            stream.prompt.append(Token(id=prompt[0], text=self.tokenizer.token_text(prompt[0])[0], logprob=math.nan))
        following = prompt[begin + 1 : begin + 1 + len(logits)]
        logprobs = torch.log_softmax(logits[: len(following)], dim=-1)
        values, ids = logprobs.topk(stream.generation.top_logprobs)
        for place, token in enumerate(following):
            top = tuple(zip(ids[place].tolist(), values[place].tolist(), strict=True))
            text = self.tokenizer.token_text(token)[0]
            stream.prompt.append(Token(id=token, text=text, logprob=float(logprobs[place, token]), top=top))

    def _step(self) -> None:
        """One token for every answer under way."""
        rows = [stream if stream and not stream.prefilling else None for stream in self._running]
        if not any(rows):
            return
        tokens = torch.tensor([[stream.next_token if stream else 0] for stream in rows])
        positions = torch.tensor([[stream.cache.length if stream else 0] for stream in rows])
        logits = self._forward(tokens, positions, [stream.cache if stream else None for stream in rows])[:, -1]
        for slot, stream in enumerate(rows):
            if stream:
                stream.cache.length += 1
                self._produce(slot, stream, logits[slot])

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, slots: Sequence[SlotCache | None], *, kept: int = 1
    ) -> torch.Tensor:
        """Logits (rows, kept, vocabulary) after the last of `tokens`: ids (rows, length), or their embeddings."""
        read = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
        output = self._model(**read, position_ids=positions, use_cache=False, logits_to_keep=kept, slots=slots)
        logits: torch.Tensor = output.logits[:, -kept:].float()
        return logits

    def _produce(self, slot: int, stream: _Stream, logits: torch.Tensor) -> None:
        """Choose the next token from `logits` (vocabulary,), emit it, free the slot when it is the last."""
        if not bool(torch.isfinite(logits).all()):
            self._running[slot] = None
            stream.emit(EngineError("the model computed values that are not finite; the answer ends here"))
            return
        token, logprob, top = choose(logits, stream.generation, stream.random)
        stream.next_token = token
        stream.produced += 1
        ended = token in self.tokenizer.end_tokens
        text = "" if ended else stream.text.push(token)
        last = ended or stream.text.stopped or stream.produced == stream.generation.max_tokens
        if last:
            text += stream.text.finish()
            self._running[slot] = None
        finish = finish_of(stopped=ended or stream.text.stopped) if last else None
        if not stream.cancelled:
            # Prompt tokens go out once, with the first token.
            prompt, stream.prompt = tuple(stream.prompt), []
            stream.emit(Token(id=token, text=text, logprob=logprob, top=top, finish=finish, prompt=prompt))


def _load_model(folder: Path) -> Any:
    if reads_pictures(folder):
        # Slots are for the language tower; the other one sees a picture at once, and keeps nothing.
        return load_seeing(folder, attention={"text_config": register(), "vision_config": "sdpa"}).eval()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=register(), use_safetensors=True, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    except ValueError as error:
        raise FmopsError(f"the Transformers engine cannot serve {folder.name}: {error}") from error
    return model.eval()
