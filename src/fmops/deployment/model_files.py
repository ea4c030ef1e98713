"""Which files of a model may leave the house, and how they get into a release.

Enters: a checkpoint's model folder. Leaves: the same files in the release, by reference where the disk can.
Refuses: pickles under any name, code, symbolic links, and weights that are not finite.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

from fmops.errors import FmopsError, IntegrityError
from fmops.integrity import PICKLE_SUFFIXES, refuse_disguised, refuse_pickle

KEPT = frozenset(
    {
        "config.json", "generation_config.json", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
        "processor_config.json", "preprocessor_config.json",
    }
)  # fmt: skip
CODE_SUFFIXES = frozenset({".py", ".so", ".dll", ".dylib", ".pyc", ".sh"})
FICLONE = 0x40049409
"""Linux: share a file's blocks until one side is written to (ioctl_ficlone(2))."""


def admit_model(folder: Path) -> tuple[list[Path], list[str]]:
    """Files to release, in name order, and names that stay behind.

    Raises:
        FmopsError: the folder holds no weights, or something that must not be served.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise FmopsError(f"{folder} is no model: it needs config.json and weights in safetensors.")
    kept, left = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        _refuse_unsafe(path, name)
        if path.is_dir():
            continue
        if name in KEPT or (path.suffix == ".safetensors" and path.parent == folder):
            kept.append(path)
        else:
            left.append(name)
    for path in kept:
        if path.suffix == ".json":
            _refuse_custom_code(path)
        if path.suffix == ".safetensors":
            _refuse_infinite(path)
    return kept, left


def bring(source: Path, target: Path) -> None:
    """Put a file's content at `target`, whole or not at all: shared blocks, else a hard link, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.tmp")
    partial.unlink(missing_ok=True)
    if not _clone(source, partial) and not _link(source, partial):
        shutil.copyfile(source, partial)
    partial.replace(target)


def _refuse_unsafe(path: Path, name: str) -> None:
    if path.is_symlink():
        raise IntegrityError(f"{name} in the model folder is a symbolic link; a release holds plain files only.")
    if path.is_dir():
        return
    if path.suffix.lower() in CODE_SUFFIXES:
        raise IntegrityError(f"{name} in the model folder is code. A release holds weights and tokenizer only.")
    if path.suffix.lower() in PICKLE_SUFFIXES or path.stat().st_size:
        refuse_pickle(path)
    refuse_disguised(path)


def _refuse_custom_code(path: Path) -> None:
    try:
        stated = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path.name} in the model folder is no JSON: {error}.") from None
    if isinstance(stated, dict) and "auto_map" in stated:
        raise IntegrityError(
            f"{path.name} asks for custom code (auto_map). Only architectures that Transformers carries are served: "
            "remove auto_map if the model is one of them."
        )


def _refuse_infinite(path: Path) -> None:
    from fmops.adapters.transformers_reference import tensor_without_finite_values

    tensor = tensor_without_finite_values(path)
    if tensor:
        raise IntegrityError(
            f"{path.name}: {tensor} holds NaN or infinity. The training run that made it diverged; lower its "
            "learning_rate and run again."
        )


def _clone(source: Path, target: Path) -> bool:
    with source.open("rb") as read, target.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), FICLONE, read.fileno())
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
                return False
            raise
        return True


def _link(source: Path, target: Path) -> bool:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            return False
        raise
    return True
