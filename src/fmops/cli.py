"""The command line: thin; each command opens the project and calls one function.

Enters: arguments. Leaves: text, and an exit code (docs/concepts.md lists them).
Refuses: to show a traceback for a mistake that the user can mend.
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from fmops import __version__
from fmops.cli_console import console
from fmops.cli_deploy import deploy
from fmops.cli_keys import keys
from fmops.cli_loop import loop
from fmops.cli_options import PORT, only_with, open_project, with_spec
from fmops.cli_run import doctor, fork_server, plan, run, stage
from fmops.errors import (
    DISK_FULL,
    EXIT_FAILED,
    EXIT_USAGE,
    FmopsError,
    disk_is_full,
    may_not_be_used,
    nearest,
    written_path,
)

SPINS = "10000"
"""How often a thread of GNU OpenMP looks for work before it sleeps: 300,000 times by itself, which takes a core that
somebody else may need. docs/log.md of 2026-11-27 has the measurements."""
YOUNG = 10_000
"""Objects made before the garbage collector looks through the young ones: 700 by itself, which takes a sixth of the
time that torch and its friends need to be imported."""
REFUSED = "{where} cannot be read or written ({why}). Give yourself the right to; --workspace names another workspace."


class Commands(click.Group):
    """Commands in the order a newcomer needs them, with the nearest name for a wrong one."""

    def list_commands(self, context: click.Context) -> list[str]:
        """In order of definition, not of the alphabet."""
        return list(self.commands)

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        """Name the nearest command where there is none of that name."""
        if args and self.get_command(context, args[0]) is None and not args[0].startswith("-"):
            hint = nearest(args[0], self.commands)
            raise click.UsageError(f"no command {args[0]!r}.{hint} Known: {', '.join(self.commands)}.")
        return super().resolve_command(context, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fmops")
def cli() -> None:
    """Take a foundation model round its whole life: pretrain, finetune, evaluate, gate, release, serve."""


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path())
def init(folder: Path) -> None:
    """Write a commented lifecycle.yaml to start from."""
    from fmops.starter import write_starter

    path = write_starter(folder)
    click.echo(f"wrote {path}. Point data.corpora at your text, then: fmops plan --spec {shlex.quote(str(path))}")


for command in (doctor, plan, run):
    cli.add_command(command)


@cli.command()
@click.argument("model")
@click.option("--endpoint", help="URL up to /v1 of a server of this model: it is asked instead of the weights.")
@click.option("--served", help="The model's name there, where the endpoint has several.")
@click.option("--suite", "suites", multiple=True, help="In place of the spec's: a name or a file; several times.")
@with_spec
def evaluate(
    model: str, endpoint: str | None, served: str | None, suites: tuple[str, ...], spec: Path, workspace: Path | None
) -> None:
    """Measure a model, a checkpoint or a release on the spec's suites."""
    if endpoint is None:
        only_with("--endpoint", "served")
    from fmops.orchestration.evaluate import evaluate as evaluate_model
    from fmops.orchestration.evaluate import render_evaluation
    from fmops.orchestration.events import open_view

    project = open_project(spec, workspace)
    with open_view() as view:
        record = evaluate_model(project, model, view, endpoint=endpoint, served=served, suites=suites)
    click.echo(render_evaluation(record))


@cli.command()
@click.argument("a")
@click.argument("b")
@click.option("--page", type=click.Path(dir_okay=False, path_type=Path), help="Default: comparisons/ in the workspace.")
@with_spec
def compare(a: str, b: str, page: Path | None, spec: Path, workspace: Path | None) -> None:
    """Judge B against A as the gate would: 0 promote, 3 reject, 4 need more data."""
    from fmops.orchestration.compare import compare as compare_reports
    from fmops.orchestration.compare import render_comparison
    from fmops.orchestration.comparison_page import write_page

    project = open_project(spec, workspace)
    compared = compare_reports(project, a, b)
    path = page or project.store.root / "comparisons" / f"{compared.before.key}--{compared.after.key}.html"
    alpha = project.spec.gate.alpha if project.spec.gate else 0.05
    write_page(compared, path, name=project.spec.name, alpha=alpha)
    click.echo(render_comparison(compared, path))
    sys.exit(compared.exit_code)


@cli.command()
@with_spec
def status(spec: Path, workspace: Path | None) -> None:
    """Show the last run, the artifacts in use and who holds the workspace."""
    from fmops.orchestration.show import render_status

    click.echo(render_status(open_project(spec, workspace)))


