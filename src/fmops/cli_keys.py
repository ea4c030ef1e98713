"""`fmops keys`: who may ask the gateway, and how much.

Enters: arguments. Leaves: a key, shown once; or a table without secrets.
Refuses: what the key ring refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fmops.cli_options import open_project, with_spec

if TYPE_CHECKING:
    from fmops.deployment.serving.gateway.keys import KeyRing


@click.group()
def keys() -> None:
    """API keys of the gateway: who may ask, and how much."""


@keys.command("add")
@click.argument("tenant")
@click.option("--tokens-per-minute", type=click.IntRange(min=1), help="Default: serve.tokens_per_minute of the spec.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Valid for so many days. Default: for ever.")
@with_spec
def add_key(
    tenant: str, tokens_per_minute: int | None, days: float | None, spec: Path, workspace: Path | None
) -> None:  # fmt: skip
    """Make a key for a tenant and print it, once: only its digest is kept."""
    key, secret = open_keys(spec, workspace).add(tenant, tokens_per_minute=tokens_per_minute, days=days)
    click.echo(secret)
    click.echo(f"key {key.id} of {key.tenant}: it is shown this once", err=True)


@keys.command("revoke")
@click.argument("id")
@with_spec
def revoke_key(id: str, spec: Path, workspace: Path | None) -> None:
    """End a key now."""
    key = open_keys(spec, workspace).revoke(id)
    click.echo(f"revoked {key.id} of {key.tenant}")


@keys.command("list")
@with_spec
def list_keys(spec: Path, workspace: Path | None) -> None:
    """Show the keys, without their secrets."""
    import time

    for key in open_keys(spec, workspace).keys().values():
        budget = f"{key.tokens_per_minute:,} tokens a minute" if key.tokens_per_minute else "the spec's budget"
        click.echo(f"{key.id}  {key.tenant:20} {key.state(time.time()):8} {budget}")


def open_keys(spec: Path, workspace: Path | None) -> KeyRing:
    """The keys of a spec's workspace."""
    from fmops.deployment.serving.gateway.keys import KEYS, KeyRing

    return KeyRing(open_project(spec, workspace).store.root / KEYS)
