"""Latent attention and sigmoid routing: DeepSeek and the families built on its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtx.decoder.config import DecoderConfig, ExpertsConfig, LatentAttentionConfig, NormConfig
from mlxtx.decoder.positions import yarn_amplitude
from mlxtx.families.common import FULL, SLIDING, HubConfig, head_norm
from mlxtx.families.family import Family
from mlxtx.families.llama import llama
from mlxtx.families.rope import make_rope, rope_parameters
from mlxtx.naming.map import Drop, Rule, rename
from mlxtx.naming.rules import CORRECTION, LAYER, experts, experts_at, mlx_only, names, tensor
from mlxtx.naming.transforms import Each, Reshaped, Split, Transposed, chain


def latent_attention(
    config: HubConfig, *, interleaved: bool = True, value_dim: int | None = None
) -> list[LatentAttentionConfig]:
    """Multi-head latent attention for every layer; YaRN's ``mscale_all_dim`` grows the scores."""
    config.ignore("head_dim num_key_value_heads qk_head_dim")  # follow from the other sizes
    rope_dim, nope_dim = config.get("qk_rope_head_dim"), config.get("qk_nope_head_dim")
    parameters = rope_parameters(config)
    scale = (nope_dim + rope_dim) ** -0.5
    grown = parameters.get("mscale_all_dim") if parameters["rope_type"] != "default" else None
    if grown:
        scale *= yarn_amplitude(parameters["factor"], grown) ** 2
    rope = make_rope(parameters, rope_dim, config.context, interleaved=interleaved, tail=True)
    attention = LatentAttentionConfig(
        heads=config.heads,
        kv_rank=config.get("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=config.get("v_head_dim", default=value_dim),
        q_rank=config.nullable("q_lora_rank", None),
        rope=rope,
        scale=scale,
        bias=config.get("attention_bias", default=False),
        norm=NormConfig(eps=1e-6),
    )
    return [attention] * config.layers


def shared_experts(
    config: HubConfig, default: int = 1, bias: bool = False, **routing: Any
) -> ExpertsConfig:
    """Experts, some of which all tokens share, in DeepSeek's words."""
    config.ignore("aux_loss_alpha ep_size seq_aux")
    config.expect(moe_layer_freq=1)
    shared = config.get("n_shared_experts", default=default)
    return config.experts("moe_intermediate_size", shared, bias, **routing)


def sigmoid_experts(
    config: HubConfig, *, normalize: bool = True, scaling: float = 1.0
) -> ExpertsConfig:
    """DeepSeek-V3's routing: sigmoid scores, a bias that only chooses, the best groups."""
    config.expect(topk_method="noaux_tc", scoring_func=("sigmoid", "noaux_tc"))
    return shared_experts(
        config,
        scores="sigmoid",
        normalize=config.get("norm_topk_prob", default=normalize),
        normalize_eps=1e-20,
        scaling=float(config.get("routed_scaling_factor", default=scaling)),
        correction_bias=True,
        groups=config.get("n_group", default=1),
        chosen_groups=config.get("topk_group", default=1),
        group_score="top2",
    )


def dense_first(config: HubConfig, sparse: ExpertsConfig, default: int, bias: bool = False) -> list:
    """Plain feed-forwards in the first layers, experts in the others."""
    plain = config.feed_forward(bias=bias)
    dense = config.get("first_k_dense_replace", default=default)
    return [plain if i < dense else sparse for i in range(config.layers)]


def ahead(config: HubConfig, decoder: DecoderConfig) -> DecoderConfig:
    """With extra prediction heads, each with a block like the last one."""
    count = config.count("num_nextn_predict_layers", "num_mtp_layers", least=0, default=1)
    return replace(decoder, prediction_heads=decoder.blocks[-1:] * count)


def deepseek_v2(config: HubConfig) -> DecoderConfig:
    """Softmax routing; the best groups are those with the best single expert."""
    config.ignore("norm_topk_prob")  # neither transformers nor mlx-lm normalises
    config.expect(scoring_func="softmax")
    config.expect(topk_method=("greedy", "group_limited_greedy"))
    limited = config.get("topk_method", default="greedy") != "greedy"
    groups, chosen = (config.get(name, default=1) for name in ("n_group", "topk_group"))
    limits = {"groups": groups, "chosen_groups": chosen} if limited else {}
    scaling = float(config.get("routed_scaling_factor", default=1.0))
    bias = config.get("mlp_bias", default=False)
    sparse = shared_experts(config, 2, bias, scaling=scaling, **limits)
    body = dense_first(config, sparse, 0, bias)
    return config.decoder(config.rms_norm(), body, layers=latent_attention(config))


def deepseek_v3(config: HubConfig) -> DecoderConfig:
    interleaved = config.get("rope_interleave", default=True)
    body = dense_first(config, sigmoid_experts(config, scaling=2.5), 3)
    attention = latent_attention(config, interleaved=interleaved)
    return ahead(config, config.decoder(config.rms_norm(), body, layers=attention))


def glm4_moe_lite(config: HubConfig) -> DecoderConfig:
    config.ignore("partial_rotary_factor")
    interleaved = config.get("rope_interleave", default=True)
    sparse, plain = sigmoid_experts(config, scaling=1.8), config.feed_forward()
    body = dense_first(config, sparse, 1)
    if kinds := config.get("mlp_layer_types", default=None):
        body = [sparse if kind == "sparse" else plain for kind in kinds]
    attention = latent_attention(config, interleaved=interleaved)
    return ahead(config, config.decoder(config.rms_norm(1e-5), body, layers=attention))


def minicpm3(config: HubConfig) -> DecoderConfig:
    """Latent attention with multipliers on embeddings, residuals and logits."""
    bias = config.get("mlp_bias", default=False)
    depth = config.get("scale_depth", default=1.4)
    value_dim = config.width // config.heads
    return config.decoder(
        config.rms_norm(1e-5),
        config.feed_forward(bias=bias),
        tied=True,
        block={"residual_multiplier": depth / config.layers**0.5},
        embedding={"multiplier": float(config.get("scale_emb", default=12))},
        head={"multiplier": config.get("dim_model_base", default=256) / config.width},
        layers=latent_attention(config, interleaved=False, value_dim=value_dim),
    )


def dots1(config: HubConfig) -> DecoderConfig:
    first = config.get("max_window_layers", default=62)
    types = config.layer_types([SLIDING if i >= first else FULL for i in range(config.layers)])
    body = dense_first(config, sigmoid_experts(config, normalize=False), 0)
    own = head_norm(config.rms_norm())
    return llama(config, window=config.windows(types, 4096), feed_forward=body, **own)


def glm4_moe(config: HubConfig) -> DecoderConfig:
    normed = config.get("use_qk_norm", default=False)
    own = head_norm(config.rms_norm(1e-5)) if normed else {}
    body = dense_first(config, sigmoid_experts(config), 1)
    fields: dict[str, Any] = {"rope": {"partial": 0.5}, "output_bias": False, **own}
    return ahead(config, llama(config, 1e-5, feed_forward=body, **fields))


def solar_open(config: HubConfig) -> DecoderConfig:
    """Experts in every layer."""
    config.expect(first_k_dense_replace=0, use_qk_norm=False)
    config.ignore("intermediate_size")
    body, rope = sigmoid_experts(config), {"partial": 1.0, "theta": 1e6}
    return llama(config, 1e-5, 128, rope=rope, feed_forward=body, output_bias=False)


def latent_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """Keys and values of all heads come from one projection: [key (nope); value] of each head,
    which we keep as two stacks of maps, from the latent row and into it."""
    attention = decoder.blocks[0].attention
    assert isinstance(attention, LatentAttentionConfig)
    heads, rank = attention.heads, attention.kv_rank
    nope, value = attention.nope_dim, attention.value_dim

    def stacked(rows: int) -> Reshaped:
        return Reshaped((heads * rows, rank), (heads, rows, rank))

    ours = tuple(f"{LAYER}.self_attn.{part}.weight" for part in ("embed_q", "unembed_out"))
    parts = Each((chain(stacked(nope), Transposed()), stacked(value)))
    move = chain(Split((nope, value), groups=heads), parts)
    return (Rule((f"{LAYER}.self_attn.kv_b_proj.weight",), ours, move, layout="hf"),)


def _mlx_latent(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return mlx_only(*latent_rules(decoder))


SAME = """
    input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj
    self_attn.o_proj self_attn.q_norm self_attn.k_norm self_attn.q_a_proj self_attn.q_b_proj
    self_attn.q_a_layernorm self_attn.kv_a_proj_with_mqa self_attn.kv_a_layernorm mlp.gate
    mlp.gate_proj mlp.up_proj mlp.down_proj mlp.shared_experts.gate_proj
    mlp.shared_experts.up_proj mlp.shared_experts.down_proj
    """


def with_heads(decoder: DecoderConfig, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """``rules``, and the same for extra prediction heads, which these families keep as layers
    behind the last one."""
    extra: list[Rule] = []
    for depth in range(len(decoder.prediction_heads)):
        theirs, ours = f"model.layers.{len(decoder.blocks) + depth}", f"prediction_heads.{depth}"
        for name in ("enorm", "hnorm", "eh_proj"):
            extra.append(rename(f"{theirs}.{name}", f"{ours}.{name}"))
        extra.append(rename(f"{theirs}.shared_head.norm", f"{ours}.norm"))
        for rule in (*rules, tensor(CORRECTION, CORRECTION), *names(SAME)):
            sources = tuple(name.replace(LAYER, theirs) for name in rule.sources)
            targets = tuple(name.replace(LAYER, f"{ours}.block") for name in rule.targets)
            extra.append(replace(rule, sources=sources, targets=targets))
    return (*extra, *rules)


def _latent_experts(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return with_heads(decoder, (*latent_rules(decoder), *experts()))


# A prediction head comes with copies of the embeddings and the output head.
COPIES = tuple(
    Drop(f"model.layers.*.{name}.weight") for name in ("embed_tokens", "shared_head.head")
)

FAMILIES = (
    Family("deepseek_v2", deepseek_v2, _latent_experts, mlx_rules=_mlx_latent),
    Family("deepseek_v3", deepseek_v3, _latent_experts, drops=COPIES),
    Family("glm4_moe_lite", glm4_moe_lite, _latent_experts, drops=COPIES),
    Family("minicpm3", minicpm3, latent_rules, mlx_rules=_mlx_latent),
    Family("dots1", dots1, experts(), mlx_rules=experts_at("mlp.experts")),
    Family("glm4_moe", glm4_moe, lambda decoder: with_heads(decoder, experts()), drops=COPIES),
    Family("solar_open", solar_open, experts()),
)
