"""`fmops deploy`: its options.

Enters: arguments. Leaves: text, manifests, an exit code.
Refuses: nothing of its own; see orchestration.deploy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fmops.cli_options import open_project, with_spec


@click.command()
@click.argument("release", default="champion")
@click.option("--on", type=click.Choice(["eks"]), required=True, help="The cluster of kubectl's current context.")
@click.option("--by", type=click.Choice(["kserve", "ray"]), default="kserve", show_default=True, help="Who runs vLLM.")
@click.option("--least", type=click.IntRange(min=1), default=1, show_default=True, help="Fewest replicas.")
@click.option("--most", type=click.IntRange(min=1), default=4, show_default=True, help="Most replicas.")
@click.option(
    "--tokens-per-second", type=click.IntRange(min=1), help="A replica's; more of them add one, as a queue does."
)
@click.option(
    "--warm", type=click.IntRange(min=0), default=0, show_default=True, help="Nodes that placeholder pods keep warm."
)
@click.option(
    "--platform", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path("infra/platform"),
    show_default=True,
    help="Folder with cluster.yaml and images.lock.yaml.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the manifests and end.")
@with_spec
def deploy(release: str, folder: Path, dry_run: bool, spec: Path, workspace: Path | None, **options: Any) -> None:
    """Serve a release on the cluster, checked before it gets traffic."""
    from fmops.deployment.manifests import Scale
    from fmops.orchestration.deploy import Platform, deploy_release, describe, plan_deployment, render

    scale = Scale(
        least=options["least"], most=options["most"], warm=options["warm"],
        tokens_per_second=options["tokens_per_second"],
    )  # fmt: skip
    platform = Platform.read(folder)
    project = open_project(spec, workspace)
    planned = plan_deployment(project, release, platform=platform, by=options["by"], scale=scale)
    if dry_run:
        click.echo(render(planned), nl=False)
        return
    from fmops.adapters.kubernetes import connect

    click.echo(describe(planned, scale=scale))
    deploy_release(planned, connect(), platform=platform, say=click.echo)
