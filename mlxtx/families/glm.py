"""GLM: RoPE on half of each head; the fourth generation adds norms behind the branches, then
experts."""

from __future__ import annotations

from typing import Any

from mlxtx.decoder.config import DecoderConfig
from mlxtx.families.common import (
    attention_layers,
    blocks,
    decoder,
    feed_forward,
    rms_norm,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import head_dim
from mlxtx.families.names import Rule
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope
from mlxtx.families.rules import LAYER, feed_forward_of, gate_up_rule, layer_rules


def _glm(reader: ConfigReader, default_bias: bool, behind: bool) -> DecoderConfig:
    norm = rms_norm(reader, 1.5625e-7)
    size = head_dim(reader, 128)
    attention = attention_layers(
        reader,
        head_dim=size,
        rope=read_rope(reader, size, partial=0.5, fields={"interleaved": True}),
        qkv_bias=reader.get("attention_bias", default=default_bias),
    )
    output: dict[str, Any] = {}
    if behind:
        output = {"attention_output_norm": norm, "feed_forward_output_norm": norm}
    return decoder(reader, blocks(attention, feed_forward(reader), norm, **output), norm)


def glm(reader: ConfigReader) -> DecoderConfig:
    return _glm(reader, True, behind=False)


def glm4(reader: ConfigReader) -> DecoderConfig:
    return _glm(reader, True, behind=True)


def _gate_up(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (gate_up_rule(f"{LAYER}.mlp.gate_up_proj", feed_forward_of(decoder).width),)


def _glm4_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (
        *_gate_up(decoder),
        *layer_rules(
            LAYER,
            {
                "post_self_attn_layernorm": "attention_output_layernorm",
                "post_mlp_layernorm": "feed_forward_output_layernorm",
            },
        ),
    )


FAMILIES = (Family("glm", glm, _gate_up), Family("glm4", glm4, _glm4_rules))
