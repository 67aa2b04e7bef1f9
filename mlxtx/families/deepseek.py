"""Latent attention and sigmoid routing: DeepSeek and the families built on its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtx.decoder.config import (
    BlockConfig,
    DecoderConfig,
    EmbeddingConfig,
    ExpertsConfig,
    LatentAttentionConfig,
    NormConfig,
    RouterConfig,
)
from mlxtx.decoder.positions import yarn_amplitude
from mlxtx.families.common import (
    attention_layers,
    blocks,
    context,
    decoder,
    feed_forward,
    head_norm,
    layer_types,
    layers,
    rms_norm,
    width,
    windows,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import biases, head_dim
from mlxtx.families.names import Drop, Rule, rename
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import make_rope, read_rope, rope_parameters
from mlxtx.families.rules import CORRECTION, LAYER, expert_rules, layer_rules, tensor_rule
from mlxtx.families.transforms import Each, Reshaped, Split, Transposed, chain

TRAINING = (
    "aux_loss_alpha",
    "ep_size",
    "output_router_logits",
    "qk_head_dim",
    "router_aux_loss_coef",
    "seq_aux",
)


def latent_attention(
    reader: ConfigReader, *, interleaved: bool = True, value_dim: int | None = None
) -> LatentAttentionConfig:
    """Multi-head latent attention; YaRN's ``mscale_all_dim`` grows the scores."""
    reader.ignore("head_dim", "num_key_value_heads")  # derived, and of no use to latent rows
    rope_dim, nope_dim = reader.get("qk_rope_head_dim"), reader.get("qk_nope_head_dim")
    parameters = rope_parameters(reader)
    scale = (nope_dim + rope_dim) ** -0.5
    grown = parameters.get("mscale_all_dim") if parameters["rope_type"] != "default" else None
    if grown:
        scale *= yarn_amplitude(parameters["factor"], grown) ** 2
    rope = make_rope(
        parameters, rope_dim, context=context(reader), interleaved=interleaved, tail=True
    )
    return LatentAttentionConfig(
        heads=reader.get("num_attention_heads"),
        kv_rank=reader.get("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=reader.get("v_head_dim", default=value_dim),
        q_rank=reader.nullable("q_lora_rank", None),
        rope=rope,
        scale=scale,
        bias=reader.get("attention_bias", default=False),
        norm=NormConfig(eps=1e-6),
    )


def sigmoid_experts(reader: ConfigReader, **fields: Any) -> ExpertsConfig:
    """DeepSeek-V3's routing: sigmoid scores, a bias that only chooses, the best groups of experts,
    and experts that all tokens share."""
    reader.ignore(*TRAINING)
    reader.expect("moe_layer_freq", 1)
    reader.expect("topk_method", "noaux_tc")
    expert = feed_forward(reader, "moe_intermediate_size")
    shared = reader.get("n_shared_experts", default=1)
    return ExpertsConfig(
        count=reader.get("n_routed_experts", "num_local_experts"),
        per_token=reader.get("num_experts_per_tok"),
        expert=expert,
        shared=replace(expert, width=expert.width * shared),
        router=RouterConfig(
            scores="sigmoid",
            normalize=reader.get("norm_topk_prob", default=True),
            normalize_eps=1e-20,
            scaling=float(reader.get("routed_scaling_factor", default=1.0)),
            correction_bias=True,
            groups=reader.get("n_group", default=1),
            chosen_groups=reader.get("topk_group", default=1),
            group_score="top2",
            **fields,
        ),
    )


def dense_first(reader: ConfigReader, experts: ExpertsConfig, dense: int) -> list:
    """Plain feed-forwards in the first ``dense`` layers."""
    plain = feed_forward(reader)
    return [plain if i < dense else experts for i in range(layers(reader))]


def ahead(reader: ConfigReader, body: list[BlockConfig]) -> tuple[BlockConfig, ...]:
    """Extra prediction heads, each with a block like the last one."""
    return (body[-1],) * reader.get("num_nextn_predict_layers", "num_mtp_layers", default=1)


def deepseek_v2(reader: ConfigReader) -> DecoderConfig:
    reader.ignore(*TRAINING, "norm_topk_prob")  # the published code normalises only for one expert
    reader.expect("scoring_func", "softmax")
    reader.expect("moe_layer_freq", 1)
    norm = rms_norm(reader)
    expert = feed_forward(reader, "moe_intermediate_size")
    limited = reader.get("topk_method", default="greedy") == "group_limited_greedy"
    reader.expect("topk_method", "greedy", "group_limited_greedy")
    groups = reader.get("n_group", default=1), reader.get("topk_group", default=1)
    experts = ExpertsConfig(
        count=reader.get("n_routed_experts", "num_experts"),
        per_token=reader.get("num_experts_per_tok"),
        expert=expert,
        shared=replace(expert, width=expert.width * reader.get("n_shared_experts", default=2)),
        router=RouterConfig(
            scaling=float(reader.get("routed_scaling_factor", default=1.0)),
            groups=groups[0] if limited else 1,
            chosen_groups=groups[1] if limited else 1,
        ),
    )
    body = dense_first(reader, experts, reader.get("first_k_dense_replace", default=0))
    reader.expect("mlp_bias", False)
    return decoder(reader, blocks([latent_attention(reader)] * layers(reader), body, norm), norm)


def deepseek_v3(reader: ConfigReader) -> DecoderConfig:
    reader.expect("scoring_func", "sigmoid")
    norm = rms_norm(reader)
    attention = latent_attention(reader, interleaved=reader.get("rope_interleave", default=True))
    feed = dense_first(
        reader, sigmoid_experts(reader), reader.get("first_k_dense_replace", default=3)
    )
    body = blocks([attention] * layers(reader), feed, norm)
    return decoder(reader, body, norm, prediction_heads=ahead(reader, body))


def glm4_moe_lite(reader: ConfigReader) -> DecoderConfig:
    norm = rms_norm(reader, 1e-5)
    attention = latent_attention(reader, interleaved=reader.get("rope_interleave", default=True))
    reader.expect("scoring_func", "sigmoid")
    reader.ignore("partial_rotary_factor")
    first = reader.get("first_k_dense_replace", default=1)
    kinds = reader.get(
        "mlp_layer_types",
        default=["dense" if i < first else "sparse" for i in range(layers(reader))],
    )
    plain, experts = feed_forward(reader), sigmoid_experts(reader)
    feed = [experts if kind == "sparse" else plain for kind in kinds]
    body = blocks([attention] * layers(reader), feed, norm)
    return decoder(reader, body, norm, prediction_heads=ahead(reader, body))


def minicpm3(reader: ConfigReader) -> DecoderConfig:
    """Latent attention with multipliers on embeddings, residuals and logits."""
    norm = rms_norm(reader, 1e-5)
    count, size = layers(reader), width(reader)
    attention = latent_attention(
        reader, interleaved=False, value_dim=size // reader.get("num_attention_heads")
    )
    reader.expect("mlp_bias", False)
    reader.ignore("qk_head_dim")
    depth = reader.get("scale_depth", default=1.4)
    return decoder(
        reader,
        blocks(
            [attention] * count,
            feed_forward(reader),
            norm,
            residual_multiplier=depth / count**0.5,
        ),
        norm,
        tied=True,
        embedding=EmbeddingConfig(multiplier=float(reader.get("scale_emb", default=12))),
        head={"multiplier": reader.get("dim_model_base", default=256) / size},
    )


def dots1(reader: ConfigReader) -> DecoderConfig:
    reader.expect("scoring_func", "noaux_tc", "sigmoid")
    norm = rms_norm(reader)
    window = reader.nullable("sliding_window", 4096)
    first = reader.get("max_window_layers", default=62)
    types = layer_types(
        reader,
        [
            "sliding_attention" if window and i >= first else "full_attention"
            for i in range(layers(reader))
        ],
    )
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader)),
        window=windows(reader, types, window),
        **biases(reader),
        **head_norm(norm),
    )
    body = dense_first(
        reader, sigmoid_experts(reader), reader.get("first_k_dense_replace", default=0)
    )
    return decoder(reader, blocks(attention, body, norm), norm)


