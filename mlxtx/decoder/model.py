"""The whole decoder: embeddings, blocks, final norm and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache import DEFAULT_REWIND, KVSettings, ModelCache, Step, Uncached, make_cache
from mlxtx.decoder.block import Block
from mlxtx.decoder.config import BlockConfig, DecoderConfig, EmbeddingConfig, NormConfig
from mlxtx.decoder.norm import Norm
from mlxtx.decoder.per_layer import PerLayerEmbedding
from mlxtx.decoder.positions import sinusoidal_table
from mlxtx.decoder.prediction import PredictionHead


class Decoder(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        embedding = config.embedding
        inner = embedding.width or config.width
        self._embedding = embedding
        self.embed_tokens = nn.Embedding(config.vocabulary, inner)
        if embedding.width and embedding.width != config.width:
            self.project_in = nn.Linear(inner, config.width, bias=False)
            self.project_out = nn.Linear(config.width, inner, bias=False)
        if embedding.positions and not embedding.sinusoidal:
            self.embed_positions = nn.Embedding(embedding.positions, config.width)
        if embedding.norm:
            self.embed_norm = Norm(config.width, embedding.norm)
        if embedding.per_layer:
            self.per_layer = PerLayerEmbedding(
                config.width,
                len(config.blocks),
                embedding.per_layer,
                embedding.per_layer_vocabulary or config.vocabulary,
                config.final_norm or NormConfig(),
            )
        self.layers = [Block(config.width, block) for block in config.blocks]
        self.norm = Norm(config.width, config.final_norm) if config.final_norm else nn.Identity()

    def embed(self, tokens: mx.array, step: Step) -> mx.array:  # [B, T] -> [B, T, D]
        embedding: EmbeddingConfig = self._embedding
        x = self.embed_tokens(tokens)
        if "project_in" in self:
            x = self.project_in(x)
        if embedding.multiplier != 1.0:
            x = x * mx.array(embedding.multiplier, dtype=x.dtype)
        if embedding.positions:
            # Padding lies before the table; a row that is done and fed on with others, behind it.
            last_row = embedding.positions - 1 - embedding.position_offset
            rows = mx.clip(step.query_positions, 0, last_row) + embedding.position_offset
            if embedding.sinusoidal:
                x = x + sinusoidal_table(embedding.positions, x.shape[-1])[rows].astype(x.dtype)
            else:
                x = x + self.embed_positions(rows)
        return self.embed_norm(x) if embedding.norm else x

    def __call__(self, tokens: mx.array, caches: Sequence, step: Step, last: int | None):
        x = self.embed(tokens, step)
        own = self.per_layer(tokens, x) if self._embedding.per_layer else None
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            x = layer(x, cache, step, None if own is None else own[:, :, i])
        x = self.norm(x if last is None else x[:, -last:])
        return self.project_out(x) if "project_out" in self else x


class DecoderModel(nn.Module):
    """A decoder with its language-model head: tokens [B, T] -> logits [B, T, V]."""

    weights_version = 0  # counts up when other weights are put on: what caches hold is stale then

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self._config = config
        self.model = Decoder(config)
        if config.prediction_heads:
            norm = config.final_norm or NormConfig()
            self.prediction_heads = [
                PredictionHead(config.width, block, norm) for block in config.prediction_heads
            ]
        if not config.head.tied:
            inner = config.embedding.width or config.width
            self.lm_head = nn.Linear(inner, config.vocabulary, bias=config.head.bias)

    @property
    def config(self) -> DecoderConfig:
        return self._config

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def __call__(self, tokens: mx.array, cache: ModelCache | None = None, **how: Any) -> mx.array:
        """Logits [B, T, V] of tokens [B, T]; ``how`` as in ``hidden``."""
        return self.head(self.hidden(tokens, cache, **how))

    def hidden(
        self,
        tokens: mx.array,
        cache: ModelCache | None = None,
        *,
        left_padding: Sequence[int] | None = None,
        length: int | None = None,
        segments: mx.array | None = None,
        positions: mx.array | None = None,
        last: int | None = None,
    ) -> mx.array:
        """Hidden states [B, T, D] behind the final norm, of which ``head`` makes logits; with
        ``last`` only those of the newest positions.

        ``cache`` takes the tokens behind what it holds. ``left_padding`` is how many tokens at
        the start of each row are padding (told once, with the first tokens or when the cache is
        made). ``length`` is how many tokens a prompt fed in chunks will have in the end, which
        dynamic and LongRoPE scalings depend on. ``segments`` [B, T] numbers the samples packed
        into a row, ``positions`` [B, T] gives each token's position in its sample.
        """
        step = _step(tokens.shape[1], cache, left_padding, length, positions, segments)
        caches = uncached(self._config.blocks) if cache is None else cache.layers
        x = self.model(tokens, caches, step, last)
        if cache is not None:
            cache.offset += step.count
        return x

    def outgrows(self, cache: ModelCache, count: int = 1) -> bool:
        """Whether ``count`` more tokens take a row past ``config.refeed_beyond``, where rotary
        frequencies change for good: then the text so far is to be fed anew into an empty cache,
        for what ``cache`` holds was made with the old ones."""
        limit = self._config.refeed_beyond
        if limit is None:
            return False
        lengths = [cache.offset - padding for padding in cache.left_padding or (0,)]
        return any(0 < length <= limit < length + count for length in lengths)

    def predict_ahead(
        self,
        hidden: mx.array,
        next_tokens: mx.array,
        cache: ModelCache | None = None,
        *,
        depth: int = 0,
        left_padding: Sequence[int] | None = None,
        segments: mx.array | None = None,
        positions: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Logits [B, T, V] of the token after the next one, and the states they come from.

        ``hidden`` [B, T, D] is what ``hidden()`` gave (or, for ``depth`` above 0, the states
        that the head before returned) and ``next_tokens`` [B, T] are the tokens that follow each.
        ``cache`` comes from ``make_cache(ahead=True)``, one for each depth.
        """
        heads = self.get("prediction_heads", [])
        if depth >= len(heads):
            raise ValueError(f"this model has {len(heads)} prediction heads, not {depth + 1}")
        step = _step(next_tokens.shape[1], cache, left_padding, None, positions, segments)
        block = self._config.prediction_heads[depth]
        layer = uncached([block])[0] if cache is None else cache.layers[depth]
        states = heads[depth](hidden, self.model.embed(next_tokens, step), layer, step)
        if cache is not None:
            cache.offset += step.count
        return self.head(states), states

    def head(self, hidden: mx.array) -> mx.array:  # [B, T, D] -> [B, T, V]
        config = self._config.head
        if config.tied:
            logits = self.model.embed_tokens.as_linear(hidden)
        else:
            logits = self.lm_head(hidden)
        if config.multiplier != 1.0:
            logits = logits * config.multiplier
        if config.softcap is not None:
            logits = config.softcap * mx.tanh(logits / config.softcap)
        return logits

    def make_cache(
        self,
        kv: str | KVSettings | None = None,
        *,
        left_padding: Sequence[int] | None = None,
        rewind: int = DEFAULT_REWIND,
        ahead: bool = False,
    ) -> ModelCache:
        """An empty cache for one batch. ``kv`` names how rows are kept, "k8v4g64" for instance;
        None keeps them as they are. ``rewind``: tokens that layers with a window can take back.
        ``ahead`` makes one for ``predict_ahead``."""
        blocks = self._config.prediction_heads if ahead else self._config.blocks
        return make_cache(blocks, kv, left_padding=left_padding, rewind=rewind)


def _step(count, cache, left_padding, length, positions, segments) -> Step:
    """The step that comes next in ``cache``, or the only one without a cache."""
    if cache is not None:
        if left_padding is not None:
            cache.set_left_padding(left_padding)
        left_padding = cache.left_padding
    return Step(
        count,
        0 if cache is None else cache.offset,
        left_padding=left_padding,
        length=length,
        positions=positions,
        segments=segments,
    )


def uncached(blocks: Sequence[BlockConfig]) -> list[Uncached]:
    """What stands in for caches where every token is there at once; layers that share a cache
    share it here too."""
    caches: list[Uncached] = []
    for block in blocks:
        source = getattr(block.attention, "shares_cache_of", None)
        caches.append(Uncached() if source is None else caches[source])
    return caches
