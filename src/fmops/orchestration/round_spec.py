"""The spec of one round, derived from the project's: start at the champion, learn what is new, measure against it.

Enters: the project's spec, the champion, the trigger, new files and feedback. Leaves: a folder with data and a spec.
Refuses: a stage that has nothing to learn from; says what is wanted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fmops.artifacts import SourceFile
from fmops.errors import FmopsError
from fmops.lifecycle import FAMILIES, Lifecycle
from fmops.orchestration.rounds import STAGES, RoundStage

EARLIER = "earlier"
"""Name of the replay corpus of what the champion has read already."""
EARLIER_FILES = 500
EARLIER_WEIGHT = 0.2
"""Share of the tokens that a round reads again, against forgetting (beside the spec's own replay corpora)."""
OWN_SUITES = "evaluation"
"""Folder of the suites that are made from production, in a round and in the workspace."""
HELD_OUT_FILES = 8
"""New files held out, up to half of them: from fewer the gate could not tell whether the domain is known better."""
KIND = {"instruct": "conversations", "align": "preferences"}
"""What a stage of finetuning learns from, as the spec and feedback call it."""
DOCUMENTS = 0.5
"""Share of the tokens in which a round that has read documents reads them again while it tunes."""
PRETRAIN = {"tokens": 16_384}
"""For a spec that has no pretraining of its own."""


def trained(spec: Lifecycle, stage: RoundStage) -> tuple[RoundStage, ...]:
    """What a round trains: the stage that mends, and after it every later one that the spec has.

    Each stage unlearns some of what the later ones taught: pretraining on plain documents how to answer and to stop,
    instruction tuning what people prefer.
    """
    later = STAGES[STAGES.index(stage) + 1 :]
    return (stage, *(each for each in later if getattr(spec, each) is not None))


def write_round(
    folder: Path,
    *,
    spec: Lifecycle,
    root: Path,
    champion: Path,
    stage: RoundStage,
    new: Mapping[str, Sequence[SourceFile]],
    seen: Mapping[str, Sequence[SourceFile]],
) -> Path:
    """Copy what the round learns from, so that later edits do not change it, and write its `lifecycle.yaml`.

    Args:
        folder: the round's; its `feedback/` may hold conversations and preferences, its `evaluation/` suites.
        root: where the project's relative paths start.
        champion: the model folder of the release that serves.
        new: files of each train corpus that no round has read.
        seen: files of each train corpus that the champion has read.

    Raises:
        FmopsError: there is nothing for the stage to learn from.
    """
    derived = spec.model_dump(mode="json", exclude_defaults=True)
    stages = trained(spec, stage)
    for key in STAGES:
        if key not in stages:
            derived.pop(key, None)
    derived["base"] = os.path.relpath(champion, folder)
    derived["data"] = _data(folder, spec, root, stage, new, seen)
    if stage == "pretrain":
        derived.setdefault("pretrain", dict(PRETRAIN))
        share = min(0.5, HELD_OUT_FILES / sum(map(len, new.values())))
        derived["curate"] = {
            "held_out_examples": spec.curate.held_out, **derived.get("curate", {}),
            "held_out": max(spec.curate.held_out, share),
        }  # fmt: skip
    for each in stages:
        if suites := derived.setdefault(each, {}).get("suites"):
            derived[each]["suites"] = _suites(suites, root, folder)
    if stage == "pretrain" and "instruct" in stages:
        # Rehearsal alone unlearns what the round has just read.
        derived["instruct"].setdefault("documents", DOCUMENTS)
    if rewards := derived.get("align", {}).get("reward"):
        derived["align"]["reward"] = {_moved(name, root, folder): weight for name, weight in rewards.items()}
    derived["evaluate"] = _evaluate(derived, spec, root, folder)
    derived["gate"] = _gate(derived, spec, stage)
    path = folder / "lifecycle.yaml"
    text = yaml.safe_dump(derived, sort_keys=False, allow_unicode=True, width=110)
    path.write_text(f"# Written by `fmops loop`: round {folder.name}. Do not edit.\n{text}", encoding="utf-8")
    return path


def _data(
    folder: Path,
    spec: Lifecycle,
    root: Path,
    stage: RoundStage,
    new: Mapping[str, Sequence[SourceFile]],
    seen: Mapping[str, Sequence[SourceFile]],
) -> dict[str, Any]:
    data: dict[str, Any] = {"corpora": _corpora(folder, spec, root, new if stage == "pretrain" else {}, seen)}
    if stage == "pretrain" and not any(new.values()):
        raise FmopsError(
            "a round of pretraining needs documents that no round has read, and no watched source has any. "
            f"Add some under {', '.join(sorted(seen)) or 'data.corpora'}; questions.jsonl lists what is asked."
        )
    for each in trained(spec, stage):
        if each != "pretrain":
            data[KIND[each]] = {"source": _examples(folder, spec, root, each, needed=each == stage)}
    return data


def _examples(folder: Path, spec: Lifecycle, root: Path, stage: RoundStage, *, needed: bool) -> list[str]:
    """What feedback gave, and the spec's own again. The round's first stage is there for the former."""
    kind = KIND[stage]
    own = getattr(spec.data, kind)
    votes = ("votes",) if stage == "align" and spec.align and spec.align.method == "kto" else ()
    sources = [f"feedback/{name}.jsonl" for name in (kind, *votes) if (folder / "feedback" / f"{name}.jsonl").is_file()]
    if needed and not sources:
        raise FmopsError(
            f"a round of {stage} needs {kind} from feedback, and there are none. Users give them on /v1/feedback; "
            "quarantine.jsonl lists what waits for a person."
        )
    return sources + [_moved(uri, root, folder) for uri in (own.source if own else ())]


def _corpora(
    folder: Path,
    spec: Lifecycle,
    root: Path,
    new: Mapping[str, Sequence[SourceFile]],
    seen: Mapping[str, Sequence[SourceFile]],
) -> dict[str, Any]:
    """New files as train corpora, earlier ones and the spec's own replay as the old domain."""
    corpora: dict[str, Any] = {}
    rest = {name: files for name, files in seen.items() if files}
    for name, corpus in spec.data.corpora.items():
        stated = corpus.model_dump(mode="json", exclude_defaults=True, exclude={"source", "weight"})
        if corpus.role == "replay":
            weight = {"weight": corpus.weight} if corpus.weight else {}
            corpora[name] = {"source": [_moved(uri, root, folder) for uri in corpus.source], **stated, **weight}
        elif new.get(name):
            _copy(new[name], folder / "data" / "new" / name)
            corpora[name] = {"source": f"data/new/{name}", **stated}
        elif rest.get(name):
            # Nothing new here: its held-out documents are still what the domain suite is made of.
            _copy(_some(rest.pop(name)), folder / "data" / "kept" / name)
            corpora[name] = {"source": f"data/kept/{name}", **stated}
    if new:
        for name, files in rest.items():
            _copy(_some(files), folder / "data" / EARLIER / name)
        if rest:
            corpora[EARLIER] = {"source": f"data/{EARLIER}", "role": "replay", "weight": EARLIER_WEIGHT}
    return corpora


def _evaluate(derived: dict[str, Any], spec: Lifecycle, root: Path, folder: Path) -> dict[str, Any]:
    """The spec's suites; forgetting joins where the round has an old domain."""
    stated = spec.evaluate.model_dump(mode="json") if spec.evaluate else {"suites": ["domain"]}
    suites = _suites(stated["suites"], root, folder)
    roles = {corpus.get("role", "train") for corpus in derived["data"]["corpora"].values()}
    if "replay" in roles and "forgetting" not in suites:
        suites.append("forgetting")
    # What production says of it: files of the round's own, in place of the workspace's where the spec names those.
    of_the_workspace = os.path.relpath(folder.parents[1] / OWN_SUITES, folder)
    suites = [suite for suite in suites if not suite.startswith(of_the_workspace)]
    suites += [f"{OWN_SUITES}/{path.name}" for path in sorted((folder / OWN_SUITES).glob("*.yaml"))]
    wanted = {"domain": "train", "forgetting": "replay"}
    return {
        **stated,
        "suites": [suite for suite in suites if wanted.get(suite, "train") in roles or suite not in wanted],
    }


def _suites(named: Sequence[str], root: Path, folder: Path) -> list[str]:
    return [_moved(suite, root, folder) if suite.endswith((".yaml", ".yml")) else suite for suite in named]


def _gate(derived: dict[str, Any], spec: Lifecycle, stage: RoundStage) -> dict[str, Any]:
    """The spec's gate. A round of finetuning need not know the domain better, it must lose nothing."""
    stated = spec.gate.model_dump(mode="json", exclude_defaults=True) if spec.gate else {}
    primary = spec.gate.primary if spec.gate else ("domain",)
    suites = derived["evaluate"]["suites"]
    own_files = any(suite.endswith((".yaml", ".yml")) for suite in suites)
    kept = [name for name in primary if name in suites or (own_files and name not in FAMILIES)]
    return {**stated, "primary": kept if stage == "pretrain" else [name for name in kept if name != "domain"]}


def _some(files: Sequence[SourceFile]) -> list[SourceFile]:
    """A sample that only the contents decide."""
    return sorted(files, key=lambda file: file.sha256)[:EARLIER_FILES]


def _copy(files: Sequence[SourceFile], to: Path) -> None:
    for file in files:
        target = to / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.path, target)


def _moved(uri: str, root: Path, folder: Path) -> str:
    """A relative path of the project's, as seen from the round's folder; other URIs are what they are."""
    if "://" in uri or Path(uri).expanduser().is_absolute():
        return uri
    return os.path.relpath(root / uri, folder)
