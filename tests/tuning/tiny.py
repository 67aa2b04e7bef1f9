"""A tiny decoder and samples for the tests of training."""

from __future__ import annotations

import numpy as np

from mlxtx.decoder.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadConfig,
    RopeConfig,
)
from mlxtx.tuning.samples import Sample, sample
from mlxtx.tuning.scratch import initial_model

VOCABULARY, WIDTH = 61, 32


def block(experts: bool = False, **attention) -> BlockConfig:
    feed_forward = FeedForwardConfig(width=64)
    if experts:
        expert = FeedForwardConfig(width=32)
        feed_forward = ExpertsConfig(count=4, per_token=2, expert=expert)
    how = {"heads": 4, "kv_heads": 2, "head_dim": 8, "rope": RopeConfig(dims=8), **attention}
    return BlockConfig(attention=AttentionConfig(**how), feed_forward=feed_forward)


def decoder(*blocks: BlockConfig, tied: bool = True, **more) -> DecoderConfig:
    return DecoderConfig(
        vocabulary=more.pop("vocabulary", VOCABULARY),
        width=more.pop("width", WIDTH),
        context=128,
        blocks=blocks or (block(), block()),
        head=more.pop("head", HeadConfig(tied=tied)),
        **more,
    )


def model(*blocks: BlockConfig, seed: int = 1, **more):
    return initial_model(decoder(*blocks, **more), seed, deviation=0.15)


def samples(lengths, seed: int = 0, masked: bool = True) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        in_loss = rng.random(length) < 0.7 if masked else np.ones(length, bool)
        in_loss[-1] = True
        made.append(sample(rng.integers(0, VOCABULARY, length), in_loss))
    return made
