"""The decoder block: attention and a feed-forward, each behind a norm, around a residual stream.

Every placement the field uses is here, as data in ``BlockConfig``:

    pre         x = x + attention(norm(x))
    sandwich    x = x + norm(attention(norm(x)))
    output      x = x + norm(attention(x))
    post        x = norm(x + attention(x))
    parallel    x = x + attention(norm(x)) + feed_forward(norm(x))
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache import LayerCache, Step
from mlxtx.decoder.attention import Attention
from mlxtx.decoder.config import (
    AttentionConfig,
    BlockConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    NormConfig,
)
from mlxtx.decoder.experts import Experts
from mlxtx.decoder.feed_forward import FeedForward
from mlxtx.decoder.latent_attention import LatentAttention
from mlxtx.decoder.norm import Norm
from mlxtx.decoder.per_layer import PerLayerInput


def attention(
    width: int, config: AttentionConfig | LatentAttentionConfig
) -> Attention | LatentAttention:
    if isinstance(config, LatentAttentionConfig):
        return LatentAttention(width, config)
    return Attention(width, config)


def feed_forward(width: int, config: FeedForwardConfig | ExpertsConfig) -> FeedForward | Experts:
    if isinstance(config, ExpertsConfig):
        return Experts(width, config)
    return FeedForward(width, config)


class Block(nn.Module):
    """One layer of a decoder. The names of its parts are those of Llama's checkpoints."""

    def __init__(self, width: int, config: BlockConfig):
        super().__init__()
        self._config = config

        self.self_attn = attention(width, config.attention)
        self.mlp = feed_forward(width, config.feed_forward)

        def norm(which: NormConfig | None) -> nn.Module:
            return Norm(width, which) if which else nn.Identity()

        self.input_layernorm = norm(config.attention_norm)
        self.attention_output_layernorm = norm(config.attention_output_norm)
        self.post_attention_layernorm = norm(config.feed_forward_norm)
        self.feed_forward_output_layernorm = norm(config.feed_forward_output_norm)

        before = config.feed_forward_norm or NormConfig()
        if config.experts:
            self.experts = Experts(width, config.experts)
            self.experts_layernorm = Norm(width, before)
            self.experts_output_layernorm = Norm(width, before)
            self.dense_output_layernorm = Norm(width, before)
        if config.per_layer_input:
            act = getattr(config.feed_forward, "activation", "silu")
            self.per_layer = PerLayerInput(width, config.per_layer_input, act, before)
        if config.layer_scale:
            self.layer_scalar = mx.ones((1,))

    def __call__(
        self, x: mx.array, cache: LayerCache, step: Step, own: mx.array | None = None
    ) -> mx.array:
        """x [B, T, D] -> [B, T, D]; the cache takes this step's keys and values. ``own`` [B, T, w]
        are the layer's inputs of its own, where it has any."""
        if self._config.form == "parallel":
            x = self._parallel(x, cache, step)
        elif self._config.norm_after_add:
            x = self._post(x, cache, step)
        else:
            x = self._sequential(x, cache, step)
        if own is not None:
            x = self.per_layer(x, own)
        return x * self.layer_scalar if self._config.layer_scale else x

    def _sequential(self, x: mx.array, cache: LayerCache, step: Step) -> mx.array:
        normed = self.input_layernorm(x)
        h = self.self_attn(normed, cache, step)
        x = self._add(self._stream(x, normed), self.attention_output_layernorm(h))

        normed = self.post_attention_layernorm(x)
        h = self.mlp(normed)
        if self._config.experts:
            routed = self.experts(self.experts_layernorm(x), x)
            h = self.dense_output_layernorm(h) + self.experts_output_layernorm(routed)
        return self._add(self._stream(x, normed), self.feed_forward_output_layernorm(h))

    def _stream(self, x: mx.array, normed: mx.array) -> mx.array:
        return normed if self._config.residual_after_norm else x

    def _parallel(self, x: mx.array, cache: LayerCache, step: Step) -> mx.array:
        normed = self.input_layernorm(x)
        attention = self.self_attn(normed, cache, step)
        own_norm = self._config.feed_forward_norm is not None
        feed_forward = self.mlp(self.post_attention_layernorm(x) if own_norm else normed)
        return self._add(x, attention + feed_forward)

    def _post(self, x: mx.array, cache: LayerCache, step: Step) -> mx.array:
        x = self.input_layernorm(self._add(x, self.self_attn(x, cache, step)))
        return self.post_attention_layernorm(self._add(x, self.mlp(x)))

    def _add(self, x: mx.array, branch: mx.array) -> mx.array:
        multiplier = self._config.residual_multiplier
        return x + (branch if multiplier == 1.0 else branch * multiplier)
