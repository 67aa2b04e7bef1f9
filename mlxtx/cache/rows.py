"""Rows of keys or values, plain or as codes, and the buffer of slots that holds them.

Rows are ``mx.array`` [B, K, S, D] or ``QuantizedRows``, which stand for the same. What is below
works on either, so nothing else has to ask which one it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx

from mlxtx.metal_kernels.kv_quantize import QuantizedRows, kv_quantize, row_words

Rows: TypeAlias = mx.array | QuantizedRows


def array_of(rows: Rows) -> mx.array:
    """The array [B, K, S, .] that holds the rows: themselves, or words of codes and scales."""
    return rows.words if isinstance(rows, QuantizedRows) else rows


def with_array(rows: Rows, array: mx.array) -> Rows:
    """Rows of the same format that lie in ``array``."""
    return rows._replace(words=array) if isinstance(rows, QuantizedRows) else array


def slice_rows(rows: Rows, start: int, stop: int) -> Rows:
    """Rows start to stop."""
    if stop - start == count_rows(rows):
        return rows
    return with_array(rows, array_of(rows)[:, :, start:stop])


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

    def from_array(self, array: mx.array, dim: int, dtype: mx.Dtype) -> Rows:
        """Rows of ``dim`` channels and ``dtype`` in this format from the array that holds them.
        Raises ValueError if it cannot."""
        width, kind = dim, dtype
        if self.bits is not None:
            width, kind = row_words(dim, self.bits, self.group_size, dtype.size), mx.uint32
        if array.ndim != 4 or array.shape[-1] != width or array.dtype != kind:
            raise ValueError(f"rows of {array.dtype} {array.shape}, not of {kind} and {width} wide")
        if self.bits is None:
            return array
        return QuantizedRows(array, self.bits, self.group_size, dim, dtype, self.rotate)

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
    def dtype_name(self) -> str | None:
        """Of the rows as they come back, for example ``float16``; None as long as there is none."""
        return None if self.rows is None else str(self.rows.dtype).removeprefix("mlx.core.")

    @property
    def arrays(self) -> list[mx.array]:
        """The buffer, if there is one."""
        return [] if self.rows is None else [array_of(self.rows)]

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
        array = array_of(like)
        room = mx.zeros((*array.shape[:2], slots - capacity, array.shape[3]), array.dtype)
        if self.rows is None:
            self.rows = with_array(like, room)
        else:
            grown = mx.concatenate([array_of(self.rows), room], axis=2)
            self.rows = with_array(self.rows, grown)

    def write(self, slot: int, new: Rows) -> None:
        """Puts ``new`` into the slots from ``slot`` on, which are reserved."""
        assert self.rows is not None
        stop = slot + count_rows(new)
        buffer = array_of(self.rows)[:]  # what ``slice_rows`` handed out whole stays as it is
        array = array_of(new)
        if array.shape == buffer.shape:  # MLX would take the view, and with it all that it is of
            array = mx.contiguous(array)
        buffer[:, :, slot:stop] = array  # in place, unless something shares the buffer
        self.rows = with_array(self.rows, buffer)

    def read(self, start: int, stop: int) -> Rows:
        assert self.rows is not None
        return slice_rows(self.rows, start, stop)

    def copy(self) -> Slots:
        """Another handle on the same buffer; the first to write to it gets its own."""
        other = Slots(self.limit)
        other.rows = self.rows  # ``write`` changes a handle of its own
        return other


def capacity_for(slots: int, limit: int | None, block: int = Slots.block) -> int:
    """Slots that are allocated when ``slots`` are needed: whole blocks, within the limit."""
    whole = -(-slots // block) * block
    return whole if limit is None else min(whole, limit)
