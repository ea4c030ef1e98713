"""Who may ask: API keys, of which only digests are kept.

Enters: a header `Authorization: Bearer …`. Leaves: the key's entry: tenant, budget.
Refuses: unknown, expired and revoked keys, in constant time and in the same words.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, ValidationError

from fmops.artifacts import Frozen
from fmops.deployment.serving.bodies import RequestError
from fmops.errors import FmopsError
from fmops.locks import locked
from fmops.store import write_atomically

KEYS = "keys.json"
SHAPE = re.compile(r"sk-fmops-([0-9a-f]{12})-([\w-]{43})", re.ASCII)
"""`sk-`, so that secret scanners and our own redaction know it when they see it."""
TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class Key(Frozen):
    """One key, without its secret."""

    id: str
    tenant: str
    sha256: str = Field(description="Of the secret. The secret is 256 random bits: a slow hash would add nothing.")
    tokens_per_minute: int | None = Field(None, description="The tenant's budget; null takes the spec's.")
    created: float = Field(description="Unix time.")
    expires: float | None = Field(None, description="Unix time.")
    revoked: float | None = Field(None, description="Unix time.")

    def state(self, now: float) -> str:
        """`valid`, `revoked` or `expired`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "valid"


_NOBODY = Key(id="", tenant="", sha256=hashlib.sha256(b"").hexdigest(), created=0, revoked=0)
"""What an unknown id is compared with, so that it takes as long as a known one."""


class KeyRing:
    """The keys of a workspace: `keys.json`, readable by its owner only."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}

    def check(self, authorization: str | None) -> Key:
        """The entry of a request's key.

        Raises:
            RequestError: 401; which of the reasons it is, only the log says.
        """
        scheme, _, given = (authorization or "").partition(" ")
        shaped = SHAPE.fullmatch(given.strip()) if scheme.lower() == "bearer" else None
        key_id, secret = shaped.groups() if shaped else ("", "")
        key = self.keys().get(key_id, _NOBODY)
        same = hmac.compare_digest(_digest(secret), key.sha256)
        if not (same and key.state(self._clock()) == "valid"):
            raise RequestError(
                "a valid API key is needed in the header 'Authorization: Bearer …'; the owner of this server makes "
                "one with `fmops keys add`",
                code="invalid_api_key", status=401,
            )  # fmt: skip
        return key

    def keys(self) -> dict[str, Key]:
        """All keys by id, as of now: a revoked key stops working with the next request."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, {}
            return self._keys
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp != self._stamp:
            self._keys, self._stamp = self._read(), stamp
        return self._keys

    def add(self, tenant: str, *, tokens_per_minute: int | None = None, days: float | None = None) -> tuple[Key, str]:
        """Make a key; returns its entry and the one string that the tenant gets and nobody keeps.

        Raises:
            FmopsError: the tenant's name has other characters than a-z, 0-9, `.`, `_`, `-`.
        """
        if not TENANT.fullmatch(tenant):
            raise FmopsError(f"tenant {tenant!r}: use up to 63 of a-z, 0-9, '.', '_', '-', a letter or digit first.")
        key_id, secret, now = secrets.token_hex(6), secrets.token_urlsafe(32), self._clock()
        key = Key(
            id=key_id, tenant=tenant, sha256=_digest(secret), tokens_per_minute=tokens_per_minute, created=now,
            expires=None if days is None else now + days * 86_400,
        )  # fmt: skip
        with self._changing() as keys:
            keys[key_id] = key
        return key, f"sk-fmops-{key_id}-{secret}"

    def revoke(self, key_id: str) -> Key:
        """End a key now.

        Raises:
            FmopsError: no such key.
        """
        with self._changing() as keys:
            if key_id not in keys:
                known = ", ".join(f"{key.id} ({key.tenant})" for key in keys.values()) or "none"
                raise FmopsError(f"no key {key_id!r}. Known: {known}.")
            keys[key_id] = keys[key_id].model_copy(update={"revoked": self._clock()})
            return keys[key_id]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Key]]:
        """The keys on disk while nobody else changes them; written when the block ends well."""
        with locked(self.path.with_suffix(".lock"), wait_s=10):
            keys = self._read() if self.path.is_file() else {}
            yield keys
            text = json.dumps([key.model_dump() for key in keys.values()], indent=1) + "\n"
            write_atomically(self.path, text, mode=0o600)

    def _read(self) -> dict[str, Key]:
        try:
            return {entry["id"]: Key.model_validate(entry) for entry in json.loads(self.path.read_bytes())}
        except (ValueError, ValidationError, TypeError, KeyError) as error:
            raise FmopsError(
                f"{self.path} holds no keys: {error}. Restore it, or remove it and add keys anew."
            ) from None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
