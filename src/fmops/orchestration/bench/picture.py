"""The benchmark's table and picture, made from its JSON.

Enters: rows as `run.play` leaves them. Leaves: Markdown; one SVG with a panel an event.
Refuses: nothing; what was not found or not mended is drawn and written as that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Row = Mapping[str, Any]

WIDTH, HEIGHT, COLUMNS = 300, 170, 2
LEFT, RIGHT, TOP, BOTTOM = 34, 12, 44, 26
CALM, CURVE, FAULT, FOUND, MENDED = "#8a8f98", "#2457a6", "#c0392b", "#d68910", "#1e8449"
HEADINGS = (
    "event", "n", "found after, requests", "by", "diagnosis", "false triggers", "mended after, requests", "CPU s",
    "quality before → during → after", "forgetting, bits per byte",
)  # fmt: skip


def table(events: Sequence[Row]) -> str:
    """Markdown. n runs an event; medians with the range over runs; quality is the mean likeness of answers to the right
    ones, with a 95 % half-width over requests."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in events)])


def _cells(row: Row) -> list[str]:
    right, n = row["diagnosis_right_runs"], row["n"]
    judged = ("right" if right == n else "**wrong**") + (f" in {right} of {n}" if right < n and n > 1 else "")
    parts = [row["quality_before"], row["quality_during"], row["quality_after"]]
    mended = _over_runs(row, "recovered_after_requests", "d")
    if row["recovered"] is False:
        missed = n - row["recovered_runs"]
        mended = f"**not** in {missed} of {n}; {mended}" if missed < n else "**not**"
    found = _over_runs(row, "detected_after_requests", "d")
    return [
        row["name"],
        str(n),
        found + (f", in {row['detected_runs']} of {n}" if 0 < row["detected_runs"] < n else ""),
        _short(row["detected_by"]),
        f"{row['diagnosis'] or 'none'} ({judged})",
        str(row["false_triggers"]) + (f" ({', '.join(row['false_triggers_are'])})" if row["false_triggers"] else ""),
        mended,
        _over_runs(row, "recovery_cpu_s", ".0f"),
        " → ".join(_value(part) for part in parts if part and part["n"]),
        _over_runs(row, "forgetting_bits_per_byte", "+.3f"),
    ]


def _over_runs(row: Row, name: str, form: str) -> str:
    """Median and range over the runs that have the figure."""
    known = [run[name] for run in row["runs"] if run[name] is not None]
    if not known:
        return "–"
    low, high = format(min(known), form), format(max(known), form)
    return format(row[name], form) + (f" ({low} to {high})" if low != high else "")


def _value(part: Row) -> str:
    return f"{part['mean']:.2f} ± {part['half_width']:.2f}"


def _short(found_by: str | None) -> str:
    """Without the e-value and what follows it."""
    if not found_by:
        return "–"
    if not found_by.startswith("rollout: "):
        return found_by
    reason = found_by.removeprefix("rollout: ")
    return f"rollout: {reason.rpartition(': ')[2] if reason.startswith('harm') else reason.partition(':')[0]}"


def picture(events: Sequence[Row]) -> str:
    """Quality of the answers against requests; lines where something was injected, found, mended."""
    rows = -(-len(events) // COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT + 24
    panels = [
        f'<g transform="translate({place % COLUMNS * WIDTH},{place // COLUMNS * HEIGHT})">{_panel(row)}</g>'
        for place, row in enumerate(events)
    ]
    key = [(FAULT, "injected"), (FOUND, "found"), (MENDED, "mended")]
    told = "".join(
        f'<rect x="{LEFT + 110 * n}" y="{height - 17}" width="10" height="10" fill="{colour}"/>'
        f'<text x="{LEFT + 15 + 110 * n}" y="{height - 8}">{word}</text>'
        for n, (colour, word) in enumerate(key)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="sans-serif" font-size="10" fill="#30343a">'
        f"<title>How the loop finds and mends each fault</title>"
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(panels)}{told}</svg>\n'
    )


def _panel(row: Row) -> str:
    last: int = max(at for at, _ in row["curve"])

    def across(requests: float) -> float:
        return LEFT + requests / last * (WIDTH - LEFT - RIGHT)

    def down(quality: float) -> float:
        return TOP + (1 - quality) * (HEIGHT - TOP - BOTTOM)

    quiet = row["quiet_requests"]
    marks = [(quiet, FAULT, "4 3"), *((quiet + after, colour, "") for after, colour in _marks(row))]
    points = " ".join(f"{across(at):.1f},{down(quality):.1f}" for at, quality in row["curve"])
    right = "" if row["diagnosis_right"] else ", which is wrong"
    said = f"{row['diagnosis'] or 'no diagnosis'}{right}; false triggers: {row['false_triggers']}"
    return "".join(
        [
            f'<text x="{LEFT}" y="16" font-size="12" font-weight="bold">{escape(row["name"])}</text>',
            f'<text x="{LEFT}" y="30" fill="{CALM}">{escape(said)}</text>',
            *(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="#e3e5e8"/>'
                f'<text x="{LEFT - 5}" y="{down(y) + 3:.1f}" text-anchor="end">{y:g}</text>'
                for y in (0, 0.5, 1)
            ),
            *(
                f'<line x1="{across(at):.1f}" x2="{across(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
                f'stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dash}"/>'
                for at, colour, dash in marks
            ),
            f'<polyline points="{points}" fill="none" stroke="{CURVE}" stroke-width="1.3"/>',
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">{last} requests</text>',
        ]
    )


def _marks(row: Row) -> list[tuple[int, str]]:
    found = [(row["detected_after_requests"], FOUND), (row["recovered_after_requests"], MENDED)]
    return [(after, colour) for after, colour in found if after is not None]
