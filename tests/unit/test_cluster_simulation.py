"""The simulation of the queue against closed formulas, and its accounts, which can fail."""

from __future__ import annotations

import math
import re
from pathlib import Path
from random import Random

import pytest
import yaml

from benchmarks import cluster as one_gang
from benchmarks import scheduler, scheduler_mix
from benchmarks.nodes import DEVICES, EMPTY_S, LOOP, RUN, SERVING, URGENT, Cluster, Job, Nodes
from benchmarks.scheduler import Policy, Simulation, require_conserved, simulate
from fmops.orchestration.sizing import DEVICE_FAILURE_H, RESTART_S, goodput, young_daly

PLATFORM = Path(__file__).parents[2] / "infra" / "platform"
INSTANT = {"launch_s": 0.0, "restart_s": 0.0, "device_failure_h": math.inf}
H = 3600.0


def job(number, *, nodes, hours=1.0, at_h=0.0, priority=RUN, team="a"):
    return Job(number, "job", team, priority, nodes * DEVICES, hours * H, at_h * H)


def poisson(*, an_hour, hours, until, priority, seed, first=0):
    random, made, at = Random(seed), [], 0.0
    while (at := at + random.expovariate(an_hour)) < until:
        made.append(job(first + len(made), nodes=1, hours=random.expovariate(1 / hours), at_h=at, priority=priority))
    return made


def share(seen, name):
    return seen.seconds[name] / sum(seen.seconds.values())


def erlang_c(servers, load):
    """Probability that who arrives has to wait (Erlang 1917)."""
    last = load**servers / math.factorial(servers) / (1 - load / servers)
    return last / (sum(load**k / math.factorial(k) for k in range(servers)) + last)


def test_without_failures_everything_is_work():
    seen = simulate(Cluster(nodes=16, **INSTANT), Policy(), [job(0, nodes=16, hours=math.inf)], hours=100, seed=0)
    assert share(seen, "work") == 1


def test_one_gang_is_what_the_simulation_of_one_gang_and_the_formula_say():
    spares, days, every = 64, 20, young_daly(5, DEVICE_FAILURE_H * H / 16_384)
    gang, cluster = Job(0, "gang", "", RUN, 16_384, math.inf, 0.0), Cluster(nodes=2048 + spares)
    ours, theirs = [], []
    for seed in range(8):
        gang = Job(0, "gang", "", RUN, 16_384, math.inf, 0.0)
        simulate(cluster, Policy(spares=spares), [gang], hours=24 * days, seed=seed)
        ours.append(gang.kept_s / (24 * days * H))
        run = one_gang.Run(16_384, 5, RESTART_S, every, spares)
        theirs.append(one_gang.simulate(run, hours=24 * days, seed=seed).goodput)
    said = goodput(every, checkpoint_s=5, between_failures_s=DEVICE_FAILURE_H * H / 16_384, restart_s=RESTART_S)
    # One run's goodput spreads by 0.004.
    assert sum(ours) / 8 == pytest.approx(sum(theirs) / 8, abs=0.006)
    assert sum(ours) / 8 == pytest.approx(said, abs=0.006)


def test_waits_are_those_of_a_queue_with_as_many_servers():
    waits = []
    for seed in range(4):
        jobs = poisson(an_hour=2.4, hours=1.0, until=2000, priority=RUN, seed=seed)
        simulate(Cluster(nodes=4, **INSTANT), Policy(), jobs, hours=2100, seed=0)
        waits += [each.first_wait_s / H for each in jobs]
    assert sum(wait > 0 for wait in waits) / len(waits) == pytest.approx(erlang_c(4, 2.4), abs=0.03)
    assert sum(waits) / len(waits) == pytest.approx(erlang_c(4, 2.4) / (4 - 2.4), rel=0.2)


