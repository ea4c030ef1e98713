"""A model in shards, one a process (FSDP2), and whole again.

Enters: a model with plain parameters, a process group. Leaves: the same model in shards; its tensors whole.
Refuses: a form of its own on disk: resume states and artifacts are those of one process, so any number reads them.

Gathering goes tensor by tensor through the device; the whole is in host memory. Models for which that is too much want
states in shards (torch.distributed.checkpoint), which FMOps does not write (docs/design/0016-past-one-process.md).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fmops.adapters import ranks
from fmops.errors import unknown

SHARDINGS = ("auto", "ddp", "fsdp2")
TRAINED_BYTES = 16
"""Weight, gradient and two moments of a parameter in float32."""
FILLED = 0.6
"""Share of the memory that whole copies may take; activations want the rest."""


def shard(model: Any, how: str) -> Any:
    """Split `model` over the processes where `how` asks for it, or `auto` finds that whole copies would not fit.

    Whole copies (`ddp`) exchange gradients alone; shards exchange weights, too, and are slower where both fit.
    """
    if how not in SHARDINGS:
        raise unknown("sharding", how, SHARDINGS)
    if ranks.world() == 1 or how == "ddp" or (how == "auto" and _fits(model)):
        return model
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (ranks.world(),))
    layers = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _mark(model, sharded=True)
    return model


def _mark(model: Any, *, sharded: bool) -> None:
    """Transformers' own mark of such a model: its Trainer then neither wraps nor moves it."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    bare._is_distributed_loading_by_transformers = sharded


def _fits(model: Any) -> bool:
    parameters = list(model.parameters())
    wanted = sum(p.numel() * (TRAINED_BYTES if p.requires_grad else p.element_size()) for p in parameters)
    if torch.cuda.is_available():
        return bool(wanted < FILLED * torch.cuda.mem_get_info()[1])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return bool(wanted * here < FILLED * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, in shards or not. Every rank must ask."""
    if isinstance(tensor, DTensor):
        full: torch.Tensor = tensor.full_tensor()
        return full
    return tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    if isinstance(tensor, DTensor):
        part: torch.Tensor = tensor.to_local()
        return part
    return tensor


def like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """`value`, which every rank has whole, in the same shards as `model`."""
    if isinstance(model, DTensor) and value.shape == model.shape:
        moved = value.to(model.device)
        return distribute_tensor(moved, model.device_mesh, model.placements, src_data_rank=None)
    return value


def settle(model: Any) -> None:
    """After a forward without backward: let go of the weights that were gathered for it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(model: Any) -> dict[str, torch.Tensor] | None:
    """Every parameter whole, by name, on the first rank; None where the model is not in shards."""
    if not is_sharded(model):
        return None
    settle(model)
    found = {}
    for name, parameter in model.named_parameters():
        full = whole(parameter.detach())
        if ranks.rank() == 0:
            found[name] = full.cpu()
    return found


def whole_optimizer(optimizer: Any) -> dict[str, Any] | None:
    """Its state as one process would save it, on the first rank, in the host's memory: no device holds all moments."""
    state = optimizer.state_dict()
    found: dict[int, dict[str, Any]] = {}
    for index, moments in state["state"].items():
        full = {key: whole(value).cpu() if torch.is_tensor(value) else value for key, value in moments.items()}
        if ranks.rank() == 0:
            found[index] = full
    return None if ranks.rank() else {**state, "state": found}


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Give `optimizer` a state that one process would save, in the shards of its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {
        index: {
            key: like(value, parameters[index]) if torch.is_tensor(value) else value for key, value in moments.items()
        }
        for index, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": placed})


def load_weights(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Give the trained parameters of a model in shards a file's values; PEFT's files leave the adapter's name out."""
    settle(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                value = state[name if name in state else name.replace(".default.", ".")]
                parameter.copy_(like(value, parameter))


def made_whole(model: Any) -> Any:
    """The same model in plain parameters in every rank's host memory, which held it when it was loaded.

    It is not trained any more; a device need not hold it whole.
    """
    if not is_sharded(model):
        return model
    settle(model)
    done: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                # Tied weights stay one parameter.
                if id(parameter) not in done:
                    full = whole(parameter.detach()).cpu()
                    done[id(parameter)] = torch.nn.Parameter(full, parameter.requires_grad)
                module._parameters[name] = done[id(parameter)]
        if isinstance(module, FSDPModule):
            # `fully_shard` gave it a class of its own, whose second base is the plain one.
            plain: Any = module
            plain.__class__ = type(module).__bases__[1]
            for hooks in (plain._forward_pre_hooks, plain._forward_hooks, plain._state_dict_pre_hooks):
                hooks.clear()
    _mark(model, sharded=False)
    return model
