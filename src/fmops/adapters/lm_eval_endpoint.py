"""A served model behind lm-evaluation-harness's interface: what is scored is what is served.

Enters: an OpenAI-compatible endpoint, requests. Leaves: answers, greedy or by a seed; log-likelihoods of prompts.
Refuses: log-likelihoods of chats, ones that are no numbers or that company moves beyond the tolerance; sampling where
the endpoint does not give the same answer to the same seed.

Log-likelihoods come from `echo` with `logprobs`. The first token of a text has none and counts as nothing; an answer
that fuses with its context into one token is read as the server reads the whole. Both arms of a comparison are asked
alike: the engine is part of the protocol.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text

from fmops.adapters.lm_eval_generation import understood
from fmops.adapters.lm_eval_sampling import Sampling
from fmops.adapters.lm_eval_scorer import BATCH_TOLERANCE, repeat_keys
from fmops.adapters.openai_endpoint import OpenAIEndpoint
from fmops.adapters.tree_reader import Scored
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
UNSTATED_TOLERANCE = 0.1
"""Of an endpoint that states none: as the coarsest engine here states, which computes in half precision."""
_COMPANY = ("Rain", "The capital of France is Paris.", "def f(x):\n    return x", "One two three four five " * 5)
"""Texts of different lengths, each scored alone and among others."""


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
        self._is_steady = False
        """Whether company was seen to move log-likelihoods no further than the tolerance."""
        self.journal = Journal()
        self._lengths: dict[str, int] = {}
        """Tokens of each context; the answers of a question share one."""
        self.on_progress: Callable[[float], None] = lambda _: None

    @property
    def engine(self) -> dict[str, str]:
        """What scores depend on beside the harness, the items and the weights."""
        return {"dtype": "as served", "batch": self.batch_mode}

    @property
    def batch_tolerance(self) -> float:
        """How far company may move a log-likelihood: as the endpoint's engine states it, else `UNSTATED_TOLERANCE`.

        At least the local scorer's: the two arms may be served on different numbers of threads.
        """
        stated = self.endpoint.batch_tolerance
        return UNSTATED_TOLERANCE if stated is None else max(BATCH_TOLERANCE, stated)

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

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        return self._scores(requests, [request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return [value for value, _ in self._scores(requests, [("", request.args[0]) for request in requests])]

    def _scores(self, requests: list[Instance], pairs: list[tuple[str, str]]) -> list[Scored]:
        """Each pair's second text after its first one."""
        self._require_steady()
        items = {pair: _item(request) for request, pair in zip(requests, pairs, strict=True)}
        scored = self._all("score", pairs, partial(self._score, items))
        return [Scored.of(float(value), lead >= 0, float(lead)) for value, lead in scored]

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

    def _require_steady(self) -> None:
        """Score a few texts alone and among others, once, and hold what moved against the tolerance."""
        if self._is_steady:
            return

        def total(text: str) -> float:
            return sum(value for value, _ in self.endpoint.prompt_logprobs(text) if value is not None)

        alone = [total(text) for text in _COMPANY]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            together = list(pool.map(total, _COMPANY * 3))
        moved = max(abs(ours - theirs) for ours, theirs in zip(alone * 3, together, strict=True))
        if moved > self.batch_tolerance:
            raise FmopsError(
                f"{self.endpoint.url}: other requests move a text's log-likelihood by {moved:.2g} nats, more than its "
                f"batch tolerance of {self.batch_tolerance:g}: differences between models would be noise. Serve it in "
                "float32 or one request at a time, or evaluate the weights."
            )
        self._is_steady = True

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

    def _score(self, items: dict[tuple[str, str], str], context: str, answer: str) -> tuple[float, float]:
        item = items[context, answer]
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
        if not kept and tokens and tokens[0][0] is None:
            # The first token of a text has none.
            tokens = tokens[1:]
        if all(value is None for value, _ in tokens):
            raise FmopsError(f"{self.endpoint.url} tells no log-probabilities of a prompt (`echo` with `logprobs`).")
        bad = [value for value, _ in tokens if value is None or not math.isfinite(value)]
        if bad:
            raise FmopsError(
                f"{item}: {self.endpoint.url} gives {answer[:60]!r} a token of log-probability {bad[0]}. The served "
                "weights give no usable numbers, or the server does not tell all of them."
            )
        return sum(value for value, _ in tokens if value is not None), min(lead for _, lead in tokens)

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


def _item(request: Instance) -> str:
    """What a request is asked for, as errors call it."""
    document = request.doc if isinstance(request.doc, dict) else {}
    return f"task {request.task_name}, item {document.get('id', request.doc_id)}"
