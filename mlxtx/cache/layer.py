"""One layer's cache: segments of rows, put together from the layer's window and the settings.

    head   the first rows: as they are, or kept while a ring overwrites the rest
    body   everything behind it: plain or quantized, in order or in a ring
    tail   the newest rows of a quantized cache that stay as they are for a while

Any of head and tail can be missing. Attention sees a list of parts and no kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from mlxtx.cache.attention import AttentionSpec
from mlxtx.cache.kernels import encode_with_kernels, prepare_with_kernels
from mlxtx.cache.parts import attend_parts
from mlxtx.cache.rows import PLAIN_FORMAT, RowFormat, Rows, Slots, slice_rows
from mlxtx.cache.segment import Part, Segment
from mlxtx.cache.settings import KVSettings
from mlxtx.errors import MlxtxError

DEFAULT_REWIND = 64  # rows that a window can take back
TAIL_SLACK = 32  # rows that leave the tail together


@dataclass(frozen=True)
class LayerLayout:
    """What a layer's cache consists of. ``reach``: how many rows, itself included, a token can
    look back on; None is all. ``kept``: rows at the start that stay whatever the reach."""

    key_format: RowFormat = PLAIN_FORMAT
    value_format: RowFormat = PLAIN_FORMAT
    first: int = 0
    newest: int = 0
    reach: int | None = None
    kept: int = 0
    rewind: int = DEFAULT_REWIND

    @property
    def head(self) -> int:
        """Rows of the head."""
        return max(self.first, self.kept if self.reach is not None else 0)

    @property
    def head_formats(self) -> tuple[RowFormat, RowFormat]:
        """A head that must stay anyway is quantized unless first rows shall be plain."""
        if self.first:
            return PLAIN_FORMAT, PLAIN_FORMAT
        return self.key_format, self.value_format


def layer_layout(
    spec: AttentionSpec, settings: KVSettings, *, padding: int = 0, rewind: int = DEFAULT_REWIND
) -> LayerLayout:
    """The layout for a layer that attends as ``spec`` says; ``padding``: the most left padding."""
    spec = narrowed(spec, settings)
    reaches = [r for r in (spec.window, spec.chunk) if r is not None]
    reach = min(reaches) if reaches and spec.stride is None else None
    return LayerLayout(
        key_format=RowFormat(settings.key_bits, settings.group_size, settings.rotate),
        value_format=RowFormat(settings.value_bits, settings.group_size, settings.rotate),
        first=settings.first + padding if settings.first else 0,
        newest=settings.newest,
        reach=reach,
        kept=spec.global_tokens + padding if spec.global_tokens else 0,
        rewind=rewind,
    )


def narrowed(spec: AttentionSpec, settings: KVSettings) -> AttentionSpec:
    """The spec with the window that the settings ask for, unless its own is narrower."""
    if settings.window is None or (spec.window is not None and spec.window <= settings.window):
        return spec
    kept = max(spec.global_tokens, settings.sink_tokens)
    return replace(spec, window=settings.window, global_tokens=kept)


class RowsCache:
    """Keys and values of one layer (``LayerCache``), of every kind there is."""

    def __init__(self, layout: LayerLayout, settings: KVSettings, *, shared: bool = False):
        self.settings, self.shared = settings, shared
        self._lay_out(layout)

    def _lay_out(self, layout: LayerLayout) -> None:
        self.layout = layout
        self.rows = 0
        head = layout.head
        self.head = Segment(*layout.head_formats, limit=head) if head else None
        self.body = Segment(
            layout.key_format,
            layout.value_format,
            origin=head,
            reach=layout.reach,
            rewind=layout.rewind,
        )
        self.tail = Segment(PLAIN_FORMAT, PLAIN_FORMAT, origin=head) if layout.newest else None

    def set_padding(self, more: int) -> None:
        """Left padding that was not known when the cache was made: first rows move behind it."""
        layout = self.layout
        first, kept = (rows + more if rows else 0 for rows in (layout.first, layout.kept))
        self._lay_out(replace(layout, first=first, kept=kept))

    def clear(self) -> None:
        self._lay_out(self.layout)

    @property
    def segments(self) -> dict[str, Segment]:
        named = {"head": self.head, "body": self.body, "tail": self.tail}
        return {name: segment for name, segment in named.items() if segment is not None}

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments.values())

    def state(self) -> list[mx.array]:
        return [
            array
            for segment in self.segments.values()
            for slots in (segment.keys, segment.values)
            for array in slots.arrays
        ]

    def attend(self, q, k, v, *, prepare, spec, step, sinks=None, expand=None) -> mx.array:
        if step.segments is not None or step.positions is not None:
            raise MlxtxError("packed rows (segments, positions) go through a pass without a cache")
        encoded = None
        if self.head is None and self.tail is None:
            formats = self.layout.key_format, self.layout.value_format
            encoded = encode_with_kernels(prepare, q, k, v, step, formats)
        if encoded is not None:
            q, k, v = encoded
        else:
            q, k = prepare_with_kernels(prepare, q, k, step) or prepare(q, k, step)
        if k is not None:
            parts = self._append(k, v, step.length)
            self.rows += k.shape[2]
            if self.shared:  # a later layer sees what this one's queries saw
                step.memo(("parts", id(self)), lambda: parts)
        else:
            parts = step.memo(("parts", id(self)), self._parts)
        spec = narrowed(spec, self.settings)
        out = attend_parts(q, parts, spec=spec, step=step, sinks=sinks, expand=expand)
        if k is not None and (self.layout.reach is not None or len(self.segments) > 1):
            # Rows that no query saw are written now too, or what they come from stays in memory.
            out = mx.depends(out, self.state())
        return out

    def _parts(self) -> list[Part]:
        return [part for segment in self.segments.values() for part in segment.parts()]

    def _append(self, k: Rows, v: Rows | None, expected: int) -> list[Part]:
        count = k.shape[2]
        parts: list[Part] = []
        taken = 0
        if self.head is not None:
            taken = min(count, max(0, self.layout.head - self.rows))
            if taken:
                self.head.append(*_rows(k, v, 0, taken), self.layout.head)
            parts += self.head.parts()
        if self.tail is None:
            if taken < count or self.body.stop > self.body.origin:
                parts += self._append_body(k, v, taken, count, expected)
            return parts
        if taken < count:
            self.tail.append(*_rows(k, v, taken, count))
        return parts + self._flush_tail(expected) + self.tail.parts()

    def _append_body(self, k, v, start: int, stop: int, expected: int) -> list[Part]:
        if start == stop:
            return self.body.parts()
        return self.body.append(*_rows(k, v, start, stop), expected)

    def _flush_tail(self, expected: int) -> list[Part]:
        """Moves rows that are no longer the newest to the body; returns the body's parts."""
        tail = self.tail
        assert tail is not None
        extra = tail.stop - tail.origin - self.layout.newest
        if extra <= TAIL_SLACK:
            return self.body.parts()
        keys, values = tail.keys.read(0, extra), None
        kept_keys, kept_values = tail.keys.read(extra, extra + self.layout.newest), None
        if tail.values.rows is not None:
            values = tail.values.read(0, extra)
            kept_values = tail.values.read(extra, extra + self.layout.newest)
        parts = self.body.append(keys, values, expected)
        tail.restart(tail.origin + extra)
        tail.keys, tail.values = Slots(), Slots()
        tail.append(kept_keys, kept_values)
        return parts

    def can_rollback(self, count: int) -> bool:
        return self.body.can_truncate(self.rows - count)

    def rollback(self, count: int) -> None:
        stop = self.rows - count
        self.body.truncate(stop)
        if self.head is not None:
            self.head.truncate(stop)
        if self.tail is not None:
            if stop < self.tail.origin:
                self.tail.restart(max(stop, self.layout.head))
            self.tail.truncate(stop)
        self.rows = stop

    def restore(self, earlier: RowsCache) -> None:
        """Becomes what ``copy`` made of it earlier."""
        fresh = earlier.copy()
        self.rows, self.head, self.body, self.tail = fresh.rows, fresh.head, fresh.body, fresh.tail

    def copy(self) -> RowsCache:
        other = RowsCache(self.layout, self.settings, shared=self.shared)
        other.rows = self.rows
        other.head = None if self.head is None else self.head.copy()
        other.body = self.body.copy()
        other.tail = None if self.tail is None else self.tail.copy()
        return other


def _rows(k: Rows, v: Rows | None, start: int, stop: int) -> tuple[Rows, Rows | None]:
    return slice_rows(k, start, stop), None if v is None else slice_rows(v, start, stop)
