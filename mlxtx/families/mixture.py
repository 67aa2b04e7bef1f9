"""Mixtures of experts with a router of their own kind: Mixtral, gpt-oss, Llama 4, ERNIE, Hunyuan,
DBRX, MiniMax and Trinity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlxtx.decoder.config import (
    DecoderConfig,
    EmbeddingConfig,
    ExpertsConfig,
    NormConfig,
    RouterConfig,
    TemperatureConfig,
)
from mlxtx.families.classic import HUNYUAN_EXTRAS, HUNYUAN_NORMS, hunyuan_attention
from mlxtx.families.common import (
    attention_layers,
    blocks,
    context,
    decoder,
    every,
    feed_forward,
    head_norm,
    layer_types,
    layers,
    rms_norm,
    sizes,
    width,
    windows,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import biases, head_dim
from mlxtx.families.names import Rule, rename
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import make_rope, read_rope, rope_parameters
from mlxtx.families.rules import (
    CORRECTION,
    LAYER,
    W123,
    attention_of,
    expert_rules,
    experts_of,
    layer_rules,
    qkv_rule,
    shared_expert_rules,
    tensor_rule,
)
from mlxtx.families.transforms import (
    Reshaped,
    Split,
    Transform,
    Transposed,
    Unflattened,
    chain,
)

if TYPE_CHECKING:
    import mlx.core as mx

TRAINING = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")


def mixtral(reader: ConfigReader) -> DecoderConfig:
    reader.ignore(*TRAINING)
    norm = rms_norm(reader, 1e-5)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader), theta=1e6),
        window=reader.nullable("sliding_window", None),
    )
    experts = ExpertsConfig(
        count=reader.get("num_local_experts", default=8),
        per_token=reader.get("num_experts_per_tok", default=2),
        expert=feed_forward(reader),
        router=RouterConfig(normalize=True),
    )
    return decoder(reader, blocks(attention, experts, norm), norm)


def gpt_oss(reader: ConfigReader) -> DecoderConfig:
    """Sinks, a window in every other layer, experts with biases and a clipped SwiGLU."""
    reader.ignore(*TRAINING, "initial_context_length", "experts_per_token")
    norm = rms_norm(reader, 1e-5)
    size = head_dim(reader, 64)
    types = layer_types(reader, every(reader, 2))
    parameters = rope_parameters(reader, theta=150000.0)
    attention = attention_layers(
        reader,
        head_dim=size,
        rope=make_rope(parameters, size, context=context(reader)),
        window=windows(reader, types, 128),
        sinks=True,
        **biases(reader, True),
    )
    experts = ExpertsConfig(
        count=reader.get("num_local_experts", "num_experts", default=128),
        per_token=reader.get("num_experts_per_tok", default=4),
        expert=feed_forward(reader, bias=True),
        router=RouterConfig(scores="softmax_chosen", bias=True),
        clip=reader.get("swiglu_limit", default=7.0),
        clip_alpha=reader.get("swiglu_alpha", default=1.702),
    )
    return decoder(reader, blocks(attention, experts, norm), norm)


@dataclass(frozen=True)
class Blocks(Transform):
    """fp4 numbers in blocks of 16 bytes, [E, out, blocks, 16] <-> in 32-bit words, [E, out, words]."""

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        import mlx.core as mx

        return [a.view(mx.uint32).flatten(-2) for a in arrays]

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        import mlx.core as mx

        return [a.reshape(*a.shape[:-1], -1, 4).view(mx.uint8) for a in arrays]


def _gpt_oss_rules(packed: bool) -> Callable[[DecoderConfig], tuple[Rule, ...]]:
    """Gate and up alternate in one tensor. Plain weights are [E, in, out]; packed ones [E, out,
    in] in blocks, with a scale for each block."""
    theirs, ours = f"{LAYER}.mlp.experts", f"{LAYER}.mlp.switch_mlp"

    def both(ending: str) -> tuple[str, ...]:
        return tuple(f"{ours}.{part}_proj.{ending}" for part in ("gate", "up"))

    def rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
        pairs = Split((1, 1), groups=experts_of(decoder).expert.width)
        turn, ending = (Blocks(), "_blocks") if packed else (Transposed(), "")
        return (
            rename(f"{LAYER}.mlp.router", f"{LAYER}.mlp.gate"),
            Rule((f"{theirs}.gate_up_proj{ending}",), both("weight"), chain(turn, pairs)),
            Rule((f"{theirs}.down_proj{ending}",), (f"{ours}.down_proj.weight",), turn),
            Rule((f"{theirs}.gate_up_proj_scales",), both("scales"), pairs),
            rename(f"{theirs}.down_proj_scales", f"{ours}.down_proj.scales"),
            Rule((f"{theirs}.gate_up_proj_bias",), both("bias"), pairs),
            rename(f"{theirs}.down_proj_bias", f"{ours}.down_proj.bias"),
        )

    return rules


def llama4_text(reader: ConfigReader) -> DecoderConfig:
    """Three layers that see chunks to one that sees everything, has no positions and lets queries
    grow; the router's scores multiply what goes into an expert."""
    reader.ignore(*TRAINING, "for_llm_compressor", "intermediate_size_mlp", "moe_layers")
    norm = rms_norm(reader, 1e-5)
    count, size = layers(reader), head_dim(reader, 128)
    interval = reader.get("no_rope_layer_interval", default=4)
    turned = reader.get("no_rope_layers", default=None) or [
        (i + 1) % interval != 0 for i in range(count)
    ]
    types = layer_types(
        reader, ["chunked_attention" if has else "full_attention" for has in turned]
    )
    rope = read_rope(reader, size, theta=5e5, fields={"interleaved": True})
    unweighted = head_norm(replace(norm, weight=False))
    chunk = reader.nullable("attention_chunk_size", 8192)
    normed = reader.get("use_qk_norm", default=True)
    temperature = None
    if reader.get("attn_temperature_tuning", default=True):
        temperature = TemperatureConfig(
            beta=reader.get("attn_scale", default=0.1),
            floor=reader.get("floor_scale", default=8192),
            shift=1.0,
        )
    reader.ignore("attn_scale", "floor_scale")
    plain = attention_layers(
        reader,
        head_dim=size,
        rope=[rope if has else None for has in turned],
        norm_after_rope=True,
        **biases(reader),
    )
    attention = [
        replace(
            layer,
            chunk=chunk if kind == "chunked_attention" else None,
            temperature=None if has else temperature,
            **(unweighted if has and normed else {}),
        )
        for layer, has, kind in zip(plain, turned, types, strict=True)
    ]
    expert = feed_forward(reader)
    experts = ExpertsConfig(
        count=reader.get("num_local_experts", default=16),
        per_token=reader.get("num_experts_per_tok", default=1),
        expert=expert,
        shared=expert,
        router=RouterConfig(scores="sigmoid_chosen"),
        scale_input=True,
    )
    dense = feed_forward(reader, reader.get("intermediate_size_mlp", default=16384))
    step = reader.get("interleave_moe_layer_step", default=1)
    sparse = reader.get("moe_layers", default=None)
    chosen = set(range(step - 1, count, step) if sparse is None else sparse)
    body = [experts if i in chosen else dense for i in range(count)]
    return decoder(reader, blocks(attention, body, norm), norm)


