"""A spec with its workspace: what every command opens first.

Enters: the path of a spec. Leaves: spec, graph, store and resolved sources.
Refuses: a spec with mistakes, and sources that are not there.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fmops.artifacts import Source
from fmops.errors import FmopsError, SpecMistake
from fmops.lifecycle import Lifecycle, read_lifecycle
from fmops.orchestration.graph import Graph, build
from fmops.orchestration.plan import Planner, wanted_sources
from fmops.shared import Shared
from fmops.store import Store
from fmops.yaml_lines import parse_yaml

WORKSPACE = ".fmops"
STORE = "FMOPS_STORE"
"""Environment variable that names a bucket; `--store` sets it, so that every process of a command sees the same."""
THREADS = "FMOPS_THREADS"
"""Environment variable of a stage's pod: its share of a node's cores, of which it sees all."""


@dataclass(frozen=True)
class Project:
    """One spec file and the workspace beside it."""

    spec_path: Path
    spec: Lifecycle
    graph: Graph
    store: Store

    @classmethod
    def open(cls, spec_path: Path, *, workspace: Path | None = None) -> Project:
        """Read the spec; the workspace is `.fmops` beside it unless named.

        Raises:
            FmopsError: mistakes in the spec, each with its line; a workspace that is no folder.
        """
        path = spec_path.resolve()
        spec = read_lifecycle(path)
        root = (workspace or path.parent / WORKSPACE).resolve()
        there = next(path for path in (root, *root.parents) if path.exists())
        if not there.is_dir():
            where = "is" if there == root else f"cannot lie in {there}, which is"
            raise FmopsError(
                f"the workspace {root} {where} a file. Name a folder with --workspace; it is made if needed."
            )
        store = Store(root, shared=_shared(spec, root))
        try:
            graph = build(spec, path.parent)
        except SpecMistake as mistake:
            raise FmopsError(parse_yaml(path).point(mistake)) from None
        return cls(spec_path=path, spec=spec, graph=graph, store=store)

    def resolve_sources(
        self, report: Callable[[str], None] | None = None, *, only: str | None = None
    ) -> dict[tuple[str, ...], Source]:
        """Bring every source here and verify it; those already here cost a look at their file times."""
        from fmops.sources import resolve_all

        nodes = self.graph.nodes.values() if only is None else [self.graph.nodes[only]]
        wanted = wanted_sources(self.graph) if only is None else [u for node in nodes for u in node.sources.values()]
        return resolve_all(wanted, root=self.graph.root, report=report)

    def planner(self, report: Callable[[str], None] | None = None) -> Planner:
        """A planner over resolved sources."""
        return Planner(self.graph, self.store, self.resolve_sources(report))

    @property
    def options(self) -> str:
        """What a command needs to open this very project again, as one would type it from here."""
        spec = f"--spec {shlex.quote(os.path.relpath(self.spec_path))}"
        usual = self.store.root == self.spec_path.parent / WORKSPACE
        workspace = "" if usual else f" --workspace {shlex.quote(os.path.relpath(self.store.root))}"
        shared = self.store.shared.address if self.store.shared else ""
        stated = (self.spec.runtime.store or "").rstrip("/")
        return spec + workspace + ("" if shared == stated else f" --store {shared}")

    @property
    def threads(self) -> int:
        """Threads a stage computes with: as its pod or the spec says, else every core this process may use."""
        stated = int(os.environ.get(THREADS, self.spec.runtime.threads or 0))
        if stated:
            return stated
        # macOS has no affinity.
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shared(spec: Lifecycle, root: Path) -> Shared | None:
    """The bucket that the command, the environment or the spec names."""
    address = os.environ.get(STORE) or spec.runtime.store
    gigabytes = spec.runtime.cache_gb
    bound = None if gigabytes is None else int(gigabytes * 1e9)
    return Shared(address, cache=root / "records", cache_bytes=bound) if address else None
