"""The model that everything starts from.

Enters: a GGUF file, or a Hugging Face folder with safetensors. Leaves: a base checkpoint with settled special tokens.
Refuses: pickles, code inside models, weights that are not what they say, quantised weights outside GGUF.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fmops.artifacts import Checkpoint, Source, SourceFile
from fmops.errors import FmopsError
from fmops.integrity import safetensors_header
from fmops.jobs import ImportJob
from fmops.stage import StageContext

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
KEPT = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(processor|preprocessor)_config\.json"
    r"|merges\.txt|tokenizer\.model|chat_template\.jinja|.*\.safetensors|model\.safetensors\.index\.json"
)
"""Files that make a model; a README, a .gitattributes and the like are left behind."""
PADDING = ("<|endoftext|>", "<pad>", "[PAD]", "<|pad|>", "<|PAD|>", "<|finetune_right_pad_id|>", "<unk>", "[UNK]")
"""Tokens that may stand for padding, in order of preference: none of them ends an answer."""
UNSET_LENGTH = 10**9
"""Transformers writes 10**30 where a tokenizer states no longest input."""


def import_base(config: ImportJob, *, source: Source, out: Path, context: StageContext) -> Checkpoint:
    """Bring the base model into the shape that every stage reads: `out/model`, in safetensors.

    Raises:
        FmopsError: the source is not one model, or holds what could run code.
    """
    _refuse_code(source)
    model = out / "model"
    if model.exists():
        shutil.rmtree(model)
    gguf = [file for file in source.files if file.name.lower().endswith(".gguf")]
    if gguf:
        if len(gguf) > 1:
            raise FmopsError(f"{source.uri} holds {len(gguf)} GGUF files: {_names(gguf)}. Name one of them as base.")
        from fmops.adapters.gguf_models import convert_gguf

        model.mkdir(parents=True)
        licence = convert_gguf(gguf[0].path, model)
    else:
        _copy_folder(source, model)
        licence = _licence(source)
    settle_special_tokens(model, context=context)
    from fmops.adapters.model_files import check_loads
    from fmops.adapters.tokens import check_template

    check_loads(model)
    check_template(model)
    if licence is None:
        context.note("the base model states no licence; the release will say so")
    return Checkpoint(
        path=out,
        stage="base",
        parameters=sum(_parameters(path) for path in sorted(model.glob("*.safetensors"))),
        trained_tokens=0,
        licence=licence,
    )


def settle_special_tokens(model: Path, *, context: StageContext) -> None:
    """Give the tokenizer a padding token that does not end an answer, and a longest input.

    Where padding and end of text are one token, trainers mask both, and the model never learns to stop.
    """
    config, tokenizer = _read_json(model / "config.json"), _read_json(model / "tokenizer_config.json")
    known = {entry["content"]: entry["id"] for entry in _read_json(model / "tokenizer.json").get("added_tokens", [])}
    eos, pad = _token(tokenizer.get("eos_token")), _token(tokenizer.get("pad_token"))
    if eos is None or eos not in known:
        raise FmopsError(f"the tokenizer names no end-of-text token (eos_token is {eos!r}). Name another base model.")
    if pad is None or pad == eos or pad not in known:
        pad = next((token for token in PADDING if token in known and token != eos), None)
        if pad is None:
            raise FmopsError(
                f"the tokenizer has no padding token apart from its end-of-text token {eos!r}, and none of "
                f"{', '.join(PADDING)}. A model trained so never learns to stop: add one to its tokenizer.json."
            )
        context.note(f"padding is now {pad}: it was the end-of-text token, or unset")
    tokenizer["pad_token"] = pad
    if tokenizer.get("model_max_length", math.inf) > UNSET_LENGTH:
        tokenizer["model_max_length"] = config.get("max_position_embeddings", 2048)
    for key in ("is_local", "local_files_only"):
        tokenizer.pop(key, None)
    _write_json(model / "tokenizer_config.json", tokenizer)
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            _write_json(model / name, {**_read_json(model / name), "pad_token_id": known[pad]})
    if not (model / "chat_template.jinja").is_file() and not tokenizer.get("chat_template"):
        context.note("the tokenizer has no chat template: instruct and align will refuse this model")


def _refuse_code(source: Source) -> None:
    for file in source.files:
        name = PurePosixPath(file.name)
        if name.suffix.lower() in PICKLES:
            raise FmopsError(
                f"{file.name} may be a pickle, and opening one runs the code inside it. "
                "Use a model in safetensors or GGUF, or leave the file out of the source."
            )
        if name.suffix.lower() == ".py":
            raise FmopsError(
                f"{file.name} is code that would run with the model. Use a model that Transformers knows by itself."
            )


def _copy_folder(source: Source, model: Path) -> None:
    """Copy one Hugging Face folder, its top level only."""
    configs = sorted((file for file in source.files if PurePosixPath(file.name).name == "config.json"), key=_depth)
    if not configs:
        raise FmopsError(
            f"{source.uri} is no model: neither a .gguf file nor a config.json among {_names(source.files)}."
        )
    root = PurePosixPath(configs[0].name).parent
    files = {PurePosixPath(f.name).name: f for f in source.files if PurePosixPath(f.name).parent == root}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name not in files:
            raise FmopsError(f"{source.uri} lacks {name}. Name a folder that has it beside config.json.")
    for name in sorted(files):
        if name.endswith(".json") and KEPT.fullmatch(name) and "auto_map" in _top(files[name]):
            raise FmopsError(f"{name} has auto_map: the model brings its own code, which is never run. Name another.")
    _check_config(configs[0])
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    if not weights:
        raise FmopsError(f"{source.uri} holds no weights in safetensors. Convert the model, or name another.")
    _check_shards(files)
    model.mkdir(parents=True)
    for name in sorted(files):
        if KEPT.fullmatch(name):
            shutil.copyfile(files[name].path, model / name)
    for name in weights:
        _header(model / name)


def _top(file: SourceFile) -> dict[str, Any]:
    """A JSON file's object; an empty one for a file that holds a list."""
    try:
        value = json.loads(file.path.read_text("utf-8"))
    except ValueError as error:
        raise FmopsError(f"{file.name} is not valid JSON: {error}. Fetch it again.") from error
    return value if isinstance(value, dict) else {}


