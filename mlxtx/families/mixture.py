"""Mixtures of experts on Llama's block: Mixtral, Qwen, OLMoE, Phi, Granite, ERNIE, Hunyuan, DBRX,
MiniMax and Trinity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtx.decoder.config import DecoderConfig, ExpertsConfig
from mlxtx.errors import MlxtxError
from mlxtx.families.common import SLIDING, HubConfig, behind, first, head_norm
from mlxtx.families.family import Family
from mlxtx.families.llama import (
    HUNYUAN,
    INTERLEAVED,
    granite,
    hunyuan_attention,
    llama,
    qwen_windows,
)
from mlxtx.families.rope import make_rope, rope_parameters
from mlxtx.naming import rules
from mlxtx.naming.map import Rule, stacked_experts
from mlxtx.naming.rules import CORRECTION, LAYER, experts, experts_at, mlx_only, names
from mlxtx.naming.transforms import Reshaped, Transposed, Unflattened, chain


def mixtral(config: HubConfig) -> DecoderConfig:
    sparse, window = config.experts(normalize=True), config.nullable("sliding_window", None)
    return llama(config, 1e-5, rope={"theta": 1e6}, window=window, feed_forward=sparse)


def qwen_experts(config: HubConfig, **more: Any) -> list:
    """Experts in every ``decoder_sparse_step``-th layer that is not listed as dense."""
    normalize = config.get("norm_topk_prob", default=False)
    sparse = config.experts("moe_intermediate_size", normalize=normalize, **more)
    plain, step = config.feed_forward(), config.get("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers", default=())
    return [plain if (i + 1) % step or i in dense else sparse for i in range(config.layers)]


def qwen2_moe(config: HubConfig) -> DecoderConfig:
    shared = config.feed_forward("shared_expert_intermediate_size")
    body = qwen_experts(config, shared=shared, fields={"shared_gate": True})
    bias = {"qkv_bias": config.get("qkv_bias", default=True), "output_bias": False}
    return llama(config, window=qwen_windows(config, early=True), feed_forward=body, **bias)


def qwen3_moe(config: HubConfig) -> DecoderConfig:
    """A window, where it is switched on, holds for all layers."""
    config.ignore("max_window_layers use_qk_norm")
    window, own = config.nullable("sliding_window", 4096), head_norm(config.rms_norm())
    on = config.get("use_sliding_window", default=False)
    body = qwen_experts(config)
    return llama(config, window=window if on else None, feed_forward=body, **own)


def olmoe(config: HubConfig) -> DecoderConfig:
    sparse = config.experts(normalize=config.get("norm_topk_prob", default=False))
    own = head_norm(config.rms_norm(1e-5), "width")
    clip = config.get("clip_qkv", default=None)
    return llama(config, 1e-5, feed_forward=sparse, clip_qkv=clip, **own)


def phimoe(config: HubConfig) -> DecoderConfig:
    """LayerNorm, and two experts that are each weighed among their likes. A scaling of RoPE is that
    of short texts at any length, as transformers has it; only its strength is another for long
    ones, and where it changes the text is computed anew."""
    config.ignore("input_jitter_noise")
    parameters, refeed = rope_parameters(config, theta=1e6), None
    strengths = [parameters.pop(f"{length}_mscale", None) for length in ("short", "long")]
    rope = make_rope(parameters, config.head_dim(), config.context)
    if scaling := rope.scaling:
        if None in strengths or scaling.kind == "dynamic":
            said = f"rope_type {scaling.kind!r} with short_mscale and long_mscale of {strengths}"
            raise MlxtxError(f"config.json: {said} is not supported (known: longrope, two numbers)")
        short, long = map(float, strengths)
        fields: dict[str, Any] = {"attention_factor": short, "long_factors": scaling.short_factors}
        if short != long:
            fields["long_attention_factor"], refeed = long, scaling.original_context
        rope = replace(rope, scaling=replace(scaling, **fields))
    jitter = config.get("router_jitter_noise", default=0.01)
    return config.decoder(
        config.layer_norm("rms_norm_eps"),
        config.experts(scores="sparsemixer", jitter=jitter),
        head={"bias": config.get("lm_head_bias", default=False)},
        whole={"refeed_beyond": refeed},
        rope=rope,
        window=config.nullable("sliding_window", None),
        bias=config.bias(),
    )


def granitemoe(config: HubConfig) -> DecoderConfig:
    """With ``shared_intermediate_size`` also a feed-forward that every token goes through."""
    width = config.get("shared_intermediate_size", default=0)
    shared = config.feed_forward(width) if width else None
    return granite(config, config.experts(shared=shared, normalize=True))


def _granite_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    mixture = first(ExpertsConfig, decoder)
    routed = (
        *names("block_sparse_moe.router.layer=mlp.gate"),
        *names("block_sparse_moe.output_linear=mlp.switch_mlp.down_proj"),
        rules.gate_up("block_sparse_moe.input_linear", mixture.expert.width, "mlp.switch_mlp"),
    )
    if mixture.shared is None:
        return routed
    return (
        *routed,
        *names("shared_mlp.output_linear=mlp.shared_experts.down_proj"),
        rules.gate_up("shared_mlp.input_linear", mixture.shared.width, "mlp.shared_experts"),
    )


def ernie4_5_moe(config: HubConfig) -> DecoderConfig:
    """Softmax scores with a bias that only chooses."""
    config.ignore("moe_capacity moe_norm_min num_nextn_predict_layers fuse_rms_norm")
    config.ignore("moe_use_aux_free moe_gate moe_gate_act moe_layer_freq")
    bias, count = config.get("use_bias", default=False), config.layers
    shared = config.get("moe_num_shared_experts", default=2)
    routed: dict[str, Any] = {"normalize": True, "correction_bias": True}
    sparse = config.experts("moe_intermediate_size", shared, bias, **routed)
    first = config.get("moe_layer_start_index", default=1)
    end = config.get("moe_layer_end_index", default=-1) + 1 or count  # -1 is the last
    step = config.get("moe_layer_interval", default=1)
    dense = config.feed_forward(bias=bias)
    body = [sparse if first <= i < end and (i + 1) % step == 0 else dense for i in range(count)]
    rope = {"theta": 5e5, "fields": INTERLEAVED}
    both = {"bias": bias, "tied": True, "head": {"bias": bias}}
    return llama(config, 1e-5, rope=rope, feed_forward=body, **both)


def _ernie_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    count = first(ExpertsConfig, decoder).count
    theirs = "mlp.moe_statics.e_score_correction_bias"
    return (rules.tensor(theirs, CORRECTION, Reshaped((1, count), (count,))), *experts())


def hunyuan_v1_moe(config: HubConfig) -> DecoderConfig:
    """A dense feed-forward beside the experts, of the same width."""
    config.ignore("moe_intermediate_size moe_layer_num_skipped moe_drop_tokens capacity_factor")
    config.ignore("moe_random_routing_dropped_token")
    config.expect(use_mixed_mlp_moe=True)

    def same(name: str) -> int:
        """These may be lists with an entry a layer, all alike."""
        value = config.get(name, default=1)
        if not isinstance(value, list):
            return value
        config.expect(**{name: value[:1] * len(value)})
        return value[0]

    sizes = {"count": same("num_experts"), "per_token": same("moe_topk")}
    sparse = config.experts(shared=same("num_shared_expert"), fields=sizes, normalize=True)
    return llama(config, 1e-5, feed_forward=sparse, **hunyuan_attention(config))


def dbrx(config: HubConfig) -> DecoderConfig:
    """LayerNorm without bias; attention's and the experts' settings in dictionaries of their own."""
    config.ignore("emb_pdrop num_key_value_heads")
    outer, inner = config.inner("attn_config"), config.inner("ffn_config")
    for nested in (outer, inner):
        nested.ignore("model_type attn_pdrop moe_jitter_eps moe_loss_weight hidden_size")
    act = inner.get("ffn_act_fn", default={}).get("name", "silu")
    expert = config.feed_forward(inner.get("ffn_hidden_size", default=3584), act, ())
    chosen = inner.get("moe_top_k", default=1)
    sizes = {"count": inner.get("moe_num_experts", default=4), "per_token": chosen}
    inner.expect(moe_normalize_expert_weights=(1, 1.0, None))
    normalize = inner.nullable("moe_normalize_expert_weights", 1) is not None
    rope = config.rope(theta=outer.get("rope_theta", default=10000.0))
    kv_heads = outer.get("kv_n_heads", default=1)
    clip = outer.get("clip_qkv", default=None)
    outer.finish()
    inner.finish()
    sparse = config.experts(fields={"expert": expert, **sizes}, normalize=normalize)
    norm = config.layer_norm(bias=False)
    return config.decoder(norm, sparse, rope=rope, kv_heads=kv_heads, clip_qkv=clip)


def _dbrx_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs, ours = "transformer.blocks.{i}", f"{LAYER}.mlp.switch_mlp"
    apart = Unflattened(first(ExpertsConfig, decoder).count)
    mlp = f"{theirs}.ffn.experts.mlp"
    return (
        *rules.outer("transformer.wte=model.embed_tokens transformer.norm_f=model.norm"),
        rules.qkv(f"{theirs}.norm_attn_norm.attn.Wqkv", decoder),
        *names(
            "norm_attn_norm.attn.out_proj=self_attn.o_proj ffn.router.layer=mlp.gate"
            " norm_attn_norm.norm_1=input_layernorm norm_attn_norm.norm_2=post_attention_layernorm",
            theirs,
        ),
        Rule((f"{mlp}.w1",), (f"{ours}.gate_proj.weight",), apart),
        Rule((f"{mlp}.v1",), (f"{ours}.up_proj.weight",), apart),
        Rule((f"{mlp}.w2",), (f"{ours}.down_proj.weight",), chain(apart, Transposed())),
    )


# One module an expert, although the family itself keeps all in one tensor.
MLX_DBRX = mlx_only(
    *stacked_experts(
        "transformer.blocks.{i}.ffn.experts.{e}",
        f"{LAYER}.mlp.switch_mlp",
        {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"},
    )
)


def minimax_m2(config: HubConfig) -> DecoderConfig:
    """Sigmoid scores with a bias that only chooses; norms over all queries and keys together."""
    config.ignore("shared_intermediate_size num_mtp_modules mtp_transformer_layers use_mtp")
    config.ignore("layernorm_full_attention_beta layernorm_linear_attention_beta max_model_len")
    config.ignore("layernorm_mlp_beta use_grouped_topk")
    config.expect(scoring_func="sigmoid", use_qk_norm=True, qk_norm_type="per_layer")
    config.expect(use_routing_bias=True, attn_type_list=[1] * config.layers)
    size = config.head_dim(128)
    rope = {"theta": 5e6, "partial": config.get("rotary_dim", default=size) / size}
    sparse = config.experts(scores="sigmoid", normalize=True, correction_bias=True)
    own = head_norm(config.rms_norm(), "width")
    return llama(config, 1e-6, 128, rope=rope, feed_forward=sparse, **own)


def afmoe(config: HubConfig) -> DecoderConfig:
    """Gated attention, norms around both branches, RoPE only in layers with a window."""
    config.ignore("load_balance_coeff use_grouped_mm num_expert_groups num_limited_groups")
    config.expect(score_func="sigmoid", route_norm=True, n_group=1, topk_group=1)
    norm = config.rms_norm(1e-5)
    types = config.layer_types(config.every(config.get("global_attn_every_n_layers", default=4)))
    rope = config.rope(config.head_dim(128))
    routed: dict[str, Any] = {"scores": "sigmoid", "normalize": True, "correction_bias": True}
    routed |= {"normalize_eps": 1e-20, "scaling": float(config.get("route_scale", default=1.0))}
    shared = config.get("num_shared_experts", default=2)
    sparse = config.experts("moe_intermediate_size", shared, **routed)
    dense, first = config.feed_forward(), config.get("num_dense_layers", default=1)
    wide = config.get("mup_enabled", default=False)
    return llama(
        config,
        1e-5,
        128,
        feed_forward=[dense if i < first else sparse for i in range(config.layers)],
        block=behind(norm),
        embedding={"multiplier": config.width**0.5 if wide else 1.0},
        rope=[rope if kind == SLIDING else None for kind in types],
        window=config.windows(types, 1024),
        gate=True,
        **head_norm(norm),
    )


BLOCK_SPARSE = names("block_sparse_moe.gate=mlp.gate") + experts(
    "block_sparse_moe.experts", "w1 w3 w2"
)
MLX_BLOCK_SPARSE = experts_at("block_sparse_moe.switch_mlp")
HUNYUAN_MOE = (
    *names("mlp.gate.wg=mlp.gate"),
    *HUNYUAN,
    *rules.shared_expert("mlp.shared_mlp"),
    *experts(),
)
MINIMAX = (rules.tensor("block_sparse_moe.e_score_correction_bias", CORRECTION), *BLOCK_SPARSE)
AFMOE = (
    *names(
        "post_attention_layernorm=attention_output_layernorm mlp.router.gate=mlp.gate"
        " pre_mlp_layernorm=post_attention_layernorm"
        " post_mlp_layernorm=feed_forward_output_layernorm"
    ),
    rules.tensor("mlp.expert_bias", CORRECTION),
    *experts(),
)

FAMILIES = (
    Family("mixtral", mixtral, BLOCK_SPARSE, mlx_rules=MLX_BLOCK_SPARSE),
    Family("qwen2_moe", qwen2_moe, experts() + rules.shared_expert("mlp.shared_expert")),
    Family("qwen3_moe", qwen3_moe, experts()),
    Family("olmoe", olmoe, experts()),
    Family("phimoe", phimoe, BLOCK_SPARSE, mlx_rules=MLX_BLOCK_SPARSE),
    Family("granitemoe", granitemoe, _granite_rules, mlx_rules=MLX_BLOCK_SPARSE),
    Family("granitemoeshared", granitemoe, _granite_rules, mlx_rules=MLX_BLOCK_SPARSE),
    Family("ernie4_5_moe", ernie4_5_moe, _ernie_rules),
    Family("hunyuan_v1_moe", hunyuan_v1_moe, HUNYUAN_MOE),
    Family("dbrx", dbrx, _dbrx_rules, mlx_rules=MLX_DBRX),
    Family("minimax_m2", minimax_m2, MINIMAX, mlx_rules=MLX_BLOCK_SPARSE),
    Family("afmoe", afmoe, AFMOE, mlx_rules=experts_at("mlp.experts")),
)
