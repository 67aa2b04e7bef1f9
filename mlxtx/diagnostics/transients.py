"""What a forward pass holds for a moment, above weights and cache.

On a CPU the numbers were measured (``tests/diagnostics/test_plan.py`` repeats some of them, and
``scripts/count_memory.py`` larger ones): MLX hands out the memory of a few operations ahead of the
one that runs, so a pass holds several arrays of the stream at once. On a GPU they are counted from
the graph and unmeasured.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mlxtx.cache.parts import QUERIES_AT_A_TIME, SCORES_AT_A_TIME
from mlxtx.checkpoint.cpu_layers import rows_at_once
from mlxtx.decoder.config import DecoderConfig, ExpertsConfig, LatentAttentionConfig

# Arrays of each kind that are alive at once on a CPU, fitted to measured peaks.
STREAM, INNER = 7.4, 2.15  # the feed-forward phase: [N, D] and [N, F]
QUERIES, ROWS = 4.2, 2.3  # the attention phase: [N, H d] and [N, K d] in float32
NORMED = 1.0  # more [N, H d] in float32 where heads are normalised
WINDOWED = 1.5  # and where layers have a window, in either phase
SLICES = 7.5  # of scores: SCORES_AT_A_TIME numbers in float32
OVERLAP = 0.2  # of the smaller phase, which is not over when the other begins
UNPACKED = 1.5  # of what is unpacked of a packed weight at once


@dataclass(frozen=True)
class Widths:
    """Channels a token has in the widest layer: inside the feed-forward, over all query heads,
    over all key/value heads."""

    stream: int
    inner: int
    queries: int
    rows: int


def widths(config: DecoderConfig) -> Widths:
    """The widest of every layer."""
    inner, queries, rows = [], [], []
    for block in config.blocks:
        inner.append(_inner(block.feed_forward))
        attention: Any = block.attention
        if isinstance(attention, LatentAttentionConfig):
            queries.append(attention.heads * (attention.nope_dim + attention.rope_dim))
            rows.append(attention.kv_rank + attention.rope_dim)
        else:
            queries.append(attention.heads * attention.head_dim)
            rows.append(attention.kv_heads * attention.head_dim)
    return Widths(config.width, max(inner), max(queries), max(rows))


def _inner(feed_forward: Any) -> int:
    if not isinstance(feed_forward, ExpertsConfig):
        return feed_forward.width
    shared = feed_forward.shared.width if feed_forward.shared else 0
    return feed_forward.per_token * feed_forward.expert.width + shared


def prefill_bytes(
    config: DecoderConfig,
    tokens: int,
    *,
    context: int,
    itemsize: int,
    unpacked: Collection[tuple[int, int]],
    gpu: bool,
) -> int:
    """The most that a chunk of ``tokens`` (of all sequences of a batch) holds at once when its
    last queries look back on ``context`` rows."""
    wide = widths(config)
    logits = config.vocabulary * 4
    if gpu:
        # x, its norm and the branch; gate, up and their product; q, k, v, rotated, and the result.
        feed_forward = 3 * wide.stream + 3 * wide.inner
        attention = 3 * wide.stream + 3 * wide.queries + 4 * wide.rows
        return tokens * itemsize * max(feed_forward, attention) + logits
    inside = tokens * itemsize * (STREAM * wide.stream + INNER * wide.inner)
    at_once = [rows_at_once(*shape, tokens) * shape[1] for shape in unpacked]
    inside += UNPACKED * max(at_once, default=0) * 4
    layers = [block.attention for block in config.blocks]
    queries = QUERIES + (NORMED if any(getattr(a, "q_norm", None) for a in layers) else 0)
    across = tokens * 4 * (queries * wide.queries + ROWS * wide.rows + wide.stream)
    heads = max(block.attention.heads for block in config.blocks)
    slice_of_scores = min(SCORES_AT_A_TIME, heads * min(tokens, QUERIES_AT_A_TIME) * context)
    across += SLICES * slice_of_scores * 4
    windowed = WINDOWED if any(getattr(a, "window", None) for a in layers) else 0
    # A product with an unpacked weight is evaluated before the next: nothing runs ahead.
    both = max(inside, across) + (0 if unpacked else OVERLAP) * min(inside, across)
    return round(both + windowed * tokens * 4 * wide.queries) + logits


def training_bytes(
    config: DecoderConfig,
    trained: int,
    *,
    tokens: int,
    length: int,
    itemsize: int,
    checkpoint: bool,
) -> int:
    """What a training step needs above the weights: gradients and two moments of ``trained``
    numbers in float32, what the blocks keep for the backward pass for a batch of ``tokens`` in
    sequences of ``length``, and slices of the logits. Counted, not measured."""
    wide = widths(config)
    heads = max(block.attention.heads for block in config.blocks)
    block = tokens * itemsize * (6 * wide.stream + 5 * wide.inner + 8 * wide.queries)
    block += 2 * heads * tokens * length * itemsize  # attention weights, kept whole
    blocks = len(config.blocks)
    stream = tokens * wide.stream * itemsize
    kept = block + blocks * stream if checkpoint else blocks * block
    logits = 4 * 4 * config.vocabulary * min(tokens, 512)
    return kept + trained * 4 * 4 + logits
