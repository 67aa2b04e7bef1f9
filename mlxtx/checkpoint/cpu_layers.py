"""What is fast on MLX's CPU back end, which multiplies quantized and half-precision weights with
plain loops: unpack or widen the weights and multiply in float32, from a few rows on.

The layers here replace MLX's own on a CPU; parameters and results are the same. Measured on two
x86-64 cores with weights [1408, 512] (``scripts/bench_convert.py --matmul``): see docs/convert.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache.parts import evaluate
from mlxtx.decoder.experts import ExpertLinear, QuantizedExpertLinear

# Rows of input from which unpacking a quantized weight once beats one slow product a row.
UNPACK_FROM = 4
# The same for widening a half-precision weight, where the BLAS is a fast one.
WIDEN_FROM = 4
# Numbers of a large weight that are unpacked or widened at a time, in as many rows or more: memory that
# was just used is used again, which is twice as fast as new memory for all of it.
PIECE, PIECE_ROWS = 3 << 16, 128
# Rows for each expert from which one product an expert beats the gathered product.
EXPERT_ROWS = 4
# Rows from which a plain BLAS is faster with the operands exchanged.
EXCHANGE_FROM = 16


@cache
def blas_is_fast() -> bool:
    """Whether float32 products run at more than 15 GFLOP/s. The wheel of MLX for Linux brings the
    reference BLAS (2 to 5); a preloaded OpenBLAS reaches over 60."""
    a, b = mx.ones((32, 256)), mx.ones((256, 256))
    mx.eval(a, b)
    times = []
    for _ in range(5):  # the best counts: other programs may be running
        started = time.perf_counter()
        mx.eval(a @ b.T)
        times.append(time.perf_counter() - started)
    return 2 * 32 * 256 * 256 / min(times) > 15e9


def _rows(x: mx.array) -> int:
    return x.size // x.shape[-1]


def rows_at_once(rows: int, columns: int, inputs: int) -> int:
    """How many rows of a weight [``rows``, ``columns``] are unpacked or widened at a time for
    ``inputs`` rows of input: all where the weight is less than twice the result, for which there
    has to be room anyway."""
    if columns < 2 * inputs:
        return rows
    pieces = min(-(-rows * columns // PIECE), max(1, rows // PIECE_ROWS))
    return -(-rows // pieces)


def _in_pieces(layer: nn.Module, x: mx.array, rows: Callable[[slice], mx.array]) -> mx.array:
    """x [..., I] @ the layer's weight [O, I] transposed, in float32 and back. ``rows`` unpacks or
    widens some rows of the weight. Each piece is evaluated before the next, or the graph would hold
    all of them; gradients allow no evaluation and take the weight in one piece."""
    wide = x.astype(mx.float32)
    count = layer.weight.shape[0]
    step = count if layer.training else rows_at_once(count, x.shape[-1], _rows(x))
    if step >= count:
        y = _multiply(wide, rows(slice(count)))
    else:
        y = mx.zeros((*x.shape[:-1], count))
        for start in range(0, count, step):
            piece = slice(start, min(start + step, count))
            y[..., piece] = _multiply(wide, rows(piece))
            evaluate(y)
    y = y.astype(x.dtype)
    evaluate(y)
    return y


def _multiply(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., I] @ weight [O, I] transposed, both float32."""
    if blas_is_fast() or _rows(x) < EXCHANGE_FROM:
        return x @ weight.T
    # A plain BLAS runs down columns of both operands as they lie in memory.
    flat = mx.contiguous(x.reshape(-1, x.shape[-1]).T)  # [I, N]
    return (weight @ flat).T.reshape(*x.shape[:-1], -1)


def _unpacked(layer: nn.Module, which: slice | int) -> mx.array:
    """Some rows of a quantized layer's weight, or one expert's, in float32."""
    return mx.dequantize(
        layer.weight[which],
        layer.scales[which],
        layer.biases[which] if "biases" in layer else None,
        layer.group_size,
        layer.bits,
        layer.mode,
        dtype=mx.float32,
    )


