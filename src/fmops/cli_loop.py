"""`fmops loop`: close the loop; and `fmops loop bench`, which lets it prove itself.

Enters: arguments. Leaves: what was done, in words; for the benchmark a JSON file, a table, a picture.
Refuses: what the loop refuses.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from fmops.cli_options import only_with, open_project, with_spec
from fmops.errors import unknown


@click.group(invoke_without_command=True)
@click.option("--once", is_flag=True, help="Do the next step and end (for cron). Default: look every minute.")
@click.option(
    "--round", "stage", type=click.Choice(["pretrain", "instruct", "align"]), help="Ask for a round of this stage."
)
@click.option("--why", default="", help="Remembered with the wish for a round.")
@click.option("--approve", type=click.IntRange(min=1), help="Let the round of this number train.")
@with_spec
@click.pass_context
def loop(
    context: click.Context, once: bool, stage: Any, why: str, approve: int | None, spec: Path, workspace: Path | None
) -> None:  # fmt: skip
    """Close the loop: watch, diagnose, train what is missing from the champion, gate, roll out, or roll back."""
    if context.invoked_subcommand:
        return
    if stage is None:
        only_with("--round", "why")
    from fmops.orchestration.events import open_view
    from fmops.orchestration.loop import LoopRunner, asked, keep_going

    with open_view() as view:
        runner = LoopRunner(open_project(spec, workspace), view)
        wish = asked(stage, why) if stage else None
        if once or stage or approve is not None:
            click.echo("\n".join(runner.look(ask=wish, approve=approve)))
        else:
            keep_going(runner, say=click.echo)


@loop.command("bench")
@click.option("--event", "names", multiple=True, help="Play this event only; several times for several.")
@click.option("--quick", is_flag=True, help="Two minutes: a smaller model, fewer requests, three events.")
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    default=(0,),
    show_default=True,
    help="Of the model, the users and their mistakes; several times for several.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the project that serves there, for the next call.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON; the picture lies beside it. Default: loop-DATE.json.",
)
def bench(names: tuple[str, ...], quick: bool, seeds: tuple[int, ...], folder: Path | None, out: Path | None) -> None:
    """Put faults into replayed traffic of a small real model; report how the loop finds and mends each."""
    from fmops.orchestration.bench.events import QUICK_EVENTS, events
    from fmops.orchestration.bench.picture import picture, table
    from fmops.orchestration.bench.run import bench as play
    from fmops.orchestration.events import open_view

    known = events()
    for name in names:
        if name not in known:
            raise unknown("event", name, list(known))
    path = out or Path(f"loop-{time.strftime('%Y-%m-%d')}.json")
    with open_view() as view:
        result = play(
            folder, quick=quick, names=names or (QUICK_EVENTS if quick else tuple(known)), seeds=seeds, out=path,
            view=view, say=click.echo,
        )  # fmt: skip
    path.with_suffix(".svg").write_text(picture(result["events"]), encoding="utf-8")
    click.echo(table(result["events"]))
    click.echo(f"wrote {path} and {path.with_suffix('.svg')}")
