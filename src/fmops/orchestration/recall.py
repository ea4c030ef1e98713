"""From one bad document, or one bad artifact, to everything that was built on it.

Enters: a store and what is to be recalled. Leaves: models, releases, the aliases and endpoints that serve them, and
what to do.
Refuses: a name that nothing in the workspace carries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fmops.deployment.serving.routes import ROUTES, RoutesFile
from fmops.errors import FmopsError, nearest
from fmops.orchestration.provenance import Downstream, trace
from fmops.store import Record, Store

LISTS = {"corpus": ("documents.jsonl",), "conversations": ("train.jsonl",), "preferences": ("train.jsonl",)}
"""Where an artifact names what a model learns from; what is held out is never learnt."""


@dataclass(frozen=True)
class Match:
    """One document in one artifact."""

    document: str
    source: str
    record: Record


@dataclass(frozen=True)
class Endpoint:
    """What an arm of this machine's gateway answers with."""

    arm: str
    release: str
    share: float
    """Of the requests."""
    url: str | None
    """Of its engine; None while it has none."""
    up: bool
    """False: `fmops up` would serve it again."""


@dataclass(frozen=True)
class Recall:
    """What must go back, and why."""

    what: str
    matches: tuple[Match, ...]
    """Empty when an artifact is recalled."""
    affected: tuple[Record, ...]
    """Every artifact built on it, the oldest first."""
    served: dict[str, str]
    """Alias → release that is affected."""
    endpoints: tuple[Endpoint, ...]
    """Arms of this machine's gateway, whatever an alias says, with a release that is affected."""
    routed: bool
    """Whether this workspace has a gateway, up or not."""
    way_back: str | None
    """An unaffected release, the newest; None when there is none."""

    @property
    def releases(self) -> list[Record]:
        """The affected releases."""
        return [record for record in self.affected if record.kind == "release"]


def recall(store: Store, what: str) -> Recall:
    """Find what was built on a document or on an artifact.

    Args:
        what: a document's id, the end of its path, its digest or its source; the answer whose feedback was trained on;
            or an artifact's key, an alias, or a node (its newest), where no document has that name.

    Raises:
        FmopsError: neither a document nor an artifact is called so.
    """
    records = store.records()
    start = _artifact(store, what, records)
    matches = () if start else tuple(_documents(store, what, records))
    if start is None and not matches:
        start = next((record for record in reversed(records) if record.node == what), None)
    if start is None and not matches:
        keys = [record.key for record in records]
        raise FmopsError(
            f"no document and no artifact of {store.place} is called {what!r}.{nearest(what, keys)} A document is "
            "named by the `id`, `sha256` or `source` that a corpus's documents.jsonl gives it; one that was dropped, "
            "or held out, was never learnt. `fmops status` lists artifacts."
        )
    roots = [start] if start else list({match.record.key: match.record for match in matches}.values())
    found: dict[str, Record] = {root.key: root for root in roots}
    for root in roots:
        found |= {record.key: record for record in _built(trace(root, records).built)}
    served = {alias: key for alias, key in store.aliases().items() if key in found}
    clean = [record.key for record in records if record.kind == "release" and record.key not in found]
    order = [record for record in records if record.key in found]
    arms = endpoints(store.root)
    return Recall(
        what=what, matches=matches, affected=tuple(order), served=served, routed=bool(arms),
        endpoints=tuple(arm for arm in arms if arm.release in found), way_back=clean[-1] if clean else None,
    )  # fmt: skip


def endpoints(workspace: Path) -> tuple[Endpoint, ...]:
    """The arms of the gateway's routes, the champion first; none where nothing was ever served by `fmops up`."""
    from fmops.orchestration.up import is_up

    routes, up = RoutesFile(workspace / ROUTES).current(), is_up(workspace)
    canary = routes.canary_share
    arms = (("champion", routes.champion, 1 - canary), ("challenger", routes.challenger, canary))
    return tuple(Endpoint(arm, target.release, share, target.url, up) for arm, target, share in arms if target)


def render_recall(found: Recall) -> str:
    """The finding in words: where it is, what stands on it, who serves it, what to do."""
    lines = [f"{match.document} ({match.source}) is in {match.record.key}" for match in found.matches[:10]]
    if len(found.matches) > 10:
        lines.append(f"… and {len(found.matches) - 10} more documents")
    lines += ["", f"built on it ({len(found.affected)}):"]
    lines += [f"  {record.key:32s} {record.kind} of {record.node}" for record in found.affected]
    lines += ["", "served now:" if found.served or found.endpoints else "served now: none of them"]
    lines += [f"  {alias} → {key}" for alias, key in sorted(found.served.items())]
    lines += [_told(arm) for arm in found.endpoints]
    return "\n".join([*lines, "", "what to do:", *(f"  {step}" for step in _remedy(found))]).lstrip("\n")


def _told(arm: Endpoint) -> str:
    where = arm.url or "no engine yet"
    down = "" if arm.up else "; the gateway is down, `fmops up` would serve it again"
    return f"  the gateway's {arm.arm}, {arm.share:.0%} of the requests, {where} → {arm.release}{down}"


def _remedy(found: Recall) -> Iterator[str]:
    arms = {arm.arm for arm in found.endpoints}
    if "challenger" in arms:
        yield "take the challenger's traffic away: `fmops rollout rollback`"
    # A champion that is free of it then answers everything again.
    if "champion" in {*arms, *found.served} or (found.served and not arms):
        way = f"serve {found.way_back} instead: "
        way += (
            f"`fmops rollout start --release {found.way_back}`, then `fmops rollout promote`"
            if found.routed
            else f"`fmops serve --release {found.way_back}`"
        )
        yield way if found.way_back else "stop serving (`fmops down`): no release here is free of it"
    if found.matches:
        sources = ", ".join(dict.fromkeys(match.source for match in found.matches[:5]))
        yield f"remove it from its source ({sources}), then `fmops run`: what is built on it is made again without it"
    else:
        yield "mend its cause (config, code or source: `fmops show` names them), then `fmops run`"
    if found.releases:
        names = ", ".join(record.key for record in found.releases)
        yield f"tell whoever took a copy of {names}"


def _artifact(store: Store, what: str, records: list[Record]) -> Record | None:
    key = store.aliases().get(what, what)
    return next((record for record in records if record.key == key), None)


def _documents(store: Store, what: str, records: list[Record]) -> Iterator[Match]:
    for record in records:
        for name in LISTS.get(record.kind, ()):
            for row in _rows(store.files(record) / name):
                name_of, source = str(row["id"]), str(row["source"])
                if what in (name_of, row.get("sha256"), row.get("of"), source) or name_of.endswith(f"/{what}"):
                    yield Match(name_of, source, record)


def _rows(path: Path) -> Iterator[dict[str, object]]:
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def _built(items: tuple[Downstream, ...]) -> Iterator[Record]:
    for item in items:
        yield item.record
        yield from _built(item.built)