def glm4_moe(reader: ConfigReader) -> DecoderConfig:
    reader.expect("scoring_func", "sigmoid")
    norm = rms_norm(reader, 1e-5)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader), partial=0.5),
        qkv_bias=reader.get("attention_bias", default=False),
        **(head_norm(norm) if reader.get("use_qk_norm", default=False) else {}),
    )
    feed = dense_first(
        reader, sigmoid_experts(reader), reader.get("first_k_dense_replace", default=1)
    )
    body = blocks(attention, feed, norm)
    return decoder(reader, body, norm, prediction_heads=ahead(reader, body))


def solar_open(reader: ConfigReader) -> DecoderConfig:
    """Experts in every layer."""
    reader.expect("first_k_dense_replace", 0)
    reader.expect("use_qk_norm", False)
    reader.ignore("intermediate_size")
    norm = rms_norm(reader, 1e-5)
    size = head_dim(reader, 128)
    attention = attention_layers(
        reader,
        head_dim=size,
        rope=read_rope(reader, size, theta=1e6),
        qkv_bias=reader.get("attention_bias", default=False),
    )
    return decoder(reader, blocks(attention, sigmoid_experts(reader), norm), norm)


def latent_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """Keys and values of all heads come from one projection: [key (nope); value] of each head,
    which we keep as two stacks of maps, from the latent row and into it."""
    attention = decoder.blocks[0].attention
    assert isinstance(attention, LatentAttentionConfig)
    heads, rank = attention.heads, attention.kv_rank
    nope, value = attention.nope_dim, attention.value_dim

    def stacked(rows: int) -> Reshaped:
        return Reshaped((heads * rows, rank), (heads, rows, rank))

    return (
        Rule(
            (f"{LAYER}.self_attn.kv_b_proj.weight",),
            (f"{LAYER}.self_attn.embed_q.weight", f"{LAYER}.self_attn.unembed_out.weight"),
            chain(
                Split((nope, value), groups=heads),
                Each((chain(stacked(nope), Transposed()), stacked(value))),
            ),
            layout="hf",
        ),
    )


