"""Many jobs on one cluster: the queue as infra/platform configures it, nodes that fail, and where device-hours go.

Enters: jobs with their times of arrival, a cluster, a policy. Leaves: device-seconds by what they were spent on, waits.
Refuses: a quota beyond the cluster, and what must never happen: a device-hour counted twice or not at all, a queue past
its quota, a gang that runs short of a node.

Discrete events. Kueue decides by quota alone: heads by priority, then time; preemption of lower priorities, reclaim in
a cohort, eviction of what is not ready in time, with backoff. Nodes are found afterwards, as kube-scheduler and
Karpenter find them. docs/sizing.md lists what is assumed.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, inf
from random import Random
from typing import Any

from benchmarks.nodes import DEVICES, PRIORITIES, Cluster, Job, Nodes
from fmops.orchestration.ray_jobs import GRACE_S
from fmops.orchestration.sizing import young_daly

READY_S, BACKOFF_S, BACKOFF_MOST_S, BACKOFFS = 1200.0, 60.0, 1800.0, 10
"""waitForPodsReady of infra/platform/apps/values/kueue.yaml; its recoveryTimeout is by default the same 20 minutes."""
HELD = ("served", "work", "lost", "checkpoints", "starting", "waiting for nodes")
FREE = ("fragments", "too few for who waits", "spare", "no demand", "in repair")
Happening = Callable[[Any, int], None]


@dataclass(frozen=True)
class Policy:
    """What an operator can choose; the defaults are the platform's."""

    name: str = "as configured"
    quotas: tuple[tuple[str, int], ...] = ()
    """Nodes of each team's queue; empty: one queue for all, with what serving leaves."""
    borrowing: bool = False
    """The queues are one cohort: what one leaves is lent, and reclaimed by preemption."""
    preemption: bool = True
    strict: bool = False
    """StrictFIFO: who does not fit holds up all behind him."""
    spares: int = 0
    """Nodes held out of the quota, so that a lost node is replaced at once."""
    warm: bool = True
    """The spare ones are kept running by placeholders; else Karpenter ends them and has to launch them again."""
    packed: bool = False
    """Small jobs go to the fullest node that holds them; kube-scheduler's default is the emptiest."""


@dataclass
class Outcome:
    """What one simulated time came to."""

    seconds: dict[str, float]
    """Device-seconds by HELD and FREE; they add up to all there were."""
    jobs: list[Job]
    counts: Counter[str]


