"""What a vision-language model sees: pictures as pixels, and the token ids that stand for them.

Enters: a model folder with an image processor, data URLs. Leaves: pixels, expanded token ids, a loaded model.
Refuses: files that are no picture, large ones, and prompts whose places do not match their pictures.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from fmops.pictures import NoPicture, from_url

MOST_PIXELS = 4096 * 4096
"""A small file can unpack to gigabytes; its size is read before its pixels are."""

REMEMBERED_BYTES = 256 * 2**20
"""Of pictures as pixels: training sees each of them in every epoch."""


@dataclass(frozen=True, eq=False)
class Look:
    """One picture as a model takes it."""

    ids: tuple[int, ...]
    """Token ids that stand for it in a prompt."""
    pixels: torch.Tensor
    """[tiles, 3, height, width]"""
    mask: torch.Tensor
    """[tiles, height, width] True where there is picture and not padding."""


class Eyes:
    """One model's image processor; may be used from any thread."""

    def __init__(self, folder: Path, *, remember: bool = False) -> None:
        """`remember` what was seen, for who sees the same again; a server must not: tenants could tell by the time."""
        self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.place: int = AutoConfig.from_pretrained(folder, local_files_only=True).image_token_id
        """The id that a template writes once where a picture stands."""
        # A fast tokenizer cannot be borrowed by two threads at once.
        self._lock = threading.Lock()
        self._room = REMEMBERED_BYTES if remember else 0
        self._seen: dict[str, Look] = {}

    def look(self, url: str) -> Look:
        """Read a picture.

        Raises:
            NoPicture: it is none, or too large.
        """
        if url in self._seen:
            return self._seen[url]
        with self._lock:
            seen = self._look(url)
        size = seen.pixels.nbytes + seen.mask.nbytes + len(url)
        if size <= self._room:
            self._seen[url], self._room = seen, self._room - size
        return seen

    def _look(self, url: str) -> Look:
        # A language model is served without Pillow, too.
        from PIL import Image, UnidentifiedImageError

        try:
            file = Image.open(io.BytesIO(from_url(url)), formats=("PNG", "JPEG", "WEBP"))
            if file.width * file.height > MOST_PIXELS:
                raise NoPicture(f"a picture of {file.width} × {file.height} is above {MOST_PIXELS} pixels")
            picture = file.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise NoPicture(f"no picture file: {error}") from None
        text = self._processor.image_token
        seen = self._processor(images=[[picture]], text=text, add_special_tokens=False, return_tensors="pt")
        pixels = seen["pixel_values"][0]
        mask = seen.get("pixel_attention_mask")
        whole = torch.ones(pixels.shape[0], *pixels.shape[2:], dtype=torch.bool)
        return Look(tuple(seen["input_ids"][0].tolist()), pixels, whole if mask is None else mask[0].bool())

    def expand(self, ids: Sequence[int], looks: Sequence[Look]) -> list[int]:
        """`ids` with every place of a picture replaced by what stands for it.

        Raises:
            NoPicture: there are more places than pictures, or fewer.
        """
        if list(ids).count(self.place) != len(looks):
            raise NoPicture(f"{len(looks)} pictures for {list(ids).count(self.place)} places in the prompt")
        left = iter(looks)
        return [new for one in ids for new in (next(left).ids if one == self.place else (one,))]

    def expand_learnt(
        self, ids: Sequence[int], learnt: Sequence[bool], looks: Sequence[Look]
    ) -> tuple[list[int], list[bool]]:
        """`expand`, and which of the ids are learnt: never a picture's.

        Raises:
            NoPicture: there are more places than pictures, or fewer.
        """
        sizes = iter([len(look.ids) for look in looks])
        whole = self.expand(ids, looks)
        return whole, [
            new for one, mine in zip(ids, learnt, strict=True)
            for new in ([False] * next(sizes) if one == self.place else [mine])
        ]  # fmt: skip


def pictures_of(rows: Sequence[Sequence[Look]]) -> dict[str, torch.Tensor]:
    """The pixels of a batch, a row's pictures after each other; nothing where no row has any.

    Rows are filled up with tiles of zeros, which the model leaves out; smaller tiles with pixels that its mask hides.
    """
    tiles = [[tile for look in row for tile in zip(look.pixels, look.mask, strict=True)] for row in rows]
    most = max((len(row) for row in tiles), default=0)
    if not most:
        return {}
    height, width = (max(tile.shape[side] for row in tiles for tile, _ in row) for side in (1, 2))
    pixels = torch.zeros(len(rows), most, 3, height, width)
    masks = torch.zeros(len(rows), most, height, width, dtype=torch.bool)
    for place, row in enumerate(tiles):
        for number, (tile, mask) in enumerate(row):
            pixels[place, number, :, : tile.shape[1], : tile.shape[2]] = tile
            masks[place, number, : mask.shape[0], : mask.shape[1]] = mask
    return {"pixel_values": pixels, "pixel_attention_mask": masks}


def load_seeing(folder: Path, *, attention: Any = "sdpa") -> Any:
    """The vision-language model in `folder`, in float32."""
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, use_safetensors=True, local_files_only=True,
        trust_remote_code=False,
    )  # fmt: skip


def embed(model: Any, ids: Sequence[int], looks: Sequence[Look]) -> torch.Tensor:
    """[tokens, width] what the language tower reads: embeddings of `ids`, the pictures' features in their places."""
    tokens = torch.tensor([list(ids)])
    embedded: torch.Tensor = model.get_input_embeddings()(tokens)
    if looks:
        features = torch.cat(model.get_image_features(**pictures_of([looks]), return_dict=True).pooler_output)
        places = (tokens == model.config.image_token_id).unsqueeze(-1).expand_as(embedded)
        embedded = embedded.masked_scatter(places, features.to(embedded.dtype))
    return embedded[0]


def knows_pictures(folder: Path) -> bool:
    """Whether Transformers has a vision-language model of this architecture that this adapter can drive."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return type(config) in AutoModelForImageTextToText._model_mapping and hasattr(config, "image_token_id")


def describe(folder: Path) -> str:
    """The architecture's name."""
    return str(json.loads((folder / "config.json").read_text("utf-8")).get("model_type"))
