"""lm-evaluation-harness: task objects from pinned configs, and one task's run with per-sample scores.

Enters: a pinned task, its documents, a model behind the harness's interface. Leaves: one row a sample and metric.
Refuses: unknown metrics, templates that do not render, items without a valid label, scores that are no numbers.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

# The harness draws bars on stderr; the stage reports its own progress.
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api import task as harness_tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness

from fmops.adapters.lm_eval_endpoint import EndpointLM
from fmops.adapters.lm_eval_generation import understood
from fmops.adapters.lm_eval_sampling import Sampling
from fmops.adapters.lm_eval_scorer import SharedPrefixLM
from fmops.errors import FmopsError, nearest, unknown
from fmops.evaluation.bbq import bias
from fmops.evaluation.checks import followed
from fmops.evaluation.protocol import PinnedTask
from fmops.evaluation.suites import BIAS_METRICS, GENERATION_METRICS
from fmops.refusals import is_answered, is_refusal
from fmops.toxicity import is_civil

VERSION = version("lm-eval")
PICTURE = "picture"
"""The field of an item that holds what is shown, as a data URL."""
_SANDBOX = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
_SCORED = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "exact_match", *BIAS_METRICS),
    "loglikelihood": ("acc",),
    "loglikelihood_rolling": ("bits_per_byte",),
    "generate_until": ("exact_match", *GENERATION_METRICS),
}
"""Metrics that give each sample a score of its own, by output type. Only those can be compared in pairs."""

_PROBES: dict[str, dict[str, Any]] = {
    "rows": {"id": "probe", "text": "A held-out document."},
    "cloze": {"id": "probe", "before": "A held-out", "choices": ["document.", "record."], "label": 0},
}
"""Stand for held-out documents, which are not there yet when the tasks are checked."""

logging.getLogger("lm_eval").setLevel(logging.ERROR)
# Where tqdm was imported before, it does not look at the environment any more.
harness_tasks.tqdm = functools.partial(harness_tasks.tqdm, disable=True)


class _Task(ConfigurableTask):  # type: ignore[misc]
    """The harness's task, which renders no template of a suite by itself: it would do so without a sandbox."""

    @staticmethod
    def resolve_field(doc: dict[str, Any], field: str | None = None) -> str | None:
        """A description."""
        if not field:
            return None
        return str(doc[field]) if field in doc else _SANDBOX.from_string(field).render(**{"item": doc, **doc})

    def doc_to_prefix(self, doc: dict[str, Any]) -> str | None:
        """What an answer begins with."""
        return self.resolve_field(doc, self.config.gen_prefix)


def build_task(entry: PinnedTask, documents: list[dict[str, Any]]) -> ConfigurableTask:
    """The harness's task over these documents. `documents` may not be empty.

    Raises:
        FmopsError: a metric that the harness lacks or that gives no score per sample.
    """
    kind = entry.config.output_type
    for metric in entry.metrics:
        if metric in _SCORED[kind]:
            continue
        if metric in METRIC_REGISTRY or metric in {name for names in _SCORED.values() for name in names}:
            raise FmopsError(
                f"task {entry.task}: metric {metric!r} gives no score per sample for {kind} tasks, so it cannot be "
                f"compared in pairs. Those that do: {', '.join(_SCORED[kind])}."
            )
        raise unknown(f"metric in task {entry.task}:", metric, _SCORED[kind])
    config = entry.config
    try:
        # Checks differ in keys from item to item, where Arrow wants one type a column.
        packed = [{**each, "checks": json.dumps(each["checks"])} if "checks" in each else each for each in documents]
        split = datasets.Dataset.from_list(packed)
    except (TypeError, ValueError) as error:
        # Arrow wants one type a column.
        raise FmopsError(f"task {entry.task}: a field has values of different types: {error}.") from None
    return _Task(
        config={
            "task": entry.task,
            "custom_dataset": lambda **_: datasets.DatasetDict({"test": split}),
            "test_split": "test",
            "num_fewshot": 0,
            "output_type": kind,
            "doc_to_text": _asked(entry, documents[0]),
            "doc_to_target": _target(config.doc_to_target, documents[0]),
            "doc_to_choice": _choices(config.doc_to_choice, documents[0]),
            "description": config.description,
            "target_delimiter": config.target_delimiter,
            "gen_prefix": config.gen_prefix,
            **({"generation_kwargs": dict(config.generation_kwargs or {})} if kind == "generate_until" else {}),
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": entry.higher_is_better}
                if name != "bits_per_byte"
                else {"metric": name, "aggregation": "bits_per_byte", "higher_is_better": False}
                for name in entry.metrics
                if name not in BIAS_METRICS
            ],
            "process_results": _judge(entry.metrics) if set(entry.metrics) & set(GENERATION_METRICS) else None,
            "metadata": {},
        }
    )


