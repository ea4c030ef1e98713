"""The lifecycle as Dagster assets, run in this process.

Enters: a graph and a function that makes one node's record. Leaves: materialisations and checks in Dagster's database.
Refuses: to run what stands behind a gate that did not promote. Records stay the truth; the database can be thrown away.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from fmops.orchestration.graph import Graph, Node
from fmops.orchestration.provenance import flatten
from fmops.orchestration.summary import summarise
from fmops.store import Record, Store

Execute = Callable[[str], Record]

INSTANCE = """\
# Written by fmops. Storage is SQLite in this folder.
telemetry:
  enabled: false
# No invitation to a newsletter before one's own lineage.
nux:
  enabled: false
# Stages write their own logs; capturing output here would break the progress bars of `fmops run`.
compute_logs:
  module: dagster._core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
# Without this a run started from the page waits for a daemon.
run_coordinator:
  module: dagster.core.run_coordinator
  class: DefaultRunCoordinator
"""

GROUPS = {
    "import": "pretraining",
    "pretrain": "pretraining",
    "curate": "data",
    "conversations": "data",
    "preferences": "data",
    "instruct": "finetuning",
    "align": "finetuning",
    "benchmarks": "evaluation",
    "evaluate": "evaluation",
    "gate": "evaluation",
    "release": "deployment",
}
PROMOTE = "promote"
"""Name of the blocking check on the gate's asset. It cannot stand on the candidate itself: the candidate's evaluation
comes after the candidate and before the gate, and would wait for the check that waits for it."""


def run_in_process(graph: Graph, execute: Execute, *, dagster_home: Path, selection: Sequence[str]) -> bool:
    """Materialise `selection` in the graph's order; `execute` is called once a node, in this process and thread.

    Returns:
        False when the gate did not promote; what stands behind it was not executed.

    Raises:
        Whatever `execute` raises, unchanged.
    """
    raised: list[BaseException] = []
    blocked: list[str] = []

    def guarded(name: str) -> Record:
        try:
            record = execute(name)
        except dg.DagsterExecutionInterruptedError:
            raised.append(KeyboardInterrupt())
            raise
        except BaseException as error:
            raised.append(error)
            raise
        if record.kind == "gate" and record.artifact["verdict"] != "promote":
            blocked.append(name)
        return record

    with open_instance(dagster_home) as instance, _own_sigterm():
        try:
            dg.materialize(
                [*assets(graph, guarded), *source_assets(graph)],
                instance=instance,
                selection=[asset_key(name) for name in selection],
                # Stop at the first error: without it Dagster goes on with every stage that does not depend on it.
                raise_on_error=True,
                tags={"fmops/name": graph.spec.name},
                # Dagster's own log would drown the lines that `fmops run` prints.
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        except BaseException:
            if raised:
                raise raised[0] from raised[0].__cause__
            if not blocked:
                raise
    return not blocked


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Give SIGTERM back: Dagster leaves it bound to what SIGINT does, which is nothing in a job of the background."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def open_instance(home: Path) -> dg.DagsterInstance:
    """The instance whose SQLite database lies in `home`; made when it is not there."""
    os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
    home.mkdir(parents=True, exist_ok=True)
    config = home / "dagster.yaml"
    if not config.is_file():
        config.write_text(INSTANCE, encoding="utf-8")
    return dg.DagsterInstance.from_config(str(home))


def definitions(
    graph: Graph, execute: Execute, store: Store, *, look: Callable[[], list[str]] | None = None,
    todo: Callable[[], dict[str, str]] | None = None,
) -> dg.Definitions:  # fmt: skip
    """Everything the lineage page shows: a node an asset, a source an external asset, newest records as metadata.

    `look` is one look of the loop; it becomes the job `loop`, with a schedule that a person switches on. `todo` says
    what a run would make and why; it becomes the sensor `changes`, which a person switches on, too.
    """
    newest = {record.node: record for record in store.records()}
    return dg.Definitions(
        assets=[*assets(graph, execute, newest=newest), *source_assets(graph)],
        schedules=[_loop_schedule(look)] if look else [],
        sensors=[_changes_sensor(todo)] if todo else [],
        executor=dg.in_process_executor,
        metadata={"workspace": dg.MetadataValue.path(str(store.root))},
    )


def _loop_schedule(look: Callable[[], list[str]]) -> dg.ScheduleDefinition:
    """The same look that `fmops loop --once` does. A job, not a sensor: a look may train for hours."""

    # Dagster reads this annotation, and does not find `dg` when it is text.
    def op(context) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        for line in look():
            context.log.info(line)

    told = "Monitor, move the rollout, end or begin a round."
    graph = dg.GraphDefinition(name="loop", node_defs=[dg.op(name="look", description=told)(op)])
    job = graph.to_job(executor_def=dg.in_process_executor)

    return dg.ScheduleDefinition(job=job, cron_schedule="* * * * *", default_status=dg.DefaultScheduleStatus.STOPPED)


def _changes_sensor(todo: Callable[[], dict[str, str]]) -> dg.SensorDefinition:
    """Starts a run when the spec, a source or the package changed; the same change once."""

    # Dagster reads this annotation, and does not find `dg` when it is text.
    def changes(context) -> Any:  # type: ignore[no-untyped-def]  # noqa: ANN001
        wanted = todo()
        if not wanted:
            return dg.SkipReason("everything is made")
        why = "; ".join(f"{name}: {reason}" for name, reason in wanted.items())
        if why == context.cursor:
            return dg.SkipReason(f"a run was started for this already: {why}")
        context.update_cursor(why)
        return dg.RunRequest(asset_selection=[asset_key(name) for name in wanted], tags={"fmops/why": why[:250]})

    return dg.SensorDefinition(
        name="changes", evaluation_fn=changes, asset_selection=dg.AssetSelection.all(), minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.STOPPED,
    )  # fmt: skip


def rebuild(store: Store, *, dagster_home: Path) -> int:
    """Report to Dagster every node's newest record that it does not know; returns how many those were.

    An emptied or missing database shows the workspace again; on a full one this adds nothing.
    """
    newest = {record.node: record for record in store.records()}
    reported = 0
    with open_instance(dagster_home) as instance:
        for record in newest.values():
            known = instance.get_latest_materialization_event(asset_key(record.node))
            shown = known.asset_materialization if known else None
            if shown and shown.metadata.get("fingerprint") == dg.MetadataValue.text(record.fingerprint):
                continue
            instance.report_runless_asset_event(
                dg.AssetMaterialization(asset_key(record.node), description=record.key, metadata=_metadata(record))
            )
            reported += 1
    return reported


def assets(graph: Graph, execute: Execute, *, newest: Mapping[str, Record] | None = None) -> list[dg.AssetsDefinition]:
    """One asset a node, in the graph's order."""
    known = newest or {}
    return [_asset(node, execute, known.get(node.name), place) for place, node in enumerate(graph.nodes.values())]


