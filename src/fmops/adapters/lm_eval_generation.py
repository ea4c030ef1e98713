"""Generation as lm-evaluation-harness asks for it: its options, its stop strings, finished answers in a journal.

Enters: prompts as token ids, one set of options. Leaves: each prompt's continuation as token ids, and its text.
Refuses: beams, penalties and other options that are not decoded here; answers without room.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from transformers import GenerationConfig, LogitsProcessor

from fmops.adapters.answer_slots import Choose, generate, likeliest
from fmops.adapters.lm_eval_sampling import Sampling
from fmops.adapters.prefix_tree import Read, plan
from fmops.adapters.tree_reader import TreeReader
from fmops.errors import FmopsError
from fmops.evaluation.journal import Journal

UNDERSTOOD = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"})
"""Options of a generation task. Those that shape sampling mean nothing where `do_sample` is false."""

Continuations = Iterator[tuple[int, list[int]]]
"""A prompt's index and the tokens that follow it, in the order in which they finish."""


def understood(given: dict[str, Any]) -> dict[str, Any]:
    """The harness's `generation_kwargs` in their normal form.

    Raises:
        FmopsError: an option that is not decoded here.
    """
    try:
        options = dict(normalize_gen_kwargs({name: value for name, value in given.items() if value is not None}))
    except (TypeError, ValueError) as error:
        raise FmopsError(f"generation_kwargs {given}: {error}. Temperature and most tokens are numbers.") from None
    if options.get("num_beams") == 1:
        # One beam is greedy decoding.
        del options["num_beams"]
    strange = sorted(options.keys() - UNDERSTOOD)
    if strange:
        raise FmopsError(
            f"generation_kwargs: {', '.join(strange)} is not decoded here. Drop it. Options: "
            f"{', '.join(sorted(UNDERSTOOD))}."
        )
    if options["max_gen_toks"] < 1:
        raise FmopsError(f"generation_kwargs: max_gen_toks is {options['max_gen_toks']}; it is at least 1.")
    return options


@dataclass(frozen=True)
class Decoding:
    """How an answer's tokens are chosen, and what ends it."""

    tokenizer: Any
    new_tokens: int
    """Most tokens of an answer."""
    until: tuple[str, ...]
    """Strings that end an answer and do not belong to it."""
    window: int
    """Tokens in which a string of `until` must show up when it is generated."""
    ends: frozenset[int]
    """Tokens that end an answer."""
    identity: str
    """The options as they were given, for the journal."""
    sampling: Sampling | None = None
    """None: the likeliest token."""

    @classmethod
    def of(cls, given: dict[str, Any], tokenizer: Any, ends: frozenset[int]) -> Decoding:
        """Read the harness's `generation_kwargs`.

        Raises:
            FmopsError: an option that is not decoded here, or one out of its range.
        """
        options = understood(given)
        sampling = Sampling.of(options)
        until = tuple(text for text in options["until"] if text)
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in until]
        # A string may come in more tokens than the tokenizer itself would cut it into.
        window = 2 * max(lengths, default=0) + 2
        identity = json.dumps(given, sort_keys=True)
        return cls(tokenizer, int(options["max_gen_toks"]), until, window, ends, identity, sampling)

    def is_done(self, tokens: list[int]) -> bool:
        """Whether an answer that ends with its newest token is over."""
        if tokens[-1] in self.ends:
            return True
        if not any(text in self.tokenizer.decode(tokens[-self.window :]) for text in self.until):
            return False
        whole = self.tokenizer.decode(tokens)
        return any(text in whole for text in self.until)

    def text(self, tokens: list[int]) -> str:
        """The answer's text up to the first stop string, without special tokens."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        end = self.tokenizer.decode([self.tokenizer.eos_token_id])
        answer: str = postprocess_generated_text(generation=text, stop=[*self.until, end], think_end_token=None)
        return answer


def continue_prompts(
    model: Any, prompts: Sequence[list[int]], options: Decoding, draws: Sequence[str], *, journal: Journal,
    pack_tokens: int,
) -> Continuations:  # fmt: skip
    """What follows each prompt: what this process generates, then what the journal or other processes had.

    Args:
        draws: where tokens are sampled, each answer's key.
    """
    steps = plan([Read(tuple(prompt), len(prompt) - 1) for prompt in prompts], pack_tokens)
    reader = TreeReader(model, steps, shares=True)
    keys, choose = _keys(prompts, options, draws), _chooser(options, draws)
    whole = _digest("prompts", *keys)
    finished: set[int] = set()

    def claim(index: int, *, wait: bool) -> set[int] | None:
        """Those of a step's requests that nobody has finished; None while another process has them."""
        if not journal.claim(f"{whole}/{index}", wait=wait):
            return None
        wanted = {span.request for span in steps[index].spans if journal.get(keys[span.request]) is None}
        if not wanted:
            journal.release(f"{whole}/{index}")
        return wanted

    def run(next_step: Callable[[], tuple[int, set[int]] | None]) -> Continuations:
        for answer in generate(reader, next_step, options.is_done, choose, new_tokens=options.new_tokens):
            journal.add(keys[answer.request], answer.tokens)
            finished.add(answer.request)
            if all(journal.get(keys[span.request]) is not None for span in steps[answer.step].spans):
                journal.release(f"{whole}/{answer.step}")
            yield answer.request, answer.tokens

    asked = iter([index for index, step in enumerate(steps) if step.spans])
    taken: list[int] = []

    def next_free() -> tuple[int, set[int]] | None:
        for index in asked:
            wanted = claim(index, wait=False)
            if wanted is None:
                taken.append(index)
            elif wanted:
                return index, wanted
        return None

    yield from run(next_free)
    for index in taken:
        # One at a time: a process that waits must hold nothing that another one waits for.
        wanted = claim(index, wait=True)
        if wanted:
            work = iter([(index, wanted)])
            yield from run(lambda work=work: next(work, None))  # type: ignore[misc]
    for request, key in enumerate(keys):
        if request not in finished:
            yield request, journal.get(key)


