"""What an artifact was made with: versions, commits, machine.

Enters: a folder whose git commit matters. Leaves: plain values for a record.
Refuses: anything secret; environment variables are never recorded.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "fmops", "torch", "transformers", "tokenizers", "accelerate", "trl", "peft", "safetensors", "datasets", "datatrove",
    "lm-eval", "numpy",
)  # fmt: skip


def describe_environment(folder: Path, *, threads: int) -> dict[str, Any]:
    """Versions, git commits of the package and of `folder`, processor and thread count."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "processor": processor(),
        "threads": threads,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "package_commit": _commit(Path(__file__).parent),
        "spec_commit": _commit(folder),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def machine_notes(*, threads: int) -> Path:
    """Folder for what was measured once on this kind of machine: same processor, thread count and torch."""
    from fmops.sources import default_cache

    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{processor()} {threads} threads torch {_version('torch')}")
    return default_cache() / "machines" / name


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit of the repository around `folder`, with `+changes` when it has uncommitted ones."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, env=clean, timeout=10
    )
    return done.stdout.strip()


def processor() -> str:
    """The processor's model, as the kernel names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