def source_assets(graph: Graph) -> list[dg.AssetSpec]:
    """Outside inputs as external assets: Dagster shows them and never makes them."""
    uris = dict.fromkeys(uri for node in graph.nodes.values() for uri in _source_uris(node))
    return [
        dg.AssetSpec(source_key(uri), description=uri, group_name="sources", metadata={"uri": uri}, kinds={"source"})
        for uri in uris
    ]


def asset_key(name: str) -> dg.AssetKey:
    """The asset of a node."""
    return dg.AssetKey([name])


def source_key(uri: str) -> dg.AssetKey:
    """The asset of a source; a readable form of its URI."""
    return dg.AssetKey(["source", re.sub(r"[^A-Za-z0-9._-]+", "_", uri).strip("_") or "here"])


def _asset(node: Node, execute: Execute, newest: Record | None, place: int) -> dg.AssetsDefinition:
    gate = node.stage.name == "gate"

    def materialise() -> dg.MaterializeResult:
        record = execute(node.name)
        return dg.MaterializeResult(
            metadata=_metadata(record),
            data_version=dg.DataVersion(record.digest),
            check_results=[_decision(record)] if gate else [],
        )

    check = dg.AssetCheckSpec(PROMOTE, asset=asset_key(node.name), blocking=True, description=_GATE)
    asset: dg.AssetsDefinition = dg.asset(
        key=asset_key(node.name),
        deps=[*map(asset_key, node.after), *map(source_key, _source_uris(node))],
        description=_described(node),
        group_name=GROUPS[node.stage.name],
        kinds={node.stage.output.kind, *_frameworks(node)},
        metadata=_metadata(newest) if newest else None,
        check_specs=[check] if gate else None,
        # Of the steps that could run, the earliest in the graph does: a person follows the lifecycle's own order.
        op_tags={"dagster/priority": str(-place)},
        code_version=str(node.stage.version),
    )(materialise)
    return asset


_GATE = "Promote only when no family regresses beyond its margin; anything else blocks the release."


def _decision(record: Record) -> dg.AssetCheckResult:
    verdict = record.artifact["verdict"]
    return dg.AssetCheckResult(
        check_name=PROMOTE,
        passed=verdict == "promote",
        severity=dg.AssetCheckSeverity.ERROR,
        description="; ".join(record.artifact["reasons"]) or verdict,
        metadata={"verdict": verdict, "alpha": record.artifact["alpha"]},
    )


def _metadata(record: Record) -> dict[str, Any]:
    """What the page shows of an artifact: identity, figures, cost."""
    numbers = {
        name: value
        for name, value in flatten(record.artifact).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {
        "summary": summarise(record),
        "artifact": record.key,
        "fingerprint": record.fingerprint,
        "digest": record.digest,
        "made": record.created,
        **{f"cost/{name}": float(value) for name, value in record.cost.items()},
        **{name.replace(".", "/"): value for name, value in numbers.items()},
    }


def _described(node: Node) -> str:
    text = (type(node.config).__doc__ or node.stage.name).strip().partition("\n")[0]
    inputs = ", ".join(node.artifacts) or "sources"
    return f"{text}\n\nStage `{node.stage.name}`, from {inputs}."


def _frameworks(node: Node) -> Iterable[str]:
    framework = getattr(node.config, "framework", None)
    return [framework] if framework else []


def _source_uris(node: Node) -> list[str]:
    return list(dict.fromkeys(uri for uris in node.sources.values() for uri in uris))