def _check_config(file: SourceFile) -> None:
    config = _read_json(file.path)
    if "quantization_config" in config:
        raise FmopsError(f"{file.name} says the weights are quantised; they cannot be trained. Name the full weights.")


def _check_shards(files: dict[str, SourceFile]) -> None:
    """Every shard that the index lists is there."""
    index = files.get("model.safetensors.index.json")
    if index is None:
        return
    missing = sorted(set(_read_json(index.path).get("weight_map", {}).values()) - set(files))
    if missing:
        raise FmopsError(f"{index.name} lists {', '.join(missing)}, which the source lacks. Name all shards.")


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's tensors; also proves that the file is one, and whole."""
    try:
        with path.open("rb") as stream:
            tensors, start = safetensors_header(stream)
        end = start + max(entry["data_offsets"][1] for entry in tensors.values())
    except (ValueError, TypeError) as error:
        raise FmopsError(f"{path.name} is not in the safetensors format, whatever its name says.") from error
    if path.stat().st_size != end:
        raise FmopsError(f"{path.name} has {path.stat().st_size} bytes instead of {end}: fetch it again.")
    return tensors


def _parameters(path: Path) -> int:
    return sum(math.prod(entry["shape"]) for entry in _header(path).values())


def _licence(source: Source) -> str | None:
    """What a README's front matter states as `license:`, or the name of a licence file's first line."""
    for file in _named(source, "README.md"):
        front = file.path.read_text("utf-8", errors="replace").split("---")
        found = re.search(r"^license:\s*([^\s#]+)", front[1], re.MULTILINE) if len(front) > 2 else None
        if found:
            return found.group(1).strip("\"'")
    for file in _named(source, "LICENSE"):
        lines = (line.strip() for line in file.path.read_text("utf-8", errors="replace").splitlines())
        return next((line for line in lines if line), None)
    return None


def _named(source: Source, name: str) -> Iterator[SourceFile]:
    return (file for file in source.files if PurePosixPath(file.name).name == name)


def _depth(file: SourceFile) -> tuple[int, str]:
    return len(PurePosixPath(file.name).parts), file.name


def _names(files: Any) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _token(value: Any) -> str | None:
    """Tokenizer configs name a token as text, or as an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FmopsError(f"{path.name} is not valid JSON: {error}. Fetch it again.") from error
    if not isinstance(value, dict):
        raise FmopsError(f"{path.name} holds a {type(value).__name__} where an object belongs. Fetch it again.")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
