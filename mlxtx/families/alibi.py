"""Families with ALiBi instead of positions: BLOOM, MPT, and Falcon, which has RoPE as well."""

from __future__ import annotations

import math
from typing import Any

from mlxtx.decoder.config import DecoderConfig
from mlxtx.decoder.positions import alibi_slopes
from mlxtx.families.common import HubConfig
from mlxtx.families.family import Family
from mlxtx.naming.map import Rule
from mlxtx.naming.rules import names, outer, qkv


def bloom(config: HubConfig) -> DecoderConfig:
    """Embeddings have a norm of their own; there is no longest text."""
    config.ignore(
        "attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion n_inner offset_alibi"
        " seq_length skip_bias_add skip_bias_add_qkv slow_but_exact unk_token_id"
    )
    norm = config.layer_norm()
    after = config.get("apply_residual_connection_post_layernorm", default=False)
    return config.decoder(
        norm,
        config.feed_forward(4 * config.width, "gelu_new", (), gated=False, bias=True),
        tied=True,
        block={"residual_after_norm": after},
        embedding={"norm": norm},
        alibi=alibi_slopes(config.heads),
        bias=True,
    )


def mpt_slopes(heads: int, strongest: float) -> tuple[float, ...]:
    """MPT orders the slopes of a head count that is no power of two differently."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = alibi_slopes(power, strongest)
    return slopes if power == heads else (*slopes[1::2], *slopes[::2])[:heads]


def mpt(config: HubConfig) -> DecoderConfig:
    """No biases, not even of LayerNorm; attention's settings in a dictionary of their own."""
    config.ignore("init_config init_device verbose emb_pdrop learned_pos_emb")
    config.ignore("expansion_ratio")  # transformers makes it 4 whatever this says
    config.expect(no_bias=True, embedding_fraction=1.0, logit_scale=None)
    config.expect(norm_type=("low_precision_layernorm", "layernorm"))
    inner = config.inner("attn_config")
    inner.ignore("attn_impl attn_pdrop model_type base_config_key")
    inner.expect(alibi=True, prefix_lm=False, qk_ln=False, attn_uses_sequence_id=False)
    inner.expect(attn_type="multihead_attention")
    slopes = mpt_slopes(config.heads, inner.get("alibi_bias_max", default=8))
    scale, clip = (inner.get(name, default=None) for name in ("softmax_scale", "clip_qkv"))
    inner.finish()
    return config.decoder(
        config.layer_norm(bias=False),
        config.feed_forward(4 * config.width, "gelu", (), gated=False),
        tied=True,
        alibi=slopes,
        scale=scale,
        clip_qkv=clip,
    )


def falcon_alibi(heads: int, head_dim: int) -> dict[str, Any]:
    """Falcon rounds ALiBi to bfloat16 and scales it together with the scores, and transformers'
    eager attention, which is what families are compared with, adds it twice: to the scores and to
    the mask."""
    factor = 2 * head_dim**-0.5
    slopes = tuple(factor * slope for slope in alibi_slopes(heads))
    return {"alibi": slopes, "alibi_coarse": factor}


def falcon(config: HubConfig) -> DecoderConfig:
    """Three forms: 7b (one key-value head, one norm, parallel), 40b (groups, two norms,
    parallel) and rw (ALiBi, biases, sequential)."""
    config.expect(apply_residual_connection_post_layernorm=False)
    new = config.get("new_decoder_architecture", default=False)
    single = config.get("multi_query", default=True)
    groups = config.get("num_kv_heads", "n_head_kv", default=config.heads)
    bias, turned = config.get("bias", default=False), not config.get("alibi", default=False)
    size = config.width // config.heads
    rope = config.rope(size)
    norms = config.get("num_ln_in_parallel_attn", default=2 if new else 1)
    block: dict[str, Any] = {}
    if config.get("parallel_attn", default=True) or new:
        block = {"form": "parallel", **({} if norms == 2 else {"feed_forward_norm": None})}
    width = config.get("ffn_hidden_size", default=None) or 4 * config.width
    return config.decoder(
        config.layer_norm(),
        config.feed_forward(width, "gelu", ("activation",), gated=False, bias=bias),
        tied=True,
        block=block,
        kv_heads=groups if new else 1 if single else config.heads,
        **({"rope": rope} if turned else falcon_alibi(config.heads, size)),
        bias=bias,
    )


LINEAR = (
    "self_attention.dense=self_attn.o_proj mlp.dense_h_to_4h=mlp.up_proj"
    " mlp.dense_4h_to_h=mlp.down_proj "
)
NORMS = "input_layernorm post_attention_layernorm"
PARALLEL_NORMS = "ln_attn=input_layernorm ln_mlp=post_attention_layernorm"
BARE = ((r"^(word_embeddings|word_embeddings_layernorm|ln_f|h)\.", r"transformer.\1."),)


def _fused_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """BLOOM's and Falcon's projection holds, for each key-value head, its queries, key and value;
    with a single key-value head that is [all queries; key; value]."""
    theirs, block = "transformer.h.{i}", decoder.blocks[0]
    two = block.form == "parallel" and block.feed_forward_norm is not None
    return (
        *outer("transformer.word_embeddings=model.embed_tokens transformer.ln_f=model.norm"),
        *outer("transformer.word_embeddings_layernorm=model.embed_norm"),
        qkv(f"{theirs}.self_attention.query_key_value", decoder, grouped=True),
        *names(LINEAR + (PARALLEL_NORMS if two else NORMS), theirs),
    )


def _mpt_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs = "transformer.blocks.{i}"
    return (
        *outer("transformer.wte=model.embed_tokens transformer.norm_f=model.norm"),
        qkv(f"{theirs}.attn.Wqkv", decoder),
        *names(
            "attn.out_proj=self_attn.o_proj ffn.up_proj=mlp.up_proj ffn.down_proj=mlp.down_proj"
            " norm_1=input_layernorm norm_2=post_attention_layernorm",
            theirs,
        ),
    )


FAMILIES = (
    Family("bloom", bloom, _fused_rules, BARE),
    Family("mpt", mpt, _mpt_rules),
    Family("falcon", falcon, _fused_rules),
)
