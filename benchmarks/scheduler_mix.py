"""The jobs and policies that benchmarks.cluster compares on 16,384 devices, and what is told of a run.

Enters: a seed. Leaves: jobs that arrive at random, the same for every policy; figures of one simulated time.
Refuses: nothing.
"""

from __future__ import annotations

from math import inf, log
from random import Random

from benchmarks.nodes import DEVICES, LOOP, RUN, SERVING, URGENT, Cluster, Job
from benchmarks.scheduler import FREE, HELD, Outcome, Policy, simulate

HOURS, FILLING_H = 21 * 24.0, 4 * 24.0
CLUSTER = Cluster(nodes=2048)
SERVING_NODES = 64
GANG_NODES = 1024
SPARES = 24
"""A third of a failure an hour times a day of repair: 7.8 nodes on average, over 24 once in a million hours."""
MIX_COLUMNS = ("kind", "team", "priority", "an_hour", "devices", "median_h", "sigma")
"""Arrivals are Poisson, one of `devices` with equal chance, hours of work log-normal."""
MIX = (
    ("continued pretraining", "research", RUN, 0.22, (128, 256, 512, 1024), 24.0, 0.8),
    ("finetuning", "product", RUN, 4.0, (8, 16, 32, 64), 8.0, 0.8),
    ("rounds of the loop", "product", LOOP, 4.0, (8, 32, 64), 6.0, 0.6),
    ("evaluation", "product", RUN, 6.0, (1, 2, 4), 1.5, 0.6),
    ("urgent", "product", URGENT, 1 / 12, (128, 256, 512), 6.0, 0.6),
)
TEAMS = {"pretraining": 1024, "research": 512, "product": 448}


def teams(less: int = 0) -> tuple[tuple[str, int], ...]:
    """Quotas of three queues; what is held out comes from research."""
    return tuple((TEAMS | {"research": TEAMS["research"] - less}).items())


POLICIES = (
    Policy(),
    Policy("no preemption", preemption=False),
    Policy("strict FIFO", strict=True),
    Policy("24 spares, ended when empty", spares=SPARES, warm=False),
    Policy("24 spares, kept running", spares=SPARES),
    Policy("24 spares, strict FIFO", spares=SPARES, strict=True),
    Policy("24 spares, small jobs packed", spares=SPARES, packed=True),
    Policy("24 spares, a queue a team", spares=SPARES, quotas=teams(SPARES)),
    Policy("24 spares, a queue a team, borrowing", spares=SPARES, quotas=teams(SPARES), borrowing=True),
)


def jobs(seed: int, *, hours: float) -> list[Job]:
    """Serving and the large gang from the beginning, the rest at random times."""
    random = Random(f"jobs {seed}")
    made = [Job(each, "serving", "", SERVING, DEVICES, inf, 0.0) for each in range(SERVING_NODES)]
    made.append(Job(SERVING_NODES, "pretraining", "pretraining", RUN, GANG_NODES * DEVICES, inf, 0.0))
    for kind, team, priority, an_hour, devices, median_h, sigma in MIX:
        at = random.expovariate(an_hour / 3600)
        while at < hours * 3600:
            work_s = random.lognormvariate(log(median_h), sigma) * 3600
            made.append(Job(len(made), kind, team, priority, random.choice(devices), work_s, at))
            at += random.expovariate(an_hour / 3600)
    return made


def simulated(policy: Policy, seed: int) -> dict[str, float]:
    """One run of the mix: shares of all device-hours, waits in hours, counts."""
    arriving = jobs(seed, hours=FILLING_H + HOURS)
    return figures(simulate(CLUSTER, policy, arriving, hours=HOURS, seed=seed, after_h=FILLING_H))


def figures(seen: Outcome) -> dict[str, float]:
    """What is told of one run; a job that never began counts with the time that it has waited by the end."""
    all_s = sum(seen.seconds.values())
    begin, end = FILLING_H * 3600, (FILLING_H + HOURS) * 3600
    told = {name: seen.seconds[name] / all_s for name in HELD + FREE}
    told["utilisation"] = sum(told[name] for name in HELD)
    told["goodput"] = told["served"] + told["work"]
    groups = {"urgent": URGENT, "run": RUN, "loop": LOOP, "continued pretraining": "continued pretraining"}
    for name, group in groups.items():
        its = [job for job in seen.jobs if group in (job.priority, job.kind) and job.arrived >= begin]
        waits = sorted((end - job.arrived if job.first_wait_s is None else job.first_wait_s) / 3600 for job in its)
        told[f"wait {name}, median h"] = waits[len(waits) // 2] if waits else 0.0
        told[f"wait {name}, 95 % h"] = waits[int(0.95 * len(waits))] if waits else 0.0
        told[f"never began, {name}"] = sum(job.first_wait_s is None for job in its)
    for name in ("failures", "preempted", "evicted", "given up", "finished"):
        told[name] = seen.counts[name]
    gang = [job for job in seen.jobs if job.kind == "pretraining"]
    told["goodput of the large gang"] = sum(job.kept_s for job in gang) / (len(gang) * HOURS * 3600)
    serving = [job for job in seen.jobs if job.serves]
    told["serving up"] = sum(job.kept_s for job in serving) / (len(serving) * HOURS * 3600)
    return told
