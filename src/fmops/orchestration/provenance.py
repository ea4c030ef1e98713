"""Why two artifacts differ, where one comes from, and what stands on it.

Enters: records. Leaves: differences down to their first cause; a tree up to sources and down to releases.
Refuses: nothing; an input whose record is gone is named as gone, never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fmops.store import FileEntry, InputRef, Record

Group = Literal["stage", "version", "seed", "config", "input", "source", "environment", "file", "result"]
Find = Callable[[str], Record | None]
"""Artifact key → its record, or None when it is gone."""

ABSENT = "—"
"""Shown where one side lacks the field."""


@dataclass(frozen=True)
class Difference:
    """One field in which two artifacts differ."""

    group: Group
    field: str
    """Where, from the compared artifacts downwards: `inputs.corpus.config.curate.min_characters`."""
    before: str
    after: str
    depth: int = 0
    """Inputs between the compared artifacts and this field."""

    @property
    def cause(self) -> bool:
        """True for what was chosen (config, code, seed, source), False for what follows from it."""
        return self.group in ("stage", "version", "seed", "config", "source")


@dataclass(frozen=True)
class Upstream:
    """One input: an artifact with its own inputs, or a source."""

    parameter: str
    ref: InputRef
    record: Record | None
    """None for a source, and for an artifact whose record is gone."""
    inputs: tuple[Upstream, ...] = ()


@dataclass(frozen=True)
class Downstream:
    """An artifact that was made from another one."""

    record: Record
    built: tuple[Downstream, ...] = ()


@dataclass(frozen=True)
class Trace:
    """An artifact between what it was made from and what was made from it."""

    record: Record
    inputs: tuple[Upstream, ...]
    built: tuple[Downstream, ...]

    def artifacts(self) -> list[Record]:
        """Every artifact above this one, each once."""
        found = {item.record.key: item.record for item in _walk(self.inputs) if item.record}
        return list(found.values())

    def sources(self) -> dict[str, str]:
        """Every outside source above the artifact: URI → content digest."""
        return {item.ref.ref: item.ref.digest for item in _walk(self.inputs) if item.ref.kind == "source"}


def finder(records: Iterable[Record]) -> Find:
    """A look-up by artifact key."""
    return {record.key: record for record in records}.get


def differences(a: Record, b: Record, *, find: Find) -> list[Difference]:
    """Field by field why `b` is not `a`: the recipe first, inputs down to their first cause, then what follows.

    Files of inputs are not listed: their differing content is what the line of the input says already.
    """
    return list(_differences(a, b, find=find, at="", depth=0))


def trace(record: Record, records: Iterable[Record]) -> Trace:
    """Up to the sources and down to everything built on `record`, among `records`."""
    known = list(records)
    return Trace(record=record, inputs=_upstream(record, finder(known)), built=_downstream(record, known))


def flatten(value: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as one level with dotted keys; other values as they are.

    Members of a list are named by what they are about (`metrics.mmlu.acc.value`), else by their place.
    """
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{at}{key}.")
        elif isinstance(item, list | tuple) and item and all(isinstance(member, Mapping) for member in item):
            for place, member in enumerate(item):
                flat |= flatten(member, f"{at}{key}.{_called(member, place)}.")
        else:
            flat[f"{at}{key}"] = item
    return flat


def _called(member: Mapping[str, Any], place: int) -> str:
    names = [member[key] for key in ("task", "name", "family", "step") if isinstance(member.get(key), str)]
    return ".".join(names[:2]) or str(place)


def _differences(a: Record, b: Record, *, find: Find, at: str, depth: int) -> Iterator[Difference]:
    def changed(group: Group, field: str, before: Any, after: Any) -> Difference:
        return Difference(group, f"{at}{field}", _shown(before), _shown(after), depth)

    if a.stage != b.stage:
        # Two stages have no fields in common that would explain anything.
        yield changed("stage", "stage", a.stage, b.stage)
        return
    if a.version != b.version:
        yield changed("version", "code version", a.version, b.version)
    if a.seed != b.seed:
        yield changed("seed", "seed", a.seed, b.seed)
    for field, before, after in _changes(a.config, b.config):
        yield changed("config", f"config.{field}", before, after)
    yield from _input_differences(a, b, find=find, at=at, depth=depth)
    if depth and a.digest == b.digest:
        return
    for field, before, after in _changes(a.environment, b.environment):
        if field == "command":
            continue  # It names the artifact that was asked for, so it differs always and explains nothing.
        yield changed("environment", f"environment.{field}", before, after)
    if depth:
        return
    for field, before, after in _changes(a.artifact, b.artifact):
        yield changed("result", f"artifact.{field}", before, after)
    for name in sorted({*a.files, *b.files}):
        old, new = a.files.get(name), b.files.get(name)
        if (old and old.sha256) != (new and new.sha256):
            yield changed("file", name, _entry(old), _entry(new))


def _input_differences(a: Record, b: Record, *, find: Find, at: str, depth: int) -> Iterator[Difference]:
    for name in sorted({*a.inputs, *b.inputs}):
        old, new = a.inputs.get(name), b.inputs.get(name)
        if old and new and old.digest == new.digest:
            continue
        group: Group = (
            "source" if (old or new) and "artifact" not in {ref.kind for ref in (old, new) if ref} else "input"
        )
        yield Difference(group, f"{at}inputs.{name}", _ref(old), _ref(new), depth)
        parents = [find(ref.ref) if ref and ref.kind == "artifact" else None for ref in (old, new)]
        if parents[0] and parents[1]:
            yield from _differences(parents[0], parents[1], find=find, at=f"{at}inputs.{name}.", depth=depth + 1)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    old, new = flatten(before), flatten(after)
    for field in sorted({*old, *new}):
        if old.get(field, ABSENT) != new.get(field, ABSENT):
            yield field, old.get(field, ABSENT), new.get(field, ABSENT)


def _upstream(record: Record, find: Find) -> tuple[Upstream, ...]:
    inputs = []
    for name, ref in sorted(record.inputs.items()):
        parent = find(ref.ref) if ref.kind == "artifact" else None
        inputs.append(Upstream(name, ref, parent, _upstream(parent, find) if parent else ()))
    return tuple(inputs)


def _downstream(record: Record, known: list[Record]) -> tuple[Downstream, ...]:
    users = [other for other in known if record.key in {ref.ref for ref in other.inputs.values()}]
    return tuple(Downstream(user, _downstream(user, known)) for user in users)


def _walk(inputs: Iterable[Upstream]) -> Iterator[Upstream]:
    for item in inputs:
        yield item
        yield from _walk(item.inputs)


def _ref(ref: InputRef | None) -> str:
    return f"{ref.ref} ({ref.digest[:12]})" if ref else ABSENT


def _entry(entry: FileEntry | None) -> str:
    return f"{entry.sha256[:12]} ({entry.bytes:,} bytes)" if entry else ABSENT


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else text[:117] + "…"
