"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1).

Keys and values of all heads are linear maps of one small latent row a token, and the cache holds
that row. A few queries are taken into the latent space instead of expanding every row (the
absorbed form); a long prompt expands rows, which costs fewer operations a query.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache import AttentionSpec, LayerCache, Step
from mlxtx.decoder.attention import Prepare
from mlxtx.decoder.config import LatentAttentionConfig
from mlxtx.decoder.norm import Norm
from mlxtx.decoder.positions import Rotary


class HeadLinear(nn.Module):
    """A linear map of its own for each head: weight [H, out, in], x [B, H, T, in]."""

    def __init__(self, heads: int, inputs: int, outputs: int):
        super().__init__()
        scale = inputs**-0.5
        self.weight = mx.random.uniform(-scale, scale, (heads, outputs, inputs))

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.swapaxes(-1, -2)

    def transposed(self, x: mx.array) -> mx.array:
        """The transposed map: x [B, H or 1, T, out] -> [B, H, T, in]."""
        return x @ self.weight

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, mode: str = "affine", **_: Any
    ) -> QuantizedHeadLinear:
        return QuantizedHeadLinear(self.weight, group_size, bits, mode)


class QuantizedHeadLinear(nn.Module):
    """``HeadLinear`` with quantized weights."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        self.freeze()

    def _matmul(self, x: mx.array, transpose: bool) -> mx.array:
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def __call__(self, x: mx.array) -> mx.array:
        return self._matmul(x, True)

    def transposed(self, x: mx.array) -> mx.array:
        return self._matmul(x, False)


class LatentAttention(nn.Module):
    """Attention over latent rows [kv_rank + rope_dim] that all heads share."""

    absorb_up_to = 8  # queries a pass that are taken to the rows; for more, rows are expanded

    def __init__(self, width: int, config: LatentAttentionConfig):
        super().__init__()
        self._config = config
        heads, query_dim = config.heads, config.nope_dim + config.rope_dim
        if config.q_rank is None:
            self.q_proj = nn.Linear(width, heads * query_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_rank, bias=config.bias)
            self.q_a_layernorm = Norm(config.q_rank, config.norm)
            self.q_b_proj = nn.Linear(config.q_rank, heads * query_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            width, config.kv_rank + config.rope_dim, bias=config.bias
        )
        self.kv_a_layernorm = Norm(config.kv_rank, config.norm)
        self.embed_q = HeadLinear(heads, config.nope_dim, config.kv_rank)
        self.unembed_out = HeadLinear(heads, config.kv_rank, config.value_dim)
        self.o_proj = nn.Linear(heads * config.value_dim, width, bias=config.bias)
        if config.sinks:
            self.sinks = mx.zeros((heads,))
        self._rotary = Rotary(config.rope)
        self._spec = AttentionSpec(
            scale=query_dim**-0.5 if config.scale is None else config.scale,
            window=config.window,
            softcap=config.softcap,
            value_dim=config.kv_rank,
        )

    def _queries(self, x: mx.array) -> mx.array:  # [B, T, D] -> [B, H, T, nope + rope]
        config = self._config
        if config.q_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return q.reshape(*x.shape[:2], config.heads, -1).swapaxes(1, 2)

    def _rows(self, x: mx.array) -> mx.array:  # [B, T, D] -> [B, 1, T, kv_rank + rope]
        latent, rope = mx.split(self.kv_a_proj_with_mqa(x), [self._config.kv_rank], axis=-1)
        return mx.concatenate([self.kv_a_layernorm(latent), rope], axis=-1)[:, None]

    def _expand(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Rows [B, 1, S, kv_rank + rope] -> keys [B, H, S, nope + rope], values [B, H, S, Dv]."""
        latent, rope = mx.split(rows, [self._config.kv_rank], axis=-1)
        nope = self.embed_q.transposed(latent)
        rope = mx.broadcast_to(rope, (*nope.shape[:3], rope.shape[-1]))
        return mx.concatenate([nope, rope], axis=-1), self.unembed_out(latent)

    def __call__(self, x: mx.array, cache: LayerCache, step: Step) -> mx.array:
        q = self._queries(x)
        absorbed = step.count <= self.absorb_up_to
        if absorbed:
            nope, rope = mx.split(q, [self._config.nope_dim], axis=-1)
            q = mx.concatenate([self.embed_q(nope), rope], axis=-1)  # [B, H, T, kv_rank + rope]
        out = cache.attend(
            q,
            self._rows(x),
            None,
            prepare=Prepare(rotary=self._rotary, temperature=self._config.temperature),
            spec=self._spec,
            step=step,
            sinks=self.get("sinks"),
            expand=None if absorbed else self._expand,
        )
        if absorbed:
            out = self.unembed_out(out)
        return self.o_proj(out.swapaxes(1, 2).flatten(-2))
