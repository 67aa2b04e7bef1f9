"""A stretch of a sequence kept in slots: in order, or in a ring that overwrites its oldest rows."""

from __future__ import annotations

from dataclasses import dataclass

from mlxtx.cache.rows import RowFormat, Rows, Slots, count_rows, slice_rows
from mlxtx.errors import MlxtxError


@dataclass(frozen=True)
class Buffer:
    """The whole buffers that a part lies in, from ``slot`` on, with only older rows before it."""

    keys: Rows
    values: Rows | None
    slot: int


@dataclass(frozen=True)
class Part:
    """Neighbouring rows ``start .. start + count`` of a sequence, as attention reads them.
    ``values`` None: values are the first channels of the keys."""

    start: int
    keys: Rows
    values: Rows | None
    buffer: Buffer | None = None

    @property
    def count(self) -> int:
        return count_rows(self.keys)

    @property
    def stop(self) -> int:
        return self.start + self.count

    def slice(self, start: int, stop: int) -> Part:
        """Only rows from start to stop, counted in the sequence."""
        if start <= self.start and stop >= self.stop:
            return self
        low, high = max(start, self.start) - self.start, min(stop, self.stop) - self.start
        values = None if self.values is None else slice_rows(self.values, low, high)
        buffer = self.buffer
        if buffer is not None:
            buffer = Buffer(buffer.keys, buffer.values, buffer.slot + low)
        return Part(self.start + low, slice_rows(self.keys, low, high), values, buffer)


class Segment:
    """Rows ``origin .. stop`` of a sequence. Row i lies in slot i - origin.

    It never holds more than ``limit`` rows, which bounds its buffers.

    With ``reach`` and ``rewind`` it is a ring of reach - 1 + rewind slots: enough for a query to
    see the ``reach - 1`` rows before it even after the newest ``rewind`` rows were taken back.
    """

    def __init__(
        self,
        key_format: RowFormat,
        value_format: RowFormat,
        *,
        origin: int = 0,
        reach: int | None = None,
        rewind: int = 0,
        limit: int | None = None,
    ):
        self.key_format, self.value_format = key_format, value_format
        self.origin = self.stop = self.newest = origin
        self.reach, self.rewind = reach, rewind
        self.ring = None if reach is None else max(1, reach - 1 + rewind)
        self.limit = self.ring if limit is None else limit
        self.keys, self.values = Slots(self.limit), Slots(self.limit)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def oldest(self) -> int:
        """The first row that is still there. ``newest`` is how far rows were ever written."""
        return self.origin if self.ring is None else max(self.origin, self.newest - self.ring)

    def _needed_before(self, row: int) -> int:
        """The first row that a query at ``row`` may look at."""
        return self.origin if self.reach is None else max(self.origin, row - self.reach + 1)

    def append(self, k: Rows, v: Rows | None, expected: int = 0) -> list[Part]:
        """Appends rows [B, K, T, D] and returns what their queries may see. ``expected``: rows
        the sequence will have, as far as that is known."""
        keys = self.key_format.encode(k)
        values = None if v is None else self.value_format.encode(v)
        count = k.shape[2]
        first = self._needed_before(self.stop)
        if self.ring is None or self.stop + count - first <= self.ring:
            self.write(keys, values, expected)
            return self.parts(first)
        # The new rows overwrite some that their own queries must see: look first, then write.
        parts = self.parts(first)
        parts.append(Part(self.stop, keys, values))
        skipped = max(0, count - self.ring)
        self.stop += skipped
        newest = parts[-1].slice(self.stop, self.stop + count)
        self.write(newest.keys, newest.values, expected)
        return parts

    def write(self, keys: Rows, values: Rows | None, expected: int = 0) -> None:
        """Puts rows behind the last one, in the segment's format already."""
        pairs = [(self.keys, keys)] + ([] if values is None else [(self.values, values)])
        stop = self.stop + count_rows(keys)
        for slots, new in pairs:
            slots.reserve(min(max(stop, expected) - self.origin, self.ring or 1 << 62), new)
            for row, slot, count in self._runs(self.stop, stop):
                done = row - self.stop
                slots.write(slot, slice_rows(new, done, done + count))
        self.stop = stop
        self.newest = max(self.newest, stop)

    def _runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(row, slot, count) of the neighbouring slots that rows start to stop lie in."""
        if stop <= start:
            return []
        slot = start - self.origin
        if self.ring is None:
            return [(start, slot, stop - start)]
        slot %= self.ring
        first = min(stop - start, self.ring - slot)
        runs = [(start, slot, first)]
        if start + first < stop:
            runs.append((start + first, 0, stop - start - first))
        return runs

    def parts(self, first: int | None = None) -> list[Part]:
        """All rows from ``first`` on that are still there, in order."""
        start = self.oldest if first is None else max(first, self.oldest)
        in_order = self.ring is None or self.newest - self.origin <= self.ring
        return [self._part(*run, in_order) for run in self._runs(start, self.stop)]

    def _part(self, row: int, slot: int, count: int, in_order: bool) -> Part:
        keys, values = self.keys.rows, self.values.rows
        assert keys is not None
        return Part(
            row,
            slice_rows(keys, slot, slot + count),
            None if values is None else slice_rows(values, slot, slot + count),
            Buffer(keys, values, slot) if in_order else None,
        )

    def can_truncate(self, stop: int) -> bool:
        """Whether rows from ``stop`` on can be forgotten with nothing missing before them."""
        stop = min(max(stop, self.origin), self.stop)
        return stop == self.origin or self.oldest <= self._needed_before(stop)

    def truncate(self, stop: int) -> None:
        """Forgets the rows from ``stop`` on."""
        if not self.can_truncate(stop):
            raise MlxtxError(
                f"this cache keeps enough to take back {self.rewind} tokens, not "
                f"{self.stop - stop}: start again from an empty one, or make it with more rewind"
            )
        self.stop = min(max(stop, self.origin), self.stop)
        if self.stop == self.origin:
            self.newest = self.origin

    def restart(self, origin: int) -> None:
        """Empty, and to go on from another row."""
        self.origin = self.stop = self.newest = origin

    def copy(self) -> Segment:
        other = Segment(
            self.key_format,
            self.value_format,
            origin=self.origin,
            reach=self.reach,
            rewind=self.rewind,
            limit=self.limit,
        )
        other.stop, other.newest = self.stop, self.newest
        other.keys, other.values = self.keys.copy(), self.values.copy()
        return other