def _llama4_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs, ours = f"{LAYER}.feed_forward", f"{LAYER}.mlp"
    inner = experts_of(decoder).expert.width
    return (
        rename(f"{theirs}.router", f"{ours}.gate"),
        Rule(
            (f"{theirs}.experts.gate_up_proj",),
            (f"{ours}.switch_mlp.gate_proj.weight", f"{ours}.switch_mlp.up_proj.weight"),
            chain(Transposed(), Split((inner, inner))),
        ),
        Rule(
            (f"{theirs}.experts.down_proj",),
            (f"{ours}.switch_mlp.down_proj.weight",),
            Transposed(),
        ),
        *shared_expert_rules("feed_forward.shared_expert"),
        *layer_rules(
            LAYER,
            {f"feed_forward.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
        ),
    )


def ernie4_5_moe(reader: ConfigReader) -> DecoderConfig:
    """Softmax scores with a bias that only chooses."""
    reader.ignore(*TRAINING, "moe_capacity", "moe_norm_min", "num_nextn_predict_layers")
    reader.ignore("fuse_rms_norm", "moe_use_aux_free", "moe_gate", "moe_gate_act", "moe_layer_freq")
    norm = rms_norm(reader, 1e-5)
    bias = reader.get("use_bias", default=False)
    size = head_dim(reader)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, size, theta=5e5, fields={"interleaved": True}),
        qkv_bias=bias,
        output_bias=bias,
    )
    expert = feed_forward(reader, "moe_intermediate_size")
    shared = reader.get("moe_num_shared_experts", default=2)
    experts = ExpertsConfig(
        count=reader.get("moe_num_experts", "num_experts", default=64),
        per_token=reader.get("moe_k", "num_experts_per_tok", default=6),
        expert=expert,
        shared=replace(expert, width=expert.width * shared, bias=bias) if shared else None,
        router=RouterConfig(normalize=True, correction_bias=True),
    )
    count = layers(reader)
    first = reader.get("moe_layer_start_index", default=1)
    last = reader.get("moe_layer_end_index", default=-1)
    step = reader.get("moe_layer_interval", default=1)
    last = count - 1 if last == -1 else last
    dense = feed_forward(reader, bias=bias)
    body = [experts if first <= i <= last and (i + 1) % step == 0 else dense for i in range(count)]
    return decoder(reader, blocks(attention, body, norm), norm, tied=True, head={"bias": bias})


