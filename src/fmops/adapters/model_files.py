"""Model folders: read into Transformers, written back deterministically.

Enters: a Hugging Face folder with safetensors. Leaves: a model in memory; a folder that depends on the weights alone.
Refuses: anything but safetensors, and code that comes with a model.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fmops.adapters import ranks
from fmops.environment import machine_notes
from fmops.errors import FmopsError, StageFailed, unknown
from fmops.pictures import reads_pictures
from fmops.stage import StageContext
from fmops.store import write_atomically

PRECISION_GAIN = 1.5
"""How much faster bfloat16 must multiply before `auto` takes it; below that the rounding buys nothing."""


def quiet() -> None:
    """Keep progress bars out of the way: a stage reports through its context."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Renamings inside the libraries, which neither a user nor a stage can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")


def load_model(folder: Path) -> Any:
    """The causal language model in `folder`, in float32.

    Raises:
        FmopsError: it reads pictures; `eyes.load_seeing` takes those.
    """
    if reads_pictures(folder):
        raise FmopsError(
            f"{folder} reads pictures, and instruction tuning alone trains such a one (instruct, `adapter: full`). "
            "Leave pretrain and align out, or name a language model as base."
        )
    # Transformers takes torch's own attention wherever an architecture knows it; asked for by name, others are refused.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def save_model(model: Any, out: Path, *, source: Path) -> None:
    """Write `model` to `out`, with the tokenizer and generation files of the folder it was loaded from.

    Those files are copied, not written again: training must not change a token id or the chat template. Of several
    processes the first one writes.
    """
    if ranks.rank():
        return
    if out.exists():
        shutil.rmtree(out)
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    # Trainers switch the cache off and mirror special tokens in the model's own config.
    config.dtype = torch.float32
    model.config = config
    model.save_pretrained(out)
    for path in sorted(source.iterdir()):
        if path.name != "config.json" and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    forget_paths(out / "config.json")


def take_weights(model: Any, folder: Path, *, of: str) -> None:
    """Put the weights in `folder`, in safetensors, into `model`.

    Raises:
        StageFailed: a parameter is not among them, or they hold something else; `of` says whose they are.
    """
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    missing, unexpected = model.load_state_dict(found, strict=False)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    named = {"lacks": sorted(set(missing) - tied), "also holds": sorted(unexpected)}
    wrong = [f"{what} {', '.join(names[:3])}" for what, names in named.items() if names]
    if wrong:
        raise StageFailed(f"{of}'s checkpoint {' and '.join(wrong)}. It is no checkpoint of this model.")


def save_adapter(model: Any, out: Path) -> None:
    """Write a PEFT model's adapter to `out`, without the path of its base; of several processes the first one does."""
    if ranks.rank():
        return
    if out.exists():
        shutil.rmtree(out)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    forget_paths(out / "adapter_config.json")


def forget_paths(config: Path) -> None:
    """Drop where a model was loaded from, and put lists that were sets in order: equal weights, equal bytes."""
    values = json.loads(config.read_text())
    for key in ("_name_or_path", "_model_name_or_path", "base_model_name_or_path"):
        values.pop(key, None)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def add_lora(model: Any, *, rank: int) -> Any:
    """Wrap `model` with a LoRA adapter on every linear layer but the head; its scale is twice the rank."""
    from peft import get_peft_model

    return get_peft_model(model, lora_config(rank=rank))


def lora_config(*, rank: int) -> Any:
    """LoRA on every linear layer but the head (Hu et al. 2021; all layers: Schulman et al. 2025)."""
    from peft import LoraConfig

    from fmops.adapters.lora import FusedLinear

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config._register_custom_module({torch.nn.Linear: FusedLinear})
    return config


def choose_precision(context: StageContext, *, work: Path) -> torch.dtype:
    """Training arithmetic: as the context asks, or measured once on this machine and kept.

    Kept beside the resume state, so that every attempt of a run agrees; and for the machine, so that a busy moment does
    not make the next run compute other bits.
    """
    kept = work / "precision"
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if context.precision in names:
        context.environment["precision"] = context.precision
        return names[context.precision]
    if context.precision != "auto":
        raise unknown("precision", context.precision, {"auto", *names})
    context.environment["precision"] = ranks.agreed(lambda: _measured_precision(context, kept=kept))
    return names[context.environment["precision"]]


def _measured_precision(context: StageContext, *, kept: Path) -> str:
    if not kept.is_file():
        machine = machine_notes(threads=context.threads) / "precision"
        if not machine.is_file():
            gain = bfloat16_gain()
            name = "bfloat16" if gain >= PRECISION_GAIN else "float32"
            context.note(f"training in {name}: bfloat16 multiplies {gain:.1f}× as fast as float32 here")
            write_atomically(machine, name)
        write_atomically(kept, machine.read_text())
    return kept.read_text()


def bfloat16_gain() -> float:
    """How many times as fast as float32 this machine multiplies bfloat16, measured now."""
    return _gemm_seconds(torch.float32) / _gemm_seconds(torch.bfloat16)


def flop_per_token(model: Any) -> float:
    """Operations that a trained token needs: two a weight forward, two backward, two more where the weight learns.

    After Kaplan et al. 2020: attention's own products are left out, and so is the lookup of a token's row.
    """
    lookup = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is lookup
    weights = [p for p in model.parameters() if p.dim() > 1 and (tied or p is not lookup)]
    return float(sum((6 if p.requires_grad else 4) * p.numel() for p in weights))


def peak_flop_per_s(dtype: torch.dtype) -> float:
    """What the processes together do at most here: the rate of a large matrix product, measured."""
    size = 4096 if torch.cuda.is_available() else 1024
    return 2 * size**3 / _gemm_seconds(dtype, size=size) * ranks.world()


def _gemm_seconds(dtype: torch.dtype, *, size: int = 1024) -> float:
    """Best of three multiplications of two size × size matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        (matrix @ matrix).sum().item()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@contextmanager
def evaluating(model: Any, *, dtype: torch.dtype) -> Iterator[torch.device]:
    """Inference as training computes: evaluation mode, no gradients, the same autocast; training mode afterwards."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            yield device
    finally:
        model.train(training)


def check_loads(folder: Path) -> None:
    """Prove that Transformers knows the architecture and reads the tokenizer, without reading the weights."""
    quiet()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = load_tokenizer(folder)
    except (ValueError, KeyError, OSError) as error:
        raise FmopsError(f"the base model cannot be read: {error}. Name another.") from error
    if reads_pictures(folder):
        _check_eyes(folder)
    elif type(config) not in AutoModelForCausalLM._model_mapping:
        raise FmopsError(f"{config.model_type} is no causal language model. Name another base.")
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise FmopsError(f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}. They do not match.")


def _check_eyes(folder: Path) -> None:
    from fmops.adapters.eyes import Eyes, describe, knows_pictures

    if not knows_pictures(folder):
        raise FmopsError(f"{describe(folder)} reads pictures in a way that is not known here. Name another base.")
    try:
        Eyes(folder)
    except (ValueError, OSError, ImportError) as error:
        raise FmopsError(f"the base model's image processor cannot be read: {error}. Name another.") from error