@cli.command()
@click.argument("artifact")
@with_spec
def show(artifact: str, spec: Path, workspace: Path | None) -> None:
    """Show one artifact: what it holds, what it was made from, what it cost."""
    from fmops.orchestration.lineage import show_record

    store = open_project(spec, workspace).store
    click.echo(show_record(store, store.by_key(artifact)))


@cli.command()
@click.argument("a")
@click.argument("b")
@with_spec
def diff(a: str, b: str, spec: Path, workspace: Path | None) -> None:
    """Say field by field why two artifacts differ."""
    from fmops.orchestration.lineage import diff as differences
    from fmops.orchestration.lineage import render_diff

    store = open_project(spec, workspace).store
    first, second = store.by_key(a), store.by_key(b)
    click.echo(render_diff(first, second, differences(store, first, second)))


@cli.command()
@click.argument("artifact")
@with_spec
def trace(artifact: str, spec: Path, workspace: Path | None) -> None:
    """Follow one artifact, or one answer by its id, back to its sources, and on to what is built from it."""
    from fmops.orchestration.lineage import render_answer, render_trace

    store = open_project(spec, workspace).store
    answer = render_answer(store, artifact)
    click.echo(render_trace(store, store.by_key(artifact)) if answer is None else answer)


@cli.command()
@click.argument("what")
@with_spec
def recall(what: str, spec: Path, workspace: Path | None) -> None:
    """Find every model and release that was built on a document or an artifact, and say what to do."""
    from fmops.orchestration.recall import recall as find
    from fmops.orchestration.recall import render_recall

    click.echo(render_recall(find(open_project(spec, workspace).store, what)))


@cli.command()
@click.argument("release", default="champion")
@with_spec
def bom(release: str, spec: Path, workspace: Path | None) -> None:
    """Print a release's bill of materials (CycloneDX JSON): model, data, software."""
    from fmops.orchestration.lineage import render_bom

    store = open_project(spec, workspace).store
    click.echo(render_bom(store, store.by_key(release)), nl=False)


@cli.command()
@click.argument("release", default="champion")
@with_spec
def sign(release: str, spec: Path, workspace: Path | None) -> None:
    """Sign a release, for example with a new key; `fmops run` signs what it promotes."""
    from fmops.orchestration.signatures import sign_release

    store = open_project(spec, workspace).store
    record = store.by_key(release)
    store.verify(record)
    click.echo(f"signed {record.key}: {sign_release(store, record)}")


@cli.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65534),
    default=3000,
    show_default=True,
    help="Of the lineage page; MLflow takes the next one. 0 takes two free ones.",
)
@with_spec
def ui(port: int, spec: Path, workspace: Path | None) -> None:
    """Open Dagster's lineage page and MLflow with these runs in them."""
    from fmops.orchestration.ui import serve_ui

    serve_ui(open_project(spec, workspace), port=port)


@cli.command()
@click.option("--host", help="Default: serve.host of the spec.")
@click.option("--port", type=PORT, help="Default: serve.port of the spec; 0 takes a free one.")
@click.option("--release", "key", default="champion", show_default=True, help="An alias or an artifact.")
@click.option("--for-gateway", is_flag=True, help="Answer the gateway of this workspace only.")
@with_spec
def serve(
    host: str | None, port: int | None, key: str, for_gateway: bool, spec: Path, workspace: Path | None
) -> None:  # fmt: skip
    """Serve the champion behind an OpenAI-compatible endpoint."""
    from fmops.deployment.serving.app import serve as serve_release
    from fmops.deployment.serving.server import workspace_secret
    from fmops.orchestration.show import find_release

    project = open_project(spec, workspace)
    changes: dict[str, Any] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    record, release = find_release(project, key)
    serve_release(
        release,
        project.spec.serve.model_copy(update=changes),
        files={name: entry.sha256 for name, entry in record.files.items()},
        threads=project.threads,
        version=record.key,
        secret=workspace_secret(project.store.root) if for_gateway else None,
    )


@cli.command()
@click.option("--foreground", is_flag=True, help="Stay, and write what happens to the terminal.")
@with_spec
def up(foreground: bool, spec: Path, workspace: Path | None) -> None:
    """Start engines, gateway, monitor and console on this machine, supervised; goes on after a crash or a reboot."""
    from fmops.console.process import invite
    from fmops.orchestration.up import supervise
    from fmops.orchestration.up import up as start

    project = open_project(spec, workspace)
    if foreground:
        supervise(project)
    else:
        start(project)
        invite(project, say=click.echo)


