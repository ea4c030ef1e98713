"""Token ids of documents, by the base model's own tokenizer (transformers).

Enters: a model folder, texts. Leaves: int32 ids, each document closed by its end token.
Refuses: model folders without a fast tokenizer or without an end token.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer
from transformers.utils import logging

from fmops.errors import FmopsError
from fmops.pictures import for_template, reads_pictures


def check_template(model: Path) -> None:
    """Render one dialogue, so that a template that breaks, or breaks out, is found before anything is trained.

    Raises:
        FmopsError: the chat template cannot be rendered in the sandbox.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    if not tokenizer.chat_template:
        return
    sees = reads_pictures(model)
    messages = [for_template({"role": role, "content": "Hello."}, sees=sees) for role in ("user", "assistant")]
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise FmopsError(
            f"the chat template of the base model cannot be rendered: {error}. Name another base, or mend its "
            "chat_template."
        ) from None


class DocumentTokenizer:
    """Documents as the base model saw them in its own pretraining."""

    def __init__(self, model: Path) -> None:
        # Documents are cut into blocks later; the warning that they exceed the context is not for us.
        logging.set_verbosity_error()
        self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
        if not self._tokenizer.is_fast:
            raise FmopsError(f"{model} has no fast tokenizer (tokenizer.json). Save one with it.")
        self._sees = reads_pictures(model)
        self._start = self._first_token()
        self._end = self._end_of_document()

    def encode(self, texts: list[str]) -> list[array[int]]:
        """Ids of each text, with the model's start token where it uses one, and the end-of-document token."""
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [array("i", [*self._start, *ids, self._end]) for ids in encoded]

    def count(self, text: str) -> int:
        """Tokens of a plain text."""
        return len(self._tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])

    def count_chat(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Tokens of a dialogue, in the model's chat template where it has one; a picture counts as one."""
        if not self._tokenizer.chat_template:
            return sum(self.count(message["content"]) + 4 for message in messages)
        plain = [for_template(message, sees=self._sees) for message in messages]
        return self.count(self._tokenizer.apply_chat_template(plain, tokenize=False))

    def _first_token(self) -> list[int]:
        ids = self._tokenizer("")["input_ids"]
        begin = self._tokenizer.bos_token_id
        return [begin] if begin is not None and begin in ids else []

    def _end_of_document(self) -> int:
        # Chat models end a turn with their eos, and a document with this one, as their base did.
        vocabulary = self._tokenizer.get_vocab()
        for name in ("<|endoftext|>", "<|end_of_text|>", self._tokenizer.eos_token):
            if name is not None and name in vocabulary:
                return int(vocabulary[name])
        raise FmopsError(
            f"the tokenizer of {self._tokenizer.name_or_path} has no end token: eos_token is "
            f"{self._tokenizer.eos_token!r}. Set one in tokenizer_config.json of the base."
        )