@torch.inference_mode()
def continue_alone(
    model: Any, prompts: Sequence[list[int]], options: Decoding, draws: Sequence[str], *, journal: Journal
) -> Continuations:
    """The same by Transformers' own generation, a prompt at a time: for models that no prefix tree can serve."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=options.new_tokens, pad_token_id=min(options.ends),
        eos_token_id=sorted(options.ends), use_cache=True,
    )  # fmt: skip
    keys, choose = _keys(prompts, options, draws), _chooser(options, draws)
    for request, prompt in enumerate(prompts):
        key = keys[request]
        journal.claim(key, wait=True)
        tokens = journal.get(key)
        if tokens is None:
            ids = torch.tensor([prompt])
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                stopping_criteria=[_Stops(options, len(prompt))],
                logits_processor=[_Chosen(choose, request, len(prompt))] if options.sampling else [],
            )  # fmt: skip
            tokens = output[0, len(prompt) :].tolist()
            journal.add(key, tokens)
        journal.release(key)
        yield request, tokens


@dataclass
class _Stops:
    """Transformers' stopping criterion for one prompt."""

    options: Decoding
    prompt_tokens: int

    def __call__(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([self.options.is_done(row[self.prompt_tokens :].tolist()) for row in ids])


@dataclass
class _Chosen(LogitsProcessor):  # type: ignore[misc]
    """Leaves Transformers one token to take: the one that was drawn."""

    choose: Choose
    request: int
    prompt_tokens: int

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        (token,) = self.choose(scores, [(self.request, input_ids.shape[1] - self.prompt_tokens)])
        alone = torch.full_like(scores, -torch.inf)
        alone[0, token] = 0.0
        return alone


def _chooser(options: Decoding, draws: Sequence[str]) -> Choose:
    sampling = options.sampling
    if sampling is None:
        return likeliest
    return lambda logits, rows: sampling.choose(logits, [draws[request] for request, _ in rows], [n for _, n in rows])


def _keys(prompts: Sequence[list[int]], options: Decoding, draws: Sequence[str]) -> list[str]:
    """What the journal knows each answer by."""
    if options.sampling is None:
        return [_digest("generate", prompt, options.identity) for prompt in prompts]
    return [_digest("generate", prompt, options.identity, draw) for prompt, draw in zip(prompts, draws, strict=True)]


def _digest(*work: Any) -> str:
    return sha256(json.dumps(work).encode()).hexdigest()
