"""Who may look and give orders: one token a workspace, of which only a digest is kept.

Enters: a token, a request's headers. Leaves: yes, or the reason why not.
Refuses: other names for this server (DNS rebinding), other pages' requests (CSRF), and wrong tokens, in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from fmops.errors import FmopsError
from fmops.locks import locked
from fmops.store import write_atomically

FILE = "console.json"
"""In the workspace, readable by its owner only."""
HEADER = "x-fmops-console"
"""A page of another origin cannot send it without asking first, and that is never allowed."""
COOKIE_S = 30 * 24 * 3600
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
ANYWHERE = ("0.0.0.0", "::")


class Token:
    """The workspace's token."""

    def __init__(self, workspace: Path) -> None:
        self._path = workspace / FILE

    def make(self, *, anew: bool = False) -> str | None:
        """A token, shown this once; None where there is one already. `anew` ends the one before."""
        with locked(self._path.with_suffix(".lock"), wait_s=10):
            if self._path.is_file() and not anew:
                return None
            token = secrets.token_urlsafe(32)
            # 256 random bits: a slow hash would add nothing.
            kept = {"sha256": _digest(token), "created": time.time()}
            write_atomically(self._path, json.dumps(kept) + "\n", mode=0o600)
        return token

    def is_right(self, given: str) -> bool:
        """Whether `given` is the token, as of now: a new one ends the old one's sessions with the next request.

        Raises:
            FmopsError: the file is broken.
        """
        if not self._path.is_file():
            return False
        try:
            kept = str(json.loads(self._path.read_bytes())["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise FmopsError(f"{self._path} holds no token: {error}. `fmops console --new-token` makes one.") from None
        return hmac.compare_digest(_digest(given), kept)


def names(host: str, port: int) -> frozenset[str]:
    """What a browser may call this server in `Host`.

    Raises:
        FmopsError: it would listen on every address; none of them could be checked.
    """
    if host in ANYWHERE:
        raise FmopsError(
            f"the console does not listen on {host}: which name a browser uses could not be checked. Give --host the "
            "one address that people type, or leave it on 127.0.0.1 and reach it through an SSH tunnel."
        )
    own = f"[{host}]" if ":" in host else host
    return frozenset(f"{name}:{port}" for name in (*LOOPBACK, own.lower()))


def refusal(headers: Mapping[str, str], *, known: frozenset[str], changes: bool) -> str | None:
    """Why a request is not this page's own, or None. `changes`: it is more than a look."""
    host = headers.get("host", "").lower()
    if host not in known:
        return f"this console is not {host or 'nameless'!r}. Open it as http://{sorted(known)[0]}."
    if not changes:
        return None
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"http://{host}":
        return f"a page of {origin} may not give orders here"
    if headers.get("sec-fetch-site", "same-origin") != "same-origin" or headers.get(HEADER) != "1":
        return f"orders come from the console's own page, with the header {HEADER}: 1"
    return None


def cookie_name(port: int) -> str:
    """Cookies are shared by all ports of a host: two consoles must not end each other's sessions."""
    return f"fmops-console-{port}"


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
