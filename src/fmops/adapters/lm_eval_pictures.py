"""The harness's view of a model that reads pictures: what `lm_eval_scorer` gives, with a question's picture seen.

Enters: a Hugging Face folder with an image processor, requests whose item has a field `picture` (a data URL).
Leaves: log-likelihoods; greedy generations to prompts without pictures.
Refuses: questions whose places (`<image>`) do not match their picture, contexts too long, generation about pictures.
"""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from fmops.adapters.eyes import Eyes, Look, embed, load_seeing
from fmops.adapters.lm_eval import PICTURE
from fmops.adapters.lm_eval_scorer import SharedPrefixLM, refuse_unusable
from fmops.adapters.tree_reader import Scored
from fmops.errors import FmopsError
from fmops.pictures import PLACE, NoPicture, for_template, reads_pictures


class SeeingLM(SharedPrefixLM):
    """Scores a request at a time: a picture's features stand in the middle of what others share as text."""

    sees = True

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._eyes = Eyes(folder, remember=True)
        # A language tower is not at the place where shared beginnings are read.
        self.shares = False

    def _load(self, folder: Path) -> Any:
        return load_seeing(folder)

    @property
    def batch_mode(self) -> str:
        return "one-by-one"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        shown = [for_template(_without_places(message), sees=True) for message in chat_history]
        text: str = self.tokenizer.apply_chat_template(
            shown, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        scores = []
        for request in requests:
            context, answer = self._encode_pair(*request.args)
            picture = (request.doc or {}).get(PICTURE)
            key = sha256(repr((picture, context, answer)).encode()).hexdigest()
            if (known := self.journal.get(key)) is None:
                self.journal.claim(key, wait=True)
                known = self._finish(key, partial(self._score, context, answer, picture, request.doc))
            scores.append(Scored.of(float(known[0]), bool(known[1]), float(known[2])))
            self.on_progress(len(scores) / len(requests))
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise FmopsError(
            f"{len(requests)} documents are to be scored, and bits per byte are not measured of a model that reads "
            "pictures. Leave the suite out."
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        shown = next((request for request in requests if (request.doc or {}).get(PICTURE)), None)
        if shown is not None:
            raise FmopsError(
                f"{shown.task_name} asks for text about pictures; questions about pictures are multiple choice here. "
                "Set its output_type to multiple_choice."
            )
        texts: list[str] = super().generate_until(requests, disable_tqdm)
        return texts

    def _score(self, context: list[int], answer: list[int], picture: str | None, doc: Any) -> tuple[float, bool, float]:
        """Log-likelihood of `answer` after `context`, whether all its tokens are the likeliest, its lead."""
        try:
            looks: list[Look] = [self._eyes.look(picture)] if picture else []
            seen = self._eyes.expand(context, looks)
        except NoPicture as reason:
            raise FmopsError(f"item {(doc or {}).get('id')}: {reason}. A question writes {PLACE} once.") from None
        tokens = [*seen, *answer]
        if len(tokens) > self.max_length:
            raise FmopsError(f"item {(doc or {}).get('id')} has {len(tokens)} tokens, the model {self.max_length}.")
        with torch.inference_mode():
            embedded = embed(self.model, tokens, looks)[None]
            logits = self.model(inputs_embeds=embedded, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
        rows = torch.log_softmax(logits.float(), dim=-1)
        chosen = rows[range(len(answer)), answer]
        value = float(chosen.sum())
        refuse_unusable(value)
        first, second = rows.topk(2).values.unbind(-1)
        lead = torch.where(chosen < first, chosen - first, first - second).min()
        return value, rows.argmax(dim=-1).tolist() == answer, float(lead)


def _without_places(message: dict[str, str]) -> dict[str, Any]:
    text = message["content"]
    return {"role": message["role"], "content": text.replace(PLACE, ""), "pictures": [PICTURE] * text.count(PLACE)}


def open_model(folder: Path, *, threads: int, seed: int = 0) -> SharedPrefixLM:
    """The weights in a folder, with eyes where they have some."""
    return (SeeingLM if reads_pictures(folder) else SharedPrefixLM)(folder, threads=threads, seed=seed)