class Simulation:
    """One run. `simulate` is how it is called."""

    def __init__(
        self, cluster: Cluster, policy: Policy, jobs: Iterable[Job], *, end: float, seed: int, measured_from: float
    ) -> None:
        self.cluster, self.policy, self.end, self.now = cluster, policy, end, 0.0
        self.measured_from = measured_from
        self.failures = Random(f"failures {seed}")
        self.jobs = list(jobs)
        for job in self.jobs:
            job.queue = job.team if policy.quotas else ""
        serving = sum(job.nodes for job in self.jobs if job.serves)
        left = cluster.nodes - serving - policy.spares
        quotas = dict(policy.quotas) or {"": left}
        if sum(quotas.values()) > left:
            raise ValueError(f"quotas of {sum(quotas.values())} nodes, and {left} there are after serving and spares.")
        self.quota = {queue: nodes * DEVICES for queue, nodes in quotas.items()}
        self.used = dict.fromkeys(quotas, 0)
        self.queues: dict[str, list[Job]] = {queue: [] for queue in quotas}
        self.nodes = Nodes(
            cluster, placeheld=policy.spares if policy.warm else 0, packed=policy.packed,
            launches=Random(f"launches {seed}"),
        )  # fmt: skip
        self.held_by: Counter[tuple[str, int]] = Counter()
        """Devices by queue and priority."""
        self.running: dict[Job, None] = {}
        self.lacking: list[Job] = []
        self.events: list[tuple[float, int, Happening, Job | None, int]] = []
        self.seconds = dict.fromkeys(HELD + FREE, 0.0)
        self.counts: Counter[str] = Counter()
        self.number = 0
        self.freed = False

    def run(self) -> Outcome:
        """From an empty cluster to the end."""
        for job in self.jobs:
            self._at(job.arrived, self._arrive, job)
        self._at(self.measured_from, self._measure, None)
        rate = self.cluster.nodes * DEVICES / (self.cluster.device_failure_h * 3600)
        failure = self.failures.expovariate(rate) if rate else inf
        while self.events or failure < self.end:
            at = min(failure, self.events[0][0] if self.events else inf)
            if at >= self.end:
                break
            self._pass_time(at)
            if failure == at:
                self._fail()
                failure = at + self.failures.expovariate(rate)
            else:
                _, _, what, job, epoch = heapq.heappop(self.events)
                what(job, epoch)
            while self.freed:
                self.freed = False
                self._serve_lacking()
                self._schedule()
        self._pass_time(self.end)
        for job in self.running:
            self._settle(job, loses=False)
        span_s = self.end - self.measured_from
        require_conserved(self.seconds, devices=self.cluster.nodes * DEVICES, span_s=span_s)
        return Outcome(self.seconds, self.jobs, self.counts)

    # -- events --------------------------------------------------------------------------------------------------------

    def _at(self, time: float, what: Happening, job: Job | None, epoch: int = 0) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, what, job, epoch))

    def _arrive(self, job: Job, _: int) -> None:
        job.stamp = self.now
        if job.serves:
            self._admit(job)
            return
        insort(self.queues[job.queue], job)
        if not self.policy.strict or self.queues[job.queue][0] is job:
            self._try(job)

    def _measure(self, _: Job | None, __: int) -> None:
        """What came before, the filling of an empty cluster, is not told."""
        for job in self.running:
            self._settle(job, loses=False)
            if job.work_s == inf:
                job.kept_s = 0.0
            elif not job.missing and job.begins <= self.now:
                # Its segments begin anew with the account.
                job.epoch += 1
                self._at(self.now + self._duration(job), self._finish, job, job.epoch)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.counts.clear()

    def _return(self, job: Job, _: int) -> None:
        """After its backoff."""
        insort(self.queues[job.queue], job)
        self.freed = True

    def _finish(self, job: Job, epoch: int) -> None:
        if epoch != job.epoch:
            return
        self._settle(job, loses=False)
        if abs(job.kept_s - job.work_s) > 1e-3:
            raise RuntimeError(
                f"{job.kind} {job.number} ended with {job.kept_s:.1f} s of its {job.work_s:.1f} s of work."
            )
        self._leave(job)
        self.counts["finished"] += 1

    def _late(self, job: Job, epoch: int) -> None:
        """Not all pods are ready in time: Kueue takes the quota back, and the gang waits longer each time."""
        if epoch != job.epoch or (not job.missing and job.ready <= self.now):
            return
        self._settle(job, loses=False)
        self._leave(job)
        self.counts["evicted"] += 1
        job.backoffs += 1
        if job.backoffs > BACKOFFS:
            self.counts["given up"] += 1
            return
        job.stamp = self.now
        self._at(self.now + min(BACKOFF_S * 2 ** (job.backoffs - 1), BACKOFF_MOST_S), self._return, job)

    def _repaired(self, _: Job | None, __: int) -> None:
        self.nodes.repaired()
        self.freed = True

    def _fail(self) -> None:
        """One node, any of them; one that is in repair does not fail again."""
        hit = self.nodes.fail(self.failures.random() * self.cluster.nodes, self.running, now=self.now)
        if hit is None:
            return
        self.counts["failures"] += 1
        self._at(self.now + self.cluster.repair_h * 3600, self._repaired, None)
        for job in hit:
            # The work since its last state is gone; its other nodes wait for another one.
            self._settle(job, loses=True)
            job.held, job.spot = max(0, job.held - 1), None
            job.missing += 1
            self._find_nodes(job, fresh=job.missing == 1)

    # -- Kueue ---------------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        """Heads by priority, then by time, over all queues."""
        # Where one did not fit, none of its priority that is as large will: room only shrinks, but for preemption.
        refused: dict[tuple[str, int], int] = {}
        preempted = self.counts["preempted"]
        for job in list(heapq.merge(*self.queues.values())):
            key = (job.queue, job.priority)
            if key in refused and job.devices >= refused[key]:
                continue
            if not self._try(job):
                refused[key] = job.devices
                if self.policy.strict:
                    refused |= {(job.queue, priority): 0 for priority in PRIORITIES if priority <= job.priority}
            elif self.counts["preempted"] > preempted:
                preempted = self.counts["preempted"]
                refused = {key: size for key, size in refused.items() if not size}

    def _count(self, job: Job, devices: int) -> None:
        self.used[job.queue] += devices
        self.held_by[job.queue, job.priority] += devices

    def _fits(self, queue: str, devices: int) -> bool:
        if self.policy.borrowing:
            return sum(self.used.values()) + devices <= sum(self.quota.values())
        return self.used[queue] + devices <= self.quota[queue]

    def _try(self, job: Job) -> bool:
        queue = job.queue
        victims: list[Job] = []
        if not self._fits(queue, job.devices):
            victims = self._victims(job, queue) if self.policy.preemption else []
            if not victims:
                return False
        for victim in victims:
            self._preempt(victim)
        self.queues[queue].remove(job)
        self._count(job, job.devices)
        over = sum(self.used.values()) > sum(self.quota.values()) or (
            self.used[queue] > self.quota[queue] and not self.policy.borrowing
        )
        if over:
            raise RuntimeError(f"queue {queue!r} holds {self.used[queue]} devices, more than its quota allows.")
        # Who was preempted has its grace to write a state; only then are its nodes there.
        self._admit(job, after=self.now + (GRACE_S if victims else 0.0))
        return True

    def _victims(self, job: Job, queue: str) -> list[Job]:
        """The fewest that make room: of other queues what they borrowed, of its own lower priorities."""
        reclaims = self.policy.borrowing and self.used[queue] + job.devices <= self.quota[queue]
        most = sum(
            devices
            for (its, priority), devices in self.held_by.items()
            if (priority < job.priority if its == queue else reclaims)
        )
        if not self._fits(queue, job.devices - most):
            return []
        candidates = [
            each for each in self.running
            if not each.serves and (each.priority < job.priority if each.queue == queue else reclaims)
        ]  # fmt: skip
        candidates.sort(key=lambda each: (each.queue == queue, each.priority, -each.admitted, each.number))
        used, taken = dict(self.used), list[Job]()
        for each in candidates:
            if self._fits(queue, job.devices):
                break
            # What a queue has within its own quota nobody reclaims.
            if each.queue == queue or self.used[each.queue] > self.quota[each.queue]:
                self.used[each.queue] -= each.devices
                taken.append(each)
        enough = self._fits(queue, job.devices)
        for each in reversed(list(taken)):
            # Who turns out not to be in the way stays.
            self.used[each.queue] += each.devices
            if enough and self._fits(queue, job.devices):
                taken.remove(each)
            else:
                self.used[each.queue] -= each.devices
        self.used = used
        return taken if enough else []

    def _preempt(self, job: Job) -> None:
        # Its stage gets SIGTERM and writes a state, if the grace is long enough for one.
        self._settle(job, loses=self.cluster.checkpoint_s > GRACE_S)
        self._leave(job)
        insort(self.queues[job.queue], job)
        self.counts["preempted"] += 1

    def _admit(self, job: Job, *, after: float = 0.0) -> None:
        job.admitted, job.since, job.ready = self.now, self.now, after
        job.held, job.missing = 0, job.nodes or 1
        self.running[job] = None
        self._find_nodes(job, fresh=True)

    def _leave(self, job: Job) -> None:
        """Gives back quota and nodes."""
        job.epoch += 1
        del self.running[job]
        if not job.serves:
            self._count(job, -job.devices)
        if job in self.lacking:
            self.lacking.remove(job)
        self.nodes.leave(job, now=self.now)
        self.freed = True

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _find_nodes(self, job: Job, *, fresh: bool) -> None:
        """What is there now; the rest when it comes. With `fresh` the time to be ready begins."""
        if fresh:
            job.epoch += 1
            if not job.serves:
                self._at(self.now + READY_S, self._late, job, job.epoch)
        if job.nodes and self.nodes.whole:
            count = min(job.missing, self.nodes.whole)
            self._settle(job, loses=False)
            job.ready = max(job.ready, self.nodes.take(count, now=self.now))
            job.held, job.missing = job.held + count, job.missing - count
        elif not job.nodes and (ready := self.nodes.place(job, now=self.now)) is not None:
            job.since, job.ready, job.missing = self.now, max(job.ready, ready), 0
        if job.missing:
            if job not in self.lacking:
                self.lacking.append(job)
                # Serving's pods go first, then who was admitted first.
                self.lacking.sort(key=lambda each: (not each.serves, each.admitted, each.number))
            return
        if job in self.lacking:
            self.lacking.remove(job)
        job.ready = max(job.ready, self.now)
        job.begins = job.ready + self.cluster.restart_s
        if job.first_wait_s is None:
            job.first_wait_s = job.ready - job.arrived
        if job.work_s < inf:
            self._at(job.begins + self._duration(job), self._finish, job, job.epoch)

    def _serve_lacking(self) -> None:
        for job in list(self.lacking):
            self._find_nodes(job, fresh=False)

    # -- time ----------------------------------------------------------------------------------------------------------

    def _every(self, job: Job) -> float:
        if self.cluster.device_failure_h == inf:
            return inf
        return young_daly(self.cluster.checkpoint_s, self.cluster.device_failure_h * 3600 / job.devices)

    def _duration(self, job: Job) -> float:
        left = job.work_s - job.kept_s
        every = self._every(job)
        return left + (max(0, ceil(left / every) - 1) * self.cluster.checkpoint_s if every < inf else 0.0)

    def _settle(self, job: Job, *, loses: bool) -> None:
        """Account for what a job held since the last time, up to now."""
        devices = job.held * DEVICES if job.nodes else job.devices * (job.spot is not None)
        start, now = job.since, self.now
        job.since = now
        if job.missing:
            self.seconds["waiting for nodes"] += devices * (now - start)
            return
        if devices != job.devices:
            raise RuntimeError(f"{job.kind} {job.number} ran on {devices} of its {job.devices} devices.")
        ready, begins = max(start, min(now, job.ready)), max(start, min(now, job.begins))
        self.seconds["waiting for nodes"] += devices * (ready - start)
        self.seconds["starting"] += devices * (begins - ready)
        elapsed = now - begins
        if elapsed > 0:
            job.backoffs = 0
        if job.serves:
            self.seconds["served"] += devices * elapsed
            job.kept_s += elapsed
            return
        sealed, open_, stopped = self._progress(job, elapsed)
        kept = sealed + (0.0 if loses else open_)
        job.kept_s += kept
        for what, spent in (("work", kept), ("lost", sealed + open_ - kept), ("checkpoints", stopped)):
            self.seconds[what] += devices * spent

    def _progress(self, job: Job, elapsed: float) -> tuple[float, float, float]:
        """Work behind the newest state, work after it, and time in states."""
        every, stop = self._every(job), self.cluster.checkpoint_s
        if every == inf:
            return 0.0, elapsed, 0.0
        segments = int(elapsed // (every + stop))
        rest = elapsed - segments * (every + stop)
        return segments * every, min(rest, every), segments * stop + max(0.0, rest - every)

    def _pass_time(self, to: float) -> None:
        """Account for what nobody holds, from now on to then."""
        spent = to - self.now
        if spent > 0:
            nodes = self.nodes
            spare = min(nodes.whole, self.policy.spares)
            wanted = self.lacking or any(self.queues.values())
            rest = "too few for who waits" if wanted else "no demand"
            self.seconds["spare"] += spent * spare * DEVICES
            self.seconds[rest] += spent * (nodes.whole - spare) * DEVICES
            self.seconds["fragments"] += spent * sum(nodes.parts.values())
            self.seconds["in repair"] += spent * nodes.dead * DEVICES
        self.now = to


def require_conserved(seconds: dict[str, float], *, devices: int, span_s: float) -> None:
    """Raise unless what was held and what was free add up to all there was: each is counted by itself."""
    found, all_of_it = sum(seconds.values()), devices * span_s
    if abs(found - all_of_it) > 1e-6 * all_of_it:
        raise RuntimeError(f"{found / 3600:,.1f} device-hours are accounted for, of {all_of_it / 3600:,.1f}.")


def simulate(
    cluster: Cluster, policy: Policy, jobs: Iterable[Job], *, hours: float, seed: int, after_h: float = 0.0
) -> Outcome:
    """Run `hours`, and tell of them; the `after_h` before them only fill the cluster.

    Raises:
        ValueError: quotas beyond the cluster.
        RuntimeError: a device-hour is counted twice or not at all, a queue is past its quota, a gang runs short.
    """
    end = (hours + after_h) * 3600
    return Simulation(cluster, policy, jobs, end=end, seed=seed, measured_from=after_h * 3600).run()
