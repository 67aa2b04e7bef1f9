"""What a family is: two functions from ``config.json``, to a ``DecoderConfig`` and to a name map."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from mlxtx.decoder.config import ConfigError, DecoderConfig
from mlxtx.errors import MlxtxError
from mlxtx.families.common import HubConfig
from mlxtx.naming.map import SAVED_BUFFERS, Drop, NameMap, Rule

_NONSENSE = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, StopIteration)
# Embedding models on Llama's block are saved without the outer module's name.
BARE = (r"^(embed_tokens|layers|norm)\.", r"model.\1.")
Rules = tuple[Rule, ...] | Callable[[DecoderConfig], tuple[Rule, ...]]


def resolved(rules: Rules, decoder: DecoderConfig) -> tuple[Rule, ...]:
    return rules(decoder) if callable(rules) else rules


@dataclass(frozen=True)
class Family:
    """One ``model_type``. ``read`` describes the decoder; ``rules`` are the name rules that turn
    the family's tensors into ours, where they depend on sizes a function of the decoder.
    ``packed_rules`` take their place where ``quantization_config`` says mxfp4. ``mlx_rules`` are
    for the names that MLX checkpoints of the family have of their own. ``defaults`` stand for
    keys that the config leaves out."""

    model_type: str
    read: Callable[[HubConfig], DecoderConfig]
    rules: Rules = ()
    aliases: tuple[tuple[str, str], ...] = ()
    drops: tuple[Drop, ...] = ()
    packed_rules: Rules | None = None
    mlx_rules: Rules = ()
    defaults: Mapping[str, int] = field(default_factory=dict)

    def decoder_config(
        self, config: Mapping[str, Any], tensors: Collection[str] = ()
    ) -> DecoderConfig:
        """The decoder that ``config`` describes; a key that nothing knows is an error.

        ``tensors`` are the names in the checkpoint: extra prediction heads count only where their
        tensors are there, for configs often promise heads that the files don't hold.
        """
        decoder = self._read(config)
        held = sum(name.endswith("eh_proj.weight") for name in tensors)
        return replace(decoder, prediction_heads=decoder.prediction_heads[:held])

    def _read(self, config: Mapping[str, Any]) -> DecoderConfig:
        hub = HubConfig({**self.defaults, **config})
        with self._explained():
            decoder = self.read(hub)
        hub.finish()
        return decoder

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A file may hold anything: what reading it stumbles over is one line for people."""
        try:
            yield
        except ConfigError as error:
            raise MlxtxError(f"config.json describes no possible decoder: {error}") from None
        except _NONSENSE as error:
            raise MlxtxError(
                f"config.json holds a value that makes no sense for {self.model_type}: {error}"
            ) from error

    def names(self, config: Mapping[str, Any], decoder: DecoderConfig | None = None) -> NameMap:
        """The two-way map of the tensor names of a checkpoint with this ``config.json``, and with
        the decoder that it describes, where that is known already."""
        decoder, rules = decoder or self._read(config), self.rules
        with self._explained():
            method = (config.get("quantization_config") or {}).get("quant_method")
            if method == "mxfp4" and self.packed_rules is not None:
                rules = self.packed_rules
            mlx = resolved(self.mlx_rules, decoder)
            own = resolved(rules, decoder)
        return NameMap(
            (*mlx, *own),
            drops=(*SAVED_BUFFERS, *self.drops),
            aliases=(*self.aliases, BARE),
        )
