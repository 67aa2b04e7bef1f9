"""OLMo: norms without weights, then norms behind the branches, then windows and experts."""

from __future__ import annotations

from mlxtx.decoder.config import DecoderConfig, ExpertsConfig, NormConfig, RouterConfig
from mlxtx.families.common import (
    attention_layers,
    blocks,
    decoder,
    every,
    feed_forward,
    head_norm,
    layer_types,
    rms_norm,
    windows,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import biases, head_dim
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope
from mlxtx.families.rules import LAYER, OUTPUT_NORMS, expert_rules, layer_rules


def olmo(reader: ConfigReader) -> DecoderConfig:
    norm = NormConfig(kind="layer", eps=1e-5, weight=False)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader)),
        clip_qkv=reader.get("clip_qkv", default=None),
        **biases(reader),
    )
    return decoder(reader, blocks(attention, feed_forward(reader), norm), norm)


def olmo2(reader: ConfigReader) -> DecoderConfig:
    rope = read_rope(reader, head_dim(reader))
    return _behind(reader, rope=rope, window=None)


def olmo3(reader: ConfigReader) -> DecoderConfig:
    """Three layers with a window, and unscaled RoPE, to one that sees everything."""
    types = layer_types(reader, every(reader, 4))
    ropes = {
        kind: read_rope(reader, head_dim(reader), kind, theta=5e5)
        for kind in ("sliding_attention", "full_attention")
    }
    return _behind(
        reader, rope=[ropes[kind] for kind in types], window=windows(reader, types, 4096)
    )


def _behind(reader: ConfigReader, **attention) -> DecoderConfig:
    """Norms behind the branches, and over all queries and keys of a token together."""
    norm = rms_norm(reader, 1e-5)
    layers = attention_layers(reader, **attention, **biases(reader), **head_norm(norm, "width"))
    body = blocks(
        layers,
        feed_forward(reader),
        None,
        attention_output_norm=norm,
        feed_forward_output_norm=norm,
    )
    return decoder(reader, body, norm)


def olmoe(reader: ConfigReader) -> DecoderConfig:
    reader.ignore("router_aux_loss_coef", "output_router_logits")
    norm = rms_norm(reader, 1e-5)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader)),
        clip_qkv=reader.get("clip_qkv", default=None),
        **biases(reader),
        **head_norm(norm, "width"),
    )
    experts = ExpertsConfig(
        count=reader.get("num_experts", "num_local_experts", default=64),
        per_token=reader.get("num_experts_per_tok", default=8),
        expert=feed_forward(reader),
        router=RouterConfig(normalize=reader.get("norm_topk_prob", default=False)),
    )
    return decoder(reader, blocks(attention, experts, norm), norm)


FAMILIES = (
    Family("olmo", olmo),
    Family("olmo2", olmo2, layer_rules(LAYER, OUTPUT_NORMS)),
    Family("olmo3", olmo3, layer_rules(LAYER, OUTPUT_NORMS)),
    Family("olmoe", olmoe, expert_rules()),
)
