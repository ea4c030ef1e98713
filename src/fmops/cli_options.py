"""What commands share: which spec, which workspace.

Enters: options of a command. Leaves: an open project.
Refuses: nothing of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fmops.orchestration.project import Project


def with_spec(command: Any) -> Any:
    """Add --spec and --workspace."""
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


def open_project(spec: Path, workspace: Path | None) -> Project:
    """Open the spec and its workspace."""
    from fmops.orchestration.project import Project

    return Project.open(spec, workspace=workspace)
