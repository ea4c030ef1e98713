"""A release on Ray Serve, on CPUs: the server of `fmops serve` in each replica, Serve's routing and restarts around it.

Enters: a lifecycle.yaml whose release is made. Leaves: an OpenAI-compatible endpoint over two replicas, until a signal.
Refuses: what `fmops serve` refuses: a release that is not certified, or not what its record says.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

# Ray reads it once, when it is imported; without it, it writes a token into the home directory.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}

import ray
from ray import serve

from fmops.deployment.serving.app import build_app
from fmops.deployment.serving.engine import load_engine
from fmops.deployment.serving.service import Service
from fmops.deployment.verify import verify_release
from fmops.orchestration.project import Project
from fmops.orchestration.show import find_release

REPLICAS = 2
ONGOING = 40
"""Requests of one replica, waiting ones included: what the Transformers engine admits before it says 429."""


@serve.deployment(
    num_replicas=REPLICAS, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=ONGOING,
    health_check_period_s=2, graceful_shutdown_timeout_s=20,
)  # fmt: skip
@serve.ingress()
class Replica:
    """One engine with the release, and the routes before it."""

    def __init__(self, spec: str) -> None:
        project = Project.open(Path(spec))
        record, release = find_release(project, "champion")
        parity = verify_release(release.path, {name: entry.sha256 for name, entry in record.files.items()})
        serving = project.spec.serve
        self.engine = load_engine(parity.engine, release.model, max_tokens=serving.max_tokens, threads=project.threads)
        self.service, self.name = Service(self.engine, version=record.key), release.name

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self.service, name=self.name)

    def check_health(self) -> None:
        """Serve replaces a replica whose check raises."""
        if self.engine.failure:
            raise RuntimeError(self.engine.failure)


def main(spec: Path, *, port: int) -> None:
    """Serve until SIGTERM or SIGINT, on a Ray of our own that ends with us."""
    # Blocked before Ray starts threads, which would inherit the signal.
    waited = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    ray.init(num_cpus=REPLICAS, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Replica.bind(str(spec.resolve())), name="models", route_prefix="/")
    print(f"Ray Serve listens on http://127.0.0.1:{port}/v1  (stop with Ctrl-C)", flush=True)
    signal.sigwait(waited)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), port=int(sys.argv[2]))
