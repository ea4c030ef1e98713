"""A model behind lm-evaluation-harness's interface that reads each context once.

Enters: a Hugging Face folder, requests. Leaves: log-likelihoods and greedy generations, as the `hf` backend gives.
Refuses: pickled weights, remote code, contexts longer than the model with room for an answer.

Contexts and their answers are packed into one row under a tree mask: an answer sees its own context and itself, never
another answer or another item, at the positions it would have alone. The head runs at scored positions only.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fmops.errors import FmopsError
from fmops.faults import fault_site

PACK_TOKENS = 512
"""Tokens a forward pass sees. More would fill the processor no better, and attention grows with the square."""
GENERATION_BATCH = 64
LONGEST = 8192
"""For models that state no maximum length."""

Request = tuple[tuple[str, str], list[int], list[int]]


class Journal:
    """Finished work of a killed attempt: JSON Lines, appended and synced; a torn last line is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[str, Any] = {}
        if path.exists():
            # A line without its end was being written when the process died.
            whole = path.read_bytes().rpartition(b"\n")[0]
            path.write_bytes(whole + b"\n" if whole else b"")
            for line in whole.decode().splitlines():
                entry = json.loads(line)
                self._done[entry["key"]] = entry["value"]

    def get(self, key: str) -> Any:
        return self._done.get(key)

    def add(self, key: str, value: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._done[key] = value
        fault_site("evaluate.chunk")


@dataclass
class Group:
    """One context with its answers, as token ids. `requests` are the answers' places in the request list."""

    context: list[int]
    answers: list[list[int]] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(len(answer) - 1 for answer in self.answers)


class SharedPrefixLM(TemplateLM):  # type: ignore[misc]
    """Scores like the harness's `hf` backend (equal within 1e-4), reading each context once."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        journal: Journal | None = None,
        on_progress: Callable[[float], None] | None = None,
        pack_tokens: int = PACK_TOKENS,
    ) -> None:
        super().__init__()
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
        self.journal = journal
        self.on_progress = on_progress or (lambda _: None)
        self.pack_tokens = pack_tokens
        parameters = inspect.signature(self.model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self.shares = "position_ids" in parameters and _attends_everywhere(self.model.config)

    @property
    def batch_mode(self) -> str:
        """How requests are batched; part of the evaluation's protocol."""
        return f"shared-prefix/{self.pack_tokens}" if self.shares else "one-by-one"

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before every text, as in the `hf` backend: bos where there is one, else eos."""
        bos = self.tokenizer.bos_token_id
        return int(bos if bos is not None else self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", None) or LONGEST)

    @property
    def tokenizer_name(self) -> str:
        return "fmops"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        done = 0
        for pack in self._packs(requests):
            work = [[group.context, group.answers] for group in pack]
            scores = self._remembered("score", work, partial(self._score, pack))
            places = [place for group in pack for place in group.requests]
            for place, (loglikelihood, greedy) in zip(places, scores, strict=True):
                results[place] = (loglikelihood, greedy)
            done += len(places)
            self.on_progress(done / len(requests))
        return [result for result in results if result is not None]

    def _packs(self, requests: list[Request]) -> Iterator[list[Group]]:
        """Group answers by context, then fill packs, longest first; the order depends on the requests alone."""
        groups: list[Group] = []
        open_groups: dict[tuple[int, ...], Group] = {}
        alone: list[Group] = []
        for place, (_, context, answer) in enumerate(requests):
            room = self.max_length + 1 - len(answer)
            if room < 1:
                raise FmopsError(f"an answer of {len(answer)} tokens does not fit the model's {self.max_length}.")
            if not self.shares or len(context) > room:
                alone.append(Group(context[-room:], [answer], [place]))
                continue
            group = open_groups.get(tuple(context))
            if group is None or group.tokens + len(answer) > self.pack_tokens:
                # Texts that all begin with the same token would otherwise make one endless group.
                group = open_groups[tuple(context)] = Group(context)
                groups.append(group)
            group.answers.append(answer)
            group.requests.append(place)
        pack: list[Group] = []
        for group in sorted(groups, key=lambda group: (-group.tokens, group.requests)):
            if pack and sum(each.tokens for each in pack) + group.tokens > self.pack_tokens:
                yield pack
                pack = []
            pack.append(group)
        if pack:
            yield pack
        yield from ([group] for group in alone)

    @torch.inference_mode()
    def _score(self, pack: list[Group]) -> list[tuple[float, bool]]:
        """Log-likelihood of each answer of a pack, and whether greedy decoding would give it."""
        ids, positions, owners, branches, scored = _lay_out(pack)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "use_cache": False}
        if len(pack) > 1 or len(pack[0].answers) > 1:
            inputs["position_ids"] = torch.tensor([positions])
            inputs["attention_mask"] = _tree_mask(owners, branches)
        kept = sorted({place for places in scored for place in places})
        if self._keeps_logits:
            inputs["logits_to_keep"] = torch.tensor(kept)
        logits = self.model(**inputs).logits[0].float()  # [kept, vocabulary]
        if not self._keeps_logits:
            logits = logits[kept]
        row = {place: index for index, place in enumerate(kept)}
        normaliser = logits.logsumexp(-1)  # [kept]
        best = logits.argmax(-1)  # [kept]
        results = []
        answers = [answer for group in pack for answer in group.answers]
        for answer, places in zip(answers, scored, strict=True):
            rows = torch.tensor([row[place] for place in places])
            tokens = torch.tensor(answer)
            value = float((logits[rows, tokens] - normaliser[rows]).sum())
            if not math.isfinite(value):
                # The largest of NaNs is the first one: accuracy would look like a number.
                raise FmopsError(
                    f"the checkpoint gives a log-likelihood of {value}: its weights are no usable numbers."
                )
            results.append((value, bool((best[rows] == tokens).all())))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, answer in map(utils.make_disjoint_window, rolling):
                # The text keeps windows with the same prefix token apart in error messages only.
                windows.append(((text, ""), context, answer))
                owners.append(place)
        totals = [0.0] * len(requests)
        for place, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[place] += loglikelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        results: dict[int, str] = {}
        for places in _batches(encoded, [request.args[1] for request in requests]):
            options = requests[places[0]].args[1]
            ids = [encoded[place] for place in places]
            texts = self._remembered("generate", [ids, options], partial(self._generate, ids, options))
            results.update(zip(places, texts, strict=True))
            self.on_progress(len(results) / len(requests))
        return [results[place] for place in range(len(requests))]

    @torch.inference_mode()
    def _generate(self, contexts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Greedy continuations of token ids, cut at the first stop string or end of text."""
        if options.get("do_sample") or options.get("temperature"):
            raise FmopsError("generation tasks are greedy, so that two evaluations can be compared. Drop do_sample.")
        new_tokens = int(options.get("max_gen_toks", 256))
        room = self.max_length - new_tokens
        if room < 1:
            raise FmopsError(f"max_gen_toks {new_tokens} leaves no room in the model's {self.max_length} tokens.")
        tokenizer = self.tokenizer
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        stop = [*until, tokenizer.decode([self.eot_token_id])]
        contexts = [context[-room:] for context in contexts]
        width = max(map(len, contexts))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eot_token_id
        ids = torch.tensor([[pad] * (width - len(context)) + context for context in contexts])
        mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=self._ends(), use_cache=True
            ),
            stopping_criteria=stop_sequences_criteria(tokenizer, until, width, len(contexts)),
        )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [postprocess_generated_text(generation=text, stop=stop, think_end_token=None) for text in texts]

    def _ends(self) -> list[int]:
        stated = self.model.generation_config.eos_token_id
        ends = stated if isinstance(stated, list) else [stated]
        return sorted({self.eot_token_id, *(end for end in ends if end is not None)})

    def _remembered(self, kind: str, work: Any, do: Callable[[], Any]) -> Any:
        if self.journal is None:
            return do()
        key = hashlib.sha256(json.dumps([kind, work], sort_keys=True).encode()).hexdigest()
        known = self.journal.get(key)
        if known is None:
            known = do()
            self.journal.add(key, known)
        return known


