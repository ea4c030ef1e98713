"""Processes that do not outlive whoever started them: left alone they would write beside the next ones.

Enters: the signal that a parent's end shall bring. Leaves: a process that gets it.
Refuses: nothing; where there is no Linux it does nothing.
"""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1
# Loaded before any fork: a child of a process with threads must not load libraries before it starts its own program.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None


def end_with_parent(sign: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process `sign` once its parent is gone."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, sign)
