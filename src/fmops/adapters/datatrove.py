"""The document pipeline, on datatrove: its executor, its Gopher filters, our readers and checks.

Enters: files of corpora in fixed groups. Leaves: for each group kept documents, their signatures, and what was dropped.
Refuses: nothing silently: every dropped document is counted under its step. A group that is finished is not done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Self

import py3langid.langid as langid
from datatrove.data import Document
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger

from fmops.adapters.minhash import record
from fmops.artifacts import SourceFile
from fmops.data.contamination import Contamination
from fmops.data.read import Policy, Unreadable, read_texts
from fmops.data.spool import INDEX, Ledger
from fmops.data.text import comparable_words, content_key, normalise, opening
from fmops.errors import unknown
from fmops.faults import fault_site
from fmops.redaction import redact

# datatrove logs every step to the terminal; failures come as exceptions.
logger.disable("datatrove")

_SURE = 0.7
_LANGUAGE_SAMPLE = 1000


@dataclass(frozen=True)
class InputFile:
    """A file, and the number of its corpus."""

    file: SourceFile
    corpus: int
    corpus_name: str
    text_field: str


@dataclass(frozen=True)
class Rules:
    """What a document must be like; a copy of the spec's `curate`, with the benchmark index."""

    language: str | None
    min_characters: int
    quality: bool
    redact: bool
    unreadable: Policy
    contamination: Contamination


Progress = Callable[[int], None]


def run_documents(groups: list[list[InputFile]], rules: Rules, *, out: Path, workers: int, progress: Progress) -> None:
    """Run every group through the pipeline.

    Args:
        groups: files by group; the split decides names under `out`, so it must not depend on the machine.
        out: gets `<group>.jsonl`, `.index`, `.signatures` and `.json`; `fmops.data.spool` reads them.
        workers: processes; 1 stays in this one.
        progress: told the bytes that are done, after each file (one worker) or group (several).
    """
    executor = _Groups(groups, rules, out=out, progress=progress)
    waiting = executor.get_incomplete_ranks()
    if min(workers, len(waiting)) < 2:
        for rank in waiting:
            executor.run_group(rank)
        return
    there = _Groups(groups, rules, out=out, progress=None)
    with ProcessPoolExecutor(
        min(workers, len(waiting)), mp_context=get_context("spawn"), initializer=_start_worker, initargs=(there,)
    ) as pool:
        running = {pool.submit(_run_group, rank): rank for rank in waiting}
        for done in as_completed(running):
            done.result()
            progress(sum(each.file.bytes for each in groups[running[done]]))


class _Groups(PipelineExecutor):  # type: ignore[misc]
    """datatrove's executor, a group a task; it keeps track of which are complete.

    Its local executor would do, but for the manager process that it starts: when this process is killed, that one
    lives on, holds our output pipe open, and whoever reads the pipe waits for ever.
    """

    def __init__(self, groups: list[list[InputFile]], rules: Rules, *, out: Path, progress: Progress | None) -> None:
        super().__init__([], logging_dir=str(out / "log"))
        self._groups, self._rules, self._out, self._progress = groups, rules, out, progress

    @property
    def world_size(self) -> int:
        return len(self._groups)

    def get_distributed_env(self, node_rank: int = -1) -> dict[str, str]:
        names = ("node_ips", "cpus_per_task", "mem_per_cpu", "gpus_on_node")
        return {"datatrove_executor": "LOCAL", **{f"datatrove_{name}": "-1" for name in names}}

    def run(self) -> None:
        for rank in self.get_incomplete_ranks():
            self.run_group(rank)

    def run_group(self, rank: int) -> None:
        """Read, check and write one group, and mark it as complete."""
        self.pipeline = _steps(self._groups, self._rules, out=self._out, progress=self._progress)
        self._run_for_rank(rank)


_worker: list[_Groups] = []


def _start_worker(executor: _Groups) -> None:
    """Take the work over, and end with the parent: a killed stage must leave nobody behind."""
    _worker[:] = [executor]
    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=follow, daemon=True).start()


def _run_group(rank: int) -> None:
    _worker[0].run_group(rank)


def _steps(groups: list[list[InputFile]], rules: Rules, *, out: Path, progress: Progress | None) -> list[Any]:
    ledger = Ledger()
    steps: list[Any] = [_Reader(groups, ledger, rules.unreadable, progress), _Clean(redacting=rules.redact)]
    steps.append(_LongEnough(rules.min_characters, exclusion_writer=_Exclusions("too-short", ledger)))
    if rules.language:
        steps.append(_InLanguage(rules.language, exclusion_writer=_Exclusions("language", ledger)))
    if rules.quality:
        steps += _quality(_Exclusions("quality", ledger))
    steps.append(_Uncontaminated(rules.contamination, ledger))
    steps.append(_Writer(out, ledger))
    return steps


