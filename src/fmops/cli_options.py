"""What commands share: which spec, which workspace, which store.

Enters: options of a command. Leaves: an open project.
Refuses: nothing of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from fmops.orchestration.project import Project


def with_spec(command: Any) -> Any:
    """Add --spec, --workspace and --store."""
    command = click.option(
        "--store",
        expose_value=False,
        callback=_remember_store,
        help="s3://bucket/prefix that machines share. Default: $FMOPS_STORE, else runtime.store of the spec.",
    )(command)
    command = click.option(
        "--workspace", type=click.Path(path_type=Path), help="Where artifacts lie. Default: .fmops beside the spec."
    )(command)
    return click.option(
        "--spec",
        type=click.Path(path_type=Path),
        default=Path("lifecycle.yaml"),
        show_default=True,
        help="The spec file.",
    )(command)


def _remember_store(context: click.Context, option: click.Parameter, address: str | None) -> None:
    # Stage processes and engines that the command starts must see the same store.
    if address:
        os.environ["FMOPS_STORE"] = address


PORT = click.IntRange(0, 65535)


def only_with(option: str, *names: str) -> None:
    """Refuse parameters of the running command, by name, that were typed and say nothing without `option`."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} says something only with {option}: add that, or drop it.")


def open_project(spec: Path, workspace: Path | None) -> Project:
    """Open the spec and its workspace."""
    from fmops.orchestration.project import Project

    return Project.open(spec, workspace=workspace)
