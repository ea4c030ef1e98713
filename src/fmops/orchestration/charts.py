"""The report's pictures as inline SVG: curves, intervals, the lifecycle.

Enters: numbers and names. Leaves: markup in which every text is escaped; colours come from the page's style sheet.
Refuses: values that are not finite; they are left out of a line and say so in the caption.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Point = tuple[float, float]

WIDTH, HEIGHT = 300, 180
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 12, 34
MAX_POINTS = 400
"""A longer curve is thinned evenly; its last point always stays."""


@dataclass(frozen=True)
class Box:
    """One stage in the lifecycle picture."""

    name: str
    state: str
    """A node's state, or `blocked` for a gate that did not promote."""
    text: str
    column: int
    row: int
    """0: data, 1: model, 2: evaluation."""


def line_chart(
    points: Sequence[Point], *, css: str, x_label: str, y_label: str, ceiling: float | None = None
) -> Markup:
    """A curve with axes; `ceiling` draws a dashed line that the curve may not cross.

    Raises:
        ValueError: no finite point.
    """
    finite = thin([point for point in points if all(map(math.isfinite, point))])
    if not finite:
        raise ValueError("a curve needs a finite point")
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_ticks = ticks(min(ys), max([*ys, ceiling] if ceiling is not None else ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[str, str]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f}", f"{down:.1f}"

    parts = [_y_axis(tick, place(x_low, tick)[1], _digits(y_ticks)) for tick in y_ticks]
    parts += [_x_tick(tick, place(tick, y_low)[0]) for tick in ticks(x_low, x_high, most=5) if x_low <= tick <= x_high]
    if ceiling is not None:
        down = place(x_low, ceiling)[1]
        parts.append(Markup('<line class="ceiling" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, WIDTH - RIGHT, down, down))  # fmt: skip
        parts.append(Markup('<text class="note" x="{}" y="{}" text-anchor="end">ceiling {:.3f}</text>').format(
            WIDTH - RIGHT, f"{float(down) - 5:.1f}", ceiling))  # fmt: skip
    path = " ".join(",".join(place(x, y)) for x, y in finite)
    parts.append(Markup('<polyline class="curve {}" points="{}"/>').format(css, path))
    if len(finite) <= 24:
        parts += [_dot(place(x, y), css, f"{x:,.0f} {x_label}: {y:.4f} {y_label}") for x, y in finite]
    else:
        parts.append(_dot(place(*finite[-1]), css, f"{finite[-1][0]:,.0f} {x_label}: {finite[-1][1]:.4f} {y_label}"))
    parts.append(Markup('<text class="note" x="{}" y="{}" text-anchor="end">{}</text>').format(
        WIDTH - RIGHT, HEIGHT - 4, x_label))  # fmt: skip
    label = f"{y_label} from {ys[0]:.3f} to {ys[-1]:.3f}"
    return _svg(parts, width=WIDTH, height=HEIGHT, label=label, css="chart")


def interval_rows(rows: Sequence[tuple[str, float, tuple[float, float] | None]], *, low: float, high: float) -> Markup:
    """Values with their 95 % intervals, one under the other on the scale from `low` to `high`.

    Args:
        rows: style class, value, its interval (None draws the value alone).
    """
    width, step = 220, 11

    def across(value: float) -> float:
        return 4 + (min(max(value, low), high) - low) / ((high - low) or 1) * (width - 8)

    parts = [
        Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1}"/>').format(
            across(at), step * len(rows) + 2
        )
        for at in (low, (low + high) / 2, high)
    ]
    for place, (css, value, bounds) in enumerate(rows):
        down = step * place + 7
        if bounds is not None:
            parts.append(Markup('<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(
                css, *map(across, bounds), down, down))  # fmt: skip
        parts.append(_dot((f"{across(value):.1f}", str(down)), css, f"{value:.4f}"))
    return _svg(parts, width=width, height=step * len(rows) + 2, label="values with 95 % intervals", css="intervals")


def margin_interval(lower: float, middle: float, upper: float, *, margin: float, css: str) -> Markup:
    """A paired difference in units of its margin: the margin stands at −1, no change at 0; arrows where it is cut."""
    width, height, reach = 260, 26, 3.0

    def across(value: float) -> float:
        return 8 + (min(max(value / margin, -reach), reach) + reach) / (2 * reach) * (width - 16)

    parts = [
        Markup('<rect class="beyond" x="8" y="0" width="{:.1f}" height="{}"/>').format(across(-margin) - 8, height),
        Markup('<line class="margin" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1}"/>').format(across(-margin), height),
        Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1}"/>').format(across(0), height),
        Markup('<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="13" y2="13"/>').format(
            css, across(lower), across(upper)),
    ]  # fmt: skip
    if upper / margin > reach:
        parts.append(Markup('<path class="arrow {}" d="M{:.1f},8 l7,5 l-7,5"/>').format(css, width - 12))
    if lower / margin < -reach:
        parts.append(Markup('<path class="arrow {}" d="M12,8 l-7,5 l7,5"/>').format(css))
    if abs(middle / margin) <= reach:
        parts.append(_dot((f"{across(middle):.1f}", "13"), css, f"{middle:+.4f}"))
    label = f"difference {signed(middle)}, from {signed(lower)} to {signed(upper)}, margin {margin:.3f}"
    return _svg(parts, width=width, height=height, label=label, css="forest")


