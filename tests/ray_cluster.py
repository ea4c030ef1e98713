"""A Ray cluster of two nodes on this machine, with token authentication, for tests.

Enters: nothing; imported before Ray is. Leaves: its address in RAY_ADDRESS while the block runs.
Refuses: to touch another cluster: `ray stop` would end every one of the machine.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

# Ray reads its token once, when it is first asked for: before anything imports it.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}

NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "dashboard_agent_listen_port": 0}
"""Any free port for the agent, which takes jobs: by itself Ray wants one number, which another cluster may hold."""


@contextmanager
def two_nodes(*, takes_jobs: bool = False) -> Iterator[Any]:
    """A head and a worker node of one CPU each; `takes_jobs`: with the dashboard, which is where jobs are sent to."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": takes_jobs})
    try:
        cluster.add_node(**NODE)
        with mock.patch.dict(os.environ, {"RAY_ADDRESS": cluster.address}):
            yield cluster
    finally:
        cluster.shutdown()


def lose_a_node(cluster: Any) -> None:
    """Kill the worker node's raylet with all that it started, as the end of its machine would; bring another node."""
    import psutil

    (node,) = cluster.worker_nodes
    (raylet,) = node.all_processes["raylet"]
    known = psutil.Process(raylet.process.pid)
    for process in [known, *known.children(recursive=True)]:
        process.kill()
    cluster.add_node(**NODE)
