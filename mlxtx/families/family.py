"""What a family is: two functions from ``config.json``, to a ``DecoderConfig`` and to a name map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxtx.decoder.config import ConfigError, DecoderConfig
from mlxtx.errors import MlxtxError
from mlxtx.families.names import SAVED_BUFFERS, NameMap
from mlxtx.families.reader import ConfigReader


def _no_rules(config: Mapping[str, Any]) -> NameMap:
    """Llama's own names."""
    return NameMap(drops=SAVED_BUFFERS)


@dataclass(frozen=True)
class Family:
    """One ``model_type``. ``read`` describes the decoder, ``names`` maps its tensors."""

    model_type: str
    read: Callable[[ConfigReader], DecoderConfig]
    names: Callable[[Mapping[str, Any]], NameMap] = _no_rules

    def decoder_config(self, config: Mapping[str, Any]) -> DecoderConfig:
        """The decoder that ``config`` describes; a key that nothing knows is an error."""
        reader = ConfigReader(config)
        try:
            decoder = self.read(reader)
        except ConfigError as error:
            raise MlxtxError(f"config.json describes no possible decoder: {error}") from None
        reader.finish()
        return decoder
