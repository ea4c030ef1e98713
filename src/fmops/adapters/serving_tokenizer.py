"""Text to token ids and back, for every serving engine: the release's own tokenizer and chat template.

Enters: a release's model folder. Leaves: ids, texts, bytes; from any thread.
Refuses: messages that the template refuses, and requests that do not fit the context or hold ids that are no tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from fmops.adapters.eyes import Eyes
from fmops.adapters.token_bytes import token_bytes
from fmops.deployment.serving.engine import Generation, Message, PromptError
from fmops.pictures import NoPicture, for_template, reads_pictures


class ServingTokenizer:
    """One release's tokenizer."""

    def __init__(self, folder: Path, *, max_tokens: int) -> None:
        """`max_tokens` bounds prompt and answer together; so does what the model was trained for."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._lock = threading.Lock()
        self.eyes = Eyes(folder) if reads_pictures(folder) else None
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        self.context_tokens: int = min(max_tokens, config.max_position_embeddings)
        self.vocabulary: int = config.vocab_size
        self.has_template = bool(self._tokenizer.chat_template)
        self.end_tokens = self._ends(folder)

    def render(self, messages: Sequence[Message]) -> str:
        """The chat template's text."""
        text: str = self._template(messages, tokenize=False)
        return text

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue, with room for what it shows."""
        shown = [url for message in messages for url in message.get("pictures", ())]
        if shown and self.eyes is None:
            raise PromptError(f"this model reads no pictures, and {len(shown)} came: send text alone")
        # Without sanitizing, a user who writes <|im_start|>system opens a turn of his own.
        ids: list[int] = self._template(messages, tokenize=True, return_dict=False, sanitize_control_tokens=True)
        if self.eyes is None:
            return ids
        try:
            return self.eyes.expand(ids, [self.eyes.look(url) for url in shown])
        except NoPicture as reason:
            raise PromptError(str(reason)) from None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        with self._lock:
            ids: list[int] = self._tokenizer.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        with self._lock:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_text(self, token: int) -> tuple[str, bytes]:
        """One token as text and as bytes."""
        with self._lock:
            raw = token_bytes(self._tokenizer, token)
        return raw.decode("utf-8", errors="replace"), raw

    def check(
        self, generation: Generation, *, alternatives: int, scores_prompts: bool = False, sees: bool = False
    ) -> None:
        """Raise PromptError for a request that cannot be computed.

        `alternatives`, `scores_prompts` and `sees` are what the engine can do.
        """
        if generation.pictures and not sees:
            raise PromptError(
                f"this engine shows its model no pictures, and {len(generation.pictures)} came: send text alone"
            )
        if generation.scores_prompt and not scores_prompts:
            raise PromptError("this engine does not state how likely a prompt is: leave 'echo' out")
        total = len(generation.prompt) + generation.max_tokens
        if not generation.prompt or generation.max_tokens < 1:
            raise PromptError(
                f"{len(generation.prompt)} prompt tokens and {generation.max_tokens} to generate: a request "
                "needs at least one of each"
            )
        if total > self.context_tokens:
            raise PromptError(
                f"{len(generation.prompt)} prompt tokens and {generation.max_tokens} to generate exceed the context "
                f"of {self.context_tokens} tokens"
            )
        if not (min(generation.prompt) >= 0 and max(generation.prompt) < self.vocabulary):
            raise PromptError(f"a prompt token is outside the vocabulary of {self.vocabulary} tokens")
        if generation.top_logprobs > alternatives:
            raise PromptError(
                f"this engine states the log-probabilities of {alternatives} alternatives at most, not of "
                f"{generation.top_logprobs}"
            )

    def _template(self, messages: Sequence[Message], **options: Any) -> Any:
        if not self.has_template:
            raise PromptError("this model has no chat template; use /v1/completions")
        try:
            with self._lock:
                shown = [for_template(message, sees=self.eyes is not None) for message in messages]
                return self._tokenizer.apply_chat_template(shown, add_generation_prompt=True, **options)
        except (TemplateError, ValueError) as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from error

    def _ends(self, folder: Path) -> frozenset[int]:
        """What the model's generation settings, the tokenizer and its padding name as an end.

        Padding counts: a model trained on documents separated by it would otherwise start a new document.
        """
        if (folder / "generation_config.json").is_file():
            settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        stated = settings.eos_token_id
        ends = stated if isinstance(stated, list) else [stated]
        tokenizer = self._tokenizer
        return frozenset(i for i in (*ends, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None)


def finish_of(*, stopped: bool) -> Literal["stop", "length"]:
    """OpenAI's word for why an answer is over."""
    return "stop" if stopped else "length"
