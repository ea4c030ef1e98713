"""What a run shows while it works: on a terminal a bar, when it ends, and the figures below it."""

from __future__ import annotations

import io
import re

from fmops.orchestration.events import open_view


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_eighty_columns_the_bar_its_end_and_both_domains_losses_are_seen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = {"tokens_per_s": 812.0, "mfu": 0.41, "loss": 2.31, "new_bits_per_byte": 1.23, "old_bits_per_byte": 0.93}
    stream = Terminal()
    with open_view(stream) as view:
        view.show("pretrain", {"event": "started"})
        view.show("pretrain", {"event": "progress", "done": 32768, "total": 65536, "unit": "tokens", "shown": shown})
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    bar = next(line for line in lines if "32,768/65,536 tokens" in line)
    assert "pretrain" in bar
    assert "━" in bar
    assert "eta" in bar
    assert any("tokens/s 812  mfu 0.41  loss 2.31  new bits/byte 1.23  old bits/byte 0.93" in line for line in lines), (
        lines
    )
