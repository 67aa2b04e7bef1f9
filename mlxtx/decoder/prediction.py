"""Extra heads that predict further ahead (multi-token prediction, DeepSeek-V3 report,
https://arxiv.org/abs/2412.19437, section 2.2)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache import LayerCache, Step
from mlxtx.decoder.block import Block
from mlxtx.decoder.config import BlockConfig, NormConfig
from mlxtx.decoder.norm import Norm


class PredictionHead(nn.Module):
    """From the state at token i and the token after it, the state that predicts token i + 2.

    Embeddings and the output head are those of the main model.
    """

    def __init__(self, width: int, config: BlockConfig, norm: NormConfig):
        super().__init__()
        self.enorm = Norm(width, norm)
        self.hnorm = Norm(width, norm)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block = Block(width, config)
        self.norm = Norm(width, norm)

    def __call__(
        self, hidden: mx.array, embedded: mx.array, cache: LayerCache, step: Step
    ) -> mx.array:
        """hidden [B, T, D] behind the final norm, embedded [B, T, D] next tokens -> [B, T, D]."""
        both = mx.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
        return self.norm(self.block(self.eh_proj(both), cache, step))
