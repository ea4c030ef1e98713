"""A served model behind lm-evaluation-harness's interface: what is scored is what is served.

Enters: an OpenAI-compatible endpoint, requests. Leaves: answers, greedy or by a seed; log-likelihoods of prompts.
Refuses: log-likelihoods of chats; sampling where the endpoint does not give the same answer to the same seed.

Log-likelihoods come from `echo` with `logprobs`. The first token of a text has none and counts as nothing; an answer
that fuses with its context into one token is read as the server reads the whole. Both arms of a comparison are asked
alike: the engine is part of the protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text

from fmops.adapters.lm_eval_generation import understood
from fmops.adapters.lm_eval_sampling import Sampling
from fmops.adapters.lm_eval_scorer import repeat_keys
from fmops.adapters.openai_endpoint import OpenAIEndpoint
from fmops.errors import FmopsError
from fmops.evaluation.journal import Journal

AT_ONCE = 8
"""Requests on their way; a server batches them as it batches those of its users."""
MOST_STOPS = 4
"""As OpenAI's API allows; the others cut the answer here."""
_CHAT = "\x00chat:"
_PROBE = "Once upon a time there was"
_PROBE_TOKENS = 24
_SEEDS = (1, 2, 3, 4)


class EndpointLM(LM):  # type: ignore[misc]
    """Asks a served model. It stands where `SharedPrefixLM` stands."""

    batch_mode = "endpoint"
    templated = True
    template_sha256: str | None = None
    """The server's own; it is not shown."""
    max_length: int | None = None
    truncated = 0

    sampling_method = "as served, by seed"

    def __init__(self, endpoint: OpenAIEndpoint, *, seed: int = 0) -> None:
        """`seed` is what sampled answers come from, with the item's text and the number of its repeat."""
        super().__init__()
        self.endpoint = endpoint
        self.seed = seed
        self._repeats_samples = False
        """Whether the endpoint was seen to answer the same to the same seed."""
        self.journal = Journal()
        self._lengths: dict[str, int] = {}
        """Tokens of each context; the answers of a question share one."""
        self.on_progress: Callable[[float], None] = lambda _: None

    @property
    def engine(self) -> dict[str, str]:
        """What scores depend on beside the harness, the items and the weights."""
        return {"dtype": "as served", "batch": self.batch_mode}

    @property
    def tokenizer_name(self) -> str:
        return "endpoint"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The dialogue itself: the server has the template."""
        return _CHAT + json.dumps(chat_history, ensure_ascii=False)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = []
        for request, key in zip(requests, repeat_keys(requests, self.seed), strict=True):
            sampled = "temperature" in self.decoding(request.args[1])[2]
            # Greedy repeats are one request.
            asked.append((*request.args, int(key[:7], 16) if sampled else None))
        answers: list[str] = self._all("generate", asked, self._generate)
        return answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        scored = self._all("score", [request.args for request in requests], self._score)
        return [(float(value), bool(greedy)) for value, greedy in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        scored = self._all("score", [("", request.args[0]) for request in requests], self._score)
        return [float(value) for value, _ in scored]

    def decoding(self, given: dict[str, Any]) -> tuple[int, tuple[str, ...], dict[str, float]]:
        """A task's `generation_kwargs`, checked: most tokens, stop strings, what the request says of sampling.

        Raises:
            FmopsError: an option that OpenAI's API does not have, or samples that the endpoint would not repeat.
        """
        options = understood(given)
        sampling = Sampling.of(options)
        sent: dict[str, float] = {}
        if sampling is not None:
            extra = [name for name in ("top_k", "min_p") if options.get(name)]
            if extra:
                raise FmopsError(
                    f"generation_kwargs: {', '.join(extra)} is not part of OpenAI's API, and {self.endpoint.url} may "
                    "not follow it. Drop it, or evaluate the weights."
                )
            self._require_seeds()
            sent = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        return int(options["max_gen_toks"]), tuple(text for text in options["until"] if text), sent

    def _require_seeds(self) -> None:
        """Ask a few times, once, whether the same seed gives the same answer and another seed another one."""
        if self._repeats_samples:
            return

        def answer(seed: int) -> str:
            sent: dict[str, float] = {"temperature": 1.0, "top_p": 1.0, "seed": seed}
            return self.endpoint.complete(_PROBE, max_tokens=_PROBE_TOKENS, sampling=sent)

        first, again, *others = [answer(seed) for seed in (_SEEDS[0], *_SEEDS)]
        if first != again or all(other == first for other in others):
            told = "another answer to the same seed" if first != again else "the same answer to every seed"
            raise FmopsError(
                f"{self.endpoint.url} gives {told}: samples could neither be repeated nor compared. Use a server that "
                "takes `seed`, evaluate the weights, or drop do_sample and temperature."
            )
        self._repeats_samples = True

    def _generate(self, context: str, options: dict[str, Any], seed: int | None) -> str:
        most, until, sent = self.decoding(options)
        sampling = None if seed is None else {**sent, "seed": seed}
        if context.startswith(_CHAT):
            messages = json.loads(context.removeprefix(_CHAT))
            text = self.endpoint.chat(messages, max_tokens=most, stop=until[:MOST_STOPS], sampling=sampling)
        else:
            text = self.endpoint.complete(context, max_tokens=most, stop=until[:MOST_STOPS], sampling=sampling)
        answer: str = postprocess_generated_text(generation=text, stop=list(until), think_end_token=None)
        return answer

    def _score(self, context: str, answer: str) -> tuple[float, bool]:
        if context.startswith(_CHAT):
            raise FmopsError(
                f"{self.endpoint.url} tells no log-likelihoods of a chat. Drop `chat`, or evaluate the model itself."
            )
        # Spaces between both belong to the answer, as in the harness: tokens begin with them.
        kept = context.rstrip()
        answer = context[len(kept) :] + answer
        if kept and kept not in self._lengths:
            self._lengths[kept] = self.endpoint.count_tokens(kept)
        # As in the harness: what the whole has beyond the tokens of its beginning alone.
        tokens = self.endpoint.prompt_logprobs(kept + answer)[self._lengths.get(kept, 0) :]
        mine = [(value, best) for value, best in tokens if value is not None]
        if not mine:
            raise FmopsError(f"{self.endpoint.url} tells no log-probabilities of a prompt (`echo` with `logprobs`).")
        return sum(value for value, _ in mine), all(best for _, best in mine)

    def _all(self, kind: str, requests: list[Any], ask: Callable[..., Any]) -> list[Any]:
        """Each request once, several at a time; finished ones come from the journal."""
        keys = [sha256(json.dumps([kind, *request]).encode()).hexdigest() for request in requests]
        wanted = {key: request for key, request in zip(keys, requests, strict=True) if self.journal.get(key) is None}
        found: dict[str, Any] = {}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = {key: pool.submit(ask, *request) for key, request in wanted.items()}
            try:
                for key, future in futures.items():
                    found[key] = future.result()
                    self.journal.add(key, found[key])
                    self.on_progress((len(keys) - len(wanted) + len(found)) / len(keys))
            finally:
                pool.shutdown(cancel_futures=True)
        return [found.get(key, self.journal.get(key)) for key in keys]
