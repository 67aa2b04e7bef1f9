"""One forward pass as every layer sees it: where the new tokens stand, and which keys they may see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx


class Step:
    """``count`` new tokens behind ``offset`` cached ones, for a batch.

    ``left_padding`` tells how many tokens at the start of each row are padding, ``length`` how
    many tokens (padding included) the rows will have once a prompt fed in chunks is complete,
    ``positions`` [B, T] and ``segments`` [B, T] describe packed rows. ``memo`` shares what is
    equal for many layers, masks above all.
    """

    def __init__(
        self,
        count: int,
        offset: int = 0,
        *,
        left_padding: Sequence[int] | None = None,
        length: int | None = None,
        positions: mx.array | None = None,
        segments: mx.array | None = None,
    ):
        self.count = count
        self.offset = offset
        self.left_padding = tuple(left_padding) if left_padding and any(left_padding) else None
        self.length = max(length or 0, offset + count)
        self.positions = positions
        self.segments = segments
        self._memo: dict[Any, Any] = {}

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made once a forward pass for each ``key``."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    @cached_property
    def padding(self) -> mx.array | None:
        """Left padding as an array [B, 1], or None when no row has any."""
        return None if self.left_padding is None else mx.array(self.left_padding)[:, None]

    @cached_property
    def first_position(self) -> int | mx.array:
        """The position of the first new token: one for all rows, or [B]. Negative in padding."""
        return self.offset if self.padding is None else self.offset - self.padding[:, 0]

    @cached_property
    def query_positions(self) -> mx.array:
        """The position of every new token, [1, T] or [B, T]. Negative in padding."""
        if self.positions is not None:
            return self.positions
        rows = mx.arange(self.offset, self.offset + self.count)[None]
        return rows if self.padding is None else rows - self.padding

    @cached_property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens in each row without its padding; a single entry when all rows agree."""
        if self.left_padding is None:
            return (self.length,)
        return tuple(self.length - padding for padding in self.left_padding)
