"""A model behind lm-evaluation-harness's interface that reads each common beginning once.

Enters: a Hugging Face folder, requests. Leaves: log-likelihoods and generations, as the `hf` backend gives.
Refuses: pickled weights, remote code, contexts longer than the model with room for an answer.

All requests of a task form a tree: few-shot examples, question, answers, and what answers have in common. See
`prefix_tree` for the order of reading and `answer_slots` for generation. The head runs at scored positions only.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from transformers import AutoModelForCausalLM, AutoTokenizer

from fmops.adapters.lm_eval_generation import Decoding, continue_alone, continue_prompts
from fmops.adapters.lm_eval_sampling import METHOD, TOP_K, answer_key
from fmops.adapters.prefix_tree import Read, Step, plan
from fmops.adapters.tree_reader import Scored, TreeReader, lines, shares_prefixes
from fmops.errors import FmopsError
from fmops.evaluation.journal import Journal

PACK_TOKENS = 256
"""Tokens a forward pass sees. More would fill the processor no better, and attend to more that is not theirs."""
BATCH_TOLERANCE = 2e-4
"""How far the log-likelihood of an answer may move with its company or the number of threads; see docs/log.md."""
LONGEST = 8192
"""For models that state no maximum length."""
ENCODED_TOGETHER = 256
"""Texts that the tokenizer gets at once."""

Request = tuple[tuple[str, str], list[int], list[int]]


class SharedPrefixLM(TemplateLM):  # type: ignore[misc]
    """Gives the choices and texts of the `hf` backend, reading common beginnings once; see docs/evaluation.md."""

    batch_tolerance = BATCH_TOLERANCE

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        journal: Journal | None = None,
        on_progress: Callable[[float], None] | None = None,
        pack_tokens: int = PACK_TOKENS,
        seed: int = 0,
    ) -> None:
        """`seed` is what sampled answers come from, with the item's text and the number of its repeat."""
        super().__init__()
        self.seed = seed
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.model = self._load(folder).eval()
        _refuse_misfit(self.tokenizer, self.model, folder)
        self.journal = journal or Journal()
        self.on_progress = on_progress or (lambda _: None)
        self.pack_tokens = pack_tokens
        self.shares = shares_prefixes(self.model)
        self.truncated = 0
        """Contexts so far that lost their beginning, because the model has no room for them."""
        self._encoded: dict[str, list[int]] = {}

    def _load(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )

    @property
    def batch_mode(self) -> str:
        """How requests are batched; part of the evaluation's protocol."""
        return f"prefix-tree/{self.pack_tokens}" if self.shares else "one-by-one"

    @property
    def templated(self) -> bool:
        """Whether chats go through a template; without one, prompts go in as they are."""
        return bool(self.tokenizer.chat_template)

    @property
    def template_sha256(self) -> str | None:
        """Digest of the chat template."""
        return sha256(str(self.tokenizer.chat_template).encode()).hexdigest() if self.templated else None

    @property
    def engine(self) -> dict[str, str]:
        """What scores depend on beside the harness, the items and the weights."""
        return {
            "torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32",
            "batch": self.batch_mode,
        }  # fmt: skip

    @property
    def sampling_method(self) -> str:
        """How sampled answers are drawn; part of the protocol of an evaluation that samples."""
        return f"{METHOD}; top_k {TOP_K} unless named"

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
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or LONGEST)

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
        if add_special_tokens is None and string in self._encoded:
            return self._encoded[string]
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        self._encode_together(text for request in requests for text in _texts(*request.args))
        scores: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        self._encoded = {}
        return scores

    def _encode_together(self, texts: Iterator[str]) -> None:
        """Encode each text once, many in a call: one by one, a context is encoded again for every answer."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        wanted = [text for text in dict.fromkeys(texts) if not has_bos_prefix(text, bos)]
        for begin in range(0, len(wanted), ENCODED_TOGETHER):
            some = wanted[begin : begin + ENCODED_TOGETHER]
            self._encoded.update(zip(some, self.tokenizer(some)["input_ids"], strict=True))

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[Scored]:
        reads = [self._read(context, answer) for _, context, answer in requests]
        answers = [answer for _, _, answer in requests]
        steps = plan(reads, self.pack_tokens) if self.shares else lines(reads)
        reader = TreeReader(self.model, steps, shares=self.shares)
        keys = {index: key for index, key in enumerate(_keys(steps, answers)) if steps[index].spans}
        tokens: list[list[float]] = [[0.0] * len(answer) for answer in answers]
        greedy, leads = [True] * len(requests), [math.inf] * len(requests)
        scored: dict[int, list[tuple[list[float], bool, float]]] = {}
        for index, found in self._each(keys, partial(_scored, reader, answers)):
            scored[index] = found
            self.on_progress(len(scored) / len(keys))
        for index in keys:
            for span, (values, best, lead) in zip(steps[index].spans, scored[index], strict=True):
                tokens[span.request][span.offset : span.offset + len(values)] = values
                greedy[span.request] &= best
                leads[span.request] = min(leads[span.request], lead)
        # A whole answer at once and in float32, as the `hf` backend adds: its rounding is ours, however a tree was cut.
        totals = [float(torch.tensor(values).sum()) for values in tokens]
        return list(map(Scored.of, totals, greedy, leads))

    def _read(self, context: list[int], answer: list[int]) -> Read:
        """What is read to score an answer: as much of the context's end as the model has room for."""
        room = self.max_length + 1 - len(answer)
        if not answer:
            raise FmopsError(
                f"an answer has no tokens, after …{self.tokenizer.decode(context[-12:])!r}: there is nothing to score. "
                "Look at doc_to_choice."
            )
        if room < 1:
            raise FmopsError(f"an answer of {len(answer)} tokens does not fit the model's {self.max_length}.")
        kept = context[-room:]
        self.truncated += len(kept) < len(context)
        return Read((*kept, *answer[:-1]), len(kept) - 1)

    def _each(self, keys: dict[int, str], do: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
        """Every chunk of work, from the journal where it is there; chunks of other processes come last."""
        left: list[int] = []
        for index, key in keys.items():
            if self.journal.get(key) is None and not self.journal.claim(key):
                left.append(index)
                continue
            yield index, self._finish(key, partial(do, index))
        for index in left:
            self.journal.claim(keys[index], wait=True)
            yield index, self._finish(keys[index], partial(do, index))

    def _finish(self, key: str, do: Callable[[], Any]) -> Any:
        """Do a claimed chunk, unless the process that had it before has finished it."""
        known = self.journal.get(key)
        if known is None:
            known = do()
            self.journal.add(key, known)
        self.journal.release(key)
        return known

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
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        texts: dict[int, str] = {}
        for places in groups.values():
            options = self.decoding(requests[places[0]].args[1])
            room = self.max_length - options.new_tokens
            prompts = [self.tok_encode(requests[place].args[0]) for place in places]
            self.truncated += sum(len(prompt) > room for prompt in prompts)
            if not all(prompts):
                raise FmopsError("generate_until: a prompt has no tokens: there is nothing to continue.")
            prompts = [prompt[-room:] for prompt in prompts]
            draws = repeat_keys([requests[place] for place in places], self.seed)
            answers = (
                continue_prompts(
                    self.model, prompts, options, draws, journal=self.journal, pack_tokens=self.pack_tokens
                )
                if self.shares
                else continue_alone(self.model, prompts, options, draws, journal=self.journal)
            )
            for number, tokens in answers:
                texts[places[number]] = options.text(tokens)
                self.on_progress(len(texts) / len(requests))
        return [texts[place] for place in range(len(requests))]

    def decoding(self, given: dict[str, Any]) -> Decoding:
        """A task's `generation_kwargs`, checked.

        Raises:
            FmopsError: an option that is not decoded here, or an answer that leaves no room for a prompt.
        """
        stated = self.model.generation_config.eos_token_id
        ends = stated if isinstance(stated, list) else [stated]
        named = frozenset({self.eot_token_id, *(end for end in ends if end is not None)})
        options = Decoding.of(given, self.tokenizer, named)
        if options.new_tokens >= self.max_length:
            raise FmopsError(
                f"max_gen_toks {options.new_tokens} leaves no room in the model's {self.max_length} tokens."
            )
        return options


def repeat_keys(requests: Sequence[Instance], seed: int) -> list[str]:
    """Each request's key for sampling. The harness asks for repeats by handing out a request several times."""
    seen: Counter[tuple[str, int | None]] = Counter()
    keys = []
    for request in requests:
        item = (request.args[0], request.doc_id)
        keys.append(answer_key(seed, request.args[0], seen[item]))
        seen[item] += 1
    return keys


def _refuse_misfit(tokenizer: Any, model: Any, folder: Path) -> None:
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise FmopsError(
            f"{folder}: the tokenizer does not fit the model: it gives token ids up to {highest}, and the model has "
            f"{rows} embeddings. Take the tokenizer that the model was trained with."
        )
    if tokenizer.eos_token_id is None:
        raise FmopsError(f"{folder}: the tokenizer names no end of text. Set eos_token in tokenizer_config.json.")


def _texts(context: str, continuation: str) -> Iterator[str]:
    """What the harness will encode for one answer."""
    if context:
        yield context.rstrip()
        yield context + continuation


def _scored(reader: TreeReader, answers: list[list[int]], index: int) -> list[tuple[list[float], bool, float]]:
    found = reader.score(index, answers)
    for values, _, _ in found:
        refuse_unusable(sum(values))
    return found


def refuse_unusable(value: float) -> None:
    """Raise for a log-likelihood that is no number."""
    if not math.isfinite(value):
        # The largest of NaNs is the first one: accuracy would look like a number.
        raise FmopsError(f"the checkpoint gives a log-likelihood of {value}: its weights are no usable numbers.")


def _keys(steps: Sequence[Step], answers: list[list[int]]) -> list[str]:
    """A name for each step's work, from all that its scores depend on beside the weights."""
    keys: list[str] = []
    for step in steps:
        above = keys[step.parent] if step.parent is not None else ""
        wanted = [[answers[span.request][span.offset :][: len(span.places)], span.places] for span in step.spans]
        work = json.dumps(["by token", above, step.tokens, step.depths, wanted])
        keys.append(sha256(work.encode()).hexdigest())
    return keys
