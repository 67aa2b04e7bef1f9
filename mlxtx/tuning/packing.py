"""Batches without padding between samples.

The samples of a batch lie one behind the other in one row of tokens, so that everything in the
decoder but attention computes real tokens only. Attention takes the row apart again: samples of
one length are a plain batch with the plain causal mask and positions from 0. That is
block-diagonal attention without its mask, and costs the sum of the squared lengths, not the
square of the sum.

Each sample is padded at its end to a length of ``bucket``, so that the number of different
shapes stays bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxtx.cache import Step, Uncached
from mlxtx.decoder.config import BlockConfig
from mlxtx.tuning.samples import Sample


def bucket(length: int, multiple: int = 8) -> int:
    """``length`` rounded up to a multiple of 8, of 16 above 128, of 32 above 256 and so on: at
    most an eighth more, and eight shapes for each doubling."""
    step = multiple
    while length > step * 16:
        step *= 2
    return -(-length // step) * step


@dataclass(frozen=True)
class Batch:
    """Samples ready for the model.

    tokens [R, N]: one row of packed samples, or a plain batch when all lengths are equal.
    targets[d] [R, N]: the token d + 1 places further in the same sample. scored[d]: the places,
    counted through all rows, whose target counts in the loss.
    groups: (samples, length) of equal lengths in the order they lie in the row.
    """

    tokens: mx.array
    targets: tuple[mx.array, ...]
    scored: tuple[np.ndarray, ...]
    groups: tuple[tuple[int, int], ...]
    real_tokens: int

    @property
    def packed(self) -> bool:
        return len(self.groups) > 1

    @property
    def target_count(self) -> int:
        return len(self.scored[0])

    def positions(self) -> mx.array:  # [1, N]
        """Each token's position in its own sample."""
        rows = [np.tile(np.arange(length), count) for count, length in self.groups]
        return mx.array(np.concatenate(rows))[None]


def make_batch(
    samples: Sequence[Sample], *, packing: bool = True, multiple: int = 8, ahead: int = 0
) -> Batch:
    """A batch of ``samples``. Without packing all are padded to the longest one's bucket.

    ``ahead`` is how many extra prediction heads want targets of their own.
    """
    lengths = [bucket(max(len(s) - 1, 1), multiple) for s in samples]
    if not packing:
        lengths = [max(lengths)] * len(samples)
    order = sorted(range(len(samples)), key=lambda n: lengths[n])
    tokens = np.zeros(sum(lengths), np.int32)
    targets = np.zeros((ahead + 1, len(tokens)), np.int32)
    scored = np.zeros((ahead + 1, len(tokens)), bool)
    groups: list[tuple[int, int]] = []
    start = 0
    for n in order:
        row = samples[n]
        tokens[start : start + len(row) - 1] = row.tokens[:-1]
        for d in range(min(ahead + 1, len(row) - 1)):
            end = start + len(row) - 1 - d
            targets[d, start:end] = row.tokens[d + 1 :]
            scored[d, start:end] = row.in_loss[d + 1 :]
        start += lengths[n]
        same = groups and groups[-1][1] == lengths[n]
        count = groups.pop()[0] if same else 0
        groups.append((count + 1, lengths[n]))
    shape = (1, len(tokens)) if len(groups) > 1 else groups[0]
    return Batch(
        mx.array(tokens.reshape(shape)),
        tuple(mx.array(row.reshape(shape)) for row in targets),
        tuple(np.flatnonzero(row) for row in scored),
        tuple(groups),
        sum(len(s) - 1 for s in samples),
    )


class PackedLayer:
    """Attention of one layer over packed samples: a plain batch for each group of one length."""

    def __init__(self, groups: tuple[tuple[int, int], ...], steps: list[Step]):
        self._groups, self._steps = groups, steps
        self._layers = [Uncached() for _ in groups]

    def attend(self, q, k, v, *, step, **how) -> mx.array:
        """q [1, H, N, D], k and v [1, K, N, D] -> [1, H, N, Dv]."""
        outputs, start = [], 0
        for (count, length), own, layer in zip(
            self._groups, self._steps, self._layers, strict=True
        ):
            end = start + count * length

            def rows(x: mx.array | None, start=start, end=end, count=count, length=length):
                if x is None:
                    return None
                x = x[0, :, start:end]
                return x.reshape(x.shape[0], count, length, -1).swapaxes(0, 1)

            out = layer.attend(rows(q), rows(k), rows(v), step=own, **how)  # [n, H, L, Dv]
            outputs.append(out.swapaxes(0, 1).flatten(1, 2))
            start = end
        return mx.concatenate(outputs, axis=1)[None]


class PackedCache:
    """What ``DecoderModel.hidden`` takes as its cache for a packed batch. It keeps nothing."""

    left_padding = None

    def __init__(self, blocks: Sequence[BlockConfig], groups: tuple[tuple[int, int], ...]):
        steps = [Step(length) for _, length in groups]
        self.offset = 0
        self.layers: list[PackedLayer] = []
        for block in blocks:
            source = getattr(block.attention, "shares_cache_of", None)
            new = PackedLayer(groups, steps) if source is None else self.layers[source]
            self.layers.append(new)


def packed_arguments(blocks: Sequence[BlockConfig], batch: Batch) -> dict[str, Any]:
    """What ``DecoderModel.hidden`` and ``predict_ahead`` need beside the tokens of a batch."""
    if not batch.packed:
        return {}
    return {"cache": PackedCache(blocks, batch.groups), "positions": batch.positions()}
