"""Named places where a test may kill this process, as a power cut would, or stop it.

Enters: FMOPS_FAULT=site:n[:signal[:rank]] in the environment. Leaves: nothing; the n-th visit to the site is SIGKILL,
or that signal (SIGTERM, SIGSTOP…), on that rank where several processes train.
Refuses: to do anything when the variable is not set.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_visits: Counter[str] = Counter()


def fault_site(name: str) -> None:
    """Die here when the test asks for it; otherwise cost nothing."""
    wanted = os.environ.get("FMOPS_FAULT")
    if not wanted:
        return
    site, visit, name_of_signal, rank = (*wanted.split(":"), "", "", "")[:4]
    _visits[name] += 1
    if rank and rank != os.environ.get("RANK"):
        return
    if site == name and _visits[name] == int(visit or 1):
        os.kill(os.getpid(), signal.Signals[name_of_signal or "SIGKILL"])
