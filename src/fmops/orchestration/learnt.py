"""What the rounds have learnt from: files and feedback that count as read, and files that were tried in vain.

Enters: watched sources, rounds that ended. Leaves: `seen.json`, `tried.json` and `used.json` beside the rounds.
Refuses: to call documents read whose release did not win, and to try the same ones again with nothing changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmops.artifacts import Frozen, SourceFile
from fmops.lifecycle import Lifecycle
from fmops.orchestration.project import Project
from fmops.orchestration.round_spec import trained
from fmops.orchestration.rounds import Round, Rounds, RoundStage
from fmops.sources import resolve, resolve_all
from fmops.store import write_atomically

SEEN, TRIED, USED = "seen.json", "tried.json", "used.json"
IN_VAIN = ("rejected", "need more data", "rolled back")
"""Ends of a round that say something of what it learnt from. A failed one says nothing: it is tried again."""
Files = dict[str, list[SourceFile]]


class Tried(Frozen):
    """The last round of pretraining whose release did not win."""

    round: int
    outcome: str
    champion: str
    spec: str
    """Digest of what the project's spec says of data, training and evaluation."""
    files: dict[str, tuple[str, ...]]
    """Digests by corpus."""


@dataclass(frozen=True)
class Watched:
    """The train corpora's files, those that the champion has read and those that are new to it."""

    new: Files
    seen: Files
    tried: Tried | None = None
    """The round that has tried some of the new ones in vain, where nothing has changed since."""

    @property
    def untried(self) -> dict[str, int]:
        """By corpus, how many new files ask for a round."""
        known = self.tried.files if self.tried else {}
        return {
            name: count
            for name, files in self.new.items()
            if (count := sum(file.sha256 not in known.get(name, ()) for file in files))
        }

    @property
    def in_vain(self) -> str | None:
        """Why documents that are new to the champion ask for no round, in words; None when they do, or none is new."""
        if not self.tried or self.untried or not any(self.new.values()):
            return None
        count = sum(map(len, self.new.values()))
        return (
            f"round {self.tried.round} learnt from the {count} new files and ended, {self.tried.outcome}. They are "
            "tried again beside other files, from another champion, under another spec, or with `--round pretrain`"
        )


class Learnt:
    """One workspace's memory of it."""

    def __init__(self, project: Project, rounds: Rounds) -> None:
        self._project, self._rounds = project, rounds

    def watched(self) -> Watched:
        """The train corpora's files. At the first look everything that lies there counts as read."""
        corpora = {name: item for name, item in self._project.spec.data.corpora.items() if item.role == "train"}
        found = resolve_all([item.source for item in corpora.values()], root=self._project.graph.root)
        files = {name: list(found[item.source].files) for name, item in corpora.items()}
        seen = self._json(SEEN)
        if seen is None:
            self._write(SEEN, {name: [file.sha256 for file in each] for name, each in files.items()})
            return Watched(new={name: [] for name in files}, seen=files)
        known = {name: set(seen.get(name, ())) for name in files}
        return Watched(
            new={name: [file for file in each if file.sha256 not in known[name]] for name, each in files.items()},
            seen={name: [file for file in each if file.sha256 in known[name]] for name, each in files.items()},
            tried=self._tried(),
        )

    def ended(self, each: Round, outcome: str) -> None:
        """What a round has learnt from is read when its release won, and tried when it did not."""
        if outcome != "promoted" and outcome not in IN_VAIN:
            return
        stages = trained(self._project.spec, each.trigger.stage)
        if "pretrain" in stages:
            files = self._files(each)
            if outcome == "promoted":
                seen = {name: set(digests) for name, digests in (self._json(SEEN) or {}).items()}
                for name, digests in files.items():
                    seen.setdefault(name, set()).update(digests)
                self._write(SEEN, {name: sorted(digests) for name, digests in seen.items()})
            else:
                tried = Tried(
                    round=each.number, outcome=outcome, champion=each.champion, spec=self._spec_digest(), files=files
                )
                write_atomically(self._rounds.folder / TRIED, tried.model_dump_json(indent=1) + "\n")
        # Examples are counted, not named: every round learns from all of them again.
        counts = json.loads((self._rounds.path(each.number) / "feedback" / "counts.json").read_text(encoding="utf-8"))
        used: dict[str, int] = {
            stage: examples(self._project.spec, counts, stage) for stage in stages if stage != "pretrain"
        }
        if used:
            self._write(USED, {**(self._json(USED) or {}), **used})

    def fresh(self, counts: Mapping[str, Any], stage: RoundStage) -> int:
        """Examples for `stage` that no round has learnt from."""
        return examples(self._project.spec, counts, stage) - int((self._json(USED) or {}).get(stage, 0))

    def _tried(self) -> Tried | None:
        path = self._rounds.folder / TRIED
        if not path.is_file():
            return None
        tried = Tried.model_validate_json(path.read_bytes())
        champion = self._project.store.aliases().get("champion")
        return tried if (tried.champion, tried.spec) == (champion, self._spec_digest()) else None

    def _files(self, each: Round) -> dict[str, tuple[str, ...]]:
        folder = self._rounds.path(each.number)
        return {
            path.name: tuple(sorted(file.sha256 for file in resolve(str(path), root=folder).files))
            for path in sorted((folder / "data" / "new").glob("*"))
        }

    def _spec_digest(self) -> str:
        said = self._project.spec.model_dump_json(exclude={"loop", "monitor", "serve", "runtime"})
        return hashlib.sha256(said.encode()).hexdigest()

    def _json(self, name: str) -> Any:
        path: Path = self._rounds.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        write_atomically(self._rounds.folder / name, json.dumps(value, indent=1) + "\n")


def examples(spec: Lifecycle, counts: Mapping[str, Any], stage: RoundStage) -> int:
    """Examples of feedback that `stage` would learn from; thumbs with no counterpart only by kto."""
    if stage == "instruct":
        return int(counts["conversations"])
    kto = spec.align is not None and spec.align.method == "kto"
    return int(counts["preferences"] + (counts["unpaired_thumbs"] if kto else 0))
