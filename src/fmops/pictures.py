"""Pictures in messages: how they travel between files, stages, servers and clients.

Enters: a PNG, JPEG or WebP file, or a data URL. Leaves: a data URL, or its bytes; a message's parts for a template.
Refuses: addresses of the network: what a model saw must be what was recorded. Other formats, and files above 4 MB.

A message is {"role", "content"} with text; `pictures`, where there are some, lists data URLs that stand before it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
MOST_BYTES = 4 * 2**20
PLACE = "<image>"
"""Stands for a picture in the text of an evaluation's question."""
_URL = re.compile(r"data:image/(png|jpeg|webp);base64,([A-Za-z0-9+/]+={0,2})")


class NoPicture(ValueError):
    """What stands where a picture belongs; the text says what is wrong with it."""


def reads_pictures(model: Path) -> bool:
    """Whether the model in a Hugging Face folder has eyes."""
    return "vision_config" in json.loads((model / "config.json").read_text("utf-8"))


def to_url(name: str, content: bytes) -> str:
    """A picture file's content as a data URL."""
    return f"data:image/{SUFFIXES[Path(name).suffix.lower()]};base64,{base64.b64encode(content).decode()}"


def from_url(url: str) -> bytes:
    """The file in a data URL.

    Raises:
        NoPicture: another kind of URL, or none.
    """
    # A match of all of it: a megabyte is not searched twice for what it is not.
    found = _URL.fullmatch(url)
    if found is None:
        shown = url if len(url) < 40 else f"{url[:39]}…"
        raise NoPicture(f"{shown!r} is none: data:image/png;base64,… (or jpeg, webp) is; addresses are not fetched")
    try:
        content = base64.b64decode(found[2], validate=True)
    except binascii.Error as error:
        raise NoPicture(f"a picture's base64 is broken: {error}") from None
    if len(content) > MOST_BYTES:
        raise NoPicture(f"a picture of {len(content)} bytes is above {MOST_BYTES}")
    return content


def for_template(message: Mapping[str, Any], *, sees: bool) -> dict[str, Any]:
    """A message as a chat template takes it: text, or for a model that reads pictures its parts in order."""
    if not sees:
        return {"role": message["role"], "content": message["content"]}
    parts: list[dict[str, str]] = [{"type": "image"} for _ in message.get("pictures", ())]
    return {"role": message["role"], "content": [*parts, {"type": "text", "text": message["content"]}]}


def in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as a client of OpenAI's API sends it."""
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in message.get("pictures", ())]
    if not shown:
        return {"role": message["role"], "content": message["content"]}
    return {"role": message["role"], "content": [*shown, {"type": "text", "text": message["content"]}]}