def test_who_goes_first_waits_as_if_it_were_alone():
    lower = poisson(an_hour=0.05, hours=100.0, until=30_000, priority=LOOP, seed=2)
    upper = poisson(an_hour=0.02, hours=100.0, until=30_000, priority=URGENT, seed=3, first=len(lower))
    seen = simulate(Cluster(nodes=8, **INSTANT), Policy(), lower + upper, hours=32_000, seed=0)
    assert seen.counts["preempted"] > 50
    waited = sum(each.first_wait_s > scheduler.GRACE_S for each in upper) / len(upper)
    assert waited == pytest.approx(erlang_c(8, 2.0), abs=0.02)
    upper = poisson(an_hour=0.02, hours=100.0, until=30_000, priority=URGENT, seed=3, first=len(lower))
    lower = poisson(an_hour=0.05, hours=100.0, until=30_000, priority=LOOP, seed=2)
    seen = simulate(Cluster(nodes=8, **INSTANT), Policy(preemption=False), lower + upper, hours=32_000, seed=0)
    assert seen.counts["preempted"] == 0
    assert sum(each.first_wait_s > scheduler.GRACE_S for each in upper) / len(upper) > waited + 0.1


def test_a_gang_starts_whole_or_waits_and_small_ones_pass_it_unless_the_queue_is_strict():
    def starts(**choices):
        jobs = [job(0, nodes=6, hours=10), job(1, nodes=4, at_h=1), job(2, nodes=2, at_h=2)]
        simulate(Cluster(nodes=8, **INSTANT), Policy(**choices), jobs, hours=40, seed=0)
        return [round(each.arrived / H + each.first_wait_s / H, 2) for each in jobs]

    assert starts() == [0, 10, 2]
    assert starts(strict=True) == [0, 10, 10]


def test_the_preempted_write_a_state_and_lose_nothing_and_the_fewest_are_taken():
    jobs = [job(each, nodes=2, hours=10, priority=LOOP) for each in range(4)]
    jobs.append(job(4, nodes=3, hours=1, at_h=5, priority=URGENT))
    seen = simulate(Cluster(nodes=8, **INSTANT), Policy(), jobs, hours=40, seed=0)
    assert seen.counts["preempted"] == 2
    assert seen.seconds["lost"] == 0
    assert [each.kept_s for each in jobs] == pytest.approx([each.work_s for each in jobs])
    assert jobs[4].first_wait_s == scheduler.GRACE_S


def test_what_a_team_lent_it_gets_back_and_without_a_cohort_nothing_is_lent():
    def run(borrowing):
        jobs = [job(each, nodes=2, hours=10, team="a") for each in range(4)]
        jobs.append(job(4, nodes=3, hours=1, at_h=1, team="b"))
        policy = Policy(quotas=(("a", 4), ("b", 4)), borrowing=borrowing)
        seen = simulate(Cluster(nodes=8, **INSTANT), policy, jobs, hours=60, seed=0)
        return seen.counts["preempted"], [each.first_wait_s / H for each in jobs]

    preempted, waits = run(True)
    assert preempted == 2
    assert waits == pytest.approx([0, 0, 0, 0, scheduler.GRACE_S / H])
    assert run(False) == (0, pytest.approx([0, 0, 10, 10, 0]))


def test_a_gang_that_does_not_get_its_nodes_in_time_gives_its_quota_back_and_goes_to_the_end():
    """The quota knows nothing of nodes in repair."""
    made = [job(0, nodes=8, hours=100)]
    cluster = Cluster(nodes=8, launch_s=0.0, restart_s=0.0, device_failure_h=800.0)
    seen = simulate(cluster, Policy(), made, hours=400, seed=0)
    assert seen.counts["evicted"] > 0
    assert seen.seconds["waiting for nodes"] > 0
    spared = simulate(
        Cluster(nodes=12, device_failure_h=800.0), Policy(spares=4), [job(0, nodes=8, hours=100)], hours=400, seed=0
    )
    assert spared.counts["evicted"] < seen.counts["evicted"]


@pytest.mark.parametrize("policy", scheduler_mix.POLICIES[:1] + scheduler_mix.POLICIES[-1:], ids=lambda each: each.name)
def test_the_mix_is_the_same_each_time_and_serving_keeps_its_devices(policy):
    found = scheduler_mix.simulated(policy, 0)
    assert found == scheduler_mix.simulated(policy, 0)
    assert sum(found[name] for name in scheduler.HELD + scheduler.FREE) == pytest.approx(1)
    assert found["serving up"] > 0.99
    assert found["failures"] == pytest.approx(scheduler_mix.HOURS * 16_384 / DEVICE_FAILURE_H, rel=0.4)
    assert found["preempted"] > 0


