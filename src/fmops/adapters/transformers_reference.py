"""The trainer's view of a model: plain Transformers, one full forward pass in float32, no cache.

Enters: a Hugging Face model folder. Leaves: token ids, rendered templates, log-probabilities.
Refuses: custom code and pickled weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fmops.adapters.eyes import Eyes, load_seeing, pictures_of
from fmops.pictures import for_template, reads_pictures


@dataclass(frozen=True)
class Step:
    """What the trainer thinks of one token that the server produced."""

    logprob: float
    best: float
    """The likeliest token's log-probability."""
    top: tuple[float, ...]
    """Of the alternatives that the server named, in its order."""


class Reference:
    """A model as its trainer computes it."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        transformers_logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._eyes = Eyes(folder) if reads_pictures(folder) else None
        self._model: Any = (load_seeing(folder) if self._eyes else _load(folder)).eval()

    @property
    def sees(self) -> bool:
        """Whether it reads pictures."""
        return self._eyes is not None

    @property
    def has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The chat template's text, ready for the assistant's turn."""
        shown = [for_template(message, sees=self.sees) for message in messages]
        text: str = self._tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
        return text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a dialogue, ready for the assistant's turn."""
        shown = [for_template(message, sees=self.sees) for message in messages]
        ids: list[int] = self._tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_dict=False)
        urls = [url for message in messages for url in message.get("pictures", ())]
        return self._eyes.expand(ids, [self._eyes.look(url) for url in urls]) if self._eyes else ids

    def score(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        tops: Sequence[Sequence[int]],
        *,
        pictures: Sequence[str] = (),
    ) -> list[Step]:
        """Log-probabilities of each token of `answer` after `prompt`, and of the alternatives in `tops`, in nats.

        What `pictures` show goes through the model's own forward pass, pixels and all.
        """
        tokens = torch.tensor([[*prompt, *answer[:-1]]])
        pixels = pictures_of([[self._eyes.look(url) for url in pictures]]) if self._eyes else {}
        with torch.inference_mode():
            output = self._model(input_ids=tokens, use_cache=False, logits_to_keep=len(answer), **pixels)
        logits = output.logits[0].float()
        rows = torch.log_softmax(logits, dim=-1)
        return [
            Step(logprob=float(row[token]), best=float(row.max()), top=tuple(row[list(top)].tolist()))
            for row, token, top in zip(rows, answer, tops, strict=True)
        ]


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )


def tensor_without_finite_values(path: Path) -> str | None:
    """Name of the first tensor in a safetensors file that holds NaN or infinity, or None."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and tensor.numel():
                # NaN propagates through both extremes; one pass without a mask as large as the tensor.
                extremes = torch.stack(torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor))
                if not bool(torch.isfinite(extremes).all()):
                    return str(name)
    return None
