"""A Hugging Face model folder, written as one GGUF file with eight-bit weights.

Enters: a folder with safetensors, `config.json` and `tokenizer.json`. Leaves: a Q8_0 GGUF; equal inputs, equal bytes.
Refuses: architectures and tokenizers whose layout in GGUF is not known here.

The layout is llama.cpp's (its `gguf` package holds the names): matrices in blocks of 32 weights with one scale,
vectors in float32, rotary pairs of the Llama family interleaved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors import safe_open

from fmops.deployment.serving.engine import EIGHT_BIT_ARCHITECTURES
from fmops.errors import FmopsError

ARCHITECTURES = dict(
    zip(
        EIGHT_BIT_ARCHITECTURES,
        (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.QWEN2, gguf.MODEL_ARCH.QWEN3),
        strict=True,
    )
)
BLOCK = 32
"""Weights that share a scale: rows must be multiples of it."""


def write_gguf(folder: Path, out: Path) -> None:
    """Write the model in `folder` to the file `out`.

    Raises:
        FmopsError: this model has no known layout in GGUF; says which part.
    """
    config = json.loads((folder / "config.json").read_bytes())
    name = (config.get("architectures") or ["?"])[0]
    if name not in ARCHITECTURES:
        raise FmopsError(f"{name} has no GGUF layout here. Known: {', '.join(ARCHITECTURES)}. Serve it otherwise.")
    architecture = ARCHITECTURES[name]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture])
    _write_shape(writer, config)
    _write_tokenizer(writer, folder)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for key, tensor in _tensors(folder):
        if key == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise FmopsError(f"the tensor {key} of {name} has no name in GGUF. Serve this model otherwise.")
        if architecture == gguf.MODEL_ARCH.LLAMA:
            tensor = _interleaved(key, tensor, config)
        if tensor.ndim == 2 and tensor.shape[1] % BLOCK == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise FmopsError(
            f"{config.get('rope_scaling') or rope}: scaled rotary positions have no GGUF layout here. Serve "
            "this model with the engine transformers."
        )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _write_tokenizer(writer: Any, folder: Path) -> None:
    """Byte-level BPE, as the tokenizers library writes it."""
    stated = json.loads((folder / "tokenizer.json").read_bytes())
    model = stated["model"]
    if model.get("type") != "BPE":
        raise FmopsError(f"a tokenizer of type {model.get('type')} has no layout here. Serve this model otherwise.")
    size = json.loads((folder / "config.json").read_bytes())["vocab_size"]
    tokens = [f"[unused{index}]" for index in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    for added in stated.get("added_tokens", ()):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    numbers = json.loads((folder / "config.json").read_bytes())
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        value = numbers.get(f"{role}_token_id")
        if value is not None:
            add(value[0] if isinstance(value, list) else value)


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values, one at a time, in name order."""
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            where |= dict.fromkeys(shard.keys(), path)
    for key in sorted(where):
        with safe_open(where[key], framework="pt") as shard:
            yield key, shard.get_tensor(key).float().numpy()


def _interleaved(key: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Query and key rows with the two halves of each rotary pair side by side."""
    heads = config["num_attention_heads"]
    if key.endswith(("k_proj.weight", "k_proj.bias")):
        heads = config.get("num_key_value_heads", heads)
    elif not key.endswith(("q_proj.weight", "q_proj.bias")):
        return tensor
    shape = (heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape)
