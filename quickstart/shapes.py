"""Pictures of one coloured shape on a noisy ground: a task that a tiny model learns from nothing.

Enters: how many, a seed. Leaves: RGB pictures of 32 × 32 pixels, each with its shape and its colour.
Refuses: nothing. Equal seeds give equal pictures; place, size, shade and noise differ from one to the next.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 210), "yellow": (220, 200, 40)}


def pictures(number: int, *, seed: int) -> Iterator[tuple[Image, str, str]]:
    """So many pictures, each with its shape and colour; every pair comes about equally often."""
    lot = random.Random(seed)
    pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    for place in range(number):
        shape, colour = pairs[place % len(pairs)]
        yield draw(lot, shape=shape, colour=colour), shape, colour


def draw(lot: random.Random, *, shape: str, colour: str) -> Image:
    """One picture; `lot` decides where the shape stands, how large it is, its shade, and the noise of the ground."""
    from PIL import Image, ImageDraw

    ground = Image.frombytes("RGB", (SIDE, SIDE), bytes(lot.randrange(90, 150) for _ in range(3 * SIDE * SIDE)))
    radius = lot.uniform(7, 11)
    x, y = (lot.uniform(radius + 1, SIDE - radius - 1) for _ in range(2))
    shade = tuple(max(0, min(255, value + lot.randrange(-25, 26))) for value in COLOURS[colour])
    pen = ImageDraw.Draw(ground)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    elif shape == "square":
        half = 0.85 * radius
        pen.rectangle((x - half, y - half, x + half, y + half), fill=shade)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + 0.8 * radius), (x + radius, y + 0.8 * radius)], fill=shade)
    return ground
