"""Qwen: windows that have to be switched on, norms of queries and keys, mixtures of experts."""

from __future__ import annotations

from mlxtx.decoder.config import DecoderConfig, ExpertsConfig, RouterConfig
from mlxtx.families.common import (
    attention_layers,
    blocks,
    decoder,
    feed_forward,
    head_norm,
    layer_types,
    layers,
    rms_norm,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import biases, head_dim, llama_like
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope
from mlxtx.families.rules import expert_rules, shared_expert_rules


def qwen_windows(reader: ConfigReader) -> list[int | None]:
    """A window counts only where it is switched on, and from a given layer on."""
    on = reader.get("use_sliding_window", default=False)
    first = reader.get("max_window_layers", default=28)
    window = reader.nullable("sliding_window", 4096)
    types = layer_types(
        reader,
        ["sliding_attention" if i >= first else "full_attention" for i in range(layers(reader))],
    )
    return [window if on and kind == "sliding_attention" else None for kind in types]


def qwen2(reader: ConfigReader) -> DecoderConfig:
    rope = read_rope(reader, head_dim(reader))
    return llama_like(reader, rope=rope, window=qwen_windows(reader), qkv_bias=True)


def qwen3(reader: ConfigReader) -> DecoderConfig:
    size = head_dim(reader, 128)
    return llama_like(
        reader,
        head_dim=size,
        rope=read_rope(reader, size),
        window=qwen_windows(reader),
        **biases(reader),
        **head_norm(rms_norm(reader)),
    )


def sparse_layers(reader: ConfigReader) -> list[bool]:
    """Which layers hold experts: every ``decoder_sparse_step``-th that is not listed as dense."""
    step = reader.get("decoder_sparse_step", default=1)
    dense = set(reader.get("mlp_only_layers", default=()))
    return [(i + 1) % step == 0 and i not in dense for i in range(layers(reader))]


def _experts(reader: ConfigReader, normalize: bool, **fields) -> list:
    reader.ignore("router_aux_loss_coef", "output_router_logits", "norm_topk_prob")
    experts = ExpertsConfig(
        count=reader.get("num_experts", "num_local_experts"),
        per_token=reader.get("num_experts_per_tok"),
        expert=feed_forward(reader, "moe_intermediate_size"),
        router=RouterConfig(normalize=normalize),
        **fields,
    )
    dense = feed_forward(reader)
    return [experts if sparse else dense for sparse in sparse_layers(reader)]


def qwen2_moe(reader: ConfigReader) -> DecoderConfig:
    norm = rms_norm(reader)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader)),
        window=qwen_windows(reader),
        qkv_bias=reader.get("qkv_bias", default=True),
    )
    experts = _experts(
        reader,
        reader.get("norm_topk_prob", default=False),
        shared=feed_forward(reader, "shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return decoder(reader, blocks(attention, experts, norm), norm)


def qwen3_moe(reader: ConfigReader) -> DecoderConfig:
    norm = rms_norm(reader)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader)),
        window=qwen_windows(reader),
        **biases(reader),
        **head_norm(norm),
    )
    experts = _experts(reader, reader.get("norm_topk_prob", default=False))
    return decoder(reader, blocks(attention, experts, norm), norm)


FAMILIES = (
    Family("qwen2", qwen2),
    Family("qwen3", qwen3),
    Family("qwen2_moe", qwen2_moe, expert_rules() + shared_expert_rules("mlp.shared_expert")),
    Family("qwen3_moe", qwen3_moe, expert_rules()),
)
