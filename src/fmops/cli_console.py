"""`fmops console`: the web page of a workspace.

Enters: arguments. Leaves: a listening console; its token, shown once.
Refuses: what the console refuses.
"""

from __future__ import annotations

from pathlib import Path

import click

from fmops.cli_options import PORT, open_project, with_spec


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The one address that it listens on.")
@click.option("--port", type=PORT, help="Default: serve.port + 3; 0 takes a free one.")
@click.option("--read-only", is_flag=True, help="Show everything, take no orders, no chat.")
@click.option("--new-token", is_flag=True, help="Make a new token and show it; the old one ends.")
@with_spec
def console(
    host: str, port: int | None, read_only: bool, new_token: bool, spec: Path, workspace: Path | None
) -> None:  # fmt: skip
    """Open the web page: lifecycle, evidence, alarms, rounds, error budget, chat; promote, hold, roll back."""
    from fmops.console.process import run_console

    project = open_project(spec, workspace)
    if port is None:
        # A spec that takes any free port has no third one after it.
        port = project.spec.serve.port and project.spec.serve.port + 3
    run_console(project, host=host, port=port, read_only=read_only, new_token=new_token)
