"""What most families share: sizes, norms, layer patterns and the frame around the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtx.decoder.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadConfig,
    HeadNormConfig,
    LatentAttentionConfig,
    NormConfig,
    RopeConfig,
)
from mlxtx.families.reader import ConfigReader

# The same size under different names; the first one present counts.
WIDTH = ("hidden_size", "n_embd", "d_model", "n_embed")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")

# transformers' names of activations -> ours
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


def width(reader: ConfigReader) -> int:
    return reader.get(*WIDTH)


def layers(reader: ConfigReader) -> int:
    return reader.get(*LAYERS)


def context(reader: ConfigReader, default: int | None = None) -> int:
    return reader.get(*CONTEXT) if default is None else reader.get(*CONTEXT, default=default)


def activation(reader: ConfigReader, *names: str, default: str = "silu") -> str:
    name = reader.get(*(names or ("hidden_act",)), default=default)
    return ACTIVATIONS.get(name, name)


def rms_norm(reader: ConfigReader, default: float = 1e-6, **fields: Any) -> NormConfig:
    return NormConfig(eps=reader.get("rms_norm_eps", default=default), **fields)


def layer_norm(
    reader: ConfigReader, *names: str, default: float = 1e-5, **fields: Any
) -> NormConfig:
    """LayerNorm with a bias unless told otherwise."""
    eps = reader.get(*(names or ("layer_norm_epsilon", "layer_norm_eps")), default=default)
    return NormConfig(**{"kind": "layer", "eps": eps, "bias": True, **fields})


def sizes(reader: ConfigReader, **known: Any) -> dict[str, Any]:
    """heads, kv_heads and head_dim; ``known`` wins over what the config says."""
    heads = reader.get(*HEADS)
    own = reader.get("head_dim", default=None)
    return {
        "heads": heads,
        "kv_heads": reader.get("num_key_value_heads", default=heads),
        "head_dim": own or width(reader) // heads,
        **known,
    }


def layer_types(reader: ConfigReader, default: Sequence[str] | None = None) -> list[str]:
    """``layer_types``, or what the family takes for granted, one name a layer."""
    types = reader.get("layer_types", default=default)
    return list(types) if types else ["full_attention"] * layers(reader)


def every(reader: ConfigReader, step: int) -> list[str]:
    """Full attention in every ``step``-th layer, a sliding window in the others."""
    return [
        "full_attention" if (i + 1) % step == 0 else "sliding_attention"
        for i in range(layers(reader))
    ]


def windows(reader: ConfigReader, types: Sequence[str], default: int | None = None) -> list:
    """Each layer's window in tokens, None where it sees everything."""
    window = reader.get("sliding_window", default=default)
    return [window if kind == "sliding_attention" else None for kind in types]


def per_layer(value: Any, count: int) -> list:
    """A list as it is; anything else for every layer."""
    return value if isinstance(value, list) else [value] * count


def head_norm(norm: NormConfig, over: Any = "head") -> dict[str, Any]:
    """The same norm for queries and keys."""
    each = HeadNormConfig(norm=norm, over=over)
    return {"q_norm": each, "k_norm": each}


def attention_layers(
    reader: ConfigReader,
    *,
    rope: RopeConfig | list[RopeConfig | None] | None = None,
    window: int | list | None = None,
    **fields: Any,
) -> list[AttentionConfig]:
    """Ordinary attention for every layer; ``fields`` are those of ``AttentionConfig``."""
    count = layers(reader)
    fields = {**sizes(reader), **fields}
    return [
        AttentionConfig(**fields, rope=one_rope, window=one_window)
        for one_rope, one_window in zip(
            per_layer(rope, count), per_layer(window, count), strict=True
        )
    ]


def feed_forward(
    reader: ConfigReader,
    width: str | int = "intermediate_size",
    *,
    default: str = "silu",
    keys: tuple[str, ...] = ("hidden_act",),
    **fields: Any,
) -> FeedForwardConfig:
    """A feed-forward, gated unless ``fields`` say otherwise; ``default`` is the family's
    activation, ``keys`` where the config names one."""
    return FeedForwardConfig(
        width=reader.get(width) if isinstance(width, str) else width,
        activation=activation(reader, *keys, default=default),
        **fields,
    )


def blocks(
    attention: Sequence[AttentionConfig | LatentAttentionConfig],
    feed_forward: FeedForwardConfig | ExpertsConfig | list,
    norm: NormConfig | None,
    **fields: Any,
) -> list[BlockConfig]:
    """One block a layer, with the same norm before both branches unless ``fields`` say more."""
    fields = {"attention_norm": norm, "feed_forward_norm": norm, **fields}
    return [
        BlockConfig(attention=one, feed_forward=other, **fields)
        for one, other in zip(attention, per_layer(feed_forward, len(attention)), strict=True)
    ]


def decoder(
    reader: ConfigReader,
    blocks: Sequence[BlockConfig],
    norm: NormConfig | None,
    *,
    tied: bool = False,
    head: dict[str, Any] | None = None,
    **fields: Any,
) -> DecoderConfig:
    """The frame: vocabulary, width, context, final norm and head. ``tied`` is the default."""
    fields.setdefault("context", None)
    fields["context"] = fields["context"] or context(reader)
    return DecoderConfig(
        vocabulary=reader.get("vocab_size"),
        width=width(reader),
        blocks=tuple(blocks),
        final_norm=norm,
        head=HeadConfig(tied=reader.get("tie_word_embeddings", default=tied), **(head or {})),
        **fields,
    )
