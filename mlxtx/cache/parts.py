"""Attention over parts of a cache, plain or quantized, that never holds the whole score matrix.

Rows are taken a slice at a time, decoded once, and joined by the running maximum and sum of the
online softmax (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). Each slice is
evaluated before the next: a lazy graph would keep them all. Slices that no query can see are
skipped, which halves a causal prompt and makes a window's cost linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxtx.cache.attention import AttentionSpec, alibi, attention, causal_mask, visible
from mlxtx.cache.codes import SliceReader
from mlxtx.cache.kernels import attend_with_kernels, fused_attention_available
from mlxtx.cache.numerics import exp, precision_of
from mlxtx.cache.rows import Rows
from mlxtx.cache.segment import Part
from mlxtx.cache.step import Step

Expand = Callable[[mx.array], tuple[mx.array, mx.array]]

SCORES_AT_A_TIME = 1 << 18  # numbers: 1 MB in float32, a few times that with what is made of them
DECODED_AT_A_TIME = 1 << 20  # numbers of decoded keys, and as many values
QUERIES_AT_A_TIME = 64
SMALLEST_SLICE = 64  # rows
# Up to here MLX's own attention is faster on a CPU, beyond up to twice as slow.
FEW_SCORES = 1 << 12


def attend_parts(
    q: mx.array,
    parts: Sequence[Part],
    *,
    spec: AttentionSpec,
    step: Step,
    sinks: mx.array | None = None,
    expand: Expand | None = None,
) -> mx.array:
    """Attention of the step's queries [B, H, T, D] over rows of a cache: [B, H, T, Dv].

    ``parts`` end with the step's own rows. A query that sees nothing gives 0.
    """
    parts = [part.slice(_first_seen(spec, step, part), part.stop) for part in parts]
    parts = [part for part in parts if part.count]
    out = attend_with_kernels(q, parts, spec=spec, step=step, sinks=sinks, expand=expand)
    if out is not None:
        return out
    rows = _plain_rows(parts)
    fused = fused_attention_available(q, spec)
    if rows is not None and expand is None:
        keys, values = rows
        values = keys[..., : spec.value_dim] if values is None else values
        if not fused and sinks is None and _sees_all(q, spec, step):
            return _one_query(q, keys, values, spec)
        if fused or _few_scores(q, keys, spec, step):
            mask = causal_mask(spec, step, keys.shape[2])
            return attention(q, keys, values, spec=spec, mask=mask, sinks=sinks)
    return _OnlineAttention(q, spec, step, sinks).over(parts, expand)


def _first_seen(spec: AttentionSpec, step: Step, part: Part) -> int:
    """Rows of the part before this one are out of reach of every query."""
    if not spec.only_window:
        return part.start
    assert spec.window is not None
    return min(part.stop, max(part.start, step.offset - spec.window + 1))


def _sees_all(q: mx.array, spec: AttentionSpec, step: Step) -> bool:
    """A single float32 query, of rows that are all within its reach."""
    reach = spec.chunk is None and (spec.window is None or spec.only_window)
    plain = spec.softcap is None and not spec.slopes and not step.left_padding
    return q.shape[2] == 1 and q.dtype == mx.float32 and reach and plain


def _one_query(q: mx.array, keys: mx.array, values: mx.array, spec: AttentionSpec) -> mx.array:
    """Attention of a single query to all rows: heads that share keys are one product's rows."""
    grouped = (q * spec.scale).reshape(q.shape[0], keys.shape[1], -1, q.shape[-1])  # [B, K, G, D]
    weights = mx.softmax(grouped @ keys.swapaxes(-1, -2), axis=-1)
    return (weights @ values).reshape(*q.shape[:3], -1)


def _few_scores(q: mx.array, keys: mx.array, spec: AttentionSpec, step: Step) -> bool:
    """MLX's own attention makes all scores on a CPU; where they are few it has the fewest steps.
    (In float32 only: it would compute in half precision. And a row of padding must give 0.)"""
    simple = spec.softcap is None and not spec.slopes and not step.left_padding
    few = q.shape[0] * q.shape[1] * q.shape[2] * keys.shape[2] <= FEW_SCORES
    return simple and few and q.dtype == mx.float32


def _plain_rows(parts: Sequence[Part]) -> tuple[mx.array, mx.array | None] | None:
    """Keys and values of parts that are one stretch of plain rows."""
    if len(parts) != 1 or not isinstance(parts[0].keys, mx.array):
        return None
    values: Rows | None = parts[0].values
    return (parts[0].keys, values) if values is None or isinstance(values, mx.array) else None


class _Queries:
    """A slice of queries [B, K, G, T, D], rows start to stop of the sequence, and what their
    softmax has seen so far: maximum and total [B, K, G, T, 1], weighted sums [B, K, G, T, Dv]."""

    def __init__(self, q: mx.array, start: int):
        self.q = q
        self.scaled: mx.array | None = None  # q in the precision of the sums, times the scale
        self.start, self.stop = start, start + q.shape[3]
        self.maximum: mx.array | None = None
        self.total: mx.array | None = None
        self.sums: mx.array | None = None

    def add(self, scores: mx.array, product: Callable[[mx.array], mx.array]) -> None:
        """Takes in scores [B, K, G, T, S]; ``product`` weighs their rows' values."""
        highest = scores.max(axis=-1, keepdims=True)
        if self.maximum is not None:
            highest = mx.maximum(self.maximum, highest)
        # Nothing seen so far: minus infinity minus itself is not a number.
        finite = mx.maximum(highest, mx.finfo(scores.dtype).min)
        weights = exp(scores - finite)
        total, sums = weights.sum(axis=-1, keepdims=True), product(weights)
        if self.maximum is not None and self.sums is not None and self.total is not None:
            kept = exp(self.maximum - finite)
            total, sums = self.total * kept + total, self.sums * kept + sums
        self.maximum, self.total, self.sums = highest, total, sums

    def result(self, sinks: mx.array | None) -> mx.array:
        """The weighted mean of the values; ``sinks`` [1, K, G, 1, 1] only take part in the sum."""
        assert self.maximum is not None and self.total is not None and self.sums is not None
        total, sums = self.total, self.sums
        if sinks is not None:
            highest = mx.maximum(self.maximum, sinks)
            kept = exp(self.maximum - highest)
            total, sums = total * kept + exp(sinks - highest), sums * kept
        return mx.where(total > 0, sums / mx.where(total > 0, total, 1), 0)


