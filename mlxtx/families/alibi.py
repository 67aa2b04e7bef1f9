"""Families with ALiBi instead of positions: BLOOM, MPT, and Falcon, which has RoPE as well."""

from __future__ import annotations

import math
from typing import Any

from mlxtx.decoder.config import DecoderConfig, EmbeddingConfig, NormConfig
from mlxtx.decoder.positions import alibi_slopes
from mlxtx.families.common import (
    attention_layers,
    blocks,
    context,
    decoder,
    feed_forward,
    layer_norm,
    sizes,
    width,
)
from mlxtx.families.family import Family
from mlxtx.families.names import Rule, rename
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope
from mlxtx.families.rules import attention_of, layer_rules, qkv_rule

UNUSED = (
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "n_inner",
    "offset_alibi",
    "seq_length",
    "skip_bias_add",
    "skip_bias_add_qkv",
    "slow_but_exact",
    "unk_token_id",
)


def bloom(reader: ConfigReader) -> DecoderConfig:
    """Embeddings have a norm of their own; there is no longest text."""
    reader.ignore(*UNUSED)
    norm = layer_norm(reader)
    slopes = alibi_slopes(sizes(reader)["heads"])
    attention = attention_layers(reader, alibi=slopes, qkv_bias=True, output_bias=True)
    plain = feed_forward(
        reader, 4 * width(reader), keys=(), default="gelu_new", gated=False, bias=True
    )
    after = reader.get("apply_residual_connection_post_layernorm", default=False)
    return decoder(
        reader,
        blocks(attention, plain, norm, residual_after_norm=after),
        norm,
        tied=True,
        context=context(reader, 2048),
        embedding=EmbeddingConfig(norm=norm),
    )


def mpt_slopes(heads: int, strongest: float) -> tuple[float, ...]:
    """MPT orders the slopes of a head count that is no power of two differently."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = alibi_slopes(power, strongest)
    return slopes if power == heads else (*slopes[1::2], *slopes[::2])[:heads]


def mpt(reader: ConfigReader) -> DecoderConfig:
    """No biases, not even of LayerNorm; sizes of attention in a dictionary of their own."""
    reader.ignore("init_config", "init_device", "verbose", "emb_pdrop", "learned_pos_emb")
    reader.expect("no_bias", True)
    reader.expect("norm_type", "low_precision_layernorm", "layernorm")
    reader.expect("embedding_fraction", 1.0)
    reader.expect("logit_scale", None)
    inner = reader.inner("attn_config")
    inner.ignore("attn_impl", "attn_pdrop", "model_type", "base_config_key")
    for name, value in (("alibi", True), ("prefix_lm", False), ("qk_ln", False)):
        inner.expect(name, value)
    inner.expect("attn_type", "multihead_attention")
    inner.expect("attn_uses_sequence_id", False)
    norm = NormConfig(kind="layer", eps=reader.get("layer_norm_epsilon", default=1e-5))
    shape = sizes(reader)
    attention = attention_layers(
        reader,
        alibi=mpt_slopes(shape["heads"], inner.get("alibi_bias_max", default=8)),
        scale=inner.get("softmax_scale", default=None),
        clip_qkv=inner.get("clip_qkv", default=None),
    )
    inner.finish()
    reader.ignore("expansion_ratio")  # transformers makes it 4 whatever this says
    plain = feed_forward(reader, 4 * width(reader), keys=(), default="gelu", gated=False)
    return decoder(reader, blocks(attention, plain, norm), norm, tied=True)


def falcon_slopes(heads: int, head_dim: int) -> tuple[float, ...]:
    """Falcon scales ALiBi together with the scores, and transformers' eager attention, which is
    what families are compared with, adds it twice: to the scores and to the mask."""
    return tuple(2 * slope * head_dim**-0.5 for slope in alibi_slopes(heads))


def falcon(reader: ConfigReader) -> DecoderConfig:
    """Three forms: 7b (one key-value head, one norm, parallel), 40b (groups, two norms,
    parallel) and rw (ALiBi, biases, sequential)."""
    new = reader.get("new_decoder_architecture", default=False)
    reader.expect("apply_residual_connection_post_layernorm", False)
    norm = layer_norm(reader)
    shape = sizes(reader)
    heads = shape["heads"]
    kv_heads = reader.get("num_kv_heads", "n_head_kv", default=heads) if new else heads
    if not new and reader.get("multi_query", default=True):
        kv_heads = 1
    bias = reader.get("bias", default=False)
    turned = not reader.get("alibi", default=False)
    attention = attention_layers(
        reader,
        kv_heads=kv_heads,
        rope=read_rope(reader, shape["head_dim"]) if turned else None,
        alibi=() if turned else falcon_slopes(heads, shape["head_dim"]),
        qkv_bias=bias,
        output_bias=bias,
    )
    reader.ignore("rope_theta", "rope_scaling", "rope_parameters", "num_kv_heads", "multi_query")
    wide = reader.get("ffn_hidden_size", default=None) or 4 * width(reader)
    plain = feed_forward(reader, wide, keys=("activation",), default="gelu", gated=False, bias=bias)
    form: dict[str, Any] = {}
    norms = reader.get("num_ln_in_parallel_attn", default=2 if new else 1)
    if new or reader.get("parallel_attn", default=True):
        form = (
            {"form": "parallel"} if norms == 2 else {"form": "parallel", "feed_forward_norm": None}
        )
    reader.ignore("parallel_attn")
    return decoder(
        reader,
        blocks(attention, plain, norm, **form),
        norm,
        tied=True,
        context=context(reader, 2048),
    )


LINEAR = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
PARALLEL_NORMS = {"ln_attn": "input_layernorm", "ln_mlp": "post_attention_layernorm"}
FRAME = (
    rename("transformer.word_embeddings", "model.embed_tokens"),
    rename("transformer.word_embeddings_layernorm", "model.embed_norm"),
    rename("transformer.ln_f", "model.norm"),
)
BARE = ((r"^(word_embeddings|word_embeddings_layernorm|ln_f|h)\.", r"transformer.\1."),)


def _fused_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """BLOOM's and Falcon's projection holds, for each key-value head, its queries, key and value;
    with a single key-value head that is [all queries; key; value]."""
    theirs = "transformer.h.{i}"
    block = decoder.blocks[0]
    two = block.form == "parallel" and block.feed_forward_norm is not None
    return (
        *FRAME,
        qkv_rule(f"{theirs}.self_attention.query_key_value", attention_of(decoder), grouped=True),
        *layer_rules(theirs, {**LINEAR, **(PARALLEL_NORMS if two else NORMS)}),
    )


def _mpt_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs = "transformer.blocks.{i}"
    return (
        rename("transformer.wte", "model.embed_tokens"),
        rename("transformer.norm_f", "model.norm"),
        qkv_rule(f"{theirs}.attn.Wqkv", attention_of(decoder)),
        *layer_rules(
            theirs,
            {
                "attn.out_proj": "self_attn.o_proj",
                "ffn.up_proj": "mlp.up_proj",
                "ffn.down_proj": "mlp.down_proj",
                "norm_1": "input_layernorm",
                "norm_2": "post_attention_layernorm",
            },
        ),
    )


FAMILIES = (
    Family("bloom", bloom, _fused_rules, BARE),
    Family("mpt", mpt, _mpt_rules),
    Family("falcon", falcon, _fused_rules),
)
