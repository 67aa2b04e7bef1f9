"""What a family is: two functions from ``config.json``, to a ``DecoderConfig`` and to a name map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxtx.decoder.config import ConfigError, DecoderConfig
from mlxtx.errors import MlxtxError
from mlxtx.families.names import SAVED_BUFFERS, Drop, NameMap, Rule
from mlxtx.families.reader import ConfigReader


@dataclass(frozen=True)
class Family:
    """One ``model_type``. ``read`` describes the decoder; ``rules`` are the name rules that turn
    the family's tensors into ours, where they depend on sizes a function of the decoder."""

    model_type: str
    read: Callable[[ConfigReader], DecoderConfig]
    rules: tuple[Rule, ...] | Callable[[DecoderConfig], tuple[Rule, ...]] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    drops: tuple[Drop, ...] = ()

    def decoder_config(self, config: Mapping[str, Any]) -> DecoderConfig:
        """The decoder that ``config`` describes; a key that nothing knows is an error."""
        reader = ConfigReader(config)
        try:
            decoder = self.read(reader)
        except ConfigError as error:
            raise MlxtxError(f"config.json describes no possible decoder: {error}") from None
        reader.finish()
        return decoder

    def names(self, config: Mapping[str, Any] | DecoderConfig) -> NameMap:
        """The two-way map of the tensor names of a checkpoint with this ``config.json``."""
        decoder = config if isinstance(config, DecoderConfig) else self.decoder_config(config)
        rules = self.rules(decoder) if callable(self.rules) else self.rules
        unused = (Drop("lm_head.*"),) if decoder.head.tied else ()
        return NameMap(rules, drops=(*SAVED_BUFFERS, *unused, *self.drops), aliases=self.aliases)