class _OnlineAttention:
    """Attention of one step's queries over one slice of rows after the other."""

    def __init__(self, q: mx.array, spec: AttentionSpec, step: Step, sinks: mx.array | None):
        self.spec, self.step, self.dtype = spec, step, q.dtype
        self.batch, self.heads, self.count, _ = q.shape
        self.precision = precision_of(q)
        self.q = q
        self.sinks = sinks
        self.padding = max(step.left_padding or (0,))

    def over(self, parts: Sequence[Part], expand: Expand | None) -> mx.array:
        kv_heads = self.heads if expand else parts[0].keys.shape[1]
        group = self.heads // kv_heads
        q = self.q.reshape(self.batch, kv_heads, group, self.count, -1)
        # Decoding and expanding is done once a slice of rows, whatever the slices of queries.
        size = min(self.count, QUERIES_AT_A_TIME)
        queries = [
            _Queries(q[:, :, :, start : start + size], self.step.offset + start)
            for start in range(0, self.count, size)
        ]
        slices = [piece for part in parts for piece in self._slices(part, kv_heads, size)]
        bounded = len(slices) * len(queries) > len(parts)
        for piece in slices:
            reader = SliceReader(piece, self.spec.value_dim, self.precision, expand)
            for some in queries:
                if self._hidden(some, piece):
                    continue
                self._add(some, piece, reader)
                if bounded:
                    evaluate(some.maximum, some.total, some.sums)
                    some.scaled = None if len(queries) > 1 else some.scaled
        sinks = self.sinks
        if sinks is not None:
            sinks = sinks.astype(self.precision).reshape(1, kv_heads, group, 1, 1)
        results = []
        for some in queries:
            if some.sums is None:  # not one row in sight
                some.add(mx.full((*some.q.shape[:-1], 1), -mx.inf, self.precision), self._nothing)
            result = some.result(sinks).astype(self.dtype)
            if bounded:
                evaluate(result)
                some.sums = some.q = None  # type: ignore[assignment]
            results.append(result)
        out = results[0] if len(results) == 1 else mx.concatenate(results, axis=3)
        return out.reshape(self.batch, self.heads, self.count, -1)

    def _nothing(self, weights: mx.array) -> mx.array:
        return weights * mx.zeros((self.q.shape[-1],), self.precision)

    def _slices(self, part: Part, kv_heads: int, queries: int) -> list[Part]:
        """Stretches of the part whose scores and decoded rows stay within bounds."""
        by_scores = SCORES_AT_A_TIME // (self.batch * self.heads * queries)
        by_rows = DECODED_AT_A_TIME // (self.batch * kv_heads * part.keys.shape[-1])
        size = max(SMALLEST_SLICE, min(by_scores, by_rows))
        return [
            part.slice(start, min(start + size, part.stop))
            for start in range(part.start, part.stop, size)
        ]

    def _hidden(self, some: _Queries, piece: Part) -> bool:
        """No query of these sees any row of the piece."""
        if piece.start >= some.stop:
            return True
        spec = self.spec
        if spec.only_window and some.start - (piece.stop - 1) >= (spec.window or 0):
            return True
        return bool(
            spec.chunk
            and not self.padding
            and (piece.stop - 1) // spec.chunk < some.start // spec.chunk
        )

    def _all_seen(self, some: _Queries, piece: Part) -> bool:
        """Every query of these sees every row of the piece."""
        spec = self.spec
        if piece.stop - 1 > some.start or piece.start < self.padding:
            return False
        if spec.window is not None and some.stop - 1 - piece.start >= spec.window:
            return False
        chunk = spec.chunk
        return chunk is None or (
            not self.padding and piece.start // chunk == (some.stop - 1) // chunk
        )

    def _add(self, some: _Queries, piece: Part, reader: SliceReader) -> None:
        spec = self.spec
        if some.scaled is None:
            some.scaled = some.q.astype(self.precision) * spec.scale
        scores = reader.scores(some.scaled)  # [B, K, G, T, S]
        if spec.softcap is not None:
            scores = spec.softcap * mx.tanh(scores / spec.softcap)
        rows = mx.arange(piece.start, piece.stop)[None]
        positions = mx.arange(some.start, some.stop)[None]
        if spec.slopes:
            padding = 0 if self.step.padding is None else self.step.padding
            bias = alibi(spec, positions - padding, rows - padding).astype(self.precision)
            scores = scores + bias.reshape(-1, *scores.shape[1:3], *bias.shape[2:])
        if not self._all_seen(some, piece):
            if self.step.padding is not None:
                rows, positions = rows - self.step.padding, positions - self.step.padding
            seen = visible(spec, positions, rows)[:, :, None]  # [1|B, 1, 1, T, S]
            scores = mx.where(seen, scores, -mx.inf)
        some.add(scores, reader.product)


def evaluate(*arrays: mx.array | None) -> None:
    """Evaluates, unless a transformation is tracing, which allows no evaluation."""
    try:
        mx.eval(*[array for array in arrays if array is not None])
    except ValueError:
        return