def lifecycle_picture(boxes: Sequence[Box], edges: Iterable[tuple[str, str]]) -> Markup:
    """Stages in three rows with their state, and what each hands to the next; a box leads to its row in the table."""
    box_width, box_height, across, down = 158, 50, 180, 84
    at = {box.name: (box.column * across + 1, box.row * down + 1) for box in boxes}
    reached = {box.name for box in boxes if box.state in ("done", "cached")}
    parts = []
    for start, end in edges:
        if start in at and end in at:
            css = "edge" if start in reached and end in reached else "edge open"
            parts.append(
                Markup('<path class="{}" d="{}"/>').format(css, _edge(at[start], at[end], box_width, box_height))
            )
    parts += [_box(box, *at[box.name], box_width, box_height) for box in boxes]
    width = max(x for x, _ in at.values()) + box_width + 1
    height = max(y for _, y in at.values()) + box_height + 1
    return _svg(parts, width=width, height=height, label="the lifecycle with the state of each stage", css="lifecycle")


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points, evenly chosen, the last one kept."""
    if len(points) <= most:
        return list(points)
    stride = math.ceil(len(points) / (most - 1))
    return [*points[:-1:stride], points[-1]]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `most` of them."""
    if high <= low:
        high, low = low + (abs(low) or 1) * 0.05, low - (abs(low) or 1) * 0.05
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def _edge(start: tuple[int, int], end: tuple[int, int], width: int, height: int) -> str:
    (x1, y1), (x2, y2) = start, end
    if y1 == y2:
        return f"M{x1 + width},{y1 + height / 2} H{x2 - 2}"
    if x1 == x2:
        top = y1 < y2
        return f"M{x1 + width / 2},{y1 + (height if top else 0)} V{y2 + (-2 if top else height + 2)}"
    middle = x2 + width / 2
    bend = 10 if y1 > y2 else -10
    return f"M{x1 + width},{y1 + height / 2} H{middle - 10} q10,0 10,{-bend} V{y2 + (height + 2 if y1 > y2 else -2)}"


def _box(box: Box, x: int, y: int, width: int, height: int) -> Markup:
    frame = Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="9"/>').format(x, y, width, height)
    light = Markup('<circle cx="{}" cy="{}" r="4"/>').format(x + 13, y + 17)
    name = Markup('<text class="name" x="{}" y="{}">{}</text>').format(x + 23, y + 21, box.name)
    state = Markup('<text class="state" x="{}" y="{}">{}</text>').format(x + 23, y + 39, box.text)
    return Markup('<a href="#stage-{0}"><g class="box {1}"><title>{0}: {2}</title>{3}</g></a>').format(
        box.name, box.state, box.text, frame + light + name + state)  # fmt: skip


def _dot(at: tuple[str, str], css: str, title: str) -> Markup:
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(css, *at, title)


def _y_axis(tick: float, down: str, digits: int) -> Markup:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, down, down)
    text = Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        LEFT - 6, f"{float(down) + 3.5:.1f}", f"{tick:.{digits}f}")  # fmt: skip
    return line + text


def _digits(values: Sequence[float]) -> int:
    """Decimals that tell neighbouring ticks apart."""
    return next((places for places in range(6) if all(abs(round(value, places) - value) < 1e-9 for value in values)), 6)


def signed(value: float, digits: int = 3) -> str:
    """`+0.012` or `−0.004`, with a minus sign as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _x_tick(tick: float, across: str) -> Markup:
    shown = f"{tick / 1000:g} k" if tick >= 1000 else f"{tick:g}"
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        across, HEIGHT - BOTTOM + 15, shown)  # fmt: skip


def _svg(parts: Iterable[Markup], *, width: float, height: float, label: str, css: str) -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        css, width, height, label, Markup("").join(parts))  # fmt: skip
