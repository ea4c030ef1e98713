"""Runs and releases in MLflow, for looking and for finding.

Enters: a store, run folders and records. Leaves: rows in `mlflow.db` beside them, never weights.
Refuses: to log a thing twice, and to move an alias that somebody else has moved. Records stay the truth.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

# Read at import: nothing leaves this machine.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from fmops.errors import FmopsError
from fmops.locks import holder, locked
from fmops.orchestration.history import History, NodeRun, read_history
from fmops.orchestration.provenance import flatten
from fmops.store import RECORD, Record, Store, utc_now

# It announces the tables it makes; a run prints its own lines.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)

BATCH_METRICS, BATCH_PARAMS = 1000, 100
"""MLflow's own limits on one call of log_batch."""
PARAM_CHARACTERS = 6000
COMPLETE = "fmops.complete"
"""Set last on a run: without it the run was cut off while being logged, and is logged again."""


def tracking_uri(store: Store) -> str:
    """The workspace's own database."""
    return f"sqlite:///{store.root / 'mlflow.db'}"


def log_run(store: Store, folder: Path) -> str:
    """Log one run: a parent, and a child for each stage that was executed. Returns the parent's MLflow id.

    Logging a run again adds nothing; a run that was being logged when the process died is completed. A run that was
    killed counts as ended once nobody holds the workspace.
    """
    history = read_history(store, folder)
    with _client(store) as client:
        experiment = _experiment(client, store, history.name)
        parent = _run(client, experiment, _parent_tags(history), name=history.id, started=history.started)
        for node in history.nodes.values():
            if node.state in ("done", "failed"):
                _log_node(client, store, experiment, history, node, parent=parent)
        if not _complete(client, parent) and (history.finished or not holder(store.root / "lock")):
            _log_parent(client, parent, history)
    return parent


def register(store: Store, release: Record) -> int:
    """Make a release a version of the registered model of its name; the version it has already is returned."""
    with _client(store) as client, locked(store.root / "registry.lock", wait_s=30):
        return _register(client, store, release)


def mirror_release(store: Store, release: Record) -> int:
    """Register a release and set MLflow's aliases to what the workspace's aliases say; returns its version."""
    with _client(store) as client, locked(store.root / "registry.lock", wait_s=30):
        version = _register(client, store, release)
        _mirror_aliases(client, store)
    return version


def move_alias(
    store: Store, name: str, alias: str, *, expected: int | None, version: int, why: str = "by hand"
) -> None:
    """Point `alias` of the registered model `name` at `version` if it still points at `expected`.

    Raises:
        FmopsError: it points elsewhere by now; names who moved it and when. Nothing is changed.
    """
    with _client(store) as client, locked(store.root / "registry.lock", wait_s=30):
        _swap(client, name, {alias: version}, expected={alias: expected}, why=why)


def promote(store: Store, name: str, *, expected: int | None, version: int, why: str = "by hand") -> None:
    """Make `version` the champion and the champion before it `previous`, both or neither.

    Raises:
        FmopsError: the champion is not `expected` any more; names who moved it and when. Nothing is changed.
    """
    targets = {"champion": version} | ({"previous": expected} if expected is not None else {})
    with _client(store) as client, locked(store.root / "registry.lock", wait_s=30):
        _swap(client, name, targets, expected={"champion": expected}, why=why)


def rebuild(store: Store) -> int:
    """Log every run folder, then every record that no run folder tells of, then the releases; returns the runs logged.

    On an empty database this restores what was there; on a full one it adds nothing.
    """
    folders = sorted(path for path in store.runs.glob("*") if (path / "run.json").is_file())
    for folder in folders:
        log_run(store, folder)
    with _client(store) as client, locked(store.root / "registry.lock", wait_s=30):
        for record in store.records():
            if not _logged(client, f"tags.`fmops.fingerprint` = '{record.fingerprint}'"):
                experiment = _experiment(client, store, "without run")
                node = NodeRun(record.node, state="done", fingerprint=record.fingerprint, record=record)
                _log_node(client, store, experiment, None, node, parent=None)
        for record in store.records():
            if record.kind == "release":
                _register(client, store, record)
        _mirror_aliases(client, store)
    return len(folders)


