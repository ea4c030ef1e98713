"""A GGUF file's header, without its weights.

Enters: a file. Leaves: the sizes that a Hugging Face `config.json` would name.
Refuses: files without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from fmops.errors import FmopsError

FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}


def read_config(file: Path) -> dict[str, Any]:
    """The model's sizes under Transformers' names.

    Raises:
        FmopsError: the header lacks one; names it.
    """
    reader = gguf.GGUFReader(str(file))

    def value(key: str) -> Any:
        field = reader.get_field(key)
        if field is None:
            raise FmopsError(f"{file.name} does not state {key}, so its model is not sized.")
        return field.contents()

    kind = value("general.architecture")
    config = {name: value(f"{kind}.{key}") for name, key in FIELDS.items()}
    tensors = {tensor.name for tensor in reader.tensors}
    return {
        **config,
        "model_type": kind,
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
