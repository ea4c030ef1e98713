"""The bytes of one token.

Enters: a Transformers tokenizer and an id. Leaves: bytes; concatenated over an answer they are its UTF-8 text.
Refuses: nothing; a tokenizer of unknown make yields the bytes of its decoded text.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How tokenizers with byte fallback name a single byte."""


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Bytes of one token. Byte-level vocabularies spell each byte as a printable character (GPT-2's table)."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""
    if token in tokenizer.added_tokens_decoder:
        return str(piece).encode()
    if matched := BYTE.fullmatch(piece):
        return bytes.fromhex(matched.group(1))
    if "\u2581" in piece:
        return str(piece).replace("\u2581", " ").encode()
    table = _characters()
    if _is_byte_level(tokenizer) and all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


@cache
def _characters() -> dict[str, int]:
    """GPT-2's table, turned round: printable character → byte (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}
