"""`fmops plan`, `run`, `doctor`, and what a run starts: `stage`, `fork-server`.

Enters: arguments. Leaves: text, manifests, an exit code.
Refuses: nothing of its own; see orchestration.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click

from fmops.cli_options import only_with, open_project, with_spec
from fmops.errors import EXIT_FAILED


@click.command()
@click.option("--on", "where", type=click.Choice(["eks"]), help="Say what it would take on a cluster instead of here.")
@click.option("--instance", help="Only on nodes of this kind. Left out: the cheapest for each stage.")
@click.option("--nodes", type=click.IntRange(min=1), help="So many of them. Left out: the fewest that hold the stage.")
@click.option(
    "--requests-per-s", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
    help="That the endpoint must carry.",
)  # fmt: skip
@with_spec
def plan(
    where: str | None,
    instance: str | None,
    nodes: int | None,
    requests_per_s: float,
    spec: Path,
    workspace: Path | None,
) -> None:
    """Say what would run and why, with tokens, time and cost."""
    if where is None:
        only_with("--on eks", "instance", "nodes", "requests_per_s")
    from fmops.orchestration.cluster_plan import render_cluster_plan
    from fmops.orchestration.show import render_plan

    project = open_project(spec, workspace)
    # A download of minutes must not look like nothing; the plan itself stays alone on standard output.
    say = partial(click.echo, err=True)
    if where is None:
        click.echo(render_plan(project, report=say))
        return
    click.echo(render_cluster_plan(project, on=instance, nodes=nodes, requests_per_s=requests_per_s, report=say))


@click.command()
@click.option("--on", "where", type=click.Choice(["eks"]), help="Run each stage as a job of the cluster.")
@click.option(
    "--platform", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path("infra/platform"),
    show_default=True,
    help="Folder with cluster.yaml and images.lock.yaml.",
)  # fmt: skip
@click.option("--context", help="Of the kubeconfig. Left out: the current one.")
@click.option("--baked-in", is_flag=True, help="Local sources lie in the stages' image, below /srv.")
@click.option(
    "--priority", type=click.Choice(["loop", "run", "urgent"]), default="run", show_default=True,
    help="In the cluster's queue: a higher one goes first, and takes a lower one's nodes.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the jobs that the cluster would get, and end.")
@with_spec
def run(
    where: str | None, folder: Path, context: str | None, baked_in: bool, priority: str, dry_run: bool, spec: Path,
    workspace: Path | None,
) -> None:  # fmt: skip
    """Run what is not done yet; a second run with nothing changed does nothing."""
    if where is None and dry_run:
        raise click.UsageError("--dry-run prints what a cluster would get: add --on eks. Here, `fmops plan` says it.")
    if where is None:
        only_with("--on eks", "folder", "context", "baked_in", "priority")
    from fmops.orchestration.events import open_view
    from fmops.orchestration.run import Alias, Launcher
    from fmops.orchestration.run import run as run_project
    from fmops.orchestration.show import render_outcome, serves

    project = open_project(spec, workspace)
    launch: Launcher | None = None
    if where:
        from fmops.orchestration.deploy import Platform
        from fmops.orchestration.eks import EksLauncher, render_run

        platform = Platform.read(folder)
        if dry_run:
            click.echo(render_run(project, platform=platform, baked_in=baked_in, priority=priority), nl=False)
            return
        from fmops.adapters.kubernetes import connect

        launch = EksLauncher(connect(context), platform, baked_in=baked_in, priority=priority)
    with open_view() as view:
        # What users are served is changed by a rollout alone.
        alias: Alias = "challenger" if serves(project) else "champion"
        outcome = run_project(project, view, alias=alias, launch=launch)
    click.echo(render_outcome(project, outcome))


@click.command()
@click.option("--on", "where", type=click.Choice(["eks"]), help="Look at the cluster instead of this machine.")
@click.option("--context", help="Of the kubeconfig. Left out: the current one.")
@with_spec
def doctor(where: str | None, context: str | None, spec: Path, workspace: Path | None) -> None:
    """Say whether a lifecycle can run here, or on the cluster, and what to mend."""
    if where is None:
        only_with("--on eks", "context")
    from fmops.orchestration.doctor import examine_cluster, examine_here, render_findings

    here = examine_here(spec, open_project=lambda: open_project(spec, workspace))
    findings = list(examine_cluster(context) if where else here)
    click.echo(render_findings(findings))
    if any(each.state == "fault" for each in findings):
        sys.exit(EXIT_FAILED)


@click.command()
@click.argument("name")
@click.option("--fingerprint", help="Refuse to make anything else; a launcher sets it.")
@with_spec
def stage(name: str, fingerprint: str | None, spec: Path, workspace: Path | None) -> None:
    """Run one stage in this process, reporting JSON lines (launchers call this)."""
    from fmops.orchestration.execute import run_stage_process

    sys.exit(run_stage_process(spec, name, workspace=workspace, fingerprint=fingerprint))


@click.command("fork-server", hidden=True)
@click.argument("channel", type=int)
def fork_server(channel: int) -> None:
    """Fork the stages of one run (`fmops run` starts this); CHANNEL is the socket on which it asks for them."""
    import socket

    from fmops.orchestration.fork_server import serve

    arguments = serve(socket.socket(fileno=channel))
    if arguments:
        # A fork: from here on it is that command, also for what it writes down.
        sys.argv[1:] = arguments
        stage(arguments[1:], standalone_mode=False)
