"""What the pods of a stage ask for: nodes, devices, memory.

Enters: a stage, the model's shape and its work, the platform's facts. Leaves: a share: pods, and what each has.
Refuses: what no nodes of the platform hold, with what would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from fmops.errors import FmopsError
from fmops.frameworks import START_RANKS
from fmops.orchestration.deploy import Platform
from fmops.orchestration.execute import LAUNCHER, PROCESSES, TRAINING
from fmops.orchestration.launch import pinned_threads
from fmops.orchestration.project import THREADS
from fmops.orchestration.sizing import (
    GIB,
    STATE_BYTES,
    Instance,
    Shape,
    Training,
    Work,
    instances,
    layout,
    training,
    usable_devices,
)
from fmops.stage import STAGES

COMPUTES = (*TRAINING, "evaluate", "release")
"""Stages that run the model."""
RESOURCES = {"gpu": "nvidia.com/gpu", "neuron": "aws.amazon.com/neuron"}
FABRIC = "vpc.amazonaws.com/efa"
POOLS = {
    "gpu": {"g6": "gpu-inference", "g6e": "gpu-inference", "p4d": "gpu-training", "p5": "gpu-training"},
    "neuron": {"trn1": "neuron-training"},
}
"""The node pool that starts a family's instances (infra/platform/nodes); Kueue's flavour bears its name."""
FABRIC_POOLS = ("gpu-training",)
"""Whose nodes stand together with EFA between them, and whose devices Ray Train knows."""
VLLM = ("auto", "vllm")
"""Engines of a release that are vLLM where there is a GPU."""
WHOLE = ("llama-factory",)
"""Frameworks whose processes each hold the whole model and its state."""
LIBRARIES_GIB = 6
PROCESSORS = 8
"""Of a stage that computes without accelerators."""


@dataclass(frozen=True)
class Share:
    """What each pod of a stage asks for; a pod a node."""

    cpu: int
    memory_gib: int
    pool: str = "cpu"
    resource: str | None = None
    count: int = 0
    """Devices of each."""
    instance: str | None = None
    nodes: int = 1
    fabric: int = 0
    """EFA interfaces of each."""

    @property
    def processes(self) -> int:
        """One a device, on all nodes together."""
        return max(1, self.count) * self.nodes

    @property
    def threads(self) -> int:
        """Of each process."""
        return max(1, self.cpu // max(1, self.count))

    @property
    def resources(self) -> dict[str, dict[str, str]]:
        """As a container states them; memory and devices are limits, too."""
        fixed = {"memory": f"{self.memory_gib}Gi"}
        if self.resource:
            fixed[self.resource] = str(self.count)
        if self.fabric:
            fixed[FABRIC] = str(self.fabric)
        return {"requests": {"cpu": str(self.cpu), **fixed}, "limits": fixed}

    @property
    def environment(self) -> dict[str, str]:
        """Threads are stated: a pod sees every core of its node, and weights are equal only at an equal number."""
        found = pinned_threads(self.threads) | {THREADS: str(self.threads)}
        if self.processes > 1:
            found[PROCESSES] = str(self.processes)
        if self.nodes > 1:
            # Karpenter knows no huge pages; EFA works without.
            found |= {LAUNCHER: "ray", "FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0"}
        return found


def share_of(
    stage: str, *, shape: Shape | None, work: Work | None, framework: str | None = None, platform: Platform
) -> Share:
    """The cheapest accelerators that hold a stage where the profile has some, else processors.

    Training in ranks shards the model over the devices of one node, or of several where one does not hold it; other
    training has one device, and what does not compute on devices has none.

    Args:
        shape: of the model; None before it is known (import).
        work: of a training stage; other stages only read the model.
        framework: that trains, where the stage has a choice; of a release the engine that must agree.

    Raises:
        FmopsError: no nodes of the platform hold it, or its ranks would want files that they cannot share.
    """
    size = (shape.parameters if shape else 1_000_000_000) / GIB
    if stage not in COMPUTES:
        # Curation holds a few hundred MB however large the corpus is; import holds the model in 32 bits.
        return Share(cpu=4, memory_gib=ceil(8 + (6 * size if stage == "import" else 0)))
    if shape is None or not _uses_devices(stage, framework, platform.profile):
        return _processors(size, work)
    asked = work or Work(tokens=1, sequence=1024, batch_tokens=1024, lora=True)
    best = _cheapest(stage, shape, asked, framework=framework, platform=platform)
    if best is None and stage == "release" and framework != "vllm":
        return _processors(size, work)
    if best is None:
        raise _refused(stage, shape, framework=framework, platform=platform)
    if best.nodes > 1 and not platform.shared_files:
        raise FmopsError(
            f"{stage} with {shape.parameters / 1e9:.1f} B parameters takes {best.nodes} × {best.on.name}, whose "
            f"processes share files, and {platform.cluster} has no file system for them. Set `lustre` in infra/cluster "
            "(`make plan`, `make apply`, `make platform-values`), or train an adapter (`lora`)."
        )
    return _of(best, size, work=asked, framework=framework, platform=platform)


def _uses_devices(stage: str, framework: str | None, profile: str) -> bool:
    """Whether the stage's code computes on them: the scorer does not, and a release only if vLLM answers for it."""
    if stage in TRAINING:
        return profile in RESOURCES
    return stage == "release" and profile == "gpu" and framework in VLLM


