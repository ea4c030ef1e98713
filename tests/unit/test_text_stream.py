"""What a reader sees while an answer grows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fmops.deployment.serving.text import TextStream


def decode(ids) -> str:
    """One token a byte, as in a byte-level vocabulary."""
    return bytes(ids).decode("utf-8", errors="replace")


def spaced(ids) -> str:
    """Words that carry a leading space which the first one loses, as SentencePiece does."""
    return "".join(f" w{i}" for i in ids)[1:]


def pieces(stream: TextStream, ids) -> list[str]:
    shown = []
    for token in ids:
        shown.append(stream.push(token))
        if stream.stopped:
            return shown
    return [*shown, stream.finish()]


@given(st.text(max_size=40))
def test_the_pieces_join_to_the_text(text):
    assert "".join(pieces(TextStream(decode), text.encode())) == text


@given(st.binary(max_size=40))
def test_broken_bytes_are_shown_as_a_decoder_shows_them(raw):
    assert "".join(pieces(TextStream(decode), raw)) == decode(raw)


def test_half_a_character_is_never_shown():
    assert pieces(TextStream(decode), "né🙂".encode()) == ["n", "", "é", "", "", "", "🙂", ""]


def test_a_space_before_a_word_survives():
    assert "".join(pieces(TextStream(spaced), [1, 2, 3])) == "w1 w2 w3"


@settings(max_examples=300)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_stop_string_that_is_complete_first(text, stops):
    stream = TextStream(decode, stops)
    shown = "".join(pieces(stream, text.encode()))
    for end in range(len(text) + 1):
        found = [text[:end].index(stop) for stop in stops if stop in text[:end]]
        if found:
            assert (shown, stream.stopped) == (text[: min(found)], True)
            return
    assert (shown, stream.stopped) == (text, False)


def test_the_start_of_a_stop_string_is_held_back_until_it_is_none():
    stream = TextStream(decode, ["STOP"])
    assert [stream.push(byte) for byte in b"xSTx"] == ["x", "", "", "STx"]
