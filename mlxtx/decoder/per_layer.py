"""Embeddings of their own for every layer (Gemma 3n and 4): each token adds a few channels to the
residual stream in each layer, through a gate that the stream opens."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxtx.decoder.config import NormConfig
from mlxtx.decoder.feed_forward import activation
from mlxtx.decoder.norm import Norm


class PerLayerEmbedding(nn.Module):
    """Inputs of all layers: (norm(projection(x) / sqrt(D)) + sqrt(w) embedding(token)) / sqrt(2)."""

    def __init__(self, width: int, layers: int, inner: int, vocabulary: int, norm: NormConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, layers * inner)
        self.projection = nn.Linear(width, layers * inner, bias=False)
        self.norm = Norm(inner, norm)
        self._layers, self._inner = layers, inner

    def __call__(self, tokens: mx.array, x: mx.array) -> mx.array:
        """tokens [B, T] and their scaled embeddings x [B, T, D] -> [B, T, layers, inner]."""
        shape = (*tokens.shape, self._layers, self._inner)
        own = self.embed_tokens(tokens).reshape(shape) * self._inner**0.5
        projected = (self.projection(x) * x.shape[-1] ** -0.5).reshape(shape)
        return (self.norm(projected) + own.astype(x.dtype)) * 2**-0.5


class PerLayerInput(nn.Module):
    """x + norm(projection(act(gate(x)) * own))."""

    def __init__(self, width: int, inner: int, act: str, norm: NormConfig):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.projection = nn.Linear(inner, width, bias=False)
        self.norm = Norm(width, norm)
        self.act_fn = activation(act)

    def __call__(self, x: mx.array, own: mx.array) -> mx.array:  # [B, T, D], [B, T, w] -> [B, T, D]
        return x + self.norm(self.projection(self.act_fn(self.gate(x)) * own))
