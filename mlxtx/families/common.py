"""A ``config.json`` read in the field's words: what most families share.

A family's function takes a ``HubConfig`` and returns its ``DecoderConfig``; every method here
reads keys under the names that vendors use and leaves the strict accounting to the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from mlxtx.decoder.config import (
    AttentionConfig,
    BlockConfig,
    ConfigError,
    DecoderConfig,
    EmbeddingConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadConfig,
    HeadNormConfig,
    LatentAttentionConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import make_rope, rope_parameters

FULL, SLIDING = "full_attention", "sliding_attention"

Part = TypeVar("Part")

MOST = 10_000  # more layers or heads than any decoder has

# transformers' names of activations that are not ours
TANH = "gelu_new gelu_fast gelu_accurate gelu_pytorch_tanh gelu_python_tanh"
ACTIVATIONS = {"swish": "silu", "gelu_python": "gelu", "quick_gelu": "gelu_quick"}
ACTIVATIONS |= dict.fromkeys(TANH.split(), "gelu_tanh")


def per_layer(value: Any, count: int) -> list:
    """A list as it is; anything else for every layer."""
    return value if isinstance(value, list) else [value] * count


def head_norm(norm: NormConfig, over: Any = "head") -> dict[str, Any]:
    """The same norm for queries and keys."""
    return dict.fromkeys(("q_norm", "k_norm"), HeadNormConfig(norm=norm, over=over))


def behind(norm: NormConfig) -> dict[str, Any]:
    """The same norm behind both branches."""
    return dict.fromkeys(("attention_output_norm", "feed_forward_output_norm"), norm)


class HubConfig(ConfigReader):
    """One ``config.json``. ``default`` is always what the family takes for granted."""

    @property
    def width(self) -> int:
        return self.count("hidden_size", "n_embd", "d_model", "n_embed", most=2**31)

    @property
    def layers(self) -> int:
        return self.count("num_hidden_layers", "n_layer", "n_layers", "num_layers")

    @property
    def heads(self) -> int:
        return self.count("num_attention_heads", "n_head", "n_heads", "num_heads")

    def count(self, *names: str, least: int = 1, most: int = MOST, **default: int) -> int:
        """How many there are of something that is listed one by one: a bound keeps a hostile file
        from filling the memory."""
        count = self.get(*names, **default)
        if not isinstance(count, int) or not least <= count <= most:
            raise ConfigError(
                f"{names[0]} must be a whole number from {least} to {most}, not {count!r:.40}"
            )
        return count

    @property
    def context(self) -> int:
        """The longest text; a family without positions may not say."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
        return self.get(*names, default=2048)

    def head_dim(self, default: int | None = None) -> int:
        return self.nullable("head_dim", default) or self.width // self.heads

    def layer_types(self, default: Sequence[str] | None = None) -> list[str]:
        """The kind of attention of each layer."""
        return list(self.get("layer_types", default=None) or default or [FULL] * self.layers)

    def every(self, step: int) -> list[str]:
        """Full attention in every ``step``-th layer, a sliding window in the others."""
        return [SLIDING if (i + 1) % step else FULL for i in range(self.layers)]

    def windows(self, types: Sequence[str], default: int | None = None) -> list[int | None]:
        """Each layer's window in tokens, None where it sees everything."""
        window = self.nullable("sliding_window", default)
        return [window if kind == SLIDING else None for kind in types]

    def rms_norm(self, default: float = 1e-6, **fields: Any) -> NormConfig:
        return NormConfig(eps=self.get("rms_norm_eps", default=default), **fields)

    def layer_norm(self, name: str = "layer_norm_epsilon", **fields: Any) -> NormConfig:
        """LayerNorm, with a bias unless told otherwise; ``name`` is where its epsilon stands."""
        eps = self.get(name, default=1e-5)
        return NormConfig(**{"kind": "layer", "eps": eps, "bias": True, **fields})

    def feed_forward(
        self,
        width: str | int = "intermediate_size",
        activation: str = "silu",
        keys: tuple[str, ...] = ("hidden_act",),
        **fields: Any,
    ) -> FeedForwardConfig:
        """Gated unless ``fields`` say otherwise; ``width`` is a key or a number, ``activation``
        the default, ``keys`` where the config may name another."""
        name = self.get(*keys, default=activation)
        size = self.get(width) if isinstance(width, str) else width
        return FeedForwardConfig(width=size, activation=ACTIVATIONS.get(name, name), **fields)

    def experts(
        self,
        width: str = "intermediate_size",
        shared: int | FeedForwardConfig | None = None,
        shared_bias: bool = False,
        fields: dict[str, Any] | None = None,
        **routing: Any,
    ) -> ExpertsConfig:
        """Experts under every vendor's names, with this routing. All tokens go through ``shared``,
        a feed-forward or so many experts; ``fields`` are more of ``ExpertsConfig``'s."""
        fields = dict(fields or {})
        expert = fields["expert"] = fields.get("expert") or self.feed_forward(width)
        if isinstance(shared, int):
            both = {"width": expert.width * shared, "bias": shared_bias}
            shared = replace(expert, **both) if shared else None
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        if "count" not in fields:
            fields["count"] = self.get(*names)
            fields["per_token"] = self.get("num_experts_per_tok", "moe_k", "top_k_experts")
        router = RouterConfig(**routing)
        return ExpertsConfig(router=router, shared=shared, **fields)

    def bias(self, default: bool = False) -> bool:
        """The switch for the biases of all four projections."""
        return self.get("attention_bias", default=default)

    def rope(
        self,
        head_dim: int | None = None,
        layer_type: str | None = None,
        *,
        fields: dict[str, Any] | None = None,
        **defaults: Any,
    ) -> RopeConfig:
        """RoPE of a layer type; ``fields`` are more of ``RopeConfig``'s, ``defaults`` the
        family's (see ``rope_parameters``)."""
        parameters = rope_parameters(self, layer_type, **defaults)
        return make_rope(parameters, head_dim or self.head_dim(), self.context, **(fields or {}))

    def attention(
        self, *, rope: Any = None, window: Any = None, bias: bool = False, **fields: Any
    ) -> list[AttentionConfig]:
        """Ordinary attention for every layer. ``rope`` and ``window`` may be lists; ``bias`` is
        for all four projections; ``fields`` are those of ``AttentionConfig``."""
        fields = {
            "qkv_bias": bias,
            "output_bias": bias,
            "heads": self.heads,
            "kv_heads": self.get("num_key_value_heads", default=self.heads),
            "head_dim": fields.get("head_dim") or self.head_dim(),
            **fields,
        }
        ropes, windows = per_layer(rope, self.layers), per_layer(window, self.layers)
        return [
            AttentionConfig(**fields, rope=one, window=other)
            for one, other in zip(ropes, windows, strict=True)
        ]

    def decoder(
        self,
        norm: NormConfig | None,
        feed_forward: FeedForwardConfig | ExpertsConfig | list,
        *,
        tied: bool = False,
        block: dict[str, Any] | None = None,
        embedding: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        whole: dict[str, Any] | None = None,
        layers: Sequence[AttentionConfig | LatentAttentionConfig] | None = None,
        **attention: Any,
    ) -> DecoderConfig:
        """The whole decoder: ``norm`` before both branches and at the end, attention as
        ``attention`` says (or ``layers``), and more fields of the blocks, the embedding, the head
        and the whole. ``tied`` is the default for the head."""
        tied = self.get("tie_word_embeddings", default=tied)
        common = {"attention_norm": norm, "feed_forward_norm": norm, **(block or {})}
        parts = layers or self.attention(**attention), per_layer(feed_forward, self.layers)
        fields = {
            "vocabulary": self.get("vocab_size"),
            "width": self.width,
            "context": self.context,
            "blocks": tuple(
                BlockConfig(attention=one, feed_forward=other, **common)
                for one, other in zip(*parts, strict=True)
            ),
            "final_norm": norm,
            "embedding": EmbeddingConfig(**(embedding or {})),
            "head": HeadConfig(tied=tied, **(head or {})),
        }
        return DecoderConfig(**{**fields, **(whole or {})})


def first(kind: type[Part], decoder: DecoderConfig) -> Part:
    """The first part of a kind: in a family whose name rules ask, all have the same sizes."""
    parts = [part for block in decoder.blocks for part in (block.attention, block.feed_forward)]
    return next(part for part in parts if isinstance(part, kind))
