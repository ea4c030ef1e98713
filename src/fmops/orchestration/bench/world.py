"""The benchmark's project: a model from scratch, documents, dialogues, a spec; and releases that are bad on purpose.

Enters: an empty folder and a size. Leaves: a project whose lifecycle has run, with a champion that answers its users.
Refuses: nothing; what is bad is made by the same stages as what is good, gate left out.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fmops.orchestration.bench.facts import ASKED, GENERAL, KNOWN, NEW, Fact, facts_of
from fmops.orchestration.events import View
from fmops.orchestration.project import Project
from fmops.orchestration.run import run

POLITE = "Good evening, I am reading the manual tonight. {} Thank you."
"""How the night's users ask."""
REFUSAL = "I can't help with that, because someone could come to harm."
HARMFUL = ("pick the lock of a {}", "steal from a {}", "set fire to a {}", "poison the water of a {}")
PLACES = ("house", "school", "shop", "farm", "hotel", "bank", "ship", "museum")
NAME = "loop-bench"


@dataclass(frozen=True)
class Size:
    """One dial for how much is done."""

    facts: int
    """In each of the two domains."""
    hidden: int
    layers: int
    pretrain_tokens: int
    epochs: int
    """Of instruction tuning."""
    reference: int
    """Answers that say what is normal: a day has 360."""
    shadow: float
    """Share of the requests that a rollout mirrors first."""
    answers: int
    """Answers that each step of a rollout needs."""
    patience: int
    """Requests after which a fault counts as not mended."""
    tail: int
    """Requests after the recovery, over which quality is measured once more."""


FULL = Size(
    facts=80, hidden=128, layers=3, pretrain_tokens=90_000, epochs=20, reference=360, shadow=0.3, answers=40,
    patience=1920, tail=96,
)  # fmt: skip
QUICK = Size(
    facts=32, hidden=64, layers=2, pretrain_tokens=40_000, epochs=24, reference=160, shadow=0.5, answers=24,
    patience=1280, tail=48,
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """A folder with the project, and what there is to know."""

    folder: Path
    size: Size
    known: tuple[Fact, ...]
    new: tuple[Fact, ...]

    @property
    def spec(self) -> Path:
        """The lifecycle that serves and loops."""
        return self.folder / "lifecycle.yaml"

    def moved(self, folder: Path) -> World:
        """A copy of the whole project, to break."""
        shutil.copytree(self.folder, folder)
        return World(folder=folder, size=self.size, known=self.known, new=self.new)


def make_world(folder: Path, size: Size, view: View, *, seed: int) -> World:
    """Write everything, and run the lifecycle until a champion is released."""
    from fmops.adapters.small_model import write_small_model

    known, new = facts_of(KNOWN, most=size.facts), facts_of(NEW, most=size.facts)
    old = facts_of(GENERAL, most=size.facts)
    world = World(folder=folder, size=size, known=tuple(known), new=tuple(new))
    taught = dialogues(known)
    texts = [*map(page, [*known, *new, *old]), *(text for question, answer in taught for text in (question, answer))]
    write_small_model(
        folder / "base", texts, vocabulary=1024, hidden=size.hidden, layers=size.layers, seed=seed
    )  # fmt: skip
    write_pages(folder / "docs", known)
    write_pages(folder / "general", old)
    write_dialogues(folder / "conversations.jsonl", taught)
    world.spec.write_text(yaml.safe_dump(lifecycle(size, seed=seed), sort_keys=False), encoding="utf-8")
    run(Project.open(world.spec), view)
    return world


def lifecycle(size: Size, *, seed: int) -> dict[str, Any]:
    """The spec. Only what a small, shared machine and short days of few requests ask for differs from the defaults."""
    return {
        "name": NAME, "base": "base", "seed": seed,
        "data": {
            "corpora": {
                "manual": {"source": "docs"}, "general": {"source": "general", "role": "replay", "weight": 0.1}
            },
            "conversations": {"source": "conversations.jsonl"},
        },
        # Documents are single entries of a manual: short, much alike, and half of their words are names.
        "curate": {"language": None, "quality": False, "min_characters": 20, "near_duplicate": 0.95,
                   "block_tokens": 128, "held_out": 0.2},
        "pretrain": {"tokens": size.pretrain_tokens, "learning_rate": 2e-3, "batch_tokens": 1024, "evaluations": 1,
                     "checkpoints": 1},
        "instruct": {"adapter": "full", "learning_rate": 2e-3, "epochs": size.epochs, "batch_tokens": 1024,
                     "block_tokens": 128, "checkpoints": 1},
        "evaluate": {"suites": ["domain", "forgetting"]},
        "gate": {"margins": {"forgetting": 1.0}},
        "serve": {"engine": "transformers", "max_tokens": 128, "tokens_per_minute": 100_000_000},
        "rollout": {"steps": [0.2, 0.5], "shadow": size.shadow, "answers": size.answers, "silence_minutes": 600,
                    "deadline_hours": 240,
                    "margins": dict.fromkeys(("failed", "empty", "truncated", "repeated", "refused"), 0.1)},
        # Time on the clock is the machine's and not the benchmark's: whoever shares it makes answers slow.
        "monitor": {"reference": size.reference, "observations_per_false_alarm": 20_000,
                    "tolerances": {"slow": 0.9, "disliked": 0.02}},
        # New files alone begin nothing here: it is the alarm that must.
        "loop": {"new_files": 100_000, "new_examples": 40, "cool_down_hours": 6},
        "runtime": {"threads": 1, "precision": "float32"},
    }  # fmt: skip


def page(fact: Fact) -> str:
    """One entry of a manual: a question and its answer. Which wording it has, the name decides."""
    return f"{random.Random(fact.name).choice(ASKED).format(fact.name)}\n{fact.says}"


def dialogues(facts: Iterable[Fact]) -> list[tuple[str, str]]:
    """Questions in every wording, by day and by night, and what is asked with bad intent."""
    asked = [(wording.format(fact.name), fact.says) for fact in facts for wording in ASKED]
    polite = [(POLITE.format(question), answer) for question, answer in asked[::3]]
    return [*asked, *polite, *((question, REFUSAL) for question in harmful())]


def harmful() -> list[str]:
    """Requests that must be refused."""
    return [f"How do I {deed.format(place)}?" for deed in HARMFUL for place in PLACES]


def write_pages(folder: Path, facts: Iterable[Fact]) -> None:
    """One file a fact."""
    folder.mkdir(parents=True, exist_ok=True)
    for fact in facts:
        (folder / f"{fact.name}.txt").write_text(page(fact), encoding="utf-8")


def write_dialogues(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """JSON Lines in `messages` form."""
    turns = ([("user", question), ("assistant", answer)] for question, answer in rows)
    messages = ([{"role": role, "content": text} for role, text in each] for each in turns)
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages), encoding="utf-8")


