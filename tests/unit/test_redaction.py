"""Personal data and secrets are found in every common form; what only looks like them stays."""

from __future__ import annotations

import base64
import json
import random
import string

import pytest

from fmops.redaction import passes_luhn, redact


def luhn(prefix: str, length: int, rng: random.Random) -> str:
    body = prefix + "".join(rng.choices(string.digits, k=length - len(prefix) - 1))
    return next(body + digit for digit in string.digits if passes_luhn(body + digit))


def token(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits, k=length))


def jwt(rng: random.Random) -> str:
    parts = [json.dumps({"alg": "HS256", "typ": "JWT"}), json.dumps({"sub": token(rng, 8)})]
    encoded = [base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, token(rng, 43)])


def samples(kind: str, rng: random.Random) -> str:
    upper = "".join(rng.choices(string.ascii_uppercase + string.digits, k=16))
    card = luhn(rng.choice(["4", "51", "37"]), 16, rng)
    makers = {
        "email": f"{token(rng, 6).lower()}.{token(rng, 4)}+news@{token(rng, 5)}-corp.co.uk",
        "card": rng.choice([card, f"{card[:4]} {card[4:8]} {card[8:12]} {card[12:]}", "-".join([card[:4], card[4:]])]),
        "ip": rng.choice([f"{rng.randint(11, 99)}.8.{rng.randint(0, 255)}.7", "2001:4860:4860:0:0:0:0:8888"]),
        "phone": rng.choice(["+49 30 1234 5678", "(555) 867-5309", "+1 212 555 0147", "+44 (20) 7946 0958"]),
        "aws-key": rng.choice(["AKIA", "ASIA"]) + upper,
        "aws-secret": f"aws_secret_access_key = {token(rng, 40)}",
        "jwt": jwt(rng),
        "token": rng.choice([f"ghp_{token(rng, 36)}", f"hf_{token(rng, 34)}", f"xoxb-{token(rng, 24)}"]),
        "private-key": f"-----BEGIN RSA PRIVATE KEY-----\n{token(rng, 64)}\n-----END RSA PRIVATE KEY-----",
    }
    return makers[kind]


KINDS = ("email", "card", "ip", "phone", "aws-key", "aws-secret", "jwt", "token", "private-key")


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_of_a_kind_is_replaced(kind: str) -> None:
    rng = random.Random(11)
    for _ in range(200):
        secret = samples(kind, rng)
        text, counts = redact(f"Before it ({secret}), after it.")
        assert counts == {kind: 1}, secret
        assert secret.rpartition(" = ")[2] not in text
        assert f"<{kind}>" in text
        assert text.startswith("Before it (")
        assert text.endswith("), after it.")


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com and root@localhost and x@y.test",
        "127.0.0.1, 10.0.0.1, 192.168.1.5, 0.0.0.0, ::1",
        "4111 1111 1111 1112 fails its check digit; 0000000000000000 is no card",
        "version 1.2.3.4.5, section 3.11.7, 999.1.1.1",
        "2**64 = 18446744073709551616, pi = 3.14159265358979323846",
        "call foo(555) 8 times; 2024-01-02 10:11:12; ISBN 978-3-16-148410-0",
        "@decorator\ndef f(self) -> int: ...  # a[1:2], d['a':'b'], std::vector",
        "AKIA is a prefix; eyJ is how a token starts; sk-learn; -----BEGIN CERTIFICATE-----",
        "git@ and a @ b and @@@ and me@",
        "the slope is +3.140000, then +1.618 and +2.7",
    ],
)
def test_what_is_no_personal_data_stays(text: str) -> None:
    assert redact(text) == (text, {})


def test_a_private_key_without_its_end_is_cut_to_the_end_of_the_text() -> None:
    text, counts = redact("key:\n-----BEGIN PRIVATE KEY-----\nMIIE\nabc")
    assert text == "key:\n<private-key>"
    assert counts == {"private-key": 1}


def test_redaction_of_redacted_text_changes_nothing() -> None:
    rng = random.Random(5)
    once, _ = redact("\n".join(samples(kind, rng) for kind in KINDS))
    assert redact(once) == (once, {})


def test_long_hostile_text_takes_linear_time() -> None:
    import time

    for unit in ("a" * 50 + "@", "1 " * 30, "1:" * 20, "a.a.", "eyJ" + "a" * 20 + "."):
        hostile = unit * (200_000 // len(unit))
        start = time.process_time()
        redact(hostile)
        assert time.process_time() - start < 3, unit
