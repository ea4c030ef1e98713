"""Pictures of one coloured shape on a noisy ground: a task that a tiny model learns from nothing.

Enters: how many, a seed. Leaves: RGB pictures of 32 × 32 pixels, each with its shape, its colour and its ground.
Refuses: nothing. Equal seeds give equal pictures; place, size, shade and noise differ from one to the next.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 210), "yellow": (220, 200, 40)}


GROUNDS = {"light": (170, 220), "dark": (40, 90)}


class Picture(NamedTuple):
    """What is drawn, and what it shows."""

    image: Image
    shape: str
    colour: str
    ground: str


def pictures(number: int, *, seed: int) -> Iterator[Picture]:
    """So many pictures; every combination of shape, colour and ground comes about equally often."""
    lot = random.Random(seed)
    kinds = [(shape, colour, ground) for shape in SHAPES for colour in COLOURS for ground in GROUNDS]
    for place in range(number):
        shape, colour, ground = kinds[place % len(kinds)]
        yield Picture(draw(lot, shape=shape, colour=colour, ground=ground), shape, colour, ground)


def draw(lot: random.Random, *, shape: str, colour: str, ground: str) -> Image:
    """One picture; `lot` decides where the shape stands, how large it is, its shade, and the noise of the ground."""
    from PIL import Image, ImageDraw

    darkest, lightest = GROUNDS[ground]
    noise = bytes(lot.randrange(darkest, lightest) for _ in range(3 * SIDE * SIDE))
    picture = Image.frombytes("RGB", (SIDE, SIDE), noise)
    radius = lot.uniform(7, 11)
    x, y = (lot.uniform(radius + 1, SIDE - radius - 1) for _ in range(2))
    shade = tuple(max(0, min(255, value + lot.randrange(-25, 26))) for value in COLOURS[colour])
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    elif shape == "square":
        half = 0.85 * radius
        pen.rectangle((x - half, y - half, x + half, y + half), fill=shade)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + 0.8 * radius), (x + radius, y + 0.8 * radius)], fill=shade)
    return picture
