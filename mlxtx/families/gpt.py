"""The GPT line: learned positions (GPT-2, BigCode, Neo) or RoPE (NeoX, J, CodeGen), and OPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtx.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    EmbeddingConfig,
    NormConfig,
    RopeConfig,
)
from mlxtx.families.common import (
    attention_layers,
    blocks,
    context,
    decoder,
    feed_forward,
    layer_norm,
    layers,
    sizes,
    width,
)
from mlxtx.families.family import Family
from mlxtx.families.names import Rule, rename
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope
from mlxtx.families.rules import LAYER, attention_of, layer_rules, qkv_rule
from mlxtx.families.transforms import Split, Transposed, chain

UNUSED = (  # heads, training and implementation details of the first files
    "attention_softmax_in_fp32",
    "embed_dropout",
    "inference_runner",
    "max_batch_size",
    "max_sequence_length",
    "n_ctx",
    "pad_key_length",
    "pre_allocate_kv_cache",
    "reorder_and_upcast_attn",
    "resid_dropout",
    "scale_attention_softmax_in_fp32",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "validate_runner_input",
)


def _plain(reader: ConfigReader, default: str = "gelu_new", **fields):
    inner = reader.get("n_inner", "intermediate_size", default=None) or 4 * width(reader)
    return feed_forward(
        reader, inner, keys=("activation_function",), default=default, gated=False, **fields
    )


def _learned(
    reader: ConfigReader, attention: Sequence[AttentionConfig], gelu: str = "gelu_new"
) -> DecoderConfig:
    """Learned positions, LayerNorm before both branches, biases, a tied head."""
    reader.ignore(*UNUSED)
    norm = layer_norm(reader)
    body = blocks(attention, _plain(reader, gelu, bias=True), norm)
    embedding = EmbeddingConfig(positions=context(reader))
    return decoder(reader, body, norm, tied=True, embedding=embedding)


def _scale(reader: ConfigReader) -> float:
    """Scores are divided by the head dimension's root unless that is switched off."""
    dim = width(reader) // sizes(reader)["heads"]
    return dim**-0.5 if reader.get("scale_attn_weights", default=True) else 1.0


def gpt2(reader: ConfigReader) -> DecoderConfig:
    inverse = reader.get("scale_attn_by_inverse_layer_idx", default=False)
    attention = [
        AttentionConfig(
            **sizes(reader),
            scale=_scale(reader) / (i + 1 if inverse else 1),
            qkv_bias=True,
            output_bias=True,
        )
        for i in range(layers(reader))
    ]
    return _learned(reader, attention)


def gpt_bigcode(reader: ConfigReader) -> DecoderConfig:
    """One key-value head for all, unless multi-query attention is switched off."""
    single: dict[str, Any] = {"kv_heads": 1} if reader.get("multi_query", default=True) else {}
    attention = attention_layers(
        reader, scale=_scale(reader), qkv_bias=True, output_bias=True, **single
    )
    return _learned(reader, attention, "gelu_pytorch_tanh")


def gpt_neo(reader: ConfigReader) -> DecoderConfig:
    """Unscaled scores; every other layer sees a window."""
    kinds = [
        kind
        for names, times in reader.get("attention_types", default=[[["global", "local"], 12]])
        for kind in names * times
    ]
    reader.expect("attention_layers", kinds)
    window = reader.get("window_size", default=256)
    attention = attention_layers(
        reader,
        scale=1.0,
        output_bias=True,
        window=[window if kind == "local" else None for kind in kinds],
    )
    return _learned(reader, attention)


def gpt_neox(reader: ConfigReader) -> DecoderConfig:
    """Attention and feed-forward side by side, each behind a norm of its own."""
    reader.ignore("classifier_dropout")
    norm = layer_norm(reader, "layer_norm_eps")
    size = width(reader) // sizes(reader)["heads"]
    rope = read_rope(
        reader,
        size,
        theta_names=("rope_theta", "rotary_emb_base"),
        partial=0.25,
        partial_names=("partial_rotary_factor", "rotary_pct"),
    )
    bias = reader.get("attention_bias", default=True)
    attention = attention_layers(reader, rope=rope, head_dim=size, qkv_bias=bias, output_bias=bias)
    plain = feed_forward(reader, default="gelu", gated=False, bias=True)
    parallel = reader.get("use_parallel_residual", default=True)
    body = blocks(attention, plain, norm, form="parallel" if parallel else "sequential")
    return decoder(reader, body, norm)


def _interleaved(reader: ConfigReader) -> DecoderConfig:
    """GPT-J's block: RoPE on the first channels of a head, one norm, both branches side by side."""
    reader.ignore(*UNUSED)
    reader.expect("rotary", True)
    reader.expect("scale_attn_weights", True)
    norm = layer_norm(reader)
    head = sizes(reader)["head_dim"]
    rope = RopeConfig(dims=reader.get("rotary_dim", default=head), interleaved=True)
    attention = attention_layers(reader, rope=rope)
    body = blocks(
        attention, _plain(reader, bias=True), norm, form="parallel", feed_forward_norm=None
    )
    return decoder(reader, body, norm, head={"bias": True})