MODULES = (  # of a layer, under the same names here and there
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "o", "q_a", "q_b")),
    *(f"self_attn.{part}_norm" for part in ("q", "k")),
    "self_attn.q_a_layernorm",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_a_layernorm",
    "mlp.gate",
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    *(f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")),
)


def with_heads(decoder: DecoderConfig, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """``rules``, and the same for extra prediction heads, which these families keep as layers
    behind the last one."""
    extra: list[Rule] = []
    for depth in range(len(decoder.prediction_heads)):
        theirs, ours = f"model.layers.{len(decoder.blocks) + depth}", f"prediction_heads.{depth}"
        for name in ("enorm", "hnorm", "eh_proj"):
            extra.append(rename(f"{theirs}.{name}", f"{ours}.{name}"))
        extra.append(rename(f"{theirs}.shared_head.norm", f"{ours}.norm"))
        same = (
            tensor_rule(CORRECTION, CORRECTION),
            *layer_rules(LAYER, {name: name for name in MODULES}),
        )
        for rule in (*rules, *same):
            extra.append(
                replace(
                    rule,
                    sources=tuple(name.replace(LAYER, theirs) for name in rule.sources),
                    targets=tuple(name.replace(LAYER, f"{ours}.block") for name in rule.targets),
                )
            )
    return (*extra, *rules)


def _latent_experts(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return with_heads(decoder, (*latent_rules(decoder), *expert_rules()))


def _experts(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return with_heads(decoder, expert_rules())


# A prediction head comes with copies of the embeddings and the output head.
COPIES = (
    Drop("model.layers.*.embed_tokens.weight"),
    Drop("model.layers.*.shared_head.head.weight"),
)

FAMILIES = (
    Family("deepseek_v2", deepseek_v2, _latent_experts),
    Family("deepseek_v3", deepseek_v3, _latent_experts, drops=COPIES),
    Family("glm4_moe_lite", glm4_moe_lite, _latent_experts, drops=COPIES),
    Family("minicpm3", minicpm3, latent_rules),
    Family("dots1", dots1, expert_rules()),
    Family("glm4_moe", glm4_moe, _experts, drops=COPIES),
    Family("solar_open", solar_open, expert_rules()),
)