def _ernie_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    count = experts_of(decoder).count
    return (
        tensor_rule(
            "mlp.moe_statics.e_score_correction_bias",
            CORRECTION,
            Reshaped((1, count), (count,)),
        ),
        *expert_rules(),
    )


def hunyuan_v1_moe(reader: ConfigReader) -> DecoderConfig:
    """A dense feed-forward beside the experts, of the same width."""
    reader.ignore(*HUNYUAN_EXTRAS, *TRAINING, "moe_intermediate_size", "moe_layer_num_skipped")
    reader.ignore("moe_drop_tokens", "moe_random_routing_dropped_token", "capacity_factor")
    reader.expect("use_mixed_mlp_moe", True)
    norm = rms_norm(reader, 1e-5)

    def same(name: str, default: int) -> int:
        """These may be lists with an entry a layer, all alike."""
        value = reader.get(name, default=default)
        if isinstance(value, list):
            reader.expect(name, value[:1] * len(value))
            return value[0]
        return value

    shared = same("num_shared_expert", 1)
    expert = feed_forward(reader)
    experts = ExpertsConfig(
        count=same("num_experts", 1),
        per_token=same("moe_topk", 1),
        expert=expert,
        shared=replace(expert, width=expert.width * shared),
        router=RouterConfig(normalize=True),
    )
    return decoder(reader, blocks(hunyuan_attention(reader), experts, norm), norm)


def dbrx(reader: ConfigReader) -> DecoderConfig:
    """LayerNorm without bias; sizes of attention and experts in dictionaries of their own."""
    reader.ignore("emb_pdrop", "resid_pdrop", "num_key_value_heads", *TRAINING)
    outer, inner = reader.inner("attn_config"), reader.inner("ffn_config")
    for nested in (outer, inner):
        nested.ignore("model_type", "attn_pdrop", "moe_jitter_eps", "moe_loss_weight")
        nested.ignore("hidden_size", "base_config_key")
    norm = NormConfig(kind="layer", eps=1e-5)
    size = sizes(reader)["head_dim"]
    theta = outer.get("rope_theta", default=10000.0)
    attention = attention_layers(
        reader,
        kv_heads=outer.get("kv_n_heads", default=1),
        clip_qkv=outer.get("clip_qkv", default=None),
        rope=read_rope(reader, size, theta=theta),
    )
    name = inner.get("ffn_act_fn", default={}).get("name", "silu")
    power = inner.nullable("moe_normalize_expert_weights", 1)
    inner.expect("moe_normalize_expert_weights", None, 1, 1.0)
    experts = ExpertsConfig(
        count=inner.get("moe_num_experts", default=4),
        per_token=inner.get("moe_top_k", default=1),
        expert=feed_forward(
            reader, inner.get("ffn_hidden_size", default=3584), keys=(), default=name
        ),
        router=RouterConfig(normalize=power is not None),
    )
    outer.finish()
    inner.finish()
    return decoder(reader, blocks(attention, experts, norm), norm)


def _dbrx_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs, ours = "transformer.blocks.{i}", f"{LAYER}.mlp"
    count = experts_of(decoder).count
    mlp = f"{theirs}.ffn.experts.mlp"
    return (
        rename("transformer.wte", "model.embed_tokens"),
        rename("transformer.norm_f", "model.norm"),
        qkv_rule(f"{theirs}.norm_attn_norm.attn.Wqkv", attention_of(decoder)),
        *layer_rules(
            theirs,
            {
                "norm_attn_norm.attn.out_proj": "self_attn.o_proj",
                "norm_attn_norm.norm_1": "input_layernorm",
                "norm_attn_norm.norm_2": "post_attention_layernorm",
                "ffn.router.layer": "mlp.gate",
            },
        ),
        Rule((f"{mlp}.w1",), (f"{ours}.switch_mlp.gate_proj.weight",), Unflattened(count)),
        Rule((f"{mlp}.v1",), (f"{ours}.switch_mlp.up_proj.weight",), Unflattened(count)),
        Rule(
            (f"{mlp}.w2",),
            (f"{ours}.switch_mlp.down_proj.weight",),
            chain(Unflattened(count), Transposed()),
        ),
    )