class CpuLinear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        if _rows(x) < WIDEN_FROM:
            return super().__call__(x)
        weight = self.weight
        if weight.dtype == x.dtype == mx.float32:
            y = _multiply(x, weight)
        elif weight.dtype in (mx.bfloat16, mx.float16) and x.dtype == weight.dtype:
            y = self._widened(x) if blas_is_fast() else x @ weight.T
        else:
            y = x @ weight.T
        return y + self.bias if "bias" in self else y

    def _widened(self, x: mx.array) -> mx.array:
        return _in_pieces(self, x, lambda rows: self.weight[rows].astype(mx.float32))


def _quantized(layer: nn.Module, x: mx.array) -> mx.array | None:
    """The product with the unpacked weight, where that is the faster way."""
    if _rows(x) < UNPACK_FROM:
        return None
    return _in_pieces(layer, x, lambda rows: _unpacked(layer, rows))


class CpuQuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        y = _quantized(self, x)
        if y is None:
            return super().__call__(x)
        return y + self.bias if "bias" in self else y


class CpuQuantizedEmbedding(nn.QuantizedEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        # The modes with 8-bit scales would give bfloat16, and all that follows would be that.
        rows = super().__call__(x)
        return rows.astype(mx.float32) if self.scales.dtype == mx.uint8 else rows

    def as_linear(self, x: mx.array) -> mx.array:
        y = _quantized(self, x)
        return super().as_linear(x) if y is None else y


def _by_expert(layer: nn.Module, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array | None:
    """One product for all rows of an expert, where rows lie in the order of their experts and are
    many: the gathered product runs row by row. What is chosen has to be known, so not while
    gradients are taken."""
    if not ordered or layer.training or chosen.size < EXPERT_ROWS * layer.weight.shape[0]:
        return None
    pieces, start = [], 0
    experts: Any = chosen.tolist()
    for expert, same in groupby(experts):
        end = start + len(list(same))
        rows = x[start:end, 0].astype(mx.float32)
        pieces.append(_multiply(rows, layer.plain(expert)))
        start = end
    return mx.concatenate(pieces)[:, None].astype(x.dtype)


class CpuExpertLinear(ExpertLinear):
    """MLX gathers matrices in float32 only: few rows take what they chose in a wider copy, many
    all of it."""

    def plain(self, expert: int) -> mx.array:
        return self.weight[expert].astype(mx.float32)

    def product(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        y = _by_expert(self, x, chosen, ordered)
        if y is not None:
            return y
        if self.weight.dtype == x.dtype == mx.float32:
            return super().product(x, chosen, ordered)
        wide = x.astype(mx.float32)
        if chosen.size <= self.weight.shape[0]:
            weight = self.weight[chosen].astype(mx.float32)
            return (wide @ weight.swapaxes(-1, -2)).astype(x.dtype)
        weight = self.weight.astype(mx.float32).swapaxes(-1, -2)
        y = mx.gather_mm(wide, weight, rhs_indices=chosen, sorted_indices=ordered)
        return y.astype(x.dtype)


class CpuQuantizedExpertLinear(QuantizedExpertLinear):
    def plain(self, expert: int) -> mx.array:
        return _unpacked(self, expert)

    def product(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        y = _by_expert(self, x, chosen, ordered)
        return super().product(x, chosen, ordered) if y is None else y


_REPLACEMENTS: dict[type, type] = {
    ExpertLinear: CpuExpertLinear,
    QuantizedExpertLinear: CpuQuantizedExpertLinear,
    nn.Linear: CpuLinear,
    nn.QuantizedLinear: CpuQuantizedLinear,
    nn.QuantizedEmbedding: CpuQuantizedEmbedding,
}


def adapt_to_cpu(modules: Iterable[nn.Module]) -> None:
    """Give a model's layers, in place, the forms above; everything they hold stays."""
    for module in modules:
        if type(module) in _REPLACEMENTS:
            module.__class__ = _REPLACEMENTS[type(module)]
