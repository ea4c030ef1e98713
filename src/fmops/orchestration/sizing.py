"""What a model needs on accelerators: memory, devices, time and dollars, from its shape and the data.

Enters: a model's shape, instances, tokens. Leaves: layouts, hours, checkpoint intervals, replicas.
Refuses: shapes it has no formula for. Pure functions; docs/sizing.md derives each formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import ceil, exp, sqrt
from typing import Any

from pydantic import Field
from yaml import safe_load

from fmops.artifacts import Frozen
from fmops.errors import FmopsError, unknown

GIB = 2**30
USABLE = 0.9
"""Share of a device's memory that tensors may take; the rest is context, fragments and collectives' buffers."""
GPU_MFU = 0.40
"""Of published dense pretraining on A100 and H100 (docs/sizing.md lists them); what a well-chosen layout reaches."""
STATE_BYTES = 16
"""A parameter under Adam: weight and gradient 4, moments 8; or, in mixed precision, 2, 2, a master copy 4, and 8."""
FROZEN_BYTES = 4
"""A weight that is only read: our adapters keep it in 32 bits and compute in 16."""
DEVICE_FAILURE_H = 16_384 * 54 * 24 / 419
"""Hours between the unexpected interruptions of one device: 419 in 54 days on 16,384 (Llama 3, section 3.3.4)."""
DRAIN_GB_S = 10.0
"""A device's memory to its host's: an asynchronous checkpoint stops the training only for this."""
RESTART_S = 600.0
"""From a failure to training again: notice, a node that is ready, weights read."""
DECODE_EFFICIENCY = 0.6
"""Share of the memory bandwidth that decoding reaches."""


class Shape(Frozen):
    """A dense decoder, as far as cost goes."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read a Hugging Face `config.json`.

        Raises:
            FmopsError: a mixture of experts, or a config without the sizes.
        """
        experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
        if experts:
            raise FmopsError(f"{config.get('model_type')} has {experts} experts; only dense models are sized.")
        try:
            heads = config["num_attention_heads"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                feed_forward=config["intermediate_size"],
                heads=heads,
                key_heads=config.get("num_key_value_heads") or heads,
                head_size=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise FmopsError(
                f"config.json of a {config.get('model_type')} names no {error}, so it is not sized."
            ) from None

    @property
    def embedding(self) -> int:
        """Parameters of one embedding matrix."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; norms and biases, far below a thousandth, are left out."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward) + self.embedding * (
            1 if self.tied else 2
        )

    def training_flops(self, sequence: int, *, lora: bool = False) -> float:
        """Floating-point operations a token: 6 for each weight in a matrix product, and causal attention's.

        LoRA needs no gradient of the frozen weights: 4 instead of 6.
        """
        products = self.parameters - (0 if self.tied else self.embedding)
        attention = 6 * self.layers * self.heads * self.head_size * sequence
        return float((4 if lora else 6) * products + attention)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, a token, in 16 bits."""
        return 2 * 2 * self.layers * self.key_heads * self.head_size


class Instance(Frozen):
    """A kind of node."""

    name: str
    device: str
    devices: int
    peak_tflops: float = Field(description="Dense bfloat16, each device.")
    memory_gib: float
    memory_gb_s: float
    network_gb_s: float
    vcpu: int
    host_gib: int = Field(description="Of the node itself.")
    dollars_per_hour: float
    efa: int = Field(0, description="Interfaces of its fabric that pods may ask for.")
    mfu: float = GPU_MFU
    trains: bool = True

    @property
    def flops(self) -> float:
        """Sustained training arithmetic of one device, a second."""
        return self.peak_tflops * 1e12 * self.mfu

    @property
    def room(self) -> float:
        """Bytes of one device that tensors may take."""
        return self.memory_gib * GIB * USABLE


@cache
def instances() -> dict[str, Instance]:
    """The packaged table, by name."""
    table = safe_load(files("fmops.orchestration").joinpath("devices.yaml").read_text("utf-8"))
    return {name: Instance(name=name, **row) for name, row in table.items()}


def instance(name: str) -> Instance:
    """One of the table.

    Raises:
        FmopsError: there is no such name; lists those there are.
    """
    if name not in instances():
        raise unknown("instance", name, instances())
    return instances()[name]


@dataclass(frozen=True)
class Work:
    """A training stage."""

    tokens: float
    sequence: int
    batch_tokens: int
    lora: bool = False

    @property
    def sequences(self) -> int:
        """In a batch; no more replicas than these can share it."""
        return max(1, self.batch_tokens // self.sequence)


@dataclass(frozen=True)
class Layout:
    """How a model lies on devices: replicas of tensor × pipeline groups; weights and state are sharded over all."""

    tensor: int
    pipeline: int
    replicas: int
    bytes_per_device: float

    @property
    def devices(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline * self.replicas


def memory(shape: Shape, work: Work, *, tensor: int, pipeline: int, replicas: int) -> float:
    """Bytes of one device with one sequence a micro-batch and every layer computed again backwards.

    State, sharded over all; two layers gathered; the inputs of each layer; one layer's workings (34 numbers a hidden
    unit: Korthikanti et al. 2022, with sequence parallelism). Logits are never whole: the loss is fused.
    """
    group = tensor * pipeline
    state = FROZEN_BYTES if work.lora else STATE_BYTES
    layer = (shape.parameters - shape.embedding) / shape.layers
    gathered = 2 * 2 * (layer + shape.embedding / shape.layers) / tensor if replicas > 1 else 0.0
    inputs = 2 * work.sequence * shape.hidden * shape.layers / tensor
    workings = 34 * work.sequence * shape.hidden / tensor
    return state * shape.parameters / (group * replicas) + gathered + inputs + workings


def layout(shape: Shape, work: Work, on: Instance, *, devices: int) -> Layout | None:
    """The layout with the fewest devices to a replica that fits on exactly `devices`; None when none does.

    Data parallel first, since it communicates least; then tensor parallel inside a node; then pipeline. A replica must
    also have enough tokens a pass to hide the gathering of weights behind its arithmetic (docs/sizing.md).
    """
    for pipeline in (1, 2, 4, 8, 16):
        for tensor in (1, 2, 4, 8):
            group = tensor * pipeline
            if tensor > on.devices or devices % group or shape.layers < pipeline or shape.key_heads < tensor:
                continue
            replicas = devices // group
            if replicas > work.sequences:
                continue
            hidden = (
                replicas == 1 or devices <= on.devices or work.sequence * _passes(work, replicas) >= _least_tokens(on)
            )
            needed = memory(shape, work, tensor=tensor, pipeline=pipeline, replicas=replicas)
            if hidden and needed <= on.room:
                return Layout(tensor, pipeline, replicas, needed)
    return None


def _passes(work: Work, replicas: int) -> int:
    return max(1, work.sequences // replicas)


def _least_tokens(on: Instance) -> float:
    """Of a replica's step whose arithmetic takes as long as the weights' way: 3 times 2 bytes, 6 operations a token."""
    return on.flops / (on.network_gb_s * 1e9)


@dataclass(frozen=True)
class Training:
    """A stage on so many nodes of one kind."""

    on: Instance
    nodes: int
    layout: Layout
    hours: float
    """Wall time, failures and checkpoints included."""
    tokens_per_s: float
    """While it computes."""
    goodput: float
    checkpoint_every_s: float

    @property
    def dollars(self) -> float:
        """Of the nodes alone."""
        return self.hours * self.nodes * self.on.dollars_per_hour


def training(
    shape: Shape, work: Work, on: Instance, *, nodes: int | None = None, devices: int | None = None
) -> Training | None:
    """Size a stage; without `nodes`, on the fewest that hold it. None when no layout fits.

    Args:
        devices: so many of one node, no more and no fewer.
    """
    for count in [nodes] if nodes else [2**power for power in range(12)]:
        for used in [devices] if devices else usable_devices(on, count):
            found = layout(shape, work, on, devices=used)
            if found:
                return _timed(shape, work, on, found, nodes=count)
    return None


def usable_devices(on: Instance, nodes: int = 1) -> list[int]:
    """Devices to try on so many nodes: all, and on a single node also fewer, down to one."""
    if nodes > 1:
        return [nodes * on.devices]
    return [on.devices // 2**power for power in range(on.devices.bit_length()) if on.devices % 2**power == 0]


def _timed(shape: Shape, work: Work, on: Instance, found: Layout, *, nodes: int) -> Training:
    rate = found.devices * on.flops / shape.training_flops(work.sequence, lora=work.lora)
    # Stages of a pipeline wait at both ends of a step (Narayanan et al. 2021, without interleaving).
    rate *= _passes(work, found.replicas) / (_passes(work, found.replicas) + found.pipeline - 1)
    between_s = DEVICE_FAILURE_H * 3600 / found.devices
    state = (FROZEN_BYTES if work.lora else STATE_BYTES) * shape.parameters / found.devices
    stop_s = max(1.0, state / (DRAIN_GB_S * 1e9))
    every_s = young_daly(stop_s, between_s)
    good = goodput(every_s, checkpoint_s=stop_s, between_failures_s=between_s, restart_s=RESTART_S)
    return Training(on, nodes, found, work.tokens / rate / good / 3600, rate, good, every_s)


def young_daly(checkpoint_s: float, between_failures_s: float) -> float:
    """Seconds of work between checkpoints that lose least (Young 1974; Daly 2006, first order)."""
    return sqrt(2 * checkpoint_s * between_failures_s)


def goodput(every_s: float, *, checkpoint_s: float, between_failures_s: float, restart_s: float) -> float:
    """Share of the time that ends in the model, when failures come at random (Daly 2006, equation 13).

    A segment of work with its checkpoint counts only if no failure falls into it; each failure also costs a restart.
    """
    segment = every_s + checkpoint_s
    expected = between_failures_s * exp(restart_s / between_failures_s) * (exp(segment / between_failures_s) - 1)
    return every_s / expected


@dataclass(frozen=True)
class Load:
    """What users ask of an endpoint."""

    requests_per_s: float
    prompt_tokens: int = 512
    answer_tokens: int = 256
    token_s: float = 0.05
    """Longest time between two tokens of an answer that they accept."""


@dataclass(frozen=True)
class Serving:
    """Replicas of a model on one kind of node."""

    on: Instance
    tensor: int
    slots: int
    """Answers under way in a replica."""
    requests_per_s: float
    """Of one replica."""
    replicas: int

    @property
    def nodes(self) -> int:
        """That hold the replicas."""
        return ceil(self.replicas / max(1, self.on.devices // self.tensor))

    @property
    def dollars_per_hour(self) -> float:
        """While all of them run."""
        return self.nodes * self.on.dollars_per_hour


def serving(shape: Shape, load: Load, on: Instance) -> Serving | None:
    """Size an endpoint with 16-bit weights; None when no node holds the model, or none answers in time.

    A step reads the weights and every answer's keys and values once; prompts take arithmetic away from it.
    """
    weights = 2.0 * shape.parameters
    held = shape.cache_bytes * (load.prompt_tokens + load.answer_tokens)
    for tensor in (size for size in (1, 2, 4, 8) if size <= on.devices and size <= shape.key_heads):
        room = tensor * on.room - weights
        bandwidth = tensor * on.memory_gb_s * 1e9 * DECODE_EFFICIENCY
        prompt_s = 2 * shape.parameters * load.prompt_tokens / (tensor * on.flops)
        slots = min(int(room // held), 256)
        # An answer's share of each step's time goes to the prompts that come meanwhile.
        while slots > 0 and _step_s(slots, weights, held, bandwidth, prompt_s, load) > load.token_s:
            slots -= max(1, slots // 16)
        if slots > 0:
            rate = slots / (load.answer_tokens * _step_s(slots, weights, held, bandwidth, prompt_s, load))
            return Serving(on, tensor, slots, rate, ceil(load.requests_per_s / rate))
    return None


def _step_s(slots: int, weights: float, held: float, bandwidth: float, prompt_s: float, load: Load) -> float:
    return (weights + slots * held) / bandwidth + slots / load.answer_tokens * prompt_s
