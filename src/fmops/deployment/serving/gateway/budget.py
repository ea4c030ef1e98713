"""How much a tenant may ask: a bucket of tokens that refills by the minute.

Enters: the tokens a request may cost at most. Leaves: a loan, settled by what it did cost.
Refuses: what the bucket does not hold, with the seconds until it will.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from fmops.deployment.serving.bodies import RequestError


@dataclass
class _Bucket:
    left: float
    at: float


@dataclass(frozen=True)
class Loan:
    """Tokens set aside for one request."""

    tenant: str
    tokens: int
    per_minute: int


class Budgets:
    """One bucket a tenant, holding at most a minute's tokens. All keys of a tenant draw from the same bucket."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def borrow(self, tenant: str, tokens: int, *, per_minute: int) -> Loan:
        """Set tokens aside.

        Raises:
            RequestError: 400 when no full bucket would hold so many, 429 when this one does not now.
        """
        if tokens > per_minute:
            raise RequestError(
                f"this request may cost {tokens} tokens, the budget is {per_minute} a minute; lower max_tokens or "
                "shorten the prompt",
                param="max_tokens", code="budget_too_small",
            )  # fmt: skip
        bucket = self._refilled(tenant, per_minute)
        if bucket.left < tokens:
            seconds = math.ceil((tokens - bucket.left) / per_minute * 60)
            raise RequestError(
                f"the budget of {per_minute} tokens a minute is used up; {max(0, int(bucket.left))} are left and this "
                f"request may cost {tokens}",
                code="rate_limit_exceeded", status=429, retry_after_s=max(1, seconds),
            )  # fmt: skip
        bucket.left -= tokens
        return Loan(tenant, tokens, per_minute)

    def settle(self, loan: Loan, used: int) -> None:
        """Give back what was not used, or take what was used beyond the guess."""
        bucket = self._refilled(loan.tenant, loan.per_minute)
        bucket.left = min(bucket.left + loan.tokens - used, loan.per_minute)

    def _refilled(self, tenant: str, per_minute: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(tenant, _Bucket(left=per_minute, at=now))
        bucket.left = min(per_minute, bucket.left + (now - bucket.at) * per_minute / 60)
        bucket.at = now
        return bucket
