"""Frameworks whose versions clash with ours: each in an environment of its own, met through files alone.

Enters: a framework's name, a command. Leaves: where it is, its version, its output line by line, its exit code.
Refuses: a framework that is not here, with how to get it; to pass on the user's keys, home or caches.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmops.errors import FmopsError, Terminated
from fmops.processes import end_with_parent

START_RANKS = ("torchtitan", "llama-factory")
"""A stage's frameworks that make their own processes of a training, so that the stage itself runs once."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Framework:
    """How one is installed and called."""

    packages: str
    """What was tried, as pip takes it."""
    command: str
    """In the environment's `bin`."""
    on_path: bool = True
    """Whether a command of that name on the PATH is surely this framework."""


FRAMEWORKS = {
    "garak": Framework("garak==0.17.1", "garak"),
    "inspect": Framework("inspect-ai==0.3.285 openai", "inspect"),
    "torchtitan": Framework("torch==2.13.0 torchtitan==0.3.0 triton==3.7.1", "torchrun", on_path=False),
    "llamafactory": Framework("llamafactory==0.9.5", "llamafactory-cli"),
}


def executable(name: str) -> str:
    """The framework's command: `FMOPS_<NAME>`, or what the PATH finds.

    Raises:
        FmopsError: it is not here; says how to get it.
    """
    framework = FRAMEWORKS[name]
    variable = f"FMOPS_{name.upper()}"
    stated = os.environ.get(variable)
    beside = Path(sys.executable).with_name(framework.command)
    found = shutil.which(stated or framework.command) if stated or framework.on_path else None
    if found is None and not stated and framework.on_path and beside.is_file():
        found = str(beside)
    if found is None:
        raise FmopsError(
            f"{name} is not here{f' ({variable}={stated})' if stated else ''}. Give it an environment of its own: "
            f"`python -m venv {name}-env && {name}-env/bin/pip install {framework.packages}`, then "
            f"`export {variable}=$PWD/{name}-env/bin/{framework.command}`."
        )
    return found


def installed_version(command: str, package: str) -> str:
    """The version of a package in the environment of `command`."""
    listed = Path(command).resolve().parents[1].glob(f"lib/python3*/site-packages/{package}-*.dist-info")
    # A command that is a link lies elsewhere than its environment.
    beside = Path(command).absolute().parents[1].glob(f"lib/python3*/site-packages/{package}-*.dist-info")
    found = next((path.name for path in (*listed, *beside)), None)
    return found.removeprefix(f"{package}-").removesuffix(".dist-info") if found else "unknown"


def own_environment(home: Path, **given: str) -> dict[str, str]:
    """Variables for a framework's process: no key of the user's, `home` instead of home and caches, no model hub."""
    kept = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    # Our own packages must not shadow the framework's.
    kept.pop("PYTHONPATH", None)
    homes = dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(home))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**kept, **homes, **offline, **given}


def follow(
    command: Sequence[str], *, folder: Path, environment: Mapping[str, str], log: Path, on_line: Callable[[str], None]
) -> int:
    """Run a framework's command in `folder` and return its exit code; what it prints as errors goes to `log`.

    Args:
        on_line: called with each line of its standard output.

    Raises:
        Terminated: SIGTERM reached this process; the framework ended first.
    """
    told: list[int] = []
    with (
        log.open("ab") as errors,
        subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            text=True, errors="replace",
            # Not KILL: it takes its own processes along.
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),
        ) as process,
    ):  # fmt: skip

        def leave(*_: object) -> None:
            told.append(1)
            process.terminate()

        before = signal.signal(signal.SIGTERM, leave)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                on_line(line)
        except BaseException:
            process.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if told:
        raise Terminated("told to leave (SIGTERM). Run again to go on from its newest resume state.")
    return process.returncode


def last_words(log: Path, lines: int = 3) -> str:
    """The end of what a framework said, on one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text("utf-8", "replace")) if log.is_file() else ""
    return " / ".join(line.strip() for line in text.strip().splitlines()[-lines:])