@cli.command()
@with_spec
def down(spec: Path, workspace: Path | None) -> None:
    """End what `fmops up` started; running answers may finish."""
    from fmops.orchestration.up import down as end

    end(open_project(spec, workspace))


@cli.command()
@with_spec
def gateway(spec: Path, workspace: Path | None) -> None:
    """Run the gateway alone, in this terminal (`fmops up` calls this)."""
    from fmops.deployment.serving.gateway.process import run_gateway

    project = open_project(spec, workspace)
    run_gateway(project.store.root, project.spec.serve, name=project.spec.name)


cli.add_command(keys)
cli.add_command(deploy)
cli.add_command(console)


@cli.command()
@click.option("--url", help="Default: where the spec serves.")
@click.option("--system", help="A system prompt.")
@click.option("--prompt", help="Ask once, print the answer, end.")
@with_spec
def chat(url: str | None, system: str | None, prompt: str | None, spec: Path, workspace: Path | None) -> None:
    """Talk to the served model in the terminal."""
    from fmops.deployment.serving.chat import chat as talk
    from fmops.deployment.serving.chat import own_key

    root = None
    if url is None:
        project = open_project(spec, workspace)
        url, root = f"http://{project.spec.serve.host}:{project.spec.serve.port}", project.store.root
    talk(url, system=system, prompt=prompt, key=own_key(root))


@cli.command()
@click.option("--once", is_flag=True, help="Look at the answers once and end (for cron).")
@click.option("--port", type=PORT, help="Serve /health and /metrics to this machine there.")
@with_spec
def monitor(once: bool, port: int | None, spec: Path, workspace: Path | None) -> None:
    """Watch answers and rollout: alarms with a stated rate of false ones, a diagnosis (`fmops up` calls this)."""
    from fmops.deployment.monitoring.process import run_monitor

    project = open_project(spec, workspace)
    run_monitor(project.store, project.spec.monitor, once=once, port=port, say=click.echo)


cli.add_command(loop)


@cli.command()
@click.argument("action", type=click.Choice(["start", "status", "look", "promote", "hold", "resume", "rollback"]))
@click.option("--release", "key", help="What to roll out, with `start`. Default: the newest release.")
@click.option("--why", default="", help="Remembered with a person's order.")
@click.option("--on", type=click.Choice(["local", "eks"]), default="local", show_default=True, help="Whose traffic.")
@with_spec
def rollout(action: str, key: str | None, why: str, on: str, spec: Path, workspace: Path | None) -> None:
    """Move traffic to a release step by step, with stated error rates; `look` decides once (for cron)."""
    if action != "start":
        only_with("`start`", "key")
    if action in ("start", "status", "look"):
        only_with("an order (promote, hold, resume, rollback)", "why")
    from fmops.deployment.rollout.command import run_action

    project = open_project(spec, workspace)
    cluster = None
    if on == "eks":
        from fmops.adapters.kubernetes import connect
        from fmops.deployment.rollout.traffic import GatewayTraffic

        cluster = GatewayTraffic(connect(), project.spec.name)
    click.echo(run_action(project.store, project.spec.rollout, action, key=key, why=why, cluster=cluster))


for command in (stage, fork_server):
    cli.add_command(command)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of lifecycle.yaml."""
    from fmops.starter import lifecycle_schema

    click.echo(lifecycle_schema(), nl=False)


def main() -> None:
    """Run the command line; a mistake of the user's ends with its message and a code, not a traceback."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read once, when torch is imported: here, in the stages, in the engines.
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    gc.set_threshold(YOUNG)
    try:
        cli(prog_name="fmops", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("stopped; finished stages are kept, `fmops run` goes on from there", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except FmopsError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if may_not_be_used(error):
            where = written_path(error) or "the workspace"
            why = getattr(error, "strerror", None) or "read-only"
            click.echo(f"error: {REFUSED.format(where=where, why=why)}", err=True)
            sys.exit(EXIT_FAILED)
        if not disk_is_full(error):
            raise
        if isinstance(error.__context__, FmopsError):
            # The run failed first, and its report could not be written either.
            click.echo(f"error: {error.__context__}", err=True)
        click.echo(f"error: {DISK_FULL.format(where=written_path(error) or 'the workspace')}", err=True)
        sys.exit(EXIT_FAILED)
