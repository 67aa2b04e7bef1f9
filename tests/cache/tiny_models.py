"""Small decoders whose layers differ in everything a cache has to know."""

from __future__ import annotations

import mlx.core as mx

from mlxtx.decoder.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    FeedForwardConfig,
    HeadConfig,
    LatentAttentionConfig,
    RopeConfig,
)
from mlxtx.decoder.model import DecoderModel

ROPE = RopeConfig(dims=16)
FULL = AttentionConfig(heads=4, kv_heads=2, head_dim=16, rope=ROPE)
WINDOW = AttentionConfig(heads=4, kv_heads=1, head_dim=16, rope=ROPE, window=12, sinks=True)
SHARED = AttentionConfig(heads=4, kv_heads=1, head_dim=16, window=12, shares_cache_of=1)
CAPPED = AttentionConfig(heads=2, kv_heads=2, head_dim=24, softcap=3.0, window=20, global_tokens=2)
CHUNKED = AttentionConfig(heads=4, kv_heads=2, head_dim=16, rope=ROPE, chunk=16)
SLOPES = AttentionConfig(heads=4, kv_heads=4, head_dim=8, alibi=(0.5, 0.25, 0.125, 0.0625))
LATENT = LatentAttentionConfig(
    heads=4, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=12, rope=RopeConfig(dims=8, tail=True)
)
KINDS = {
    "full": (FULL, FULL),
    "windows": (FULL, WINDOW, SHARED),
    "mixed": (CAPPED, CHUNKED, SLOPES),
    "latent": (LATENT, LATENT),
}


def tiny_model(*attentions, seed: int = 0, vocabulary: int = 50) -> DecoderModel:
    mx.random.seed(seed)
    blocks = tuple(
        BlockConfig(attention=attention, feed_forward=FeedForwardConfig(width=48))
        for attention in attentions or (FULL, WINDOW)
    )
    model = DecoderModel(
        DecoderConfig(
            vocabulary=vocabulary,
            width=32,
            blocks=blocks,
            context=256,
            head=HeadConfig(tied=True),
        )
    )
    mx.eval(model.parameters())
    return model