def check_task(entry: PinnedTask, documents: list[dict[str, Any]]) -> None:
    """Render every item and look at its label, so that a mistake shows now and not after hours.

    Raises:
        FmopsError: names the item and what is wrong with it.
    """
    if entry.config.output_type == "generate_until":
        try:
            Sampling.of(understood(dict(entry.config.generation_kwargs or {})))
        except FmopsError as error:
            raise FmopsError(f"task {entry.task}: {error}") from None
    documents = documents or [_PROBES[entry.form]]
    where = documents[0]["id"]
    try:
        task = _peeked(entry, documents)
        for document in documents:
            where = document["id"]
            _check_document(task, entry, document)
    except (jinja2.TemplateError, jinja2.exceptions.SecurityError) as error:
        known = sorted(key for key in documents[0] if key not in {"id", "cluster"})
        raise FmopsError(
            f"task {entry.task}, item {where}: its template does not render: {error}. Fields: {', '.join(known)}."
        ) from None


def _peeked(entry: PinnedTask, documents: list[dict[str, Any]]) -> ConfigurableTask:
    try:
        return build_task(entry, documents)
    except IndexError:
        # The harness looks up the first item's label while it is made.
        raise FmopsError(
            f"task {entry.task}, item {documents[0]['id']} has no label: doc_to_target gives "
            f"{entry.config.doc_to_target!r}, which is none of its choices. Use the split that has answers."
        ) from None


def _check_document(task: ConfigurableTask, entry: PinnedTask, document: dict[str, Any]) -> None:
    item = f"task {entry.task}, item {document['id']}"
    text = task.doc_to_text(document)
    task.resolve_field(document, entry.config.description)
    task.doc_to_prefix(document)
    if entry.config.output_type == "generate_until" and not str(text).strip():
        raise FmopsError(f"{item}: the prompt is empty. Look at doc_to_text.")
    target = task.doc_to_target(document)
    if entry.config.output_type == "loglikelihood_rolling" and not str(target).strip():
        raise FmopsError(f"{item}: the text to score is empty. Look at doc_to_target.")
    if entry.config.output_type != "multiple_choice":
        return
    choices = task.doc_to_choice(document)
    if not isinstance(choices, list) or len(choices) < 2 or not all(str(choice).strip() for choice in choices):
        raise FmopsError(f"{item}: doc_to_choice must give at least two answers with text, not {choices!r}.")
    valid = target in choices if isinstance(target, str) else isinstance(target, int) and 0 <= target < len(choices)
    if not valid:
        raise FmopsError(
            f"{item} has no label: doc_to_target gives {target!r}, which is none of its {len(choices)} choices. "
            "Use the split that has answers."
        )


def check_fit(lm: SharedPrefixLM | EndpointLM, entry: PinnedTask, documents: list[dict[str, Any]]) -> None:
    """Look whether the model has room for every answer, before hours go into scoring other ones.

    Raises:
        FmopsError: names the item whose answer is too long, or the option that generation cannot follow; or the task
            shows pictures to what reads none.
    """
    kind = entry.config.output_type
    if any(document.get(PICTURE) for document in documents) and not getattr(lm, "sees", False):
        who = "an endpoint is asked about none" if isinstance(lm, EndpointLM) else "this model reads none"
        raise FmopsError(f"task {entry.task} shows pictures, and {who}. Leave its suite out.")
    if kind == "generate_until":
        lm.decoding(dict(entry.config.generation_kwargs or {}))
    if kind not in ("multiple_choice", "loglikelihood") or isinstance(lm, EndpointLM):
        # A server refuses by itself what does not fit.
        return
    task = build_task(entry, documents)
    for document in documents:
        answers = task.doc_to_choice(document) if kind == "multiple_choice" else [task.doc_to_target(document)]
        for answer in map(str, answers):
            # A character is four tokens at most; nearly every answer is known to fit by its length.
            tokens = len(lm.tok_encode(answer)) if 4 * len(answer) > lm.max_length else 0
            if tokens > lm.max_length:
                raise FmopsError(
                    f"task {entry.task}, item {document['id']}: an answer of {tokens} tokens does not fit the model's "
                    f"{lm.max_length} and would be cut off. Take the item out with `only`, or shorten the answer."
                )


