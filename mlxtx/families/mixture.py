"""Mixtures of experts on Llama's block: Mixtral, Qwen, OLMoE, Phi, Granite, ERNIE, Hunyuan, DBRX,
MiniMax and Trinity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtx.decoder.config import DecoderConfig, ExpertsConfig, RouterConfig
from mlxtx.errors import MlxtxError
from mlxtx.families.common import SLIDING, HubConfig, behind, head_norm
from mlxtx.families.family import Family
from mlxtx.families.llama import HUNYUAN as HUNYUAN_NORMS
from mlxtx.families.llama import INTERLEAVED, granite, hunyuan_attention, qwen_windows
from mlxtx.families.rope import make_rope, rope_parameters
from mlxtx.families.rules import (
    CORRECTION,
    LAYER,
    attention_of,
    experts,
    experts_of,
    gate_up,
    names,
    outer,
    qkv,
    shared_expert,
    tensor,
)
from mlxtx.naming.map import Rule
from mlxtx.naming.transforms import Reshaped, Transposed, Unflattened, chain


def _local(config: HubConfig, router: RouterConfig, **fields: Any) -> ExpertsConfig:
    return ExpertsConfig(
        count=config.get("num_local_experts", "num_experts"),
        per_token=config.get("num_experts_per_tok"),
        expert=config.feed_forward(),
        router=router,
        **fields,
    )


def mixtral(config: HubConfig) -> DecoderConfig:
    return config.decoder(
        config.rms_norm(1e-5),
        _local(config, RouterConfig(normalize=True)),
        rope=config.rope(theta=1e6),
        window=config.nullable("sliding_window", None),
    )


def qwen_experts(config: HubConfig, **fields: Any) -> list:
    """Experts in every ``decoder_sparse_step``-th layer that is not listed as dense."""
    sparse = ExpertsConfig(
        count=config.get("num_experts", "num_local_experts"),
        per_token=config.get("num_experts_per_tok"),
        expert=config.feed_forward("moe_intermediate_size"),
        router=RouterConfig(normalize=config.get("norm_topk_prob", default=False)),
        **fields,
    )
    plain, step = config.feed_forward(), config.get("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers", default=())
    return [plain if (i + 1) % step or i in dense else sparse for i in range(config.layers)]


def qwen2_moe(config: HubConfig) -> DecoderConfig:
    shared = config.feed_forward("shared_expert_intermediate_size")
    return config.decoder(
        config.rms_norm(),
        qwen_experts(config, shared=shared, shared_gate=True),
        rope=config.rope(),
        window=qwen_windows(config),
        qkv_bias=config.get("qkv_bias", default=True),
    )


def qwen3_moe(config: HubConfig) -> DecoderConfig:
    norm = config.rms_norm()
    return config.decoder(
        norm,
        qwen_experts(config),
        rope=config.rope(),
        window=qwen_windows(config),
        **config.biases(),
        **head_norm(norm),
    )


def olmoe(config: HubConfig) -> DecoderConfig:
    norm = config.rms_norm(1e-5)
    router = RouterConfig(normalize=config.get("norm_topk_prob", default=False))
    return config.decoder(
        norm,
        _local(config, router),
        rope=config.rope(),
        clip_qkv=config.get("clip_qkv", default=None),
        **config.biases(),
        **head_norm(norm, "width"),
    )


def phimoe(config: HubConfig) -> DecoderConfig:
    """LayerNorm, and two experts that are each weighed among their likes."""
    config.ignore("input_jitter_noise")
    parameters = rope_parameters(config, theta=1e6)
    short, long = (parameters.pop(f"{kind}_mscale", None) for kind in ("short", "long"))
    if short != long:
        raise MlxtxError(f"config.json: short_mscale {short} and long_mscale {long} must be equal")
    if short is not None:
        parameters["attention_factor"] = short
    rope = make_rope(parameters, config.head_dim(), config.context)
    jitter = config.get("router_jitter_noise", default=0.01)
    return config.decoder(
        config.layer_norm("rms_norm_eps"),
        _local(config, RouterConfig(scores="sparsemixer", jitter=jitter)),
        head={"bias": config.get("lm_head_bias", default=False)},
        whole={"refeed_beyond": rope.scaling.original_context if rope.scaling else None},
        rope=rope,
        window=config.nullable("sliding_window", None),
        **config.biases(),
    )


def granitemoe(config: HubConfig) -> DecoderConfig:
    """With ``shared_intermediate_size`` also a feed-forward that every token goes through."""
    width = config.get("shared_intermediate_size", default=0)
    shared = config.feed_forward(width) if width else None
    router = RouterConfig(scores="softmax_chosen")
    return granite(config, _local(config, router, shared=shared))


def _granite_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    mixture = experts_of(decoder)
    rules = (
        *names("block_sparse_moe.router.layer=mlp.gate"),
        *names("block_sparse_moe.output_linear=mlp.switch_mlp.down_proj"),
        gate_up("block_sparse_moe.input_linear", mixture.expert.width, "mlp.switch_mlp"),
    )
    if mixture.shared is None:
        return rules
    return (
        *rules,
        *names("shared_mlp.output_linear=mlp.shared_experts.down_proj"),
        gate_up("shared_mlp.input_linear", mixture.shared.width, "mlp.shared_experts"),
    )


def ernie4_5_moe(config: HubConfig) -> DecoderConfig:
    """Softmax scores with a bias that only chooses."""
    config.ignore("moe_capacity moe_norm_min num_nextn_predict_layers fuse_rms_norm")
    config.ignore("moe_use_aux_free moe_gate moe_gate_act moe_layer_freq")
    bias = config.get("use_bias", default=False)
    expert = config.feed_forward("moe_intermediate_size")
    width = expert.width * config.get("moe_num_shared_experts", default=2)
    sparse = ExpertsConfig(
        count=config.get("moe_num_experts", "num_experts"),
        per_token=config.get("moe_k", "num_experts_per_tok"),
        expert=expert,
        shared=replace(expert, width=width, bias=bias) if width else None,
        router=RouterConfig(normalize=True, correction_bias=True),
    )
    first = config.get("moe_layer_start_index", default=1)
    last = config.get("moe_layer_end_index", default=-1) % config.layers
    step = config.get("moe_layer_interval", default=1)
    dense = config.feed_forward(bias=bias)
    return config.decoder(
        config.rms_norm(1e-5),
        [
            sparse if first <= i <= last and (i + 1) % step == 0 else dense
            for i in range(config.layers)
        ],
        tied=True,
        head={"bias": bias},
        rope=config.rope(theta=5e5, fields=INTERLEAVED),
        qkv_bias=bias,
        output_bias=bias,
    )


def _ernie_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    count = experts_of(decoder).count
    theirs = "mlp.moe_statics.e_score_correction_bias"
    return (tensor(theirs, CORRECTION, Reshaped((1, count), (count,))), *experts())


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

    expert = config.feed_forward()
    sparse = ExpertsConfig(
        count=same("num_experts"),
        per_token=same("moe_topk"),
        expert=expert,
        shared=replace(expert, width=expert.width * same("num_shared_expert")),
        router=RouterConfig(normalize=True),
    )
    return config.decoder(config.rms_norm(1e-5), sparse, **hunyuan_attention(config))


def dbrx(config: HubConfig) -> DecoderConfig:
    """LayerNorm without bias; attention's and the experts' settings in dictionaries of their own."""
    config.ignore("emb_pdrop num_key_value_heads")
    outer, inner = config.inner("attn_config"), config.inner("ffn_config")
    for nested in (outer, inner):
        nested.ignore("model_type attn_pdrop moe_jitter_eps moe_loss_weight hidden_size")
    inner.expect(moe_normalize_expert_weights=(1, 1.0, None))
    act = inner.get("ffn_act_fn", default={}).get("name", "silu")
    sparse = ExpertsConfig(
        count=inner.get("moe_num_experts", default=4),
        per_token=inner.get("moe_top_k", default=1),
        expert=config.feed_forward(inner.get("ffn_hidden_size", default=3584), act, ()),
        router=RouterConfig(
            normalize=inner.nullable("moe_normalize_expert_weights", 1) is not None
        ),
    )
    theta = outer.get("rope_theta", default=10000.0)
    kv_heads = outer.get("kv_n_heads", default=1)
    clip = outer.get("clip_qkv", default=None)
    outer.finish()
    inner.finish()
    norm = config.layer_norm(bias=False)
    rope = config.rope(theta=theta)
    return config.decoder(norm, sparse, rope=rope, kv_heads=kv_heads, clip_qkv=clip)


def _dbrx_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs, ours = "transformer.blocks.{i}", f"{LAYER}.mlp.switch_mlp"
    apart = Unflattened(experts_of(decoder).count)
    mlp = f"{theirs}.ffn.experts.mlp"
    return (
        *outer("transformer.wte=model.embed_tokens transformer.norm_f=model.norm"),
        qkv(f"{theirs}.norm_attn_norm.attn.Wqkv", attention_of(decoder)),
        *names(
            "norm_attn_norm.attn.out_proj=self_attn.o_proj ffn.router.layer=mlp.gate"
            " norm_attn_norm.norm_1=input_layernorm norm_attn_norm.norm_2=post_attention_layernorm",
            theirs,
        ),
        Rule((f"{mlp}.w1",), (f"{ours}.gate_proj.weight",), apart),
        Rule((f"{mlp}.v1",), (f"{ours}.up_proj.weight",), apart),
        Rule((f"{mlp}.w2",), (f"{ours}.down_proj.weight",), chain(apart, Transposed())),
    )


def minimax_m2(config: HubConfig) -> DecoderConfig:
    """Sigmoid scores with a bias that only chooses; norms over all queries and keys together."""
    config.ignore("shared_intermediate_size num_mtp_modules mtp_transformer_layers use_mtp")
    config.ignore("layernorm_full_attention_beta layernorm_linear_attention_beta max_model_len")
    config.ignore("layernorm_mlp_beta use_grouped_topk")
    config.expect(scoring_func="sigmoid", use_qk_norm=True, qk_norm_type="per_layer")
    config.expect(use_routing_bias=True, attn_type_list=[1] * config.layers)
    norm, size = config.rms_norm(), config.head_dim(128)
    partial = config.get("rotary_dim", default=size) / size
    router = RouterConfig(scores="sigmoid", normalize=True, correction_bias=True)
    return config.decoder(
        norm,
        _local(config, router),
        head_dim=size,
        rope=config.rope(size, theta=5e6, partial=partial),
        **head_norm(norm, "width"),
    )


def afmoe(config: HubConfig) -> DecoderConfig:
    """Gated attention, norms around both branches, RoPE only in layers with a window."""
    config.ignore("load_balance_coeff use_grouped_mm num_expert_groups num_limited_groups")
    config.expect(score_func="sigmoid", route_norm=True, n_group=1, topk_group=1)
    norm, size = config.rms_norm(1e-5), config.head_dim(128)
    types = config.layer_types(config.every(config.get("global_attn_every_n_layers", default=4)))
    rope = config.rope(size)
    expert = config.feed_forward("moe_intermediate_size")
    shared = config.get("num_shared_experts", default=2)
    sparse = ExpertsConfig(
        count=config.get("num_experts", "num_local_experts"),
        per_token=config.get("num_experts_per_tok"),
        expert=expert,
        shared=replace(expert, width=expert.width * shared),
        router=RouterConfig(
            scores="sigmoid",
            normalize=True,
            normalize_eps=1e-20,
            scaling=float(config.get("route_scale", default=1.0)),
            correction_bias=True,
        ),
    )
    dense, first = config.feed_forward(), config.get("num_dense_layers", default=1)
    wide = config.get("mup_enabled", default=False)
    return config.decoder(
        norm,
        [dense if i < first else sparse for i in range(config.layers)],
        block=behind(norm),
        embedding={"multiplier": config.width**0.5 if wide else 1.0},
        head_dim=size,
        rope=[rope if kind == SLIDING else None for kind in types],
        window=config.windows(types, 1024),
        gate=True,
        **config.biases(),
        **head_norm(norm),
    )


BLOCK_SPARSE = (
    *names("block_sparse_moe.gate=mlp.gate"),
    *experts("block_sparse_moe.experts", "w1 w3 w2"),
)
HUNYUAN = (
    *names("mlp.gate.wg=mlp.gate"),
    *HUNYUAN_NORMS,
    *shared_expert("mlp.shared_mlp"),
    *experts(),
)
MINIMAX = (tensor("block_sparse_moe.e_score_correction_bias", CORRECTION), *BLOCK_SPARSE)
AFMOE = (
    *names(
        "post_attention_layernorm=attention_output_layernorm mlp.router.gate=mlp.gate"
        " pre_mlp_layernorm=post_attention_layernorm"
        " post_mlp_layernorm=feed_forward_output_layernorm"
    ),
    tensor("mlp.expert_bias", CORRECTION),
    *experts(),
)

FAMILIES = (
    Family("mixtral", mixtral, BLOCK_SPARSE),
    Family("qwen2_moe", qwen2_moe, experts() + shared_expert("mlp.shared_expert")),
    Family("qwen3_moe", qwen3_moe, experts()),
    Family("olmoe", olmoe, experts()),
    Family("phimoe", phimoe, BLOCK_SPARSE),
    Family("granitemoe", granitemoe, _granite_rules),
    Family("granitemoeshared", granitemoe, _granite_rules),
    Family("ernie4_5_moe", ernie4_5_moe, _ernie_rules),
    Family("hunyuan_v1_moe", hunyuan_v1_moe, HUNYUAN),
    Family("dbrx", dbrx, _dbrx_rules),
    Family("minimax_m2", minimax_m2, MINIMAX),
    Family("afmoe", afmoe, AFMOE),
)
