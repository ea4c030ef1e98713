"""Attention for many answers that each grow by a token: one pool of keys and values, a row an answer.

Enters: the newest query, key and value of each row. Leaves: what each row attends to.
Refuses: nothing; `tree_attention`, which calls it, does.

Keys are taken in multiples of 16, hidden ones included: so a row gives the same bits beside rows of any length (CPU
kernels of torch, measured; see docs/log.md).
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from fmops.adapters.slot_attention import SlotCache

LANES = 16
WASTED_BYTES = 400_000
"""Hidden keys and values to read for a row rather than to call attention for it alone. A call cost 36 µs; that reading
so much costs as long is an estimate (10 GB/s)."""


class Pool:
    """Keys and values of all answers under way. Memory is touched as it is written to."""

    def __init__(self, rows: int, room: int) -> None:
        """`room` is the most tokens that a row will hold."""
        self.rows = rows
        self.room = -(-room // LANES) * LANES
        self.lengths = [0] * rows
        """Tokens held; idle rows hold none."""
        self.used = rows
        """Rows that take part in the next pass, the first ones."""
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._written = (torch.empty(0), torch.empty(0))
        self._hidden: dict[int | None, torch.Tensor] = {}
        """By window, added to the scores: 0 where a key is seen, minus infinity elsewhere."""
        self._widths: list[int] = []

    def put(self, row: int, cache: SlotCache) -> None:
        """Fill a row with what a prompt left behind."""
        self.lengths[row] = cache.length
        for layer in cache.keys:
            keys, values = self._layer(layer, cache.keys[layer], cache.values[layer])
            keys[row, :, : cache.length] = cache.keys[layer][0, :, : cache.length]
            values[row, :, : cache.length] = cache.values[layer][0, :, : cache.length]

    def move(self, source: int, target: int) -> None:
        """Give an answer another row; its own becomes idle."""
        length = self.lengths[source]
        for tensors in (self._keys, self._values):
            for tensor in tensors.values():
                tensor[target, :, :length] = tensor[source, :, :length]
        self.lengths[target], self.lengths[source] = length, 0

    def begin(self, used: int) -> None:
        """Prepare a pass of the first `used` rows, each with one more token."""
        self.used = used
        lengths = torch.tensor(self.lengths[:used])
        self._written = (torch.arange(used), lengths)
        widths = [-(-(length + 1) // LANES) * LANES for length in self.lengths[:used]]
        self._widths = widths
        self._hidden = {}

    def end(self) -> None:
        """Count the tokens of the pass; idle rows stay idle."""
        self.lengths = [length + 1 if length else 0 for length in self.lengths]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None,
        window: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Shapes: query (used, heads, 1, head size); key and value (used, key heads, 1, head size).

        `window` is how many of its newest tokens a row sees, the one of this pass among them; None: all.
        """
        keys, values = self._layer(layer, key, value)
        keys[self._written[0], :, self._written[1]] = key[:, :, 0]
        values[self._written[0], :, self._written[1]] = value[:, :, 0]
        # Heads that share keys are laid side by side as positions.
        shared = query.view(self.used, key.shape[1], query.shape[1] // key.shape[1], query.shape[3])
        hidden, widest = self._hides(window), max(self._widths)
        wasted = sum(widest - width for width in self._widths) * key[0].numel() * 8
        if wasted <= WASTED_BYTES * self.used:
            some = (slice(self.used), slice(None), slice(widest))
            found = scaled_dot_product_attention(shared, keys[some], values[some], attn_mask=hidden, scale=scale)
        else:
            found = torch.cat([
                scaled_dot_product_attention(
                    shared[row : row + 1], keys[row : row + 1, :, :width], values[row : row + 1, :, :width],
                    attn_mask=hidden[row : row + 1, :, :, :width], scale=scale,
                )
                for row, width in enumerate(self._widths)
            ])  # fmt: skip
        return found.reshape(self.used, query.shape[1], 1, values.shape[3])

    def _hides(self, window: int | None) -> torch.Tensor:
        """What each row of the pass does not see, shape (used, 1, 1, widest)."""
        if window not in self._hidden:
            place, newest = torch.arange(max(self._widths))[None, :], self._written[1][:, None]
            seen = place <= newest
            if window:
                seen &= place > newest - window
            self._hidden[window] = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None, None, :]
        return self._hidden[window]

    def _layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._keys:
            # Zeros: what a row has not written is hidden, and must be a number all the same.
            self._keys[layer] = key.new_zeros(self.rows, key.shape[1], self.room, key.shape[3])
            self._values[layer] = value.new_zeros(self.rows, value.shape[1], self.room, value.shape[3])
        return self._keys[layer], self._values[layer]