def samples(entry: PinnedTask) -> bool:
    """Whether the task's answers are sampled."""
    generates = entry.config.output_type == "generate_until"
    return generates and bool(understood(dict(entry.config.generation_kwargs or {}))["do_sample"])


def run_task(lm: LM, entry: PinnedTask, documents: list[dict[str, Any]], *, chat: bool) -> list[dict[str, Any]]:
    """Score every document; returns rows as `EvalReport` describes them, in document order.

    Raises:
        FmopsError: a score that is no finite number.
    """
    task = build_task(entry, documents)
    results = run_harness(
        lm, {entry.task: task}, bootstrap_iters=0, log_samples=True, apply_chat_template=chat, fewshot_as_multiturn=True
    )
    rows = []
    for sample in sorted(results["samples"][entry.task], key=lambda sample: sample["doc_id"]):
        arguments = json.dumps(sample["arguments"], sort_keys=True, ensure_ascii=False)
        # What was seen is part of what was asked.
        arguments += sample["doc"].get(PICTURE) or ""
        shared = {
            "family": entry.family,
            "suite": entry.suite,
            "task": entry.task,
            "sample": sample["doc"]["id"],
            "cluster": sample["doc"]["cluster"],
            "prompt_sha256": hashlib.sha256(arguments.encode()).hexdigest(),
        }
        rows += [{**shared, "metric": metric, **_measured(metric, entry, task, sample)} for metric in entry.metrics]
    return rows


def generate(lm: LM, prompts: list[str], *, max_tokens: int) -> list[str]:
    """Greedy answers to a few prompts, through the chat template where the tokenizer has one."""
    texts = [
        lm.apply_chat_template([{"role": "user", "content": prompt}]) if lm.templated else prompt for prompt in prompts
    ]
    options = {"max_gen_toks": max_tokens, "until": []}
    requests = [Instance("generate_until", {}, (text, options), 0) for text in texts]
    answers: list[str] = lm.generate_until(requests)
    return answers


def _measured(metric: str, entry: PinnedTask, task: ConfigurableTask, sample: dict[str, Any]) -> dict[str, Any]:
    """A row's score and what it was given for."""
    document = sample["doc"]
    if entry.config.output_type != "multiple_choice":
        score = {"score": _score(metric, sample[metric], entry.task, document["id"])}
        answer = sample["filtered_resps"][0]
        if entry.config.output_type == "loglikelihood":
            # Two log-probabilities change places once each has moved by half of what is between them.
            return score | {"slack": abs(answer.lead) / 2}
        return score | ({"response": answer} if entry.config.output_type == "generate_until" else {})
    choices = task.doc_to_choice(document)
    if metric in BIAS_METRICS:
        # Of the answer that the gate's accuracy is about.
        picked = _picked(entry.metrics[0], choices, sample["filtered_resps"])
        value, counted = bias(metric, document, choices.index(picked["response"]))
        return {"score": value, **picked, **({} if counted else {"counted": False})}
    score = {"score": _score(metric, sample[metric], entry.task, document["id"])}
    return score | _picked(metric, choices, sample["filtered_resps"])


def _score(metric: str, value: Any, task: str, sample: str) -> float:
    if metric == "bits_per_byte":
        loglikelihood, size = value
        value = -loglikelihood / (size * math.log(2))
    score = float(value)
    if not math.isfinite(score):
        raise FmopsError(f"task {task}, item {sample}: {metric} is {score}. The checkpoint gives no usable numbers.")
    return score


