"""Models in GGUF, turned into a Hugging Face folder.

Enters: one GGUF file. Leaves: `model.safetensors` in float32, tokenizer, chat template, configs.
Refuses: architectures and tokenizers that Transformers cannot convert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from fmops.adapters.model_files import forget_paths, quiet
from fmops.errors import FmopsError


def convert_gguf(file: Path, out: Path) -> str | None:
    """Write the model in `file` to `out`, dequantised. Returns the licence that its metadata states, if any."""
    quiet()
    with _read_once():
        metadata = gguf.GGUFReader(str(file))
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
            )
        except (ValueError, KeyError, NotImplementedError) as error:
            raise FmopsError(f"{file.name} cannot be converted: {error}. Name another base model.") from error
        licence = _text(metadata, "general.license")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    forget_paths(out / "config.json")
    return licence


def _text(reader: Any, key: str) -> str | None:
    found = reader.get_field(key)
    return str(found.contents()) if found is not None else None


@contextmanager
def _read_once() -> Iterator[None]:
    """Let Transformers parse the file's header once.

    It opens the file four times, value by value through a memory map, and builds one tensor-name map per module.
    """
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map

    class PlainReader(reader):  # type: ignore[misc, valid-type]
        """Indexes a plain view: slicing `np.memmap` costs four times as much."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    gguf.GGUFReader, gguf.get_tensor_name_map = lru_cache(PlainReader), lru_cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map
