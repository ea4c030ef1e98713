"""Token ids to text, piece by piece.

Enters: token ids one at a time. Leaves: text that never changes once it is out, cut before the first stop string.
Refuses: to show half a character, or the start of what may become a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"
"""What a decoder shows for bytes that are not yet a character."""


class TextStream:
    """The text of one answer as it grows.

    Only the tokens since the last complete character are decoded again, so a long answer costs no more per token than
    a short one. The window keeps one finished piece in front: some tokenizers drop a leading space at the start.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._window = 0
        self._read = 0
        self._held = ""
        self.stopped = False
        """True once a stop string has been found; nothing follows."""

    def push(self, token: int) -> str:
        """Take a token; return the text that may be shown now, often empty."""
        self._ids.append(token)
        grown = self._decode(self._ids[self._window :])
        if grown.endswith(INCOMPLETE):
            return ""
        return self._show(self._advance(grown))

    def finish(self) -> str:
        """The rest, when no token follows: what was held back, and an incomplete character as U+FFFD."""
        if self.stopped:
            return ""
        rest = self._show(self._advance(self._decode(self._ids[self._window :])))
        rest, self._held = rest + self._held, ""
        return rest

    def _advance(self, grown: str) -> str:
        before = self._decode(self._ids[self._window : self._read])
        self._window, self._read = self._read, len(self._ids)
        return grown[len(before) :]

    def _show(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
