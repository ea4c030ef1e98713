"""Benchmark items in training data are found: every verbatim copy, and most edited ones, inside longer documents."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fmops.artifacts import Benchmarks, Checkpoint
from fmops.data.contamination import Contamination, Quotations, read_contamination
from fmops.data.curate import curate
from fmops.jobs import CorpusPart, CurateJob
from fmops.lifecycle import Curate
from fmops.sources import resolve
from fmops.stage import StageContext

WORDS = sorted({word for text in topics.values() for word in text.lower().split() if word.isalpha()})
HAY = [topics[name] for name in sorted(topics)]


def items(count: int, *, seed: int) -> list[str]:
    """Questions of 12 to 30 words that no document of the hay holds."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(12, 30))) for _ in range(count)]


def inside(text: str, rng: random.Random) -> str:
    """The text in the middle of a document that has nothing to do with it."""
    hay = rng.choice(HAY)[:4000]
    at = rng.randrange(len(hay))
    return f"{hay[:at]}\n{text}\n{hay[at:]}"


def disguised(text: str, rng: random.Random) -> str:
    """Other case, spacing, punctuation and accents, and the same words."""
    words = [word.upper() if rng.random() < 0.5 else word.capitalize() for word in text.split()]
    return rng.choice(["  ", "\n", ", ", " - "]).join(words).replace("e", "é", 1) + "?!"


def edited(text: str, rng: random.Random) -> str:
    """Every tenth word replaced, one dropped, one added: no ten words in a row survive by design."""
    words = text.split()
    for at in range(rng.randrange(8), len(words), 10):
        words[at] = rng.choice(WORDS)
    words.insert(rng.randrange(len(words)), rng.choice(WORDS))
    return " ".join(words)


@pytest.mark.parametrize(("change", "least"), [(lambda text, _: text, 1.0), (disguised, 1.0), (edited, 0.99)])
def test_recall_of_copies_inside_documents(change: object, least: float) -> None:
    rng = random.Random(7)
    benchmark = items(300, seed=1)
    index = Contamination(("task", item) for item in benchmark)
    found = sum(index.find(inside(change(item, rng), rng)) == "task" for item in benchmark)  # type: ignore[operator]
    assert found / len(benchmark) >= least


def test_a_document_of_many_items_names_them_all() -> None:
    benchmark = items(30, seed=6)
    index = Contamination((f"task/{number}", item) for number, item in enumerate(benchmark))
    assert index.held("\n".join(reversed(benchmark[:12]))) == [f"task/{number}" for number in range(11, -1, -1)]


def test_clean_documents_are_not_flagged() -> None:
    index = Contamination(("task", item) for item in items(3000, seed=2))
    assert [text[:40] for text in HAY if index.find(text)] == []


def test_short_items_count_only_word_for_word() -> None:
    index = Contamination([("cloze", "the quick brown fox jumps")])
    assert index.find("He said: The QUICK, brown fox jumps over it.") == "cloze"
    assert index.find("the quick brown dog and the brown fox jumps") is None


def test_phrases_too_short_to_mean_anything_and_templates_are_no_items() -> None:
    template = "Choose the best answer to the following question from the list of options below"
    index = Contamination([("a", "What is it?"), *(("b", template) for _ in range(50))])
    assert index.find(f"What is it? {template}") is None


def test_items_are_read_from_every_field_but_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "items"
    folder.mkdir(parents=True)
    item = {
        "id": "task-0123456789abcdef",
        "cluster": "x",
        "question": "Which noble gas glows red orange in a discharge tube today?",
        "choices": ["neon", "argon"],
        "nested": {"passage": "Discovered in 1898 by William Ramsay and Morris Travers in London together."},
    }
    (folder / "gases.jsonl").write_text(json.dumps(item) + "\n")
    (folder / "pairs.jsonl").write_text(json.dumps({"id": "p", "a": "sour grapes", "b": "are not sweet"}) + "\n")
    index = read_contamination(tmp_path)
    assert index.find("… which noble gas glows red-orange in a discharge tube, today …") == "gases"
    assert index.find("discovered in 1898 by william ramsay and morris travers in london together") == "gases"
    assert index.find("Sour grapes are not sweet") == "pairs"
    assert index.find("task-0123456789abcdef") is None
    assert read_contamination(None).find("which noble gas glows red orange in a discharge tube") is None


def test_curation_drops_contaminated_documents_and_names_the_task(
    tmp_path: Path, tiny_model: Path, context: StageContext
) -> None:
    rng = random.Random(3)
    leaked = items(3, seed=4)
    texts = [text for text in HAY if len(text) > 1500][:15]
    for at, item in zip((2, 5, 11), leaked, strict=True):
        texts[at] = inside(disguised(item, rng), rng)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = tmp_path / "benchmarks" / "items"
    folder.mkdir(parents=True)
    (folder / "quiz.jsonl").write_text(
        "".join(
            json.dumps({"id": f"quiz-{at}", "question": item}) + "\n"
            for at, item in enumerate([*leaked, *items(2, seed=9)])
        )
    )
    corpus = curate(
        CurateJob(curate=Curate(quality=False), corpora={"new": CorpusPart()}),
        base=Checkpoint(path=tiny_model.parent, stage="base", parameters=1, trained_tokens=0),
        benchmarks=Benchmarks(path=tmp_path / "benchmarks", items={"quiz": 3}),
        corpus_new=resolve("new.jsonl", root=tmp_path, cache=tmp_path / "cache"),
        out=tmp_path / "out",
        context=StageContext(stream=io.StringIO()),
    )
    contaminated = next(each for each in corpus.dropped if each.step == "contaminated")
    assert contaminated.documents == 3
    assert contaminated.examples[0].startswith("new/new.jsonl:3 (quiz): ")
    listed = [json.loads(line) for line in (corpus.path / "contaminated.jsonl").read_text().splitlines()]
    assert listed == [{"sample": f"quiz-{at}", "task": "quiz"} for at in range(3)]


def test_quotations_find_a_shared_section_and_not_a_shared_phrase() -> None:
    held_out = " ".join(items(12, seed=5))
    quotations = Quotations([held_out])
    words = held_out.split()
    assert quotations.quoted_in("before " + " ".join(words[40 : 40 + len(words) // 4]) + " after")
    assert not quotations.quoted_in("before " + " ".join(words[40:52]) + " after")
