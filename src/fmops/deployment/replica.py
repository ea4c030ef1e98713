"""What one replica of a model needs on a cluster: accelerators, memory, how the model is cut over them.

Enters: a model's config.json and the bytes of its weights; the longest request. Leaves: a `Replica`.
Refuses: a model that no node of the pools holds. Memory in bytes; a rule of sizes, not a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from fmops.artifacts import Frozen
from fmops.errors import FmopsError

Device = Literal["gpu", "neuron"]
CONCURRENT = 8
"""Requests of the longest length whose keys and values must fit at once; shorter ones fit in larger numbers."""
SERVED_BYTES = 2
"""A weight in bfloat16, which vLLM takes for float32 as well."""
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
CPUS = 3
"""An accelerator's. The smallest nodes have 4, of which the kubelet and the daemon sets take some."""
OVERHEAD_BYTES = 2_000_000_000
"""Of an accelerator: activations, graphs, the runtime itself."""


@dataclass(frozen=True)
class Accelerator:
    """The smallest one that the pool's nodes have."""

    resource: str
    memory_bytes: float
    cores: int
    """Parts that a model is cut into on one of them."""
    most: int
    """How many of them a node of the pool has at most."""
    usable: float = 0.9


# GPUs: A10G and L4 (g5, g6) have 24 GB. Neuron: an Inferentia2 chip has two cores and 32 GB.
ACCELERATORS: dict[Device, Accelerator] = {
    "gpu": Accelerator("nvidia.com/gpu", 24e9, 1, 8),
    "neuron": Accelerator("aws.amazon.com/neuron", 32e9, 2, 12),
}


class Replica(Frozen):
    """One replica's share of a node."""

    device: Device
    accelerators: int
    parallel: int = Field(description="Tensor parallel size: the parts that every weight matrix is cut into.")
    cpu: int
    memory_gib: int
    max_tokens: int

    @property
    def resources(self) -> dict[str, dict[str, str]]:
        """As a container states them."""
        devices = {ACCELERATORS[self.device].resource: str(self.accelerators)}
        memory = f"{self.memory_gib}Gi"
        return {
            "requests": {"cpu": str(self.cpu), "memory": memory, **devices},
            "limits": {"memory": memory, **devices},
        }


def replica_for(config: Mapping[str, Any], *, weight_bytes: int, device: Device, max_tokens: int) -> Replica:
    """The fewest accelerators that hold the weights and the keys and values of `CONCURRENT` longest requests.

    A token's keys and values take 2 × layers × key-value heads × head width × 2 bytes. Tensor parallelism cuts both
    evenly, so the size must divide the attention heads.

    Raises:
        FmopsError: no node of the pool holds it; names the bytes.
    """
    # Of a model that also sees: keys and values are the language tower's.
    config = {**config, **config.get("text_config", {})}
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    token_bytes = (
        2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width * SERVED_BYTES
    )  # fmt: skip
    stored = WIDTHS.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), 4)
    weights = weight_bytes / stored * SERVED_BYTES
    needed = weights + CONCURRENT * max_tokens * token_bytes
    kind = ACCELERATORS[device]
    for count in range(1, kind.most + 1):
        parallel = count * kind.cores
        room = count * (kind.memory_bytes * kind.usable - OVERHEAD_BYTES)
        if heads % parallel == 0 and needed <= room:
            # Weights pass through the host's memory on their way.
            memory = 8 + -(-int(1.25 * weight_bytes) // 2**30)
            return Replica(
                device=device, accelerators=count, parallel=parallel, cpu=CPUS * count, memory_gib=memory,
                max_tokens=max_tokens,
            )  # fmt: skip
    raise FmopsError(
        f"the model needs {needed / 1e9:.0f} GB ({weights / 1e9:.0f} of weights, the rest for {CONCURRENT} requests of "
        f"{max_tokens} tokens), more than {kind.most} × {kind.memory_bytes / 1e9:.0f} GB hold, or its {heads} heads "
        "cannot be cut so. Lower serve.max_tokens, or add a larger pool to infra/platform/nodes."
    )
