"""Nodes that fail and come back, and the jobs that hold them: what kube-scheduler and Karpenter do in a simulation.

Enters: a cluster, jobs that Kueue has admitted. Leaves: who has which nodes, and when they are ready.
Refuses: nothing; what is not there is not given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, inf
from random import Random
from statistics import NormalDist

from fmops.orchestration.sizing import DEVICE_FAILURE_H, RESTART_S

DEVICES = 8
"""Of a node."""
EMPTY_S = 600.0
"""Karpenter ends an empty node (consolidateAfter of infra/platform/nodes)."""
LAUNCH_SIGMA = 0.25
NORMAL = NormalDist()
PRIORITIES = LOOP, RUN, URGENT = 100, 200, 1000
SERVING = 10_000
"""Kueue's priorities (infra/platform/queues); serving is in no queue."""


@dataclass(frozen=True)
class Cluster:
    """Nodes, and how long things take."""

    nodes: int
    repair_h: float = 24.0
    """Until a failed node's place can be launched again."""
    launch_s: float = 360.0
    """Median from Karpenter's call to a ready node; log-normal with LAUNCH_SIGMA."""
    restart_s: float = RESTART_S
    """From ready nodes to the first step, at every start."""
    checkpoint_s: float = 5.0
    """Stop of a training for one resume state."""
    device_failure_h: float = DEVICE_FAILURE_H


@dataclass(eq=False, slots=True)
class Job:
    """A workload; serving is one without end, outside of the queue."""

    number: int
    kind: str
    team: str
    priority: int
    devices: int
    work_s: float
    arrived: float
    # What follows changes.
    queue: str = ""
    stamp: float = 0.0
    kept_s: float = 0.0
    held: int = 0
    missing: int = 0
    spot: int | None = None
    ready: float = 0.0
    begins: float = inf
    since: float = 0.0
    admitted: float = 0.0
    epoch: int = 0
    backoffs: int = 0
    first_wait_s: float | None = None

    @property
    def nodes(self) -> int:
        """Whole ones; 0 where a part of one suffices."""
        return self.devices // DEVICES if self.devices % DEVICES == 0 else 0

    @property
    def serves(self) -> bool:
        return self.work_s == inf and self.priority == SERVING

    def __lt__(self, other: Job) -> bool:
        return (-self.priority, self.stamp, self.number) < (-other.priority, other.stamp, other.number)


class Nodes:
    """All nodes of a cluster: free, shared by small jobs, held whole by gangs (who count theirs), in repair."""

    def __init__(self, cluster: Cluster, *, placeheld: int, packed: bool, launches: Random) -> None:
        """Nothing runs yet.

        Args:
            placeheld: so many free nodes are kept running.
            packed: small jobs go to the fullest node that holds them, else to the emptiest.
        """
        self.cluster, self.launches, self.placeheld, self.packed = cluster, launches, placeheld, packed
        self._free: deque[list[float]] = deque([[-inf, cluster.nodes]])
        """Since when, and how many; the newest last."""
        self.whole, self.dead = cluster.nodes, 0
        self.parts: dict[int, int] = {}
        """Devices that are free on a node which small jobs share."""
        self._tenants: dict[int, set[Job]] = {}
        self._named = 0

    def take(self, count: int, *, now: float) -> float:
        """So many whole nodes, those that run first; returns when the last of them is ready."""
        warm = self._remove(count, now, newest=True)
        cold = count - max(warm, min(count, self.placeheld, self.whole))
        self.whole -= count
        if cold <= 0:
            return now
        # The slowest of so many log-normal launches, by one draw.
        slowest = NORMAL.inv_cdf(min(max(self.launches.random(), 1e-12) ** (1 / cold), 1 - 1e-12))
        return now + self.cluster.launch_s * exp(LAUNCH_SIGMA * slowest)

    def _remove(self, count: int, now: float, *, newest: bool) -> int:
        """From the free ones; returns how many of them ran."""
        warm, end = 0, -1 if newest else 0
        while count:
            since, there = self._free[end]
            used = min(count, int(there))
            warm += used if since > now - EMPTY_S else 0
            count -= used
            self._free[end][1] -= used
            if used == there:
                self._free.pop() if newest else self._free.popleft()
        return warm

    def give(self, count: int, *, now: float) -> None:
        """Whole nodes back."""
        if count:
            self._free.append([now, count])
            self.whole += count

    def place(self, job: Job, *, now: float) -> float | None:
        """A small job's part of a node; when that is ready, or None."""
        ready, choices = now, [node for node, left in self.parts.items() if left >= job.devices]
        empty = self.whole and self._free[-1][0] > now - EMPTY_S
        if not choices or (empty and not self.packed):
            if not self.whole:
                return None
            ready = self.take(1, now=now)
            self._named += 1
            node = self._named
            self.parts[node], self._tenants[node] = DEVICES, set()
        else:
            node = (min if self.packed else max)(choices, key=lambda each: (self.parts[each], -each))
        self.parts[node] -= job.devices
        self._tenants[node].add(job)
        job.spot = node
        return ready

    def leave(self, job: Job, *, now: float) -> None:
        """What a job held."""
        if job.nodes:
            self.give(job.held, now=now)
        elif job.spot is not None:
            self._tenants[job.spot].remove(job)
            self.parts[job.spot] += job.devices
            if not self._tenants[job.spot]:
                del self.parts[job.spot], self._tenants[job.spot]
                self.give(1, now=now)
        job.held, job.spot, job.missing = 0, None, 0

    def fail(self, pick: float, running: Iterable[Job], *, now: float) -> list[Job] | None:
        """Node number `pick` is lost; returns whose it was, or None if it is in repair already."""
        if pick < self.dead:
            return None
        pick, hit = pick - self.dead, list[Job]()
        self.dead += 1
        if pick < self.whole:
            self._remove(1, now, newest=False)
            self.whole -= 1
            return hit
        pick -= self.whole
        if pick < len(self.parts):
            node = list(self.parts)[int(pick)]
            del self.parts[node]
            return sorted(self._tenants.pop(node))
        pick -= len(self.parts)
        for job in running:
            if pick < job.held:
                return [job]
            pick -= job.held
        raise RuntimeError(f"{pick:.0f} nodes are neither free, held nor in repair.")

    def repaired(self) -> None:
        """Its place can be launched again."""
        self.dead -= 1
        self._free.appendleft([-inf, 1])
        self.whole += 1
