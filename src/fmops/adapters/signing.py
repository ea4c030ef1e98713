"""Signatures of releases with a local key, in the format of OpenSSF Model Signing (model-signing).

Enters: a release folder, an elliptic-curve key. Leaves: a Sigstore bundle beside the store's artifacts.
Refuses: a folder with a changed, missing or extra file or a link, another key, and a signature that is none.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, signing, verifying

from fmops.errors import FmopsError, IntegrityError
from fmops.store import write_atomically

PRIVATE, PUBLIC = "signing.key", "signing.pub"


def make_keys(folder: Path) -> tuple[Path, Path]:
    """The private and the public key in `folder`, made when there are none; the private one is readable by its owner.

    Raises:
        FmopsError: one of the two is missing.
    """
    private, public = folder / PRIVATE, folder / PUBLIC
    if private.is_file() != public.is_file():
        lost = public if private.is_file() else private
        raise FmopsError(f"{lost} is missing. Put it back, or remove both keys and sign the releases again.")
    if not private.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        write_atomically(public, _public_pem(key))
        descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
    return private, public


def sign_folder(folder: Path, signature: Path, *, private_key: Path) -> None:
    """Sign every file below `folder`; the signature appears whole or not at all.

    Raises:
        FmopsError: the key cannot be read.
        IntegrityError: the folder holds a symbolic link.
    """
    partial = signature.with_name(f".{signature.name}.tmp")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (ValueError, TypeError, OSError) as error:
        raise FmopsError(f"{private_key} is no usable elliptic-curve key in PEM form: {error}.") from None
    try:
        config.set_hashing_config(_every_file()).sign(folder, partial)
    except ValueError as error:
        raise IntegrityError(f"{folder.name} cannot be signed: {error}") from None
    partial.replace(signature)


def verify_folder(folder: Path, signature: Path, *, public_key: Path) -> None:
    """Compare every file below `folder` with what was signed.

    Raises:
        IntegrityError: it is unsigned, signed with another key, or not what was signed; says which file.
    """
    if not signature.is_file():
        raise IntegrityError(f"{folder.name} is not signed. If you trust it, sign it: `fmops sign {folder.name}`.")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        verifier.set_hashing_config(_every_file()).verify(folder, signature)
    except InvalidSignature:
        raise IntegrityError(
            f"the signature of {folder.name} is not by {public_key}. Do not serve it. If another workspace "
            "promoted it, name that one's public key in FMOPS_VERIFY_KEY."
        ) from None
    except OSError as error:
        raise IntegrityError(f"the signature of {folder.name} cannot be checked: {error}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{folder.name} is not what was signed, or not with {public_key.name}: {error}. Do not serve it."
        ) from None


def _every_file() -> hashing.Config:
    # By default the library leaves files named .git… out, and an added one would go unseen.
    return hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()