def _attends_everywhere(config: Any) -> bool:
    """Whether every layer is plain full attention with rotary positions, so that a tree mask means what it says."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return kinds == {"full_attention"} and not window and bool(rotary)


def _lay_out(pack: list[Group]) -> tuple[list[int], list[int], list[int], list[int], list[list[int]]]:
    """Token ids, positions, group and branch of each token, and the places whose logits predict each answer.

    Branch 0 is a group's context; branch k its k-th answer. An answer's last token is predicted, never read.
    """
    ids: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    branches: list[int] = []
    scored: list[list[int]] = []
    for owner, group in enumerate(pack):
        last = len(ids) + len(group.context) - 1
        ids += group.context
        positions += range(len(group.context))
        owners += [owner] * len(group.context)
        branches += [0] * len(group.context)
        for branch, answer in enumerate(group.answers, start=1):
            start = len(ids)
            read = answer[:-1]
            scored.append([last, *range(start, start + len(read))])
            ids += read
            positions += range(len(group.context), len(group.context) + len(read))
            owners += [owner] * len(read)
            branches += [branch] * len(read)
    return ids, positions, owners, branches, scored


def _tree_mask(owners: list[int], branches: list[int]) -> torch.Tensor:
    """True where a token may look: back, in its own group, at the context or its own branch. [1, 1, tokens, tokens]"""
    owner = torch.tensor(owners)
    branch = torch.tensor(branches)
    tokens = len(owners)
    back = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    same = owner[:, None] == owner[None, :]
    seen = (branch[None, :] == 0) | (branch[:, None] == branch[None, :])
    return (back & same & seen)[None, None]


def _batches(encoded: list[list[int]], options: list[dict[str, Any]]) -> Iterator[list[int]]:
    """Places of requests that are generated together: equal options, near lengths."""
    named = [json.dumps(each, sort_keys=True) for each in options]
    order = sorted(range(len(encoded)), key=lambda place: (named[place], -len(encoded[place]), place))
    batch: list[int] = []
    for place in order:
        if batch and (len(batch) == GENERATION_BATCH or options[place] != options[batch[0]]):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def versions() -> dict[str, str]:
    """What scores depend on beside the harness, the items and the weights."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
