"""RMSNorm and LayerNorm, with or without weight and bias, zero-centred or not."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxtx.decoder.config import HeadNormConfig, NormConfig


class Norm(nn.Module):
    """Normalises the last axis.

    RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * (offset + weight).
    LayerNorm (Ba et al. 2016): (x - mean) / sqrt(variance + eps) * (offset + weight) + bias.
    ``shape`` is the weight's: ``(dims,)``, or ``(heads, dims)`` for a norm of its own a head.
    """

    def __init__(self, shape: tuple[int, ...] | int, config: NormConfig):
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else shape
        self._config = config
        if config.weight:
            self.weight = mx.full(shape, 1.0 - config.offset)
        if config.bias:
            self.bias = mx.zeros(shape)

    def scale(self) -> mx.array | None:
        """What the normalised values are multiplied by (float32 where an offset would round)."""
        if not self._config.weight:
            return None
        if not self._config.offset:
            return self.weight
        return self.weight.astype(mx.float32) + self._config.offset

    def __call__(self, x: mx.array) -> mx.array:
        return self._normalize(x, self.scale(), self.get("bias")).astype(x.dtype)

    def _normalize(self, x: mx.array, scale: mx.array | None, bias: mx.array | None) -> mx.array:
        if self._config.kind == "rms":
            return mx.fast.rms_norm(x, scale, self._config.eps)
        return mx.fast.layer_norm(x, scale, bias, self._config.eps)


class HeadNorm(Norm):
    """A norm of queries or keys ``[B, H, T, D]``."""

    def __init__(self, heads: int, head_dim: int, config: HeadNormConfig):
        shape = {"head": (head_dim,), "each_head": (heads, head_dim), "width": (heads * head_dim,)}[
            config.over
        ]
        super().__init__(shape, config.norm)
        self._over = config.over

    def of_each_head(self) -> tuple[mx.array | None, float, float] | None:
        """(weight, eps, offset) of an RMSNorm that is the same for all heads, else None."""
        config = self._config
        if self._over != "head" or config.kind != "rms" or config.bias:
            return None
        return self.get("weight"), config.eps, config.offset if config.weight else 0.0

    def __call__(self, x: mx.array) -> mx.array:
        if self._over == "head":
            return super().__call__(x)
        if self._over == "width":
            rows = x.swapaxes(1, 2)  # [B, T, H, D]
            return super().__call__(rows.flatten(-2)).reshape(rows.shape).swapaxes(1, 2)
        y = self._normalize(x, None, None)
        if (scale := self.scale()) is not None:
            y = y * scale[:, None]
        if (bias := self.get("bias")) is not None:
            y = y + bias[:, None]
        return y.astype(x.dtype)
