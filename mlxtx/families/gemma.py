"""Gemma: scaled embeddings, zero-centred norms, sandwich norms from the second generation on."""

from __future__ import annotations

from mlxtx.decoder.config import DecoderConfig, EmbeddingConfig
from mlxtx.families.common import (
    attention_layers,
    blocks,
    decoder,
    every,
    feed_forward,
    head_norm,
    layer_types,
    rms_norm,
    width,
    windows,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import biases, head_dim
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope
from mlxtx.families.rules import LAYER, OUTPUT_NORMS, layer_rules

GELU = ("hidden_activation",)


def _embedding(reader: ConfigReader) -> EmbeddingConfig:
    return EmbeddingConfig(multiplier=width(reader) ** 0.5)


def gemma(reader: ConfigReader) -> DecoderConfig:
    """Its files say ``gelu`` where they mean the tanh form."""
    reader.expect("use_bidirectional_attention", None, False)
    norm = rms_norm(reader, offset=1.0)
    size = head_dim(reader, 256)
    rope = read_rope(reader, size)
    attention = attention_layers(reader, head_dim=size, rope=rope, **biases(reader))
    said = reader.get("hidden_act", "hidden_activation", default="gelu")
    gated = feed_forward(reader, keys=("hidden_activation", "hidden_act"))
    if said == "gelu":
        gated = feed_forward(reader, keys=GELU, default="gelu_pytorch_tanh")
    return decoder(
        reader, blocks(attention, gated, norm), norm, tied=True, embedding=_embedding(reader)
    )


def gemma2(reader: ConfigReader) -> DecoderConfig:
    """Soft caps, a window in every other layer."""
    reader.expect("use_bidirectional_attention", None, False)
    norm = rms_norm(reader, offset=1.0)
    types = layer_types(reader, every(reader, 2))
    size = head_dim(reader, 256)
    return _sandwich(
        reader,
        norm,
        rope=read_rope(reader, size),
        head_dim=size,
        window=windows(reader, types, 4096),
        softcap=reader.nullable("attn_logit_softcapping", 50.0),
        cap=reader.nullable("final_logit_softcapping", 30.0),
    )


def gemma3_text(reader: ConfigReader) -> DecoderConfig:
    """Five layers with a window and a rotary base of their own to one that sees everything."""
    reader.expect("use_bidirectional_attention", False, None)
    norm = rms_norm(reader, offset=1.0)
    step = reader.get("sliding_window_pattern", "_sliding_window_pattern", default=6)
    types = layer_types(reader, every(reader, step))
    size = head_dim(reader, 256)
    local = read_rope(
        reader, size, "sliding_attention", theta=1e4, theta_names=("rope_local_base_freq",)
    )
    full = read_rope(reader, size, "full_attention", theta=1e6)
    return _sandwich(
        reader,
        norm,
        rope=[local if kind == "sliding_attention" else full for kind in types],
        head_dim=size,
        window=windows(reader, types, 4096),
        softcap=reader.get("attn_logit_softcapping", default=None),
        cap=reader.get("final_logit_softcapping", default=None),
        **head_norm(norm),
    )


def _sandwich(reader: ConfigReader, norm, *, cap: float | None, **attention) -> DecoderConfig:
    layers = attention_layers(
        reader,
        scale=reader.get("query_pre_attn_scalar", default=256) ** -0.5,
        **biases(reader),
        **attention,
    )
    body = blocks(
        layers,
        feed_forward(reader, keys=("hidden_activation", "hidden_act"), default="gelu_pytorch_tanh"),
        norm,
        attention_output_norm=norm,
        feed_forward_output_norm=norm,
    )
    return decoder(
        reader, body, norm, tied=True, embedding=_embedding(reader), head={"softcap": cap}
    )


SANDWICH = layer_rules(
    LAYER, {**OUTPUT_NORMS, "pre_feedforward_layernorm": "post_attention_layernorm"}
)

FAMILIES = (
    Family("gemma", gemma),
    Family("gemma2", gemma2, SANDWICH),
    Family("gemma3_text", gemma3_text, SANDWICH),
)