def minimax_m2(reader: ConfigReader) -> DecoderConfig:
    """Sigmoid scores with a bias that only chooses; norms over all queries and keys together."""
    reader.ignore(
        *TRAINING, "shared_intermediate_size", "num_mtp_modules", "mtp_transformer_layers"
    )
    reader.ignore("use_mtp", "layernorm_full_attention_beta", "layernorm_linear_attention_beta")
    reader.ignore("layernorm_mlp_beta", "max_model_len", "rotary_dim", "use_grouped_topk")
    reader.expect("scoring_func", "sigmoid")
    reader.expect("use_qk_norm", True)
    reader.expect("qk_norm_type", "per_layer")
    reader.expect("use_routing_bias", True)
    reader.expect("attn_type_list", [1] * layers(reader))
    norm = rms_norm(reader)
    size = head_dim(reader, 128)
    partial = reader.get("rotary_dim", default=size) / size
    attention = attention_layers(
        reader,
        head_dim=size,
        rope=read_rope(reader, size, theta=5e6, partial=partial),
        **head_norm(norm, "width"),
    )
    experts = ExpertsConfig(
        count=reader.get("num_local_experts", "num_experts", default=256),
        per_token=reader.get("num_experts_per_tok", default=8),
        expert=feed_forward(reader),
        router=RouterConfig(scores="sigmoid", normalize=True, correction_bias=True),
    )
    return decoder(reader, blocks(attention, experts, norm), norm)


def afmoe(reader: ConfigReader) -> DecoderConfig:
    """Gated attention, norms around both branches, RoPE only in layers with a window."""
    reader.ignore(*TRAINING, "load_balance_coeff", "use_grouped_mm", "num_expert_groups")
    reader.ignore("num_limited_groups", "rope_scaling")
    reader.expect("score_func", "sigmoid")
    reader.expect("route_norm", True)
    reader.expect("n_group", 1)
    reader.expect("topk_group", 1)
    norm = rms_norm(reader, 1e-5)
    size = head_dim(reader, 128)
    step = reader.get("global_attn_every_n_layers", default=4)
    types = layer_types(reader, every(reader, step))
    rope = read_rope(reader, size)
    attention = attention_layers(
        reader,
        head_dim=size,
        rope=[rope if kind == "sliding_attention" else None for kind in types],
        window=windows(reader, types, 1024),
        gate=True,
        **biases(reader),
        **head_norm(norm),
    )
    expert = feed_forward(reader, "moe_intermediate_size")
    experts = ExpertsConfig(
        count=reader.get("num_experts", "num_local_experts", default=64),
        per_token=reader.get("num_experts_per_tok", default=6),
        expert=expert,
        shared=replace(expert, width=expert.width * reader.get("num_shared_experts", default=2)),
        router=RouterConfig(
            scores="sigmoid",
            normalize=True,
            normalize_eps=1e-20,
            scaling=float(reader.get("route_scale", default=1.0)),
            correction_bias=True,
        ),
    )
    dense = feed_forward(reader)
    first = reader.get("num_dense_layers", default=1)
    body = [dense if i < first else experts for i in range(layers(reader))]
    wide = width(reader) ** 0.5 if reader.get("mup_enabled", default=False) else 1.0
    return decoder(
        reader,
        blocks(attention, body, norm, attention_output_norm=norm, feed_forward_output_norm=norm),
        norm,
        embedding=EmbeddingConfig(multiplier=wide),
    )


AFMOE_NORMS = {
    "post_attention_layernorm": "attention_output_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "feed_forward_output_layernorm",
    "mlp.router.gate": "mlp.gate",
}
FAMILIES = (
    Family(
        "mixtral",
        mixtral,
        (
            rename(f"{LAYER}.block_sparse_moe.gate", f"{LAYER}.mlp.gate"),
            *expert_rules("block_sparse_moe.experts", W123),
        ),
    ),
    Family("gpt_oss", gpt_oss, _gpt_oss_rules(False), packed_rules=_gpt_oss_rules(True)),
    Family("llama4_text", llama4_text, _llama4_rules),
    Family("ernie4_5_moe", ernie4_5_moe, _ernie_rules),
    Family(
        "hunyuan_v1_moe",
        hunyuan_v1_moe,
        (
            rename(f"{LAYER}.mlp.gate.wg", f"{LAYER}.mlp.gate"),
            *layer_rules(LAYER, HUNYUAN_NORMS),
            *shared_expert_rules("mlp.shared_mlp"),
            *expert_rules(),
        ),
    ),
    Family("dbrx", dbrx, _dbrx_rules),
    Family(
        "minimax_m2",
        minimax_m2,
        (
            rename(f"{LAYER}.block_sparse_moe.gate", f"{LAYER}.mlp.gate"),
            tensor_rule("block_sparse_moe.e_score_correction_bias", CORRECTION),
            *expert_rules("block_sparse_moe.experts", W123),
        ),
    ),
    Family(
        "afmoe",
        afmoe,
        (
            *layer_rules(LAYER, AFMOE_NORMS),
            tensor_rule("mlp.expert_bias", CORRECTION),
            *expert_rules(),
        ),
    ),
)
