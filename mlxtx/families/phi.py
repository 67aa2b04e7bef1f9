"""Phi: parallel blocks, then Llama-like ones with fused projections, then a mixture of experts."""

from __future__ import annotations

from mlxtx.decoder.config import DecoderConfig, ExpertsConfig, RopeConfig, RouterConfig
from mlxtx.errors import MlxtxError
from mlxtx.families.common import (
    attention_layers,
    blocks,
    context,
    decoder,
    feed_forward,
    head_norm,
    layer_norm,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import biases, head_dim, llama_like
from mlxtx.families.names import Rule, rename
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import make_rope, read_rope, rope_parameters
from mlxtx.families.rules import (
    LAYER,
    W123,
    attention_of,
    expert_rules,
    feed_forward_of,
    gate_up_rule,
    layer_rules,
    qkv_rule,
)


def phi(reader: ConfigReader) -> DecoderConfig:
    """One norm before attention and feed-forward, which run side by side."""
    norm = layer_norm(reader, "layer_norm_eps")
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader), partial=0.5),
        qkv_bias=True,
        output_bias=True,
        **(head_norm(norm) if reader.get("qk_layernorm", default=False) else {}),
    )
    plain = feed_forward(reader, default="gelu_new", gated=False, bias=True)
    body = blocks(attention, plain, norm, form="parallel", feed_forward_norm=None)
    return decoder(reader, body, norm, head={"bias": True})


def phi3(reader: ConfigReader) -> DecoderConfig:
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        reader.expect(name, False)
    reader.expect("full_attn_mod", 1)
    reader.expect("interpolate_factor", 1)
    reader.ignore("num_experts_per_tok", "num_local_experts")  # of a sibling that has experts
    parameters = rope_parameters(reader)
    if parameters["rope_type"] == "yarn":  # what the first files called LongRoPE
        parameters["rope_type"] = "longrope"
    rope = make_rope(parameters, head_dim(reader), context=context(reader))
    return llama_like(
        reader,
        eps=1e-5,
        rope=rope,
        window=reader.nullable("sliding_window", None),
        refeed_beyond=_switch(rope),
    )


def _switch(rope: RopeConfig) -> int | None:
    """Where LongRoPE's factors switch, transformers computes the whole text anew for Phi."""
    scaling = rope.scaling
    return scaling.original_context if scaling and scaling.kind == "longrope" else None


def _phi3_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (
        qkv_rule(f"{LAYER}.self_attn.qkv_proj", attention_of(decoder)),
        gate_up_rule(f"{LAYER}.mlp.gate_up_proj", feed_forward_of(decoder).width),
    )


def phimoe(reader: ConfigReader) -> DecoderConfig:
    reader.ignore(
        "input_jitter_noise", "router_aux_loss_coef", "output_router_logits", "hidden_dropout"
    )
    norm = layer_norm(reader, "rms_norm_eps")
    parameters = rope_parameters(reader, theta=1e6)
    short, long = parameters.pop("short_mscale", None), parameters.pop("long_mscale", None)
    if short is not None:
        parameters["attention_factor"] = short
    if short != long:
        raise MlxtxError(f"config.json: short_mscale {short} and long_mscale {long} must be equal")
    rope = make_rope(parameters, head_dim(reader), context=context(reader))
    attention = attention_layers(
        reader,
        rope=rope,
        window=reader.nullable("sliding_window", None),
        **biases(reader),
    )
    experts = ExpertsConfig(
        count=reader.get("num_local_experts"),
        per_token=reader.get("num_experts_per_tok", default=2),
        expert=feed_forward(reader),
        router=RouterConfig(
            scores="sparsemixer", jitter=reader.get("router_jitter_noise", default=0.01)
        ),
    )
    head = {"bias": reader.get("lm_head_bias", default=False)}
    body = blocks(attention, experts, norm)
    return decoder(reader, body, norm, head=head, refeed_beyond=_switch(rope))


FAMILIES = (
    Family(
        "phi",
        phi,
        (
            rename("model.final_layernorm", "model.norm"),
            *layer_rules(
                LAYER,
                {
                    "self_attn.dense": "self_attn.o_proj",
                    "self_attn.q_layernorm": "self_attn.q_norm",
                    "self_attn.k_layernorm": "self_attn.k_norm",
                    "mlp.fc1": "mlp.up_proj",
                    "mlp.fc2": "mlp.down_proj",
                },
            ),
        ),
    ),
    Family("phi3", phi3, _phi3_rules),
    Family(
        "phimoe",
        phimoe,
        (
            rename(f"{LAYER}.block_sparse_moe.gate", f"{LAYER}.mlp.gate"),
            *expert_rules("block_sparse_moe.experts", W123),
        ),
    ),
)
