"""Rows of keys or values, plain or as codes, and the buffer of slots that holds them.

Rows are ``mx.array`` [B, K, S, D] or ``QuantizedRows``, which stand for the same. What is below
works on either, so nothing else has to ask which one it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx

from mlxtx.metal_kernels.kv_quantize import QuantizedRows, kv_quantize

Rows: TypeAlias = mx.array | QuantizedRows


def arrays_of(rows: Rows) -> tuple[mx.array, ...]:
    """What rows consist of: themselves, or codes, scales and biases."""
    if isinstance(rows, QuantizedRows):
        return rows.codes, rows.scales, rows.biases
    return (rows,)


def with_arrays(rows: Rows, arrays: tuple[mx.array, ...]) -> Rows:
    """Rows of the same format that consist of ``arrays``."""
    if isinstance(rows, QuantizedRows):
        codes, scales, biases = arrays
        return rows._replace(codes=codes, scales=scales, biases=biases)
    return arrays[0]


def map_rows(function: Callable[[mx.array], mx.array], rows: Rows) -> Rows:
    """Rows whose arrays each went through ``function``."""
    return with_arrays(rows, tuple(function(array) for array in arrays_of(rows)))


def slice_rows(rows: Rows, start: int, stop: int) -> Rows:
    """Rows start to stop."""
    return map_rows(lambda array: array[:, :, start:stop], rows)


def count_rows(rows: Rows) -> int:
    return rows.shape[2]


@dataclass(frozen=True)
class RowFormat:
    """How rows are kept: ``bits`` None as they are, else as codes in groups of channels."""

    bits: int | None = None
    group_size: int = 64
    rotate: bool = False

    def encode(self, rows: Rows) -> Rows:
        """Rows [B, K, S, D] in this format; D is padded with zeros to whole groups. Codes are
        taken to be in it already."""
        if self.bits is None or isinstance(rows, QuantizedRows):
            return rows
        return kv_quantize(rows, bits=self.bits, group_size=self.group_size, rotate=self.rotate)

    def from_arrays(self, arrays: tuple[mx.array, ...], dim: int) -> Rows:
        """Rows of ``dim`` channels in this format from what they consist of."""
        if self.bits is None:
            return arrays[0]
        codes, scales, biases = arrays
        return QuantizedRows(codes, scales, biases, self.bits, self.group_size, dim, self.rotate)

    def nbytes(self, dim: int, itemsize: int) -> int:
        """Bytes of one row of ``dim`` channels whose scales have ``itemsize`` bytes."""
        if self.bits is None:
            return dim * itemsize
        groups = -(-dim // self.group_size)
        return groups * (self.group_size * self.bits // 8 + 2 * itemsize)


PLAIN_FORMAT = RowFormat()


class Slots:
    """A buffer of rows that grows by an eighth, at least by a block, up to ``limit`` slots.

    A known length is reserved at once, so a prompt fed in chunks is never copied to grow.
    """

    block = 256

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.rows: Rows | None = None

    @property
    def capacity(self) -> int:
        return 0 if self.rows is None else count_rows(self.rows)

    @property
    def dim(self) -> int:
        """Channels of a row, 0 as long as there is none."""
        return 0 if self.rows is None else self.rows.shape[-1]

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return () if self.rows is None else arrays_of(self.rows)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def reserve(self, slots: int, like: Rows) -> None:
        """Room for ``slots`` rows of the format, heads and width of ``like``."""
        capacity = self.capacity
        if slots <= capacity:
            return
        if capacity:
            slots = max(slots, capacity + capacity // 8)
        slots = capacity_for(slots, self.limit, self.block)
        added = slots - capacity

        def room(array: mx.array) -> mx.array:
            return mx.zeros((*array.shape[:2], added, array.shape[3]), array.dtype)

        if self.rows is None:
            self.rows = map_rows(room, like)
        else:
            grown = [mx.concatenate([a, room(a)], axis=2) for a in arrays_of(self.rows)]
            self.rows = with_arrays(self.rows, tuple(grown))

    def write(self, slot: int, new: Rows) -> None:
        """Puts ``new`` into the slots from ``slot`` on, which are reserved."""
        assert self.rows is not None
        stop = slot + count_rows(new)
        for buffer, array in zip(arrays_of(self.rows), arrays_of(new), strict=True):
            buffer[:, :, slot:stop] = array  # in place, unless a copy shares the buffer

    def read(self, start: int, stop: int) -> Rows:
        assert self.rows is not None
        return slice_rows(self.rows, start, stop)

    def copy(self) -> Slots:
        """Another handle on the same buffer; the first to write to it gets its own."""
        other = Slots(self.limit)
        if self.rows is not None:
            other.rows = map_rows(lambda array: array[:], self.rows)
        return other


def capacity_for(slots: int, limit: int | None, block: int = Slots.block) -> int:
    """Slots that are allocated when ``slots`` are needed: whole blocks, within the limit."""
    whole = -(-slots // block) * block
    return whole if limit is None else min(whole, limit)
