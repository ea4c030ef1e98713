"""A causal model that reads the steps of a prefix tree; the keys and values of a stem are computed once and kept.

Enters: a Transformers model, steps. Leaves: logits at chosen places, log-likelihoods, the cache of one branch.
Refuses: nothing; a stem that another process has read is read again here, with the same arithmetic.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch

from fmops.adapters.prefix_tree import Read, Span, Step
from fmops.adapters.slot_attention import SlotCache
from fmops.adapters.tree_attention import Tree, register
from fmops.errors import FmopsError

CAUSAL = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers that a tree can be read through."""
PRIME = 7919
"""Steps through a vocabulary, so that the tokens of a trial differ."""
ROUNDING = 3e-4
"""Of the logits' standard deviation, the most that a trial may differ by: float32 leaves a tenth of it."""
MOST_ROWS = 0.75
"""Share of the rows of a pass from which on picking them out saves nothing."""
NORMALISED = 2**20
"""Logits that are normalised together: their copy stays in the processor's cache."""


def shares_prefixes(model: Any) -> bool:
    """Whether a tree behind a stem gives this model's own logits: its attention is looked at, then it is tried.

    Attention must be causal softmax, over all positions or within a window, and know places by `position_ids` alone
    (rotary, learnt); a model that keeps a state instead, or shifts scores by distance, fails the trial.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    takes = {"position_ids", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys()
    if not (kinds <= CAUSAL and takes and getattr(model, "_supports_attention_backend", False)):
        return False
    rows = model.get_input_embeddings().weight.shape[0]
    stem, *branches = ([(PRIME * place + first) % rows for place in range(8)] for first in range(3))
    stemmed = [
        Step(None, 0, stem, list(range(8))),
        Step(0, 8, [token for branch in branches for token in branch], [*range(8), *range(8)], [
            Span(0, 0, list(range(8))), Span(1, 0, list(range(8, 16)))
        ])
    ]  # fmt: skip
    own = _logits(TreeReader(model, lines([Read((*stem, *branch), 8) for branch in branches]), shares=False))
    attention = model.config._attn_implementation
    try:
        found = _logits(TreeReader(model, stemmed, shares=True))
    except (FmopsError, AttributeError, TypeError, ValueError):
        return False
    finally:
        model.set_attn_implementation(attention)
    return bool((found - own).abs().max() <= ROUNDING * own.std())


def _logits(reader: TreeReader) -> torch.Tensor:
    """At all scored places."""
    places = [[place for span in step.spans for place in span.places] for step in reader.steps]
    read = [reader.read(index, kept or [0]) for index, kept in enumerate(places)]
    return torch.cat([logits for logits, kept in zip(read, places, strict=True) if kept])


def lines(reads: Sequence[Read]) -> list[Step]:
    """Every request in a step of its own: for models that cannot share."""
    return [
        Step(None, 0, list(read.tokens), list(range(len(read.tokens))), [
            Span(request, 0, list(range(read.first, len(read.tokens))))
        ])
        for request, read in enumerate(reads)
    ]  # fmt: skip


def last_mlp(model: Any) -> Any | None:
    """The feed-forward part of the last layer, whose rows only the head reads; None where it is not a plain one."""
    layers = getattr(model.base_model, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    return mlp if hasattr(mlp, "down_proj") else None


@contextmanager
def only_rows(mlp: Any | None, places: torch.Tensor, length: int) -> Iterator[None]:
    """Compute these rows of a module's output while the block runs; the others are zeros.

    Args:
        places: in order, of `length` tokens in one row.
    """
    if mlp is None or len(places) > MOST_ROWS * length:
        yield
        return

    def spread(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        whole = output.new_zeros(1, length, output.shape[2])
        whole[:, places] = output
        return whole

    hooks = (
        mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, places],)), mlp.register_forward_hook(spread)
    )  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Scored(tuple[float, bool]):
    """An answer's log-likelihood and whether it is the greedy choice, as lm-evaluation-harness wants it; and its lead.

    The lead is what the answer's token is ahead of the likeliest other one, in nats, at the token where that is least.
    Below 0 the answer is not the greedy one; the choice is another once log-probabilities move by half of it.
    """

    lead: float

    @classmethod
    def of(cls, loglikelihood: float, greedy: bool, lead: float) -> Scored:
        scored = cls((loglikelihood, greedy))
        scored.lead = lead
        return scored


class TreeReader:
    """Reads steps in any order; in the planned order no stem is read twice."""

    def __init__(self, model: Any, steps: Sequence[Step], *, shares: bool) -> None:
        self.model = model
        self.steps = steps
        self.shares = shares
        if shares != (model.config._attn_implementation == register()):
            model.set_attn_implementation(register() if shares else "sdpa")
        self.cache = SlotCache(max((step.start + len(step.tokens) for step in steps), default=0))
        self._stem: list[int] = []
        self._parents = {step.parent for step in steps}
        self._mlp = last_mlp(model) if shares else None
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def read(self, index: int, kept: Sequence[int]) -> torch.Tensor:
        """Logits (kept, vocabulary) at places of one step, in float32."""
        step = self.steps[index]
        places = torch.tensor(kept)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([step.tokens]), "use_cache": False}
        if self.shares:
            stem = self._climb(step.parent)
            positions = torch.tensor([step.depths]) + step.start
            inputs |= {"position_ids": positions, "tree": Tree.of(step, self.cache)}
        if self._keeps_logits:
            inputs["logits_to_keep"] = places
        with only_rows(self._mlp, places, len(step.tokens)):
            logits: torch.Tensor = self.model(**inputs).logits[0].float()
        if self.shares and index in self._parents:
            self._stem = [*stem, index]
            self.cache.length += len(step.tokens)
        return logits if self._keeps_logits else logits[list(kept)]

    def score(self, index: int, answers: Sequence[Sequence[int]]) -> list[tuple[list[float], bool, float]]:
        """For each span of a step: log-likelihoods of its tokens of the answer, whether they are greedy, their lead.

        `answers` are the tokens to predict, by request: as many as the request has scored positions.
        """
        spans = self.steps[index].spans
        kept = sorted({place for span in spans for place in span.places})
        row = {place: number for number, place in enumerate(kept)}
        rows = torch.tensor([row[place] for span in spans for place in span.places])
        tokens = torch.tensor(
            [token for span in spans for token in answers[span.request][span.offset :][: len(span.places)]]
        )
        chosen, lead, greedy = torch.empty(len(rows)), torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        logits = self.read(index, kept)
        height = max(1, NORMALISED // logits.shape[1])
        for number, part in enumerate(torch.split(logits, height)):
            # In float32, as lm-evaluation-harness's `hf` backend does: what it rounds is rounded here, too.
            logs = torch.log_softmax(part, dim=-1)
            (here,) = torch.nonzero(rows // height == number, as_tuple=True)
            at = rows[here] % height
            chosen[here] = logs[at, tokens[here]]
            lead[here] = chosen[here] - logs.amax(-1)[at]
            greedy[here] = lead[here] == 0
            for best in here[greedy[here]].tolist():
                first, second = logs[rows[best] % height].topk(2).values
                lead[best] = first - second
                if first == second:
                    # Among equals, greedy decoding takes the first.
                    greedy[best] = logs[rows[best] % height].argmax() == tokens[best]
        values, wholly, leads = chosen.tolist(), greedy.tolist(), lead.tolist()
        ends = accumulate((len(span.places) for span in spans), initial=0)
        return [(values[a:b], all(wholly[a:b]), min(leads[a:b])) for a, b in pairwise(ends)]

    def branch(self, start: int, ends: Sequence[int], place: int) -> SlotCache:
        """A copy of the path to a place of the step that was read last.

        `start` and `ends` are that step's.
        """
        path = list(range(start)) + [start + other for other in range(place + 1) if place < ends[other]]
        taken = torch.tensor(path)
        branch = SlotCache(len(path))
        for layer, keys in self.cache.keys.items():
            branch.extend(layer, keys.index_select(2, taken), self.cache.values[layer].index_select(2, taken))
        branch.length = len(path)
        return branch

    def _climb(self, parent: int | None) -> list[int]:
        """Make the cache hold the stem that ends with `parent`; returns the stem's steps."""
        stem: list[int] = []
        while parent is not None:
            stem.insert(0, parent)
            parent = self.steps[parent].parent
        known = 0
        while known < min(len(stem), len(self._stem)) and stem[known] == self._stem[known]:
            known += 1
        self._stem = stem[:known]
        self.cache.length = sum(len(self.steps[each].tokens) for each in self._stem)
        for missing in stem[known:]:
            self.read(missing, [0])
        return stem
