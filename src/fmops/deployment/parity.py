"""Do trainer and server hold the same model?

Enters: the checkpoint's model folder, the release's, and the engine that will serve it. Leaves: `Parity`, and how each
probe went.
Refuses: nothing; disagreement is a finding, with reasons. `release` refuses on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from fmops.artifacts import Frozen, Parity
from fmops.deployment.serving.engine import Engine, Generation, Message, Token, generate_all, load_engine
from fmops.pictures import reads_pictures

if TYPE_CHECKING:
    from fmops.adapters.transformers_reference import Reference, Step

GREEDY_TOKENS = 32
ALTERNATIVES = 5
CONTEXT_TOKENS = 1024
"""Longest probe with its answer; a model with a shorter context gets the ends of the probes."""

_LONG = "The committee met again on the following day, and the minutes record what each member said. " * 16
"""Longer than one piece in which the engine reads a prompt."""
CHAT_PROBES: dict[str, list[Message]] = {
    "question": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "turns": [
        {"role": "user", "content": "Name a prime number."},
        {"role": "assistant", "content": "7 is a prime number."},
        {"role": "user", "content": "And a larger one?"},
    ],
    "unicode": [{"role": "user", "content": "Übersetze „naïve café“ — 東京, Ελλάδα, 🙂👩‍🚀 e\u0301"}],
    "code": [{"role": "user", "content": "Fix this:\n```python\ndef add(a, b):\n\treturn a - b  \n```\n"}],
    "spaces": [{"role": "user", "content": "  two  spaces\n\n\n   and\ttabs "}],
}
PLAIN_PROBES: dict[str, str] = {
    "prose": "Once upon a time, in a village by the sea,",
    "source": "import os\n\n\ndef main() -> None:\n    ",
    "numbers": "3.14159 + 2,718 = ",
    "script": "Добрый день. こんにちは。",
    "long": _LONG,
}


_GRADIENT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAMCAIAAADkharWAAAAHElEQVR42mNkYPgvwPCBeMTCIMJAEhjVMFI0AABb"
    "wxEJOjTVawAAAABJRU5ErkJggg=="
)
"""Colours that run across 16 × 12 pixels."""
PICTURE_PROBES: dict[str, list[Message]] = {
    "one": [{"role": "user", "content": "What is in the picture?", "pictures": [_GRADIENT]}],
    "two": [
        {"role": "user", "content": "Look at this.", "pictures": [_GRADIENT]},
        {"role": "assistant", "content": "I see colours."},
        {"role": "user", "content": "And these two?", "pictures": [_GRADIENT, _GRADIENT]},
    ],
}
"""For models that read pictures alone."""


class Probe(Frozen):
    """How one prompt went."""

    name: str
    prompt_tokens: int
    answer_tokens: int
    token_ids_equal: bool
    template_equal: bool
    greedy_equal: bool
    logprob_difference: float
    answer: str = Field("", description="The server's greedy answer: golden, to be repeated before and in production.")


@dataclass(frozen=True)
class _Served:
    """What the server made of a prompt."""

    name: str
    rendered: str | None
    ids: list[int]
    pictures: tuple[str, ...]
    prompt: list[int]
    answer: list[Token]


def check_parity(
    checkpoint_model: Path, release_model: Path, *, engine: str, threads: int
) -> tuple[Parity, tuple[Probe, ...]]:
    """Compare trainer and server on token ids, chat template, greedy tokens and log-probabilities.

    The trainer judges the server's own tokens in one full pass: each must be the trainer's likeliest, or tie with it
    within the engine's tolerance; and all log-probabilities that the server states must agree. One model is in memory
    at a time.
    """
    from fmops.adapters.transformers_reference import Reference

    server = load_engine(engine, release_model, max_tokens=CONTEXT_TOKENS, threads=threads)
    try:
        served = _serve_probes(server, sees=reads_pictures(release_model))
        name, tolerance = server.name, server.tolerance
        ends, server_chats = server.tokenizer.end_tokens, server.tokenizer.has_template
    finally:
        server.close()
    trainer = Reference(checkpoint_model, threads=threads)
    probes = tuple(_judge(trainer, probe, ends, tolerance=tolerance) for probe in served)
    reasons = [reason for probe in probes for reason in _reasons(probe, tolerance=tolerance)]
    if server_chats != trainer.has_template:
        reasons.append("one of trainer and server has a chat template, the other has none")
    parity = Parity(
        passed=not reasons,
        prompts=len(probes),
        engine=name,
        token_ids_equal=all(probe.token_ids_equal for probe in probes),
        template_equal=all(probe.template_equal for probe in probes) and server_chats == trainer.has_template,
        greedy_equal=all(probe.greedy_equal for probe in probes),
        max_logprob_difference=max(probe.logprob_difference for probe in probes),
        tolerance=tolerance,
        reasons=tuple(reasons),
    )
    return parity, probes


def _serve_probes(server: Engine, *, sees: bool) -> list[_Served]:
    """Answer every probe, side by side, as real requests would be."""
    room = server.tokenizer.context_tokens - GREEDY_TOKENS
    prepared: list[tuple[str, str | None, list[int], tuple[str, ...]]] = []
    if server.tokenizer.has_template:
        for kind, probes in {"chat": CHAT_PROBES, "picture": PICTURE_PROBES if sees else {}}.items():
            for name, messages in probes.items():
                ids = server.tokenizer.encode_chat(messages)
                # What is shown cannot be cut; where it does not fit there is nothing to compare.
                if kind == "chat" or len(ids) <= room:
                    prepared.append((f"{kind}/{name}", server.tokenizer.render(messages), ids, shown_in(messages)))
    for name, text in PLAIN_PROBES.items():
        prepared.append((f"plain/{name}", None, server.tokenizer.encode(text), ()))
    prompts = [ids[-room:] for _, _, ids, _ in prepared]
    stated = min(ALTERNATIVES, server.alternatives)
    answers = generate_all(
        server,
        [
            Generation(prompt=tuple(ids), max_tokens=GREEDY_TOKENS, top_logprobs=stated, pictures=shown)
            for ids, (_, _, _, shown) in zip(prompts, prepared, strict=True)
        ],
    )
    return [
        _Served(name=name, rendered=rendered, ids=ids, pictures=shown, prompt=prompt, answer=answer)
        for (name, rendered, ids, shown), prompt, answer in zip(prepared, prompts, answers, strict=True)
    ]


def shown_in(messages: Sequence[Message]) -> tuple[str, ...]:
    """What a dialogue shows, in order."""
    return tuple(url for message in messages for url in message.get("pictures", ()))


def _judge(trainer: Reference, served: _Served, ends: frozenset[int], *, tolerance: float) -> Probe:
    kind, _, name = served.name.partition("/")
    if kind != "plain":
        messages = (PICTURE_PROBES if kind == "picture" else CHAT_PROBES)[name]
        ids = trainer.encode_chat(messages) if trainer.has_template else []
        template_equal = trainer.has_template and trainer.render(messages) == served.rendered
    else:
        ids, template_equal = trainer.encode(PLAIN_PROBES[name]), True
    answer = [token.id for token in served.answer]
    tops = [[i for i, _ in token.top] for token in served.answer]
    steps = trainer.score(served.prompt, answer, tops, pictures=served.pictures)
    complete = len(answer) == GREEDY_TOKENS or answer[-1] in ends
    return Probe(
        name=served.name,
        prompt_tokens=len(served.prompt),
        answer_tokens=len(answer),
        token_ids_equal=ids == served.ids,
        template_equal=template_equal,
        greedy_equal=complete and all(step.best - step.logprob <= tolerance for step in steps),
        logprob_difference=_difference(served.answer, steps),
        answer="".join(token.text for token in served.answer),
    )


def _difference(answer: Sequence[Token], steps: Sequence[Step]) -> float:
    """Largest difference of any log-probability, in nats, rounded up to 1e-4: the noise below differs by machine.

    A value that is not finite on one side only counts as infinitely different.
    """
    worst = 0.0
    for token, step in zip(answer, steps, strict=True):
        pairs = [(token.logprob, step.logprob)]
        pairs += [(stated, found) for (_, stated), found in zip(token.top, step.top, strict=True)]
        for stated, found in pairs:
            difference = abs(stated - found) if stated != found else 0.0
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst if math.isinf(worst) else math.ceil(worst * 1e4) / 1e4


def _reasons(probe: Probe, *, tolerance: float) -> list[str]:
    reasons = []
    if not probe.token_ids_equal:
        reasons.append(f"{probe.name}: token ids differ")
    if not probe.template_equal:
        reasons.append(f"{probe.name}: the rendered chat templates differ")
    if not probe.greedy_equal:
        reasons.append(f"{probe.name}: greedy tokens differ")
    if probe.logprob_difference > tolerance:
        reasons.append(
            f"{probe.name}: log-probabilities differ by {probe.logprob_difference:g}, tolerance {tolerance:g}"
        )
    return reasons
