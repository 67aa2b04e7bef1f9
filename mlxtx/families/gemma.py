"""Gemma: scaled embeddings, zero-centred norms, sandwich norms from the second generation on; the
fourth has heads of two sizes, keys that serve as values, layers that share a cache, embeddings of
their own for every layer, and experts beside the feed-forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtx.decoder.config import AttentionConfig, DecoderConfig, HeadNormConfig
from mlxtx.families.common import FULL, SLIDING, HubConfig, behind, head_norm
from mlxtx.families.family import Family
from mlxtx.families.reader import ConfigReader
from mlxtx.naming.map import Rule
from mlxtx.naming.rules import LAYER, OUTPUT_NORMS, experts_at, names, outer, tensor
from mlxtx.naming.transforms import Split

GELU = "gelu_pytorch_tanh"


def _gemma(config: HubConfig, **fields: Any) -> DecoderConfig:
    config.expect(use_bidirectional_attention=(None, False))
    return config.decoder(
        config.rms_norm(offset=1.0),
        config.feed_forward(activation=GELU),
        tied=True,
        embedding={"multiplier": config.width**0.5},
        head_dim=config.head_dim(256),
        bias=config.bias(),
        **fields,
    )


def gemma(config: HubConfig) -> DecoderConfig:
    """Its files say ``gelu`` where they mean the tanh form."""
    config.ignore("hidden_activation")
    if config.get("hidden_act", default=GELU) == "gelu":
        config.config["hidden_act"] = GELU
    return _gemma(config, rope=config.rope(config.head_dim(256)))


def _sandwich(config: HubConfig, final: float | None, **attention: Any) -> DecoderConfig:
    """Norms around both branches, perhaps a soft cap of the logits."""
    config.config["hidden_act"] = config.get("hidden_activation", default=GELU)
    return _gemma(
        config,
        block=behind(config.rms_norm(offset=1.0)),
        head={"softcap": config.nullable("final_logit_softcapping", final)},
        scale=config.get("query_pre_attn_scalar", default=256) ** -0.5,
        **attention,
    )


def gemma2(config: HubConfig) -> DecoderConfig:
    """A soft cap of the scores, a window in every other layer."""
    config.ignore("sliding_window_size")  # some files say their window twice
    windows = config.windows(config.layer_types(config.every(2)), 4096)
    rope, cap = config.rope(config.head_dim(256)), config.nullable("attn_logit_softcapping", 50.0)
    return _sandwich(config, 30.0, rope=rope, window=windows, softcap=cap)


def gemma3_text(config: HubConfig) -> DecoderConfig:
    """Five layers with a window and a rotary base of their own to one that sees everything."""
    config.ignore("attn_logit_softcapping _sliding_window_pattern")  # as transformers does
    types = config.layer_types(config.every(config.get("sliding_window_pattern", default=6)))
    # A flat scaling is added to what the full layers have of their own.
    nested = config.get("rope_parameters", default={FULL: {"rope_type": "default"}})
    scaled = {**(nested.get(FULL) or {}), **config.get("rope_scaling", default={})}
    config.config |= {"rope_parameters": {**nested, FULL: scaled}, "rope_scaling": None}
    size = config.head_dim(256)
    ropes = {
        SLIDING: config.rope(size, SLIDING, theta=1e4, theta_names=("rope_local_base_freq",)),
        FULL: config.rope(size, FULL, theta=1e6),
    }
    return _sandwich(
        config,
        None,
        rope=[ropes[kind] for kind in types],
        window=config.windows(types, 4096),
        **head_norm(config.rms_norm(offset=1.0)),
    )


def _gemma4_shapes(config: HubConfig, types: list[str]) -> list[dict[str, Any]]:
    """head_dim and kv_heads of each layer: full layers have larger heads, and perhaps fewer, said
    for all of them at once or in ``per_layer_config``."""
    key_is_value = config.get("attention_k_eq_v", default=False)
    size, kv_heads = config.head_dim(256), config.get("num_key_value_heads")
    full = {"head_dim": config.get("global_head_dim", default=512)}
    fewer = config.get("num_global_key_value_heads", default=None)
    if fewer and key_is_value:
        full["num_key_value_heads"] = fewer
    said = config.get("per_layer_config", default=None)
    shapes: list[dict[str, Any]] = []
    for i, kind in enumerate(types):
        own = said.get(str(i), {}) if said is not None else full if kind == FULL else {}
        layer = ConfigReader(own, f"{config.owner}'s per_layer_config")
        heads = layer.get("num_key_value_heads", default=kv_heads)
        shapes.append({"head_dim": layer.get("head_dim", default=size), "kv_heads": heads})
        layer.finish()
    return shapes


GEMMA4_FULL_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}


def _gemma4_attention(config: HubConfig, types: list[str]) -> list[AttentionConfig]:
    """The last layers attend over the rows of the last layer of their kind before them."""
    norm, bias = config.rms_norm(), config.bias()
    windows = config.windows(types, 512)
    own = config.layers - config.get("num_kv_shared_layers", default=0)
    key_is_value = config.get("attention_k_eq_v", default=False)
    ropes = {SLIDING: {"rope_theta": 1e4}, FULL: GEMMA4_FULL_ROPE}
    layers = []
    for i, (kind, shape) in enumerate(zip(types, _gemma4_shapes(config, types), strict=True)):
        earlier = [j for j in range(own) if types[j] == kind]
        layers.append(
            AttentionConfig(
                heads=config.heads,
                **shape,
                scale=1.0,
                rope=config.rope(shape["head_dim"], kind, otherwise=ropes),
                window=windows[i],
                v_norm=HeadNormConfig(norm=replace(norm, weight=False)),
                value_is_key=key_is_value and kind == FULL,
                shares_cache_of=earlier[-1] if i >= own else None,
                qkv_bias=bias,
                output_bias=bias,
                **head_norm(norm),
            )
        )
    return layers


def gemma4_text(config: HubConfig) -> DecoderConfig:
    config.expect(use_bidirectional_attention=(None, "vision"))
    config.config["hidden_act"] = config.get("hidden_activation", default=GELU)
    norm = config.rms_norm()
    types = config.layer_types(config.every(6))
    types[-1] = FULL
    inner = config.nullable("hidden_size_per_layer_input", 256)
    first_sharing = config.layers - config.get("num_kv_shared_layers", default=0)
    wide = 2 if config.get("use_double_wide_mlp", default=False) else 1
    gated = config.feed_forward(activation=GELU)
    double = replace(gated, width=wide * gated.width)
    body = [gated if i < first_sharing else double for i in range(config.layers)]
    experts: dict[str, Any] = {}
    if config.get("enable_moe_block", default=False):
        expert = {"expert": config.feed_forward("moe_intermediate_size", GELU)}
        routed = config.experts(fields=expert, normalize=True, norm=norm, expert_scale=True)
        experts = {"experts": routed}
    config.ignore("num_experts top_k_experts moe_intermediate_size")
    return config.decoder(
        norm,
        body,
        tied=True,
        block={**behind(norm), **experts, "layer_scale": True, "per_layer_input": inner or None},
        embedding={
            "multiplier": config.width**0.5,
            "per_layer": inner or None,
            "per_layer_vocabulary": config.get("vocab_size_per_layer_input", default=262144),
        },
        head={"softcap": config.get("final_logit_softcapping", default=None)},
        layers=_gemma4_attention(config, types),
    )


def _gemma4_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    rules = names(
        "post_feedforward_layernorm_1=dense_output_layernorm"
        " post_feedforward_layernorm_2=experts_output_layernorm"
        " pre_feedforward_layernorm_2=experts_layernorm router.proj=experts.gate"
        " per_layer_input_gate=per_layer.gate per_layer_projection=per_layer.projection"
        " post_per_layer_input_norm=per_layer.norm"
    )
    experts = decoder.blocks[0].experts
    if experts is not None:
        width, ours = experts.expert.width, f"{LAYER}.experts.switch_mlp"
        rules += (
            tensor("router.scale", "experts.gate.norm.weight"),
            tensor("router.per_expert_scale", "experts.gate.expert_scale"),
            Rule(
                (f"{LAYER}.experts.gate_up_proj",),
                (f"{ours}.gate_proj.weight", f"{ours}.up_proj.weight"),
                Split((width, width)),
            ),
            Rule((f"{LAYER}.experts.down_proj",), (f"{ours}.down_proj.weight",)),
        )
    return (
        *SANDWICH,
        *rules,
        *outer(
            "model.embed_tokens_per_layer=model.per_layer.embed_tokens"
            " model.per_layer_model_projection=model.per_layer.projection"
            " model.per_layer_projection_norm=model.per_layer.norm"
        ),
    )


SANDWICH = OUTPUT_NORMS + names("pre_feedforward_layernorm=post_attention_layernorm")
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}  # published files may leave these out
GEMMA3 = {"max_position_embeddings": 131072, "vocab_size": 262208}

FAMILIES = (
    Family("gemma", gemma, defaults={"num_key_value_heads": 16, "max_position_embeddings": 8192}),
    Family("gemma2", gemma2, SANDWICH, defaults={**HEADS, "max_position_embeddings": 8192}),
    Family("gemma3_text", gemma3_text, SANDWICH, defaults={**HEADS, **GEMMA3}),
    Family(
        "gemma4_text",
        gemma4_text,
        _gemma4_rules,
        mlx_rules=experts_at("experts.switch_glu", "experts.switch_mlp"),
    ),
)
