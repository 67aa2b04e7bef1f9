"""Multi-head, multi-query and grouped-query attention: projections around the cache's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache import AttentionSpec, LayerCache, Step
from mlxtx.decoder.config import AttentionConfig, TemperatureConfig
from mlxtx.decoder.norm import HeadNorm
from mlxtx.decoder.positions import Rotary, query_temperature


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """What happens to queries and keys [B, H, T, D] between projection and attention: their
    norms, rotation and temperature, at the step's positions. One object, so that a fused kernel
    can do all of it in one launch."""

    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    rotary: Rotary | None = None
    norm_after_rope: bool = False
    temperature: TemperatureConfig | None = None
    clip: float | None = None

    def __call__(
        self, q: mx.array, k: mx.array | None, step: Step
    ) -> tuple[mx.array, mx.array | None]:
        q = self._one(q, self.q_norm, step)
        if self.temperature is not None:
            q = q * query_temperature(self.temperature, step, q.dtype)
        return q, None if k is None else self._one(k, self.k_norm, step)

    def rope_arguments(self, q: mx.array, step: Step) -> dict[str, Any] | None:
        """The same as arguments of the fused kernel ``mlxtx.metal_kernels.rope.rope``, or None if
        it is more than that kernel does."""
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        if self.rotary is None or self.temperature is not None or self.clip is not None:
            return None
        if (norms and self.norm_after_rope) or any(n.of_each_head() is None for n in norms):
            return None
        turn = self.rotary.kernel_arguments(step, q.shape[0])
        if turn is None:
            return None
        return turn | {
            name: None if norm is None else norm.of_each_head()
            for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm))
        }

    def _one(self, x: mx.array, norm: HeadNorm | None, step: Step) -> mx.array:
        if norm is not None and not self.norm_after_rope:
            x = norm(x)
        if self.clip is not None:
            x = mx.clip(x, -self.clip, self.clip)
        if self.rotary is not None:
            x = self.rotary(x, step)
        if norm is not None and self.norm_after_rope:
            x = norm(x)
        return x


class Attention(nn.Module):
    """softmax(scale q k^T) v over the cache's rows, with every head count."""

    def __init__(self, width: int, config: AttentionConfig):
        super().__init__()
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        self._config = config
        self.q_proj = nn.Linear(width, heads * dim, bias=config.qkv_bias)
        if config.shares_cache_of is None:
            self.k_proj = nn.Linear(width, kv_heads * dim, bias=config.qkv_bias)
            if not config.value_is_key:
                self.v_proj = nn.Linear(width, kv_heads * dim, bias=config.qkv_bias)
            if config.k_norm:
                self.k_norm = HeadNorm(kv_heads, dim, config.k_norm)
            if config.v_norm:
                self.v_norm = HeadNorm(kv_heads, dim, config.v_norm)
        self.o_proj = nn.Linear(heads * dim, width, bias=config.output_bias)
        if config.q_norm:
            self.q_norm = HeadNorm(heads, dim, config.q_norm)
        if config.gate:
            self.gate_proj = nn.Linear(width, heads * dim, bias=False)
        if config.sinks:
            self.sinks = mx.zeros((heads,))
        self._rotary = Rotary(config.rope) if config.rope else None
        self._spec = AttentionSpec(
            scale=dim**-0.5 if config.scale is None else config.scale,
            window=config.window,
            chunk=config.chunk,
            stride=config.stride,
            global_tokens=config.global_tokens,
            softcap=config.softcap,
            slopes=config.alibi,
            coarse_slopes=config.alibi_coarse,
        )

    def _prepare(self) -> Prepare:
        config = self._config
        return Prepare(
            q_norm=self.get("q_norm"),
            k_norm=self.get("k_norm"),
            rotary=self._rotary,
            norm_after_rope=config.norm_after_rope,
            temperature=config.temperature,
            clip=config.clip_qkv,
        )

    def _heads(self, x: mx.array, count: int) -> mx.array:  # [B, T, H * D] -> [B, H, T, D]
        return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)

    def __call__(self, x: mx.array, cache: LayerCache, step: Step) -> mx.array:
        config = self._config
        q = self._heads(self.q_proj(x), config.heads)  # [B, H, T, D]
        k = v = None
        if config.shares_cache_of is None:
            k = self._heads(self.k_proj(x), config.kv_heads)  # [B, K, T, D]
            v = k if config.value_is_key else self._heads(self.v_proj(x), config.kv_heads)
            v = self.v_norm(v) if config.v_norm else v
            if config.clip_qkv is not None:
                v = mx.clip(v, -config.clip_qkv, config.clip_qkv)
        out = cache.attend(
            q, k, v, prepare=self._prepare(), spec=self._spec, step=step, sinks=self.get("sinks")
        )
        out = out.swapaxes(1, 2).flatten(-2)  # [B, T, H * D]
        if config.gate:
            out = out * mx.sigmoid(self.gate_proj(x))
        return self.o_proj(out)