def _processors(size: float, work: Work | None) -> Share:
    state = STATE_BYTES if work and not work.lora else 6
    return Share(cpu=PROCESSORS, memory_gib=ceil(LIBRARIES_GIB + state * size))


def _kinds(profile: str) -> list[Instance]:
    return [each for name, each in instances().items() if name.partition(".")[0] in POOLS[profile]]


def _cheapest(stage: str, shape: Shape, work: Work, *, framework: str | None, platform: Platform) -> Training | None:
    """On the fewest nodes that hold it; further nodes only where Ray Train starts the ranks."""
    several = STAGES[stage].in_ranks and framework not in START_RANKS
    for nodes in [2**power for power in range(10 if several else 1)]:
        fits = [
            found
            for each in _kinds(platform.profile)
            if _may_have(each, nodes, platform)
            for found in _held(stage, shape, work, each, nodes=nodes, framework=framework)
        ]
        if fits:
            return min(fits, key=lambda found: found.dollars)
    return None


def _may_have(on: Instance, nodes: int, platform: Platform) -> bool:
    """Whether the pool of `on` may hold so many; one node is left to the queue."""
    pool = POOLS[platform.profile][on.name.partition(".")[0]]
    return nodes == 1 or (pool in FABRIC_POOLS and on.efa > 0 and nodes * on.vcpu <= platform.pools.get(pool, 0))


def _held(
    stage: str, shape: Shape, work: Work, on: Instance, *, nodes: int, framework: str | None
) -> Iterator[Training]:
    """Layouts on so many nodes that these stages can train and whose hosts load the model."""
    for devices in usable_devices(on, nodes) if STAGES[stage].in_ranks else [1]:
        found = training(shape, work, on, nodes=nodes, devices=devices)
        # LLaMA-Factory holds the model whole in each process, the others shard it; neither tensor nor pipeline
        # parallelism is part of these stages.
        if framework in WHOLE and layout(shape, work, on, devices=1) is None:
            continue
        if found and found.layout.tensor == found.layout.pipeline == 1:
            size = shape.parameters / GIB
            needed = _host_gib(size, ranks=devices // nodes, gang=devices, lora=work.lora, framework=framework)
            if needed <= _host_room_gib(on):
                yield found


def _of(found: Training, size: float, *, work: Work, framework: str | None, platform: Platform) -> Share:
    on, devices = found.on, found.layout.devices // found.nodes
    part = devices / on.devices
    needed = _host_gib(size, ranks=devices, gang=found.layout.devices, lora=work.lora, framework=framework)
    return Share(
        cpu=max(1, int(part * (on.vcpu - 1))), memory_gib=int(max(part * _host_room_gib(on), needed)),
        pool=POOLS[platform.profile][on.name.partition(".")[0]], resource=RESOURCES[platform.profile], count=devices,
        instance=on.name, nodes=found.nodes, fabric=on.efa if found.nodes > 1 else 0,
    )  # fmt: skip


def _refused(stage: str, shape: Shape, *, framework: str | None, platform: Platform) -> FmopsError:
    names = ", ".join(each.name for each in _kinds(platform.profile))
    where, remedy = "one device", "Train an adapter (`lora`), or shorten its sequences."
    if stage == "release":
        remedy = "Set serve.engine to transformers or openvino, which answer on processors."
    elif STAGES[stage].in_ranks and framework in START_RANKS:
        where = "one node"
        remedy += f" {framework} starts its own processes, on one node alone; our own trainers go over several."
    elif STAGES[stage].in_ranks:
        rooms = [f"{name}: {platform.pools[name]} vCPU" for name in FABRIC_POOLS if name in platform.pools]
        where = f"one node, nor on the nodes of a pool with EFA ({', '.join(rooms) or 'it has none'}),"
    return FmopsError(
        f"{stage} with {shape.parameters / 1e9:.1f} B parameters fits on {where} of none of {names}. {remedy}"
    )


def _host_gib(size: float, *, ranks: int, gang: int, lora: bool, framework: str | None) -> float:
    """Of a host's memory: the model that its ranks load, in 32 bits, and the state that the first one gathers.

    Our own trainers and LLaMA-Factory load the whole model in each rank. torchtitan reads each rank's shard from the
    files; the stage beside it holds the model, to measure it before and after.
    """
    loaded = 4 * size * (1 if framework == "torchtitan" else ranks)
    beside = 4 * size if framework in START_RANKS else 0.0
    return LIBRARIES_GIB + loaded + beside + (12 * size if gang > 1 and not lora else 0)


def _host_room_gib(on: Instance) -> float:
    """Of a node's memory for pods: without what the hypervisor and the kubelet keep, and the DaemonSets' pods."""
    return 0.9 * on.host_gib - 2