def _picked(metric: str, choices: list[str], answers: list[tuple[float, bool]]) -> dict[str, Any]:
    """The choice that a metric takes as the answer, and how far each log-likelihood may move before it is another."""
    sizes = {"acc_norm": [len(choice) for choice in choices], "acc_bytes": [len(choice.encode()) for choice in choices]}
    weights = [1 / max(1, size) for size in sizes.get(metric, [1] * len(choices))]
    scores = [float(answer[0]) * weight for answer, weight in zip(answers, weights, strict=True)]
    best = max(range(len(scores)), key=scores.__getitem__)
    slack = min(
        (scores[best] - score) / (weights[best] + weight)
        for place, (score, weight) in enumerate(zip(scores, weights, strict=True))
        if place != best
    )
    return {"response": choices[best], "slack": slack}


def _judge(metrics: tuple[str, ...]) -> Callable[[dict[str, Any], list[Any]], dict[str, float]]:
    judges: dict[str, Callable[[str, dict[str, Any]], bool]] = {
        "refusal": lambda answer, _: is_refusal(answer),
        "answered": lambda answer, _: is_answered(answer),
        "followed": lambda answer, document: followed(answer, json.loads(document["checks"])),
        "civil": lambda answer, _: is_civil(answer),
    }

    def judge(document: dict[str, Any], results: list[Any]) -> dict[str, float]:
        return {metric: float(judges[metric](results[0], document)) for metric in metrics if metric in judges}

    return judge


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _template(text: str, document: dict[str, Any]) -> Callable[[dict[str, Any]], str] | str:
    """The harness renders Jinja without a sandbox, so templates are rendered here and handed over as functions."""
    if not _is_template(text):
        return text
    compiled = _SANDBOX.from_string(text)
    return lambda doc: compiled.render(**{"item": doc, **doc})


def _asked(entry: PinnedTask, document: dict[str, Any]) -> Callable[[dict[str, Any]], str] | str:
    """An item's text, behind the task's examples."""
    text = _template(entry.config.doc_to_text, document)
    if not entry.examples:
        return text

    def asked(doc: dict[str, Any]) -> str:
        return entry.examples + (text(doc) if callable(text) else str(doc.get(text, text)))

    return asked


def write_examples(entry: PinnedTask, examples: list[dict[str, Any]]) -> str:
    """Items with their answers, as the harness writes few-shot examples before a question."""
    task = build_task(entry, examples)
    written = ""
    for each in examples:
        answer = task.doc_to_target(each)
        if isinstance(answer, int):
            answer = task.doc_to_choice(each)[answer]
        written += f"{task.doc_to_text(each)}{entry.config.target_delimiter}{answer}\n\n"
    return written


def _target(target: str | int, document: dict[str, Any]) -> Any:
    if isinstance(target, int) or target == "":
        return target
    if not _is_template(target):
        if target not in document:
            raise FmopsError(f"doc_to_target {target!r} is no field.{nearest(target, document)} {_fields(document)}")
        return target
    compiled = _SANDBOX.from_string(target)

    def render(doc: dict[str, Any]) -> str | int:
        text = compiled.render(**{"item": doc, **doc})
        return int(text) if text.isdigit() else text

    return render


def _choices(choices: str | tuple[str, ...] | None, document: dict[str, Any]) -> Any:
    if choices is None or isinstance(choices, tuple):
        return list(choices) if choices else None
    if not _is_template(choices):
        if choices not in document:
            raise FmopsError(f"doc_to_choice {choices!r} is no field.{nearest(choices, document)} {_fields(document)}")
        return choices
    compiled = _SANDBOX.from_string(choices)

    def render(doc: dict[str, Any]) -> Any:
        try:
            return ast.literal_eval(compiled.render(**{"item": doc, **doc}))
        except (SyntaxError, ValueError):
            raise FmopsError(
                f"doc_to_choice gives no list of strings: {compiled.render(**{'item': doc, **doc})!r}."
            ) from None

    return render


def _fields(document: dict[str, Any]) -> str:
    return f"Fields: {', '.join(sorted(key for key in document if key not in {'id', 'cluster'}))}."