@contextmanager
def _client(store: Store) -> Iterator[MlflowClient]:
    store.root.mkdir(parents=True, exist_ok=True)
    uri = tracking_uri(store)
    with locked(store.root / "mlflow.lock", wait_s=60):
        # Two processes that create the tables at once would both fail.
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    yield client


def _experiment(client: MlflowClient, store: Store, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    # Without a location of its own MLflow writes ./mlruns wherever the command was typed.
    location = (store.root / "mlflow-artifacts" / name.replace(" ", "-")).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _run(client: MlflowClient, experiment: str, tags: Mapping[str, str], *, name: str, started: float | None) -> str:
    """The run with these identifying tags, made if it is not there."""
    keys = [key for key in ("fmops.run", "fmops.node", "fmops.fingerprint") if key in tags]
    wanted = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in keys)
    found = client.search_runs([experiment], wanted + f" and tags.`fmops.level` = '{tags['fmops.level']}'")
    if found:
        return str(found[0].info.run_id)
    run = client.create_run(experiment, start_time=int((started or 0) * 1000), tags=dict(tags), run_name=name)
    return str(run.info.run_id)


def _parent_tags(history: History) -> dict[str, str]:
    artifacts = {f"fmops.artifact.{node.name}": node.record.key for node in history.nodes.values() if node.record}
    tags = {"fmops.run": history.id, "fmops.level": "run", "fmops.command": history.facts.get("command", "")}
    return tags | artifacts | ({"fmops.champion": history.champion} if history.champion else {})


def _log_parent(client: MlflowClient, run: str, history: History) -> None:
    at_ms = int((history.started or 0) * 1000)
    figures: dict[str, Any] = {
        f"stages_{state}": sum(node.state == state for node in history.nodes.values())
        for state in ("done", "cached", "failed", "skipped")
    }
    for name in ("evaluate-pretrain", "evaluate-candidate"):
        # The newest scores stand on the parent too, so that runs can be compared in one table.
        figures |= _final(record) if (record := history.record(name)) else {}
    numbers = [Metric(name, float(value), at_ms, 0) for name, value in figures.items() if _number(value)]
    client.log_batch(run, metrics=numbers)
    gate = history.record("gate")
    if gate:
        client.set_tag(run, "fmops.verdict", gate.artifact["verdict"])
    for node in history.nodes.values():
        # The page of a run then names each stage's artifact, cached ones too.
        if node.record:
            client.set_tag(run, f"fmops.artifact.{node.name}", node.record.key)
    for name in ("report.html", "run.json"):
        if (history.folder / name).is_file():
            client.log_artifact(run, str(history.folder / name))
    if history.error:
        client.set_tag(run, "fmops.error", history.error)
    client.set_tag(run, COMPLETE, "yes")
    states = {node.state for node in history.nodes.values()}
    # A gate that rejects is a run that did its work.
    status = RunStatus.FAILED if "failed" in states else RunStatus.KILLED if "running" in states else RunStatus.FINISHED
    ended = history.finished or max((node.ended or 0.0 for node in history.nodes.values()), default=0.0)
    client.set_terminated(run, RunStatus.to_string(status), end_time=int((ended or history.started or 0) * 1000))


def _log_node(
    client: MlflowClient, store: Store, experiment: str, history: History | None, node: NodeRun, *, parent: str | None
) -> None:
    record = node.record
    tags = {"fmops.node": node.name, "fmops.level": "stage"}
    tags |= {"fmops.run": history.id} if history else {}
    tags |= {"mlflow.parentRunId": parent} if parent else {}
    tags |= _record_tags(record) if record else {}
    started = node.started or (_epoch(record.created) if record else 0.0)
    run = _run(client, experiment, tags, name=node.name, started=started)
    if _complete(client, run):
        return
    metrics = _metrics(store, node, at_ms=int(started * 1000))
    params = _params(record) if record else []
    for batch in _batches(metrics, BATCH_METRICS):
        client.log_batch(run, metrics=batch)
    for batch in _batches(params, BATCH_PARAMS):
        client.log_batch(run, params=batch)
    if record:
        client.log_text(run, record.model_dump_json(indent=1) + "\n", RECORD)
    if node.error:
        client.set_tag(run, "fmops.error", node.error)
    client.set_tag(run, COMPLETE, "yes")
    status = RunStatus.to_string(RunStatus.FAILED if node.state == "failed" else RunStatus.FINISHED)
    ended = node.ended or started + (record.cost.get("wall_s", 0.0) if record else 0.0)
    client.set_terminated(run, status, end_time=int(ended * 1000))