def _quality(exclusions: _Exclusions) -> list[BaseFilter]:
    """Gopher's rules, less what technical text breaks by nature.

    Short documents, few stop words, and operators, numbers and quoted signs among the words are no faults of
    documentation and code. Words end at white space, as in the paper (Rae et al. 2021, arXiv:2112.11446, table A1).
    """
    words = _WhitespaceWords()
    return [
        GopherQualityFilter(
            min_doc_words=None,
            max_doc_words=None,
            min_avg_word_length=2,
            max_avg_word_length=14,
            max_symbol_word_ratio=0.2,
            max_non_alpha_words_ratio=0.6,
            min_stop_words=None,
            language=words,
            exclusion_writer=exclusions,
        ),
        GopherRepetitionFilter(
            top_n_grams=((2, 0.3), (3, 0.27), (4, 0.24)),
            dup_n_grams=((5, 0.3), (10, 0.2)),
            language=words,
            exclusion_writer=exclusions,
        ),
    ]


class _WhitespaceWords(WordTokenizer):  # type: ignore[misc]
    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


class _Exclusions:
    """Counts what a filter drops, in the place where datatrove would write it to disk."""

    def __init__(self, step: str, ledger: Ledger) -> None:
        self._step, self._ledger = step, ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def write(self, document: Document, rank: int) -> None:
        reason = document.metadata.get("filter_reason")
        because = f" ({reason})" if reason else ""
        self._ledger.add(self._step, f"{document.id}{because}: {opening(document.text)}")


class _Reader:
    """Documents of one group."""

    def __init__(
        self, groups: list[list[InputFile]], ledger: Ledger, policy: Policy, progress: Progress | None
    ) -> None:
        self._groups, self._ledger, self._policy, self._progress = groups, ledger, policy, progress

    def __call__(self, data: None, rank: int, world_size: int) -> Iterator[Document]:
        for given in self._groups[rank]:
            for read in read_texts(given.file, text_field=given.text_field):
                if isinstance(read, Unreadable):
                    self._ledger.add("unreadable", read.left_out(self._policy, of=f"{given.corpus_name}/"))
                    continue
                place, text = read
                yield Document(text=text, id=f"{given.corpus_name}/{place}", metadata={"corpus": given.corpus})
            if self._progress:
                self._progress(given.file.bytes)


class _Clean:
    """Normalises, and replaces personal data before any later step may write an example of it."""

    def __init__(self, *, redacting: bool) -> None:
        self._redacting = redacting

    def __call__(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        for document in data:
            document.text = normalise(document.text)
            if self._redacting:
                document.text, document.metadata["redactions"] = redact(document.text)
            yield document


class _LongEnough(BaseFilter):  # type: ignore[misc]
    name = "long enough"

    def __init__(self, characters: int, *, exclusion_writer: _Exclusions) -> None:
        super().__init__(exclusion_writer)
        self._characters = characters

    def filter(self, document: Document) -> bool:
        return len(document.text) >= self._characters


@cache
def _identifier() -> langid.LanguageIdentifier:
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


class _InLanguage(BaseFilter):  # type: ignore[misc]
    """Drops what is surely in another language, by its start and its middle."""

    name = "language"

    def __init__(self, language: str, *, exclusion_writer: _Exclusions) -> None:
        super().__init__(exclusion_writer)
        self._language = language
        self._identifier = _identifier()
        if language not in self._identifier.labels:
            raise unknown("language", language, self._identifier.labels)

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        middle = len(document.text) // 2
        sample = document.text[:_LANGUAGE_SAMPLE] + document.text[max(middle, _LANGUAGE_SAMPLE) :][:_LANGUAGE_SAMPLE]
        language, probability = self._identifier.classify(sample)
        return True if language == self._language or probability < _SURE else (False, str(language))


class _Uncontaminated(BaseFilter):  # type: ignore[misc]
    name = "not in a benchmark"

    def __init__(self, contamination: Contamination, ledger: Ledger) -> None:
        super().__init__(_Exclusions("contaminated", ledger))
        self._contamination, self._ledger = contamination, ledger

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        held = self._contamination.held(document.text)
        self._ledger.items.update(held)
        return (False, held[0].partition("/")[0]) if held else True


class _Writer:
    """The end of the pipeline: one group's kept documents on disk."""

    def __init__(self, out: Path, ledger: Ledger) -> None:
        self._out, self._ledger = out, ledger

    def __call__(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        base = self._out / f"{rank:05d}"
        redactions: Counter[str] = Counter()
        with (
            base.with_suffix(".jsonl").open("wb") as texts,
            base.with_suffix(".index").open("wb") as index,
            base.with_suffix(".signatures").open("wb") as signatures,
        ):
            for document in data:
                words = comparable_words(document.text)
                key = content_key(words)
                digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).hexdigest()
                row = {"id": document.id, "sha256": digest, "text": document.text}
                line = json.dumps(row).encode()
                index.write(INDEX.pack(texts.tell(), len(line), len(document.text), document.metadata["corpus"]))
                texts.write(line + b"\n")
                signatures.write(record(key, words))
                redactions.update(document.metadata.get("redactions", {}))
                yield document
        content = {
            "dropped": self._ledger.counts,
            "examples": self._ledger.examples,
            "items": sorted(self._ledger.items),
            "redactions": redactions,
        }
        fault_site("curate-group")
        base.with_suffix(".json").write_text(json.dumps(content, sort_keys=True))
