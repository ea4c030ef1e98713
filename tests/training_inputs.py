"""Small inputs for training tests: a corpus, conversations and preferences over Python's own documentation."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from fmops.artifacts import Benchmarks, Checkpoint, Conversations, Corpus, Preferences, Source, SourceFile
from fmops.jobs import BenchmarksJob
from fmops.sources import resolve
from fmops.stage import StageContext

NAMES = sorted(topics)


def a_checkpoint(folder: Path, model: Path) -> Checkpoint:
    """A base checkpoint over the tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        (folder / "model").symlink_to(model)
    return Checkpoint(path=folder, stage="base", parameters=1, trained_tokens=0, licence="MIT-0")


def a_corpus(folder: Path, model: Path, *, blocks: int = 8, block_tokens: int = 128) -> Corpus:
    """Blocks of two documents each, and three held-out documents a domain."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from fmops.adapters.model_files import load_tokenizer

    tokenizer = load_tokenizer(model)
    half = block_tokens // 2
    rows = []
    for index in range(blocks):
        first, second = (tokenizer(topics[NAMES[2 * index + i]])["input_ids"][:half] for i in (0, 1))
        rows.append((first + second, [len(first), len(second)]))
    (folder / "train").mkdir(parents=True, exist_ok=True)
    (folder / "held_out").mkdir(exist_ok=True)
    table = pa.table(
        {
            "input_ids": pa.array([ids for ids, _ in rows], pa.list_(pa.int32())),
            "lengths": pa.array([lengths for _, lengths in rows], pa.list_(pa.int32())),
        }
    )
    parquet.write_table(table, folder / "train" / "00000.parquet")
    for name, start in (("new", 40), ("old", 50)):
        _write(
            folder / "held_out" / f"{name}.jsonl",
            [{"id": n, "text": topics[n][:400], "source": name} for n in NAMES[start : start + 3]],
        )
    return Corpus(
        path=folder,
        documents=2 * blocks,
        tokens=int(np.sum([len(ids) for ids, _ in rows])),
        blocks=blocks,
        block_tokens=block_tokens,
        replay_share=0.0,
        held_out_new=3,
        held_out_old=3,
    )


def some_conversations(folder: Path, *, train: int = 24) -> Conversations:
    """Questions about topics, answered with their first words."""

    def row(name: str) -> dict[str, object]:
        messages = [
            {"role": "user", "content": f"What about {name.lower()}?"},
            {"role": "assistant", "content": topics[name][:60].strip()},
        ]
        return {"id": name, "source": "topics", "messages": messages}

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", [row(name) for name in NAMES[:train]])
    _write(folder / "held_out.jsonl", [row(name) for name in NAMES[train : train + 4]])
    return Conversations(path=folder, conversations=train, held_out=4)


def some_pictures(folder: Path, *, train: int = 24) -> Conversations:
    """Questions about drawn pictures, for a model that reads them; some show two."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
    from shapes import pictures

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for number, picture in enumerate(pictures(train + 4, seed=5)):
        name = f"pictures/{number}.png"
        picture.image.save(folder / name)
        asked = {"role": "user", "content": "What colour is it?", "pictures": [name] * (1 + number % 2)}
        told = {"role": "assistant", "content": picture.colour}
        rows.append({"id": name, "source": "drawn", "messages": [asked, told]})
    _write(folder / "train.jsonl", rows[:train])
    _write(folder / "held_out.jsonl", rows[train:])
    return Conversations(path=folder, conversations=train, held_out=4)


def some_preferences(folder: Path, *, train: int = 24) -> Preferences:
    """Documentation is preferred to a shrug."""

    def row(name: str) -> dict[str, object]:
        prompt = [{"role": "user", "content": f"What about {name.lower()}?"}]
        chosen, rejected = topics[name][:60].strip(), "Who knows?"
        return {"id": name, "source": "topics", "prompt": prompt, "chosen": chosen, "rejected": rejected}

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", [row(name) for name in NAMES[:train]])
    _write(folder / "held_out.jsonl", [row(name) for name in NAMES[train : train + 4]])
    return Preferences(path=folder, pairs=train, held_out=4)


REWARDS = """
def brief(answer):
    return -float(len(answer))


def names_it(answer, *, topic, prompt):
    return float(topic in answer)
"""


def some_votes(folder: Path, *, train: int = 24) -> Preferences:
    """Documentation gets a thumb up, a shrug a thumb down: each on a prompt of its own."""

    def row(index: int, name: str) -> dict[str, object]:
        liked = index % 2 == 0
        text = topics[name][:60].strip() if liked else "Who knows?"
        prompt = [{"role": "user", "content": f"What about {name.lower()}?"}]
        return {"id": name, "source": "topics", "prompt": prompt, "completion": text, "label": liked}

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", [row(*item) for item in enumerate(NAMES[:train])])
    _write(folder / "held_out.jsonl", [row(*item) for item in enumerate(NAMES[train : train + 8])])
    return Preferences(path=folder, pairs=train, held_out=8)


def some_prompts(folder: Path, *, train: int = 8) -> Preferences:
    """Questions to be answered; the topic is known to the reward."""

    def row(name: str) -> dict[str, object]:
        prompt = [{"role": "user", "content": f"What about {name.lower()}?"}]
        return {"id": name, "source": "topics", "prompt": prompt, "columns": {"topic": name.lower()}}

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", [row(name) for name in NAMES[:train]])
    _write(folder / "held_out.jsonl", [row(name) for name in NAMES[train : train + 4]])
    return Preferences(path=folder, pairs=train, held_out=4)


def some_rewards(folder: Path, text: str = REWARDS) -> Source:
    """A reward file as the stage receives it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(text)
    return resolve("rewards.py", root=folder, cache=folder / "cache")


SUITE = """\
suite: {name}
family: {name}
about: Which word comes next in Python's documentation.
margin: 0.05
unit: accuracy
higher_is_better: true
tasks:
  {name}-words:
    source: items.jsonl
    key: question
    cluster: passage
    metrics: [acc]
    config:
      output_type: multiple_choice
      doc_to_text: "{{{{question}}}}"
      doc_to_choice: choices
      doc_to_target: label
      target_delimiter: ""
"""


def questions_of(count: int = 60) -> list[dict[str, object]]:
    """Two about each passage: does a common letter come next, or a rare one? Each is one token to the tiny model."""
    return [
        {"question": f"In part {n} of the text it is:", "choices": [*pair], "label": 0, "passage": n // 2}
        for n, pair in zip(range(count), itertools.cycle(("sq", "dj", "yz", "rQ", "eX", "nZ", "tV")))
    ]


def _source(path: Path, text: str) -> Source:
    path.write_text(text)
    return Source(uri=path.name, files=(SourceFile(path=path, name=path.name, sha256="", bytes=len(text)),))


def some_benchmarks(
    folder: Path, job: BenchmarksJob, *, rows: list[dict[str, object]] | None = None, seed: int = 7
) -> Benchmarks:
    """The benchmarks artifact of suites named `<name>.yaml`, all over the same items."""
    from fmops.evaluation.benchmarks import prepare_benchmarks

    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows or questions_of())
    sources = {}
    for index, name in enumerate(job.named):
        suite = name.removesuffix(".yaml")
        sources[f"suite_{index}"] = _source(folder / name, SUITE.format(name=suite))
        sources[f"items_{suite}_words"] = _source(folder / f"{suite}.jsonl", lines)
    return prepare_benchmarks(job, out=out, context=StageContext(seed=seed, stream=io.StringIO()), **sources)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