def opt(reader: ConfigReader) -> DecoderConfig:
    """Learned positions two rows down; norms before the branches or (350m) behind the additions,
    and embeddings that may be narrower than the model."""
    reader.ignore("activation_dropout", "dropout", "layerdrop", "init_std", "output_projection")
    reader.ignore("word_embed_proj_dim")
    before = reader.get("do_layer_norm_before", default=True)
    affine = reader.get("layer_norm_elementwise_affine", default=True)
    bias = reader.get("enable_bias", default=True)
    norm = NormConfig(kind="layer", eps=1e-5, weight=affine, bias=affine)
    attention = attention_layers(reader, qkv_bias=bias, output_bias=bias)
    plain = feed_forward(
        reader, "ffn_dim", keys=("activation_function",), default="relu", gated=False, bias=bias
    )
    removed = reader.get("_remove_final_layer_norm", default=False)
    return decoder(
        reader,
        blocks(attention, plain, norm, norm_after_add=not before),
        norm if before and not removed else None,
        tied=True,
        embedding=EmbeddingConfig(
            width=reader.get("word_embed_proj_dim", default=None),
            positions=context(reader) + 2,
            position_offset=2,
        ),
    )


GPT = "transformer.h.{i}"
FRAME = (
    rename("transformer.wte", "model.embed_tokens"),
    rename("transformer.wpe", "model.embed_positions"),
    rename("transformer.ln_f", "model.norm"),
    *layer_rules(GPT, {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}),
)
BARE = ((r"^(wte|wpe|ln_f|h)\.", r"transformer.\1."),)  # without the outer module's name


def _gpt2_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """GPT-2 keeps its projections transposed."""
    qkv = qkv_rule(f"{GPT}.attn.c_attn", attention_of(decoder))
    turned = {
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    return (
        *FRAME,
        Rule(qkv.sources, qkv.targets, chain(Transposed(), qkv.transform)),
        *(
            Rule((f"{GPT}.{theirs}",), (f"{LAYER}.{ours}",), Transposed())
            for theirs, ours in turned.items()
        ),
    )


def _bigcode_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    attention = attention_of(decoder)
    return (
        *FRAME,
        qkv_rule(f"{GPT}.attn.c_attn", attention, grouped=attention.kv_heads > 1),
        *layer_rules(
            GPT,
            {
                "attn.c_proj": "self_attn.o_proj",
                "mlp.c_fc": "mlp.up_proj",
                "mlp.c_proj": "mlp.down_proj",
            },
        ),
    )


NEO = layer_rules(
    GPT,
    {
        "attn.attention.q_proj": "self_attn.q_proj",
        "attn.attention.k_proj": "self_attn.k_proj",
        "attn.attention.v_proj": "self_attn.v_proj",
        "attn.attention.out_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
)
J = layer_rules(
    GPT,
    {
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.v_proj": "self_attn.v_proj",
        "attn.out_proj": "self_attn.o_proj",
        "mlp.fc_in": "mlp.up_proj",
        "mlp.fc_out": "mlp.down_proj",
    },
)


def _codegen_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """Queries, values and keys, in this order, of a quarter of the heads at a time."""
    attention = attention_of(decoder)
    quarter = attention.heads * attention.head_dim // 4
    ours = tuple(f"{LAYER}.self_attn.{part}_proj" for part in "qvk")
    split = Split((quarter, quarter, quarter), groups=4)
    return (*FRAME, Rule((f"{GPT}.attn.qkv_proj",), ours, split), *J)


def _neox_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (
        rename("gpt_neox.embed_in", "model.embed_tokens"),
        rename("gpt_neox.final_layer_norm", "model.norm"),
        rename("embed_out", "lm_head"),
        qkv_rule(
            "gpt_neox.layers.{i}.attention.query_key_value", attention_of(decoder), grouped=True
        ),
        *layer_rules(
            "gpt_neox.layers.{i}",
            {
                "attention.dense": "self_attn.o_proj",
                "input_layernorm": "input_layernorm",
                "post_attention_layernorm": "post_attention_layernorm",
                "mlp.dense_h_to_4h": "mlp.up_proj",
                "mlp.dense_4h_to_h": "mlp.down_proj",
            },
        ),
    )


OPT = (
    rename("model.decoder.embed_tokens", "model.embed_tokens"),
    rename("model.decoder.embed_positions", "model.embed_positions"),
    rename("model.decoder.project_in", "model.project_in"),
    rename("model.decoder.project_out", "model.project_out"),
    rename("model.decoder.final_layer_norm", "model.norm"),
    *layer_rules(
        "model.decoder.layers.{i}",
        {
            "self_attn.q_proj": "self_attn.q_proj",
            "self_attn.k_proj": "self_attn.k_proj",
            "self_attn.v_proj": "self_attn.v_proj",
            "self_attn.out_proj": "self_attn.o_proj",
            "self_attn_layer_norm": "input_layernorm",
            "final_layer_norm": "post_attention_layernorm",
            "fc1": "mlp.up_proj",
            "fc2": "mlp.down_proj",
        },
    ),
)

FAMILIES = (
    Family("gpt2", gpt2, _gpt2_rules, BARE),
    Family("gpt_bigcode", gpt_bigcode, _bigcode_rules, BARE),
    Family("gpt_neo", gpt_neo, FRAME + NEO, BARE),
    Family("gpt_neox", gpt_neox, _neox_rules),
    Family("gptj", _interleaved, FRAME + J, BARE),
    Family("codegen", _interleaved, _codegen_rules, BARE),
    Family("opt", opt, OPT, ((r"^decoder\.", "model.decoder."),)),
)
