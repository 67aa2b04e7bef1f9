"""LayerNorm families around Llama's shape: StableLM, StarCoder 2, Persimmon, Nemotron, and two
with norms behind RoPE, Hunyuan and nanochat."""

from __future__ import annotations

from mlxtx.decoder.config import DecoderConfig, EmbeddingConfig, NormConfig
from mlxtx.families.common import (
    attention_layers,
    blocks,
    context,
    decoder,
    feed_forward,
    head_norm,
    layer_norm,
    rms_norm,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import biases, head_dim
from mlxtx.families.names import Rule, rename
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import make_rope, read_rope, rope_parameters
from mlxtx.families.rules import LAYER, attention_of, layer_rules, qkv_rule
from mlxtx.families.transforms import Stacked


def stablelm(reader: ConfigReader) -> DecoderConfig:
    """RoPE on a quarter of each head; with or without a second norm."""
    reader.expect("rotary_scaling_factor", 1.0)
    norm = layer_norm(reader, "layer_norm_eps")
    own = {}
    if reader.get("qk_layernorm", default=False):
        own = head_norm(NormConfig(kind="layer", eps=norm.eps), "each_head")
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader), partial=0.25),
        qkv_bias=reader.get("use_qkv_bias", default=False),
        **own,
    )
    form = {}
    if reader.get("use_parallel_residual", default=False):
        form = {"form": "parallel", "feed_forward_norm": None}
    return decoder(reader, blocks(attention, feed_forward(reader), norm, **form), norm)


def starcoder2(reader: ConfigReader) -> DecoderConfig:
    reader.expect("mlp_type", "default")
    reader.expect("norm_type", "layer_norm")
    reader.expect("scale_attn_weights", True)
    reader.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    reader.ignore("layer_norm_epsilon", "residual_dropout", "activation_function")
    bias = reader.get("use_bias", default=True)
    reader.expect("attention_bias", bias)
    norm = layer_norm(reader, "norm_epsilon")
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader)),
        window=reader.nullable("sliding_window", None),
        qkv_bias=bias,
        output_bias=bias,
    )
    plain = feed_forward(reader, default="gelu_pytorch_tanh", gated=False, bias=bias)
    return decoder(reader, blocks(attention, plain, norm), norm, tied=True)


def persimmon(reader: ConfigReader) -> DecoderConfig:
    norm = layer_norm(reader, "layer_norm_eps")
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader), partial=0.5),
        qkv_bias=True,
        output_bias=True,
        **(head_norm(norm) if reader.get("qk_layernorm", default=True) else {}),
    )
    plain = feed_forward(reader, default="relu2", gated=False, bias=True)
    return decoder(reader, blocks(attention, plain, norm), norm)


def _persimmon_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (
        rename("model.final_layernorm", "model.norm"),
        qkv_rule(f"{LAYER}.self_attn.query_key_value", attention_of(decoder), grouped=True),
        *layer_rules(
            LAYER,
            {
                "self_attn.dense": "self_attn.o_proj",
                "self_attn.q_layernorm": "self_attn.q_norm",
                "self_attn.k_layernorm": "self_attn.k_norm",
                "mlp.dense_h_to_4h": "mlp.up_proj",
                "mlp.dense_4h_to_h": "mlp.down_proj",
            },
        ),
    )


def nemotron(reader: ConfigReader) -> DecoderConfig:
    """LayerNorm stored around zero, squared ReLU."""
    norm = layer_norm(reader, "norm_eps", offset=1.0)
    bias = reader.get("mlp_bias", default=False)
    attention = attention_layers(
        reader, rope=read_rope(reader, head_dim(reader), partial=0.5), **biases(reader)
    )
    plain = feed_forward(reader, default="relu2", gated=False, bias=bias)
    return decoder(reader, blocks(attention, plain, norm), norm)


def hunyuan_attention(reader: ConfigReader) -> list:
    """Queries and keys are normalised after RoPE; ``alpha`` stretches RoPE's base once for all."""
    reader.expect("use_qk_norm", True)
    reader.expect("use_rotary_pos_emb", True)
    reader.expect("use_cla", False)
    reader.expect("norm_type", "rms")
    reader.expect("mlp_bias", False)
    size = reader.get("head_dim", "attention_head_dim", default=None) or head_dim(reader)
    parameters = rope_parameters(reader)
    alpha = parameters.pop("alpha", None)
    if alpha and parameters["rope_type"] == "dynamic":
        parameters["rope_type"] = "default"
        parameters["rope_theta"] *= alpha ** (size / (size - 2))
    return attention_layers(
        reader,
        head_dim=size,
        rope=make_rope(parameters, size, context=context(reader)),
        norm_after_rope=True,
        **biases(reader),
        **head_norm(rms_norm(reader, 1e-5)),
    )


HUNYUAN_NORMS = {
    "self_attn.query_layernorm": "self_attn.q_norm",
    "self_attn.key_layernorm": "self_attn.k_norm",
}
HUNYUAN_EXTRAS = (
    "org_vocab_size",
    "cla_share_factor",
    "add_classification_head",
    "class_num",
    "pool_type",
    "dense_list",
    "im_start_id",
    "im_end_id",
    "im_newline_id",
    "mask_init_id",
    "text_start_id",
    "text_end_id",
    "image_token_id",
    "video_start_id",
    "video_end_id",
    "eod_token_id",
    "sep_token_id",
)


def hunyuan_v1_dense(reader: ConfigReader) -> DecoderConfig:
    reader.ignore(*HUNYUAN_EXTRAS)
    norm = rms_norm(reader, 1e-5)
    return decoder(reader, blocks(hunyuan_attention(reader), feed_forward(reader), norm), norm)


def nanochat(reader: ConfigReader) -> DecoderConfig:
    """No norm has a weight, embeddings are normalised too, and RoPE turns the other way round."""
    norm = rms_norm(reader, weight=False)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader), fields={"backwards": True}),
        norm_after_rope=True,
        **biases(reader),
        **head_norm(norm),
    )
    plain = feed_forward(reader, default="relu2", gated=False)
    return decoder(
        reader,
        blocks(attention, plain, norm),
        norm,
        embedding=EmbeddingConfig(norm=norm),
        head={"softcap": reader.nullable("final_logit_softcapping", 15.0)},
    )


def _each_head(theirs: str, ours: str) -> Rule:
    return Rule((f"{LAYER}.{theirs}.norms.{{e}}",), (f"{LAYER}.{ours}",), Stacked())


FAMILIES = (
    Family(
        "stablelm",
        stablelm,
        (
            _each_head("self_attn.q_layernorm", "self_attn.q_norm"),
            _each_head("self_attn.k_layernorm", "self_attn.k_norm"),
        ),
    ),
    Family(
        "starcoder2",
        starcoder2,
        layer_rules(LAYER, {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}),
    ),
    Family("persimmon", persimmon, _persimmon_rules),
    Family("nemotron", nemotron),
    Family("hunyuan_v1_dense", hunyuan_v1_dense, layer_rules(LAYER, HUNYUAN_NORMS)),
    Family(
        "nanochat",
        nanochat,
        layer_rules(LAYER, {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}),
    ),
)
