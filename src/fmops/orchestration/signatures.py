"""Who vouches for a release: the workspace's key, or the one that the environment names.

Enters: a store, a release's record. Leaves: a signature beside the artifacts, or the proof that there is a good one.
Refuses: what `adapters.signing` refuses.
"""

from __future__ import annotations

import os
from pathlib import Path

from fmops.errors import FmopsError
from fmops.store import Record, Store

PRIVATE_KEY, PUBLIC_KEY = "FMOPS_SIGNING_KEY", "FMOPS_VERIFY_KEY"
"""Environment variables: paths of keys in PEM form that are kept apart from the workspace."""


def signature_path(store: Store, record: Record) -> Path:
    """Where a release's signature lies: outside the artifact, since no two signatures are equal."""
    return store.root / "signatures" / f"{record.key}.sig"


def sign_release(store: Store, record: Record) -> Path:
    """Sign a release with `$FMOPS_SIGNING_KEY`, else with the workspace's own key, made at first use.

    Raises:
        FmopsError: it is no release; or what `adapters.signing` refuses.
    """
    if record.kind != "release":
        raise FmopsError(f"{record.key} is a {record.kind}. Only a release is signed: nothing else is served.")
    from fmops.adapters.signing import make_keys, sign_folder

    stated = os.environ.get(PRIVATE_KEY)
    private = Path(stated) if stated else make_keys(store.root / "keys")[0]
    signature = signature_path(store, record)
    sign_folder(store.files(record), signature, private_key=private)
    if store.shared:
        store.shared.keep(f"signatures/{signature.name}", signature)
    return signature


def check_release(store: Store, record: Record) -> None:
    """Verify a release against `$FMOPS_VERIFY_KEY`, else against the workspace's own public key.

    Raises:
        IntegrityError: unsigned, signed by another key, or changed since.
        FmopsError: it is signed, and the key to verify it with is not here.
    """
    from fmops.adapters.signing import PUBLIC, verify_folder

    stated = os.environ.get(PUBLIC_KEY)
    public = Path(stated) if stated else store.root / "keys" / PUBLIC
    signature = signature_path(store, record)
    if store.shared:
        store.shared.bring(f"signatures/{record.key}.sig", signature)
    if signature.is_file() and not public.is_file():
        lacks = f"{PUBLIC_KEY} names {public}, which is not there" if stated else f"{store.root} has no keys/{PUBLIC}"
        raise FmopsError(
            f"{record.key} is signed, and {lacks}: who signed it cannot be checked. The key lies in the workspace that "
            f"promoted it. Copy its keys/{PUBLIC} here by a way that you trust, not by the bucket (never signing.key, "
            f"the private one), and name it: `export {PUBLIC_KEY}=/path/to/{PUBLIC}`."
        )
    verify_folder(store.files(record), signature, public_key=public)
