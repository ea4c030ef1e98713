"""What happens during a run, written down and shown.

Enters: events of stages and of the run. Leaves: `events.jsonl` in the run's folder, and lines or bars for a person.
Refuses: nothing; showing never decides anything.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

Event = dict[str, Any]


class View(Protocol):
    """Shows a run to a person."""

    def show(self, node: str, event: Event) -> None:
        """Show one event."""


class EventLog:
    """Appends events to `events.jsonl` and passes them on to a view."""

    def __init__(self, folder: Path, view: View, clock: Callable[[], float] = time.time) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._stream = (folder / "events.jsonl").open("a", encoding="utf-8")
        self._view, self._clock = view, clock
        self._written_progress: dict[str, float] = {}

    def add(self, node: str, event: str, **values: Any) -> None:
        """Write and show one event. Progress is shown every time but written once a second a node."""
        now = self._clock()
        row = {"time": round(now, 3), "node": node, "event": event, **values}
        self._view.show(node, row)
        if event == "progress" and now - self._written_progress.get(node, 0) < 1 and values["done"] < values["total"]:
            return
        self._written_progress[node] = now
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """No more events."""
        self._stream.close()


def read_events(folder: Path) -> list[Event]:
    """The events of a run; a last line cut off by a kill is left out."""
    path = folder / "events.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@contextmanager
def open_view(stream: TextIO | None = None) -> Iterator[View]:
    """Bars on a terminal; one line a stage elsewhere."""
    stream = stream or sys.stdout
    if not stream.isatty():
        yield LineView(stream)
        return
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    class TwoLines(Progress):
        """Figures stand below the bar: beside it they would push bar and end off a terminal of 80 columns."""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            yield from (f"  {task.fields['figures']}" for task in self.tasks if task.fields["figures"])

    columns = (
        SpinnerColumn(), TextColumn("{task.description:18}"), BarColumn(bar_width=12),
        TextColumn("{task.fields[shown]}"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    with TwoLines(*columns, console=Console(file=stream), transient=True) as progress:
        yield BarView(progress)


class LineView:
    """One line when a stage ends, and its notes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, node: str, event: Event) -> None:
        """Print what a log should keep."""
        text = describe(node, event)
        if text:
            print(text, file=self._stream, flush=True)


class BarView:
    """A bar for each running stage; finished ones scroll up as lines."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def show(self, node: str, event: Event) -> None:
        """Move the bar, or print the line."""
        if event["event"] == "started":
            self._tasks[node] = self._progress.add_task(node, total=None, shown="", figures="")
        elif event["event"] == "progress" and node in self._tasks:
            names = {name: name.replace("_per_", "/").replace("_", " ") for name in event["shown"]}
            self._progress.update(
                self._tasks[node],
                completed=event["done"],
                total=event["total"],
                shown=f"{event['done']:,.0f}/{event['total']:,.0f} {event['unit']}",
                figures="  ".join(f"{names[name]} {value:.4g}" for name, value in event["shown"].items()),
            )
        elif event["event"] in ("finished", "failed", "cached") and node in self._tasks:
            self._progress.remove_task(self._tasks.pop(node))
        text = describe(node, event)
        if text:
            self._progress.console.print(text, highlight=False, markup=False)


def describe(node: str, event: Event) -> str | None:
    """The one line that an event deserves, or None."""
    kind = event["event"]
    if kind == "finished":
        cost = event["cost"]
        figures = f"{cost['wall_s']:7.1f} s  {cost['cpu_s']:7.1f} CPU s  {cost['peak_bytes'] / 1e9:4.1f} GB"
        return f"{node:18} done   {figures}  {event.get('summary', '')}".rstrip()
    if kind == "cached":
        return f"{node:18} cached"
    if kind == "note":
        return f"{node:18} · {event['text']}"
    if kind == "failed":
        return f"{node:18} FAILED"
    return None