def _record_tags(record: Record) -> dict[str, str]:
    facts = {name: str(value) for name, value in record.cost.items()}
    return {
        "fmops.stage": record.stage,
        "fmops.kind": record.kind,
        "fmops.artifact": record.key,
        "fmops.fingerprint": record.fingerprint,
        "fmops.digest": record.digest,
        **{f"fmops.cost.{name}": value for name, value in facts.items()},
        **{f"fmops.input.{name}": ref.ref[:PARAM_CHARACTERS] for name, ref in record.inputs.items()},
    }


def _params(record: Record) -> list[Param]:
    fields = {"seed": record.seed, "code version": record.version, **flatten(record.config)}
    return [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in fields.items()]


def _metrics(store: Store, node: NodeRun, *, at_ms: int) -> list[Metric]:
    """Curves with their steps, then final figures. All carry one time, so that logging again finds them there."""
    rows = node.metrics
    record = node.record
    metrics = [
        Metric(name, float(value), at_ms, step) for step, row in rows for name, value in row.items() if _number(value)
    ]
    if record:
        final = {f"final/{name}": value for name, value in _final(record).items() if _number(value)}
        final |= {f"cost/{name}": value for name, value in record.cost.items()}
        metrics += [Metric(name, float(value), at_ms, 0) for name, value in final.items()]
    return metrics


def _final(record: Record) -> dict[str, Any]:
    return {name.removeprefix("metrics.").replace(".", "/"): value for name, value in flatten(record.artifact).items()}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _register(client: MlflowClient, store: Store, release: Record) -> int:
    name = release.artifact["name"]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.tags.get("fingerprint") == release.fingerprint:
            return int(known.version)
    runs = _logged(client, f"tags.`fmops.fingerprint` = '{release.fingerprint}'")
    version = client.create_model_version(
        name,
        source=store.uri(release),
        run_id=runs[0] if runs else None,
        tags={
            "fingerprint": release.fingerprint,
            "digest": release.digest,
            "verdict": release.artifact["verdict"],
            "artifact": release.key,
        },
    )
    return int(version.version)


def _mirror_aliases(client: MlflowClient, store: Store) -> None:
    records = {record.key: record for record in store.records()}
    for alias, key in store.aliases().items():
        if key in records and records[key].kind == "release":
            version = _register(client, store, records[key])
            name = records[key].artifact["name"]
            if _aliases(client, name).get(alias) != version:
                _swap(client, name, {alias: version}, expected={}, why="as the workspace's aliases say")


def _swap(
    client: MlflowClient, name: str, targets: Mapping[str, int], *, expected: Mapping[str, int | None], why: str
) -> None:
    now = _aliases(client, name)
    tags = client.get_registered_model(name).tags
    for alias, seen in expected.items():
        if now.get(alias) != seen:
            last = tags.get(f"moved.{alias}", "somebody")
            raise FmopsError(
                f"alias {alias!r} of {name} points at version {now.get(alias, 'none')}, expected {seen or 'none'}; "
                f"last moved: {last}. Look again, then repeat the move."
            )
    for alias, version in targets.items():
        client.set_registered_model_alias(name, alias, str(version))
        moved = f"{now.get(alias, 'none')} → {version} by pid {os.getpid()} at {utc_now()}, {why}"
        client.set_registered_model_tag(name, f"moved.{alias}", moved)


def _aliases(client: MlflowClient, name: str) -> dict[str, int]:
    return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}


def _logged(client: MlflowClient, wanted: str) -> list[str]:
    experiments = [item.experiment_id for item in client.search_experiments()]
    return [run.info.run_id for run in client.search_runs(experiments, wanted)]


def _complete(client: MlflowClient, run: str) -> bool:
    return COMPLETE in client.get_run(run).data.tags


def _epoch(created: str) -> float:
    return datetime.fromisoformat(created).timestamp()


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
