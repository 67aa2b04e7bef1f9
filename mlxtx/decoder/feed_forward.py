"""Feed-forward layers: gated (SwiGLU, GeGLU) and plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlxtx.decoder.config import FeedForwardConfig


class XIELU(nn.Module):
    """xIELU (Huang et al. 2024): quadratic above zero, expm1 below, with learned strengths."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = mx.array([0.8])
        self.alpha_n = mx.array([0.8])
        self.beta = mx.array(0.5)  # these two are constants that checkpoints carry
        self.eps = mx.array(-1e-6)
        self.freeze(keys=["beta", "eps"])

    def __call__(self, x: mx.array) -> mx.array:
        above = nn.softplus(self.alpha_p)
        below = self.beta + nn.softplus(self.alpha_n)
        negative = below * (mx.expm1(mx.minimum(x, self.eps)) - x) + self.beta * x
        return mx.where(x > 0, above * x * x + self.beta * x, negative).astype(x.dtype)


_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
    "gelu_quick": nn.gelu_fast_approx,
    "relu": nn.relu,
    "relu2": nn.relu2,
    "sigmoid": mx.sigmoid,
    "tanh": mx.tanh,
}


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """The activation called ``name``; xIELU comes with parameters of its own."""
    return XIELU() if name == "xielu" else _ACTIVATIONS[name]


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def gate_with(act: Callable[[mx.array], mx.array], gate: mx.array, up: mx.array) -> mx.array:
    """act(gate) * up, in one operation where it is SwiGLU."""
    return _swiglu(gate, up) if act is nn.silu else act(gate) * up


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)) when gated (Shazeer 2020), down(act(up(x))) otherwise."""

    def __init__(self, width: int, config: FeedForwardConfig):
        super().__init__()
        if config.gated:
            self.gate_proj = nn.Linear(width, config.width, bias=config.bias)
        self.up_proj = nn.Linear(width, config.width, bias=config.bias)
        self.down_proj = nn.Linear(config.width, width, bias=config.bias)
        self.act_fn = activation(config.activation)
        self._gated = config.gated

    def __call__(self, x: mx.array) -> mx.array:  # [B, T, D] -> [B, T, D]
        if self._gated:
            return self.down_proj(gate_with(self.act_fn, self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(self.act_fn(self.up_proj(x)))