def test_a_device_hour_that_is_lost_or_counted_twice_is_found(monkeypatch):
    with pytest.raises(RuntimeError, match=r"9\.0 device-hours are accounted for, of 10\.0"):
        require_conserved({"work": 9 * H}, devices=10, span_s=H)
    give = Nodes.give
    monkeypatch.setattr(Nodes, "give", lambda self, count, *, now: give(self, count + 1, now=now))
    with pytest.raises(RuntimeError, match="device-hours are accounted for"):
        simulate(Cluster(nodes=8, **INSTANT), Policy(), [job(0, nodes=2)], hours=10, seed=0)


def test_a_queue_past_its_quota_is_found(monkeypatch):
    monkeypatch.setattr(Simulation, "_fits", lambda *_: True)
    with pytest.raises(RuntimeError, match="queue '' holds 128 devices, more than its quota allows"):
        simulate(Cluster(nodes=8, **INSTANT), Policy(), [job(0, nodes=8), job(1, nodes=8)], hours=10, seed=0)
    with pytest.raises(ValueError, match="quotas of 9 nodes, and 8 there are"):
        simulate(Cluster(nodes=8), Policy(quotas=(("a", 9),)), [], hours=1, seed=0)


def test_a_gang_that_runs_short_of_a_node_is_found(monkeypatch):
    def careless(self, job, *, fresh):
        job.held, job.missing = self.nodes.whole, 0
        self.nodes.take(job.held, now=self.now)
        job.ready = job.begins = self.now

    monkeypatch.setattr(Simulation, "_find_nodes", careless)
    monkeypatch.setattr(Simulation, "_fits", lambda *_: True)
    monkeypatch.setattr(Simulation, "_count", lambda *_: None)
    with pytest.raises(RuntimeError, match="job 0 ran on 64 of its 72 devices"):
        simulate(Cluster(nodes=8, **INSTANT), Policy(), [job(0, nodes=9)], hours=10, seed=0)


def test_a_job_that_ends_before_its_work_is_done_is_found(monkeypatch):
    monkeypatch.setattr(Simulation, "_duration", lambda self, job: 60.0)
    with pytest.raises(RuntimeError, match=r"ended with 60\.0 s of its 3600\.0 s of work"):
        simulate(Cluster(nodes=1, **INSTANT), Policy(), [job(0, nodes=1, hours=1)], hours=2, seed=0)


def test_it_simulates_what_the_platform_configures():
    kueue = yaml.safe_load((PLATFORM / "apps/values/kueue.yaml").read_text())
    ready = yaml.safe_load(kueue["managerConfig"]["controllerManagerConfigYaml"])["waitForPodsReady"]
    again = ready["requeuingStrategy"]
    assert ready["timeout"] == f"{scheduler.READY_S / 60:.0f}m"
    assert "recoveryTimeout" not in ready
    assert not ready["blockAdmission"]
    assert again == {
        "timestamp": "Eviction", "backoffLimitCount": scheduler.BACKOFFS,
        "backoffBaseSeconds": scheduler.BACKOFF_S, "backoffMaxSeconds": scheduler.BACKOFF_MOST_S,
    }  # fmt: skip
    queues = (PLATFORM / "queues/templates/queues.yaml").read_text()
    assert queues.count("kind: ClusterQueue") == 1
    assert "cohort" not in queues
    assert "queueingStrategy: BestEffortFIFO" in queues
    assert "preemption: {withinClusterQueue: LowerPriority, reclaimWithinCohort: Never}" in queues
    [priorities] = re.findall(r'"loop" (\d+) "run" (\d+) "urgent" (\d+)', queues)
    assert tuple(map(int, priorities)) == (LOOP, RUN, URGENT)
    assert URGENT < SERVING
    pool = yaml.safe_load((PLATFORM / "nodes/values.yaml").read_text())["pools"]["gpu-training"]
    assert pool["disruption"]["consolidationPolicy"] == "WhenEmpty"
    assert pool["disruption"]["consolidateAfter"] == f"{EMPTY_S / 60:.0f}m"
