"""Whether an engine is worth asking now.

Enters: how its answers went. Leaves: an open or a closed circuit.
Refuses: requests to an engine that has failed several times in a row, for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

FAILURES = 3
"""In a row, before a circuit opens."""
COOL_S = (1.0, 30.0)
"""First and longest time that a circuit stays open; it doubles with every failed trial."""


class EngineDown(Exception):
    """An engine gave no answer. `sent` says whether it may have begun one."""

    def __init__(
        self, reason: str, *, sent: bool, status: int = 502, retry_after_s: int | None = None,
        code: str = "engine_failed",
    ) -> None:  # fmt: skip
        super().__init__(reason)
        self.sent, self.status, self.retry_after_s, self.code = sent, status, retry_after_s, code


@dataclass
class Circuit:
    """Closed while an engine answers; open for a while after `FAILURES` in a row; then one trial decides."""

    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    cool_s: float = COOL_S[0]
    open_until: float = 0.0
    trying: bool = False

    @property
    def is_open(self) -> bool:
        """True while no request is let through."""
        return self.failures >= FAILURES and (self.trying or self.clock() < self.open_until)

    def enter(self) -> None:
        """Let a request through.

        Raises:
            EngineDown: the circuit is open.
        """
        if self.is_open:
            wait = max(1, round(self.open_until - self.clock()))
            raise EngineDown(
                f"the engine failed {self.failures} times in a row and is left alone for a while",
                sent=False, status=503, retry_after_s=wait,
            )  # fmt: skip
        self.trying = self.failures >= FAILURES

    def answered(self) -> None:
        """The engine speaks: others may try it, too; one more failure before the end of this closes the door again."""
        self.failures, self.trying = min(self.failures, FAILURES - 1), False

    def succeeded(self) -> None:
        """The engine answered to the end."""
        self.failures, self.cool_s, self.trying = 0, COOL_S[0], False

    def failed(self) -> None:
        """It did not."""
        self.failures += 1
        self.trying = False
        # Requests that were under way when it opened add nothing: they failed of the same cause.
        if self.failures >= FAILURES and self.clock() >= self.open_until:
            self.open_until = self.clock() + self.cool_s
            self.cool_s = min(2 * self.cool_s, COOL_S[1])

    def abandoned(self) -> None:
        """The client left first: nothing was learnt."""
        self.trying = False