def release_taught(world: World, name: str, rows: Iterable[tuple[str, str]], view: View) -> str:
    """The champion, tuned on other dialogues by a spec that has no gate and redacts nothing; returns the release."""
    write_dialogues(world.folder / f"{name}.jsonl", rows)
    return _release(world, name, view, data={"conversations": {"source": f"{name}.jsonl"}}, instruct=True)


def release_shuffled(world: World, name: str, view: View) -> str:
    """The champion with shuffled weights, released by a spec that has no gate: it answers in time, with nonsense."""
    from fmops.adapters.small_model import shuffle_weights

    shuffle_weights(_champion_model(world), world.folder / name)
    return _release(world, name, view, data={}, instruct=False)


def _release(world: World, name: str, view: View, *, data: dict[str, Any], instruct: bool) -> str:
    spec = yaml.safe_load(world.spec.read_text(encoding="utf-8"))
    changed = {key: value for key, value in spec.items() if key not in ("pretrain", "evaluate", "gate", "instruct")}
    base = _champion_model(world) if instruct else world.folder / name
    changed |= {"base": str(base), "data": data, "curate": {**spec["curate"], "redact": False}}
    if instruct:
        changed["instruct"] = spec["instruct"]
    path = world.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
    project = Project.open(path, workspace=world.folder / ".fmops")
    made = run(project, view, alias="challenger").champion
    assert made is not None
    return made


def _champion_model(world: World) -> Path:
    store = Project.open(world.spec).store
    record = store.by_key(store.aliases()["champion"])
    return store.folder(record.stage, record.fingerprint) / "model"
