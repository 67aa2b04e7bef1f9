"""Families with LayerNorm instead of RMSNorm: OLMo, Phi, Command R, StableLM, StarCoder 2,
Persimmon and Nemotron."""

from __future__ import annotations

from typing import Any

from mlxtx.decoder.config import DecoderConfig, NormConfig
from mlxtx.families.common import SLIDING, HubConfig, head_norm
from mlxtx.families.family import Family
from mlxtx.families.llama import INTERLEAVED
from mlxtx.naming.map import Rule
from mlxtx.naming.rules import LAYER, names, outer, qkv
from mlxtx.naming.transforms import Stacked

ONE_NORM: dict[str, Any] = {"form": "parallel", "feed_forward_norm": None}


def olmo(config: HubConfig) -> DecoderConfig:
    """LayerNorm without weights."""
    norm = NormConfig(kind="layer", eps=1e-5, weight=False)
    clip, rope = config.get("clip_qkv", default=None), config.rope()
    return config.decoder(norm, config.feed_forward(), rope=rope, clip_qkv=clip, bias=config.bias())


def phi(config: HubConfig) -> DecoderConfig:
    """One norm before attention and feed-forward, which run side by side."""
    norm = config.layer_norm("layer_norm_eps")
    plain = config.feed_forward(activation="gelu_new", gated=False, bias=True)
    own = head_norm(norm) if config.get("qk_layernorm", default=False) else {}
    attention: dict[str, Any] = {"rope": config.rope(partial=0.5), "bias": True, **own}
    return config.decoder(norm, plain, block=ONE_NORM, head={"bias": True}, **attention)


def _command(config: HubConfig, norm: NormConfig, **attention: Any) -> DecoderConfig:
    scale = config.get("logit_scale", default=0.0625)
    return config.decoder(
        norm,
        config.feed_forward(),
        tied=True,
        block=ONE_NORM,
        head={"multiplier": scale},
        bias=config.bias(),
        **attention,
    )


def cohere(config: HubConfig) -> DecoderConfig:
    norm = config.layer_norm("layer_norm_eps", bias=False)
    own = head_norm(norm, "each_head") if config.get("use_qk_norm", default=False) else {}
    return _command(config, norm, rope=config.rope(theta=5e5, fields=INTERLEAVED), **own)


def cohere2(config: HubConfig) -> DecoderConfig:
    """Layers with a window have RoPE, layers that see everything have no positions."""
    config.expect(use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True)
    config.expect(use_qk_norm=False, rotary_pct=1.0)
    config.ignore("use_parallel_embedding")
    config.expect(position_embedding_type="rope_gptj")
    config.expect(order_of_interleaved_layers="local_attn_first")
    step = ("sliding_window_pattern", "_sliding_window_pattern", "layer_switch")
    types = config.layer_types(config.every(config.get(*step, default=4)))
    rope = config.rope(fields=INTERLEAVED)
    ropes = [rope if kind == SLIDING else None for kind in types]
    norm = config.layer_norm("layer_norm_eps", bias=False)
    return _command(config, norm, rope=ropes, window=config.windows(types, 4096))


def stablelm(config: HubConfig) -> DecoderConfig:
    """RoPE on a quarter of each head; with or without a second norm."""
    config.expect(rotary_scaling_factor=1.0)
    own = head_norm(config.layer_norm("layer_norm_eps", bias=False), "each_head")
    return config.decoder(
        config.layer_norm("layer_norm_eps"),
        config.feed_forward(),
        block=ONE_NORM if config.get("use_parallel_residual", default=False) else {},
        rope=config.rope(partial=0.25),
        qkv_bias=config.get("use_qkv_bias", default=False),
        **(own if config.get("qk_layernorm", default=False) else {}),
    )


def starcoder2(config: HubConfig) -> DecoderConfig:
    config.ignore("attention_softmax_in_fp32 scale_attention_softmax_in_fp32 layer_norm_epsilon")
    config.ignore("residual_dropout activation_function")
    bias = config.get("use_bias", default=True)
    config.expect(mlp_type="default", norm_type="layer_norm", scale_attn_weights=True)
    config.expect(attention_bias=bias)
    return config.decoder(
        config.layer_norm("norm_epsilon"),
        config.feed_forward(activation="gelu_pytorch_tanh", gated=False, bias=bias),
        tied=True,
        rope=config.rope(),
        window=config.nullable("sliding_window", None),
        bias=bias,
    )


def persimmon(config: HubConfig) -> DecoderConfig:
    norm = config.layer_norm("layer_norm_eps")
    plain = config.feed_forward(activation="relu2", gated=False, bias=True)
    own = head_norm(norm) if config.get("qk_layernorm", default=True) else {}
    return config.decoder(norm, plain, rope=config.rope(partial=0.5), bias=True, **own)


def nemotron(config: HubConfig) -> DecoderConfig:
    """Weights stored around zero, squared ReLU."""
    bias = config.get("mlp_bias", default=False)
    plain = config.feed_forward(activation="relu2", gated=False, bias=bias)
    norm = config.layer_norm("norm_eps", offset=1.0)
    return config.decoder(norm, plain, rope=config.rope(partial=0.5), bias=config.bias())


FRAME = outer("model.final_layernorm=model.norm") + names(
    "self_attn.dense=self_attn.o_proj self_attn.q_layernorm=self_attn.q_norm"
    " self_attn.k_layernorm=self_attn.k_norm"
)
PHI = FRAME + names("mlp.fc1=mlp.up_proj mlp.fc2=mlp.down_proj")


def persimmon_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (
        *FRAME,
        qkv(f"{LAYER}.self_attn.query_key_value", decoder, grouped=True),
        *names("mlp.dense_h_to_4h=mlp.up_proj mlp.dense_4h_to_h=mlp.down_proj"),
    )


STABLELM = tuple(
    Rule(
        (f"{LAYER}.self_attn.{part}_layernorm.norms.{{e}}",),
        (f"{LAYER}.self_attn.{part}_norm",),
        Stacked(),
    )
    for part in "qk"
)

FAMILIES = (
    Family("olmo", olmo),
    Family("phi", phi, PHI),
    Family("cohere", cohere),
    Family("cohere2", cohere2),
    Family("stablelm", stablelm, STABLELM),
    Family("starcoder2", starcoder2, names("mlp.c_fc=mlp.up_proj mlp.c_proj=mlp.down_proj")),
    Family("persimmon", persimmon, persimmon_rules),
    Family("nemotron", nemotron),
)
