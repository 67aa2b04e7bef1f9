"""A cache kept between prompts, so that what two prompts share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxtx.cache.reuse import Find, ReusedCache

if TYPE_CHECKING:
    from mlxtx.decoder.config import DecoderConfig
    from mlxtx.decoder.model import DecoderModel


class Session(ReusedCache):
    """One conversation's cache and the tokens that are in it.

    ``start(prompt)`` takes the cache back to the longest common beginning of what it holds and
    ``prompt``; ``tokens`` then grows as the caller feeds more.
    """

    def __init__(
        self, model: DecoderModel, kv: str | None = None, find: Find | None = None
    ) -> None:
        self.model = model
        self.kv = kv
        self.turn = 0  # counts prompts: an answer to an earlier one can't go on
        self._weights = model.weights_version
        self._regime = 0
        # Saved caches were made at one length; other regimes have other keys.
        regular = find and (lambda prompt, held: None if self._regime else find(prompt, held))
        super().__init__(lambda: model.make_cache(kv=kv), regular)

    def start(self, prompt: Sequence[int]) -> int:
        """Tokens of ``prompt`` that need not be fed again: all but the last at most."""
        self.turn += 1
        regime = rope_regime(self.model.config, len(prompt))
        if regime != self._held() or self._weights != self.model.weights_version:
            self.reset()
        elif regime != self._regime:  # marks were set before the text was fed anew
            self._marks.clear()
        self._regime, self._weights = regime, self.model.weights_version
        return super().start(prompt)

    def _held(self) -> int:
        """The regime of the keys in the cache: the last prompt's, or a later one where the text
        outgrew the cache and was fed anew."""
        limit = self.model.config.refeed_beyond
        return self._regime if limit is None else max(self._regime, self.cache.offset > limit)


def rope_regime(config: DecoderConfig, length: int) -> int:
    """Sequences of one regime have the same rotary frequencies, so their keys can be shared.

    LongRoPE has two sets of factors, dynamic scaling one base for every length beyond the
    trained context; everything else is regime 0.
    """
    regime = 0
    for block in config.blocks:
        rope = getattr(block.attention, "rope", None)
        scaling = rope.scaling if rope else None
        if scaling and scaling.depends_on_length and length > scaling.original_context:
            regime = max(regime, length if scaling.kind == "dynamic" else 1)
    return regime


def shared_limit(config: DecoderConfig) -> int:
    """The longest beginning whose keys any longer text of regime 0 can share."""
    scalings = (getattr(getattr(b.attention, "rope", None), "scaling", None) for b in config.blocks)
    lengths = (s.original_context for s in scalings if s and s.depends_on_length)
    return min(context_limit(config), *lengths, config.refeed_beyond or context_limit(config))


def context_limit(config: DecoderConfig) -> int:
    """The longest sequence in tokens: the configured context, or what a RoPE scaling makes of it.

    YaRN and dynamic scaling are often switched on without touching the configured context.
    """
    limit = config.context
    for block in config.blocks:
        rope = getattr(block.attention, "rope", None)
        scaling = rope.scaling if rope else None
        if scaling and scaling.kind in ("yarn", "dynamic"):
            limit = max(limit, int(scaling.original_context * scaling.factor))
    return limit
