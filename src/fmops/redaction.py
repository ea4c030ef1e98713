"""Personal data and secrets: found by pattern and check digit, replaced by their type.

Enters: text. Leaves: the text with `<email>`, `<card>` … in their place, and counts by type.
Refuses: nothing; names and street addresses are beyond patterns and stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"


def redact(text: str) -> tuple[str, Counter[str]]:
    """Replace what is personal or secret; also count it by type.

    E-mail addresses and IPv4 patterns follow datatrove's PIIFormatter. Reserved domains (RFC 2606) and addresses that
    are not public are examples, no personal data, and stay.
    """
    counts: Counter[str] = Counter()
    for kind, sign, pattern, is_personal in _PATTERNS:
        if sign and sign not in text:
            continue

        def replacement(match: re.Match[str], kind: str = kind, valid: Callable[[str], bool] = is_personal) -> str:
            # Some patterns keep a label before the secret: group 1.
            label = match.group(1) if match.re.groups else ""
            if not valid(match.group(0)[len(label) :]):
                return match.group(0)
            counts[kind] += 1
            return f"{label}<{kind}>"

        text = pattern.sub(replacement, text)
    return text, counts


def _always(_: str) -> bool:
    return True


def _is_real_email(address: str) -> bool:
    domain = address.rpartition("@")[2].lower()
    reserved = ("example.com", "example.org", "example.net", ".example", ".invalid", ".test", ".localhost")
    return not any(domain == name.lstrip(".") or domain.endswith(f".{name.lstrip('.')}") for name in reserved)


def _is_phone(number: str) -> bool:
    """Not a decimal fraction with its sign; WHOIS writes +49.3012345, with more digits after the point."""
    return re.fullmatch(r"\+\d{1,3}\.\d{1,6}", number) is None


def _is_public_ip(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def passes_luhn(number: str) -> bool:
    """Whether the digits end in the check digit of payment cards (ISO/IEC 7812-1)."""
    digits = [int(sign) for sign in number if sign.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


# Type, a string without which the pattern cannot match (to skip the search), pattern, check.
# Secrets come first: an e-mail address inside a private key is no e-mail address.
_PATTERNS: tuple[tuple[str, str, re.Pattern[str], Callable[[str], bool]], ...] = (
    (
        "private-key",
        "-----BEGIN",
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
        _always,
    ),
    ("jwt", "eyJ", re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{4,}\.[\w-]{8,}"), _always),
    ("aws-key", "", re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b"), _always),
    (
        "aws-secret",
        "",
        re.compile(
            r"(?i)(\baws_?secret(?:_?access)?(?:_?key)?[\"']?\s*[:=]\s*[\"']?)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"
        ),
        _always,
    ),
    (
        "token",
        "",
        re.compile(
            r"\b(?:gh[pousr]_\w{36,}|github_pat_\w{22,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,}"
            r"|sk-(?:proj-|ant-)?[\w-]{20,}|glpat-[\w-]{20,}|sk_live_\w{20,}|pypi-[\w-]{50,})"
        ),
        _always,
    ),
    (
        "email",
        "@",
        re.compile(
            r"\b[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*@"
            r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}\b"
        ),
        _is_real_email,
    ),
    ("card", "", re.compile(r"(?<![\w.+-])\d(?:[ -]?\d){12,18}(?![\w-])"), passes_luhn),
    ("ip", ".", re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w]|\.\d)"), _is_public_ip),
    ("ip", ":", re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:{1,2}){2,7}[0-9A-Fa-f]{1,4}(?![\w:])"), _is_public_ip),
    (
        "phone",
        "",
        re.compile(
            r"(?<![\w.+-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)|\d{1,4})(?:[ .-]?\d{2,4}){2,4}"
            r"|\(\d{3}\) ?\d{3}-\d{4})(?![\w-])"
        ),
        _is_phone,
    ),
)
