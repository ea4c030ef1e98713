"""What `fmops show`, `fmops diff` and `fmops trace` print.

Enters: a store and records. Leaves: text, coloured on a terminal and plain when piped.
Refuses: to read markup in what it shows; names and values are data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fmops.errors import FmopsError
from fmops.orchestration.provenance import (
    Difference,
    Downstream,
    Upstream,
    differences,
    finder,
    flatten,
    trace,
)
from fmops.orchestration.recall import LISTS
from fmops.orchestration.summary import summarise
from fmops.store import Record, Store

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.tree import Tree

FILES_SHOWN = 12
PIPED_WIDTH = 200
"""Columns when there is no terminal: wide enough that a line stays a line for grep."""


def diff(store: Store, a: Record, b: Record) -> list[Difference]:
    """Field by field why `b` is not `a`, down to the first cause among the store's records."""
    return differences(a, b, find=finder(store.records()))


def show_record(store: Store, record: Record) -> str:
    """One artifact: what it is, what it was made from and with, its files and its cost."""
    from rich.text import Text

    parts: list[RenderableType] = [Text.assemble((record.key, "bold"), f"  {record.kind} of node {record.node}")]
    facts = {"made": record.created, "folder": _place(store, record), "digest": record.digest, "seed": record.seed}
    aliases = [alias for alias, key in store.aliases().items() if key == record.key]
    parts.append(_fields({**facts, "aliases": ", ".join(aliases)} if aliases else facts))
    sections: dict[str, Mapping[str, object]] = {
        "result": flatten(record.artifact),
        "config": flatten(record.config),
        "inputs": {name: f"{ref.ref}  {ref.digest[:12]}" for name, ref in record.inputs.items()},
        "environment": flatten(record.environment),
        "cost": {name: _cost(name, value) for name, value in record.cost.items()},
        "files": _files(record),
    }
    for title, fields in sections.items():
        if fields:
            parts += [Text(f"\n{title}", style="bold"), _fields(fields)]
    return _text(*parts)


def render_diff(a: Record, b: Record, found: Sequence[Difference]) -> str:
    """Differences as a table, what was chosen marked with an arrow, and the first cause in words."""
    from rich.table import Table
    from rich.text import Text

    if not found:
        return _text(Text(f"{a.key} and {b.key} are the same: equal recipe, equal content."))
    table = Table(box=None, pad_edge=False, show_edge=False)
    for title in ("", "where", a.key, b.key):
        table.add_column(title, overflow="fold")
    for item in found:
        style = "bold" if item.cause else "dim" if item.group in ("environment", "file") else ""
        cells = ("→" if item.cause else "", item.field, item.before, item.after)
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return _text(table, Text(f"\n{_first_cause(found)}"))


def render_trace(store: Store, record: Record) -> str:
    """The tree above an artifact, up to sources with digests, and the tree of what is built on it.

    Each artifact tells its figures (of a gate the verdict), and where it lists every document that it holds.
    """
    from rich.text import Text
    from rich.tree import Tree

    found = trace(record, store.records())
    up = Tree(Text.assemble((record.key, "bold"), f"  {record.node}, made from"))
    _add_inputs(up, found.inputs, store, set())
    if not found.built:
        return _text(up, Text("\nNothing is built on it."))
    down = Tree(Text("\nand used by"))
    _add_built(down, found.built, set())
    return _text(up, down)


def render_answer(store: Store, answer: str) -> str | None:
    """The trace of one answer of production, followed by that of the release that gave it; None for another id."""
    from fmops.traces import DayLog, Trace

    found = DayLog(store.root / "traces", Trace).find(answer)
    if found is None:
        return None
    shown = found.model_dump(exclude_none=True, exclude={"signals"}) | flatten({"signals": found.signals})
    record = store.by_key(found.release.rpartition("@")[2])
    return f"{_text(_fields(shown))}\n\n{render_trace(store, record)}"


def render_bom(store: Store, release: Record) -> str:
    """CycloneDX JSON of a release and everything that it was made from.

    Raises:
        FmopsError: the artifact is no release.
    """
    from fmops.adapters.cyclonedx import bill_of_materials

    if release.kind != "release":
        raise FmopsError(f"{release.key} is a {release.kind}. A bill of materials is of a release.")
    return bill_of_materials(release, trace(release, store.records()).artifacts())


def _first_cause(found: Sequence[Difference]) -> str:
    causes = [item for item in found if item.cause]
    if causes:
        first = max(causes, key=lambda item: item.depth)
        return f"First cause: {first.field}, {first.before} → {first.after}."
    if any(item.group == "input" for item in found):
        return "An input's content differs, though nothing in the known recipes does: made anew, or its record is gone."
    return "Same recipe, other content: this stage is not reproducible across what is listed under environment."


def _place(store: Store, record: Record) -> str:
    return store.uri(record) if store.shared else str(store.folder(record.stage, record.fingerprint))


def _add_inputs(tree: Tree, inputs: Iterable[Upstream], store: Store, seen: set[str]) -> None:
    from rich.text import Text

    for item in inputs:
        name = (item.parameter, "cyan")
        if item.ref.kind == "source":
            tree.add(Text.assemble(name, f"  {item.ref.ref}  content {item.ref.digest[:16]}"))
        elif item.record is None:
            tree.add(Text.assemble(name, f"  {item.ref.ref}  (its record is gone)"))
        elif item.record.key in seen:
            tree.add(Text.assemble(name, f"  {item.record.key}", " (shown above)" if item.inputs else ""))
        else:
            seen.add(item.record.key)
            branch = tree.add(Text.assemble(name, f"  {item.record.key}  {summarise(item.record)}"))
            for listed in LISTS.get(item.record.kind, ()):
                branch.add(Text(f"each is named in {_place(store, item.record)}/{listed}", style="dim"))
            _add_inputs(branch, item.inputs, store, seen)


def _add_built(tree: Tree, built: Iterable[Downstream], seen: set[str]) -> None:
    from rich.text import Text

    for item in built:
        again = item.record.key in seen
        branch = tree.add(
            Text(f"{item.record.key}  {item.record.node}{' (shown above)' if again and item.built else ''}")
        )
        if not again:
            seen.add(item.record.key)
            _add_built(branch, item.built, seen)


def _fields(fields: Mapping[str, object]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, show_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(Text(f"  {name}"), Text(value if isinstance(value, str) else repr(value)))
    return table


def _files(record: Record) -> dict[str, object]:
    shown: dict[str, object] = {
        name: f"{entry.bytes:,} bytes  sha256 {entry.sha256[:16]}"
        for name, entry in list(record.files.items())[:FILES_SHOWN]
    }
    more = len(record.files) - FILES_SHOWN
    return {**shown, "…": f"{more} more"} if more > 0 else shown


def _cost(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.0f} MB"
    return f"{value:,.1f} s" if name.endswith("_s") else f"{value:g}"


def _text(*parts: RenderableType) -> str:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
