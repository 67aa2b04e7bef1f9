"""Llama and the families that differ from it by biases, windows, norms or rotary layout."""

from __future__ import annotations

from typing import Any

from mlxtx.decoder.config import DecoderConfig, NormConfig, TemperatureConfig
from mlxtx.errors import MlxtxError
from mlxtx.families.common import FULL, SLIDING, HubConfig, behind, head_norm
from mlxtx.families.family import Family
from mlxtx.families.names import Rule
from mlxtx.families.rope import make_rope, rope_parameters
from mlxtx.families.rules import (
    LAYER,
    OUTPUT_NORMS,
    attention_of,
    feed_forward_of,
    gate_up,
    names,
    outer,
    qkv,
)
from mlxtx.families.transforms import Stacked

INTERLEAVED = {"interleaved": True}


def llama3_scaling(factor: float) -> dict[str, Any]:
    """Llama 3.1's RoPE, which two families take for granted."""
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = {"original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **frequencies, **original}


def llama(config: HubConfig) -> DecoderConfig:
    gated = config.feed_forward(bias=config.get("mlp_bias", default=False))
    return config.decoder(config.rms_norm(), gated, rope=config.rope(), **config.biases())


def mistral(config: HubConfig) -> DecoderConfig:
    """A window in every layer, or in none."""
    if len(set(config.layer_types())) > 1:
        raise MlxtxError(
            "config.json: layer_types differ between layers, which model_type 'ministral' has and"
            " 'mistral' has not"
        )
    window = config.nullable("sliding_window", 4096)
    return config.decoder(
        config.rms_norm(), config.feed_forward(), rope=config.rope(), window=window
    )


def ministral(config: HubConfig) -> DecoderConfig:
    everywhere = [SLIDING] * config.layers
    window = config.windows(config.layer_types(everywhere), 4096)
    return config.decoder(
        config.rms_norm(), config.feed_forward(), rope=config.rope(), window=window
    )


MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def ministral3(config: HubConfig) -> DecoderConfig:
    """Queries grow with their position, as YaRN's settings say."""
    parameters = rope_parameters(config, theta=1e6, otherwise=MINISTRAL3_ROPE)
    beta = parameters.get("llama_4_scaling_beta")
    floor = parameters.get("original_max_position_embeddings") or config.context
    size = config.head_dim(128)
    return config.decoder(
        config.rms_norm(1e-5),
        config.feed_forward(),
        head_dim=size,
        rope=make_rope(parameters, size, config.context),
        window=config.nullable("sliding_window", None),
        temperature=TemperatureConfig(beta=beta, floor=floor) if beta else None,
    )


def qwen_windows(config: HubConfig) -> list[int | None]:
    """A window counts only where it is switched on, and from a given layer on."""
    on = config.get("use_sliding_window", default=False)
    first = config.get("max_window_layers", default=28)
    types = [SLIDING if i >= first else FULL for i in range(config.layers)]
    windows = config.windows(config.layer_types(types), 4096)
    return windows if on else [None] * config.layers


def qwen2(config: HubConfig) -> DecoderConfig:
    return config.decoder(
        config.rms_norm(),
        config.feed_forward(),
        rope=config.rope(),
        window=qwen_windows(config),
        qkv_bias=True,
    )


def qwen3(config: HubConfig) -> DecoderConfig:
    norm, size = config.rms_norm(), config.head_dim(128)
    return config.decoder(
        norm,
        config.feed_forward(),
        head_dim=size,
        rope=config.rope(size),
        window=qwen_windows(config),
        **config.biases(),
        **head_norm(norm),
    )


def smollm3(config: HubConfig) -> DecoderConfig:
    """Every fourth layer goes without positions."""
    interval = config.get("no_rope_layer_interval", default=4)
    fourth = [(i + 1) % interval != 0 for i in range(config.layers)]
    turned = config.get("no_rope_layers", default=fourth)
    on = config.get("use_sliding_window", default=False)
    types = config.layer_types([FULL if has or not on else SLIDING for has in turned])
    windows, rope = config.windows(types), config.rope(theta=2e6)
    return config.decoder(
        config.rms_norm(),
        config.feed_forward(bias=config.get("mlp_bias", default=False)),
        tied=True,
        rope=[rope if has else None for has in turned],
        window=windows if on else None,
        **config.biases(),
    )


def seed_oss(config: HubConfig) -> DecoderConfig:
    config.ignore("residual_dropout")
    size = config.head_dim(128)
    return config.decoder(
        config.rms_norm(),
        config.feed_forward(bias=config.get("mlp_bias", default=False)),
        head_dim=size,
        rope=config.rope(size),
        qkv_bias=config.get("attention_bias", default=True),
        output_bias=config.get("attention_out_bias", default=False),
    )


def internlm3(config: HubConfig) -> DecoderConfig:
    size, rest = config.head_dim(128), config.get("bias", "mlp_bias", default=False)
    return config.decoder(
        config.rms_norm(1e-5),
        config.feed_forward(bias=rest),
        head_dim=size,
        rope=config.rope(size),
        qkv_bias=config.get("qkv_bias", "attention_bias", default=False),
        output_bias=rest,
    )


def cwm(config: HubConfig) -> DecoderConfig:
    types = config.layer_types([SLIDING if i % 4 else FULL for i in range(config.layers)])
    size = config.head_dim(128)
    return config.decoder(
        config.rms_norm(1e-5),
        config.feed_forward(bias=config.get("mlp_bias", default=False)),
        head_dim=size,
        rope=config.rope(size, theta=1e6, otherwise=llama3_scaling(16.0)),
        window=config.windows(types, 8192),
    )


def helium(config: HubConfig) -> DecoderConfig:
    size = config.head_dim(128)
    return config.decoder(
        config.rms_norm(1e-8),
        config.feed_forward(bias=config.get("mlp_bias", default=False)),
        head_dim=size,
        rope=config.rope(size, theta=1e5, fields=INTERLEAVED),
        qkv_bias=config.get("attention_bias", default=False),
    )


def ernie4_5(config: HubConfig) -> DecoderConfig:
    bias, size = config.get("use_bias", default=False), config.head_dim(128)
    return config.decoder(
        config.rms_norm(1e-5),
        config.feed_forward(bias=bias),
        tied=True,
        head_dim=size,
        rope=config.rope(size, theta=5e5, fields=INTERLEAVED),
        qkv_bias=bias,
        output_bias=bias,
    )


def arcee(config: HubConfig) -> DecoderConfig:
    """A feed-forward without gate: squared ReLU."""
    bias = config.get("mlp_bias", default=False)
    plain = config.feed_forward(activation="relu2", gated=False, bias=bias)
    return config.decoder(config.rms_norm(1e-5), plain, rope=config.rope(), **config.biases())


def apertus(config: HubConfig) -> DecoderConfig:
    """xIELU without gate, norms of queries and keys."""
    config.expect(qk_norm=True, post_norm=False, mlp_bias=False)
    norm = config.rms_norm(1e-5)
    plain = config.feed_forward(activation="xielu", gated=False)
    rope = config.rope(theta=12e6, otherwise=llama3_scaling(8.0))
    return config.decoder(norm, plain, rope=rope, **config.biases(), **head_norm(norm))


def exaone4(config: HubConfig) -> DecoderConfig:
    """Norms behind the branches only; where some layers have windows, only those have RoPE."""
    norm, window = config.rms_norm(1e-5), config.nullable("sliding_window", 4096)
    pattern = config.get("sliding_window_pattern", default=4 if window else None)
    step = len(pattern) if isinstance(pattern, str) else pattern
    types = config.layer_types(config.every(step) if window and step else None)
    rope = config.rope()
    return config.decoder(
        norm,
        config.feed_forward(),
        block={"attention_norm": None, "feed_forward_norm": None, **behind(norm)},
        rope=[rope if window is None or kind == SLIDING else None for kind in types],
        window=config.windows(types, 4096),
        **head_norm(norm),
    )


def olmo(config: HubConfig) -> DecoderConfig:
    """LayerNorm without weights."""
    norm = NormConfig(kind="layer", eps=1e-5, weight=False)
    clip = config.get("clip_qkv", default=None)
    rope = config.rope()
    return config.decoder(norm, config.feed_forward(), rope=rope, clip_qkv=clip, **config.biases())


def _olmo_behind(config: HubConfig, **attention: Any) -> DecoderConfig:
    """Norms behind the branches, and over all queries and keys of a token together."""
    norm = config.rms_norm(1e-5)
    return config.decoder(
        norm,
        config.feed_forward(),
        block={"attention_norm": None, "feed_forward_norm": None, **behind(norm)},
        **attention,
        **config.biases(),
        **head_norm(norm, "width"),
    )


def olmo2(config: HubConfig) -> DecoderConfig:
    return _olmo_behind(config, rope=config.rope())


def olmo3(config: HubConfig) -> DecoderConfig:
    """Three layers with a window, and unscaled RoPE, to one that sees everything."""
    types = config.layer_types(config.every(4))
    ropes = {kind: config.rope(None, kind, theta=5e5) for kind in (SLIDING, FULL)}
    windows = config.windows(types, 4096)
    return _olmo_behind(config, rope=[ropes[kind] for kind in types], window=windows)


def _glm(config: HubConfig, **block: Any) -> DecoderConfig:
    """RoPE on half of each head."""
    size = config.head_dim(128)
    return config.decoder(
        config.rms_norm(1.5625e-7),
        config.feed_forward(),
        block=block,
        head_dim=size,
        rope=config.rope(size, partial=0.5, fields=INTERLEAVED),
        qkv_bias=config.get("attention_bias", default=True),
    )


def glm4(config: HubConfig) -> DecoderConfig:
    return _glm(config, **behind(config.rms_norm(1.5625e-7)))


def gate_up_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (gate_up("mlp.gate_up_proj", feed_forward_of(decoder).width),)


def glm4_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return gate_up_rules(decoder) + names(
        "post_self_attn_layernorm=attention_output_layernorm"
        " post_mlp_layernorm=feed_forward_output_layernorm"
    )


def phi(config: HubConfig) -> DecoderConfig:
    """One LayerNorm before attention and feed-forward, which run side by side."""
    norm = config.layer_norm("layer_norm_eps")
    plain = config.feed_forward(activation="gelu_new", gated=False, bias=True)
    own = head_norm(norm) if config.get("qk_layernorm", default=False) else {}
    return config.decoder(
        norm,
        plain,
        block={"form": "parallel", "feed_forward_norm": None},
        head={"bias": True},
        rope=config.rope(partial=0.5),
        qkv_bias=True,
        output_bias=True,
        **own,
    )


def phi3(config: HubConfig) -> DecoderConfig:
    """Where LongRoPE's factors switch, transformers computes the whole text anew."""
    config.expect(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    config.expect(full_attn_mod=1, interpolate_factor=1)
    config.ignore("num_experts_per_tok num_local_experts")  # of a sibling that has experts
    parameters = rope_parameters(config)
    if parameters["rope_type"] == "yarn":  # what the first files called LongRoPE
        parameters["rope_type"] = "longrope"
    rope = make_rope(parameters, config.head_dim(), config.context)
    return config.decoder(
        config.rms_norm(1e-5),
        config.feed_forward(),
        whole={"refeed_beyond": rope.scaling.original_context if rope.scaling else None},
        rope=rope,
        window=config.nullable("sliding_window", None),
    )


def phi3_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (qkv(f"{LAYER}.self_attn.qkv_proj", attention_of(decoder)), *gate_up_rules(decoder))


def cohere(config: HubConfig) -> DecoderConfig:
    """Both branches side by side behind one LayerNorm without bias."""
    norm = config.layer_norm("layer_norm_eps", bias=False)
    own = head_norm(norm, "each_head") if config.get("use_qk_norm", default=False) else {}
    return _cohere(config, norm, rope=config.rope(theta=5e5, fields=INTERLEAVED), **own)


def _cohere(config: HubConfig, norm: NormConfig, **attention: Any) -> DecoderConfig:
    return config.decoder(
        norm,
        config.feed_forward(),
        tied=True,
        block={"form": "parallel", "feed_forward_norm": None},
        head={"multiplier": config.get("logit_scale", default=0.0625)},
        **config.biases(),
        **attention,
    )


def cohere2(config: HubConfig) -> DecoderConfig:
    """Layers with a window have RoPE, layers that see everything have no positions."""
    config.expect(use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True)
    config.expect(use_parallel_embedding=False, use_qk_norm=False, rotary_pct=1.0)
    config.expect(position_embedding_type="rope_gptj")
    config.expect(order_of_interleaved_layers="local_attn_first")
    step = ("sliding_window_pattern", "_sliding_window_pattern", "layer_switch")
    types = config.layer_types(config.every(config.get(*step, default=4)))
    rope = config.rope(fields=INTERLEAVED)
    return _cohere(
        config,
        config.layer_norm("layer_norm_eps", bias=False),
        rope=[rope if kind == SLIDING else None for kind in types],
        window=config.windows(types, 4096),
    )


def stablelm(config: HubConfig) -> DecoderConfig:
    """RoPE on a quarter of each head; with or without a second norm."""
    config.expect(rotary_scaling_factor=1.0)
    norm = config.layer_norm("layer_norm_eps")
    own = config.layer_norm("layer_norm_eps", bias=False)
    parallel = config.get("use_parallel_residual", default=False)
    return config.decoder(
        norm,
        config.feed_forward(),
        block={"form": "parallel", "feed_forward_norm": None} if parallel else {},
        rope=config.rope(partial=0.25),
        qkv_bias=config.get("use_qkv_bias", default=False),
        **(head_norm(own, "each_head") if config.get("qk_layernorm", default=False) else {}),
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
        qkv_bias=bias,
        output_bias=bias,
    )


def persimmon(config: HubConfig) -> DecoderConfig:
    norm = config.layer_norm("layer_norm_eps")
    return config.decoder(
        norm,
        config.feed_forward(activation="relu2", gated=False, bias=True),
        rope=config.rope(partial=0.5),
        qkv_bias=True,
        output_bias=True,
        **(head_norm(norm) if config.get("qk_layernorm", default=True) else {}),
    )


def persimmon_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (
        *outer("model.final_layernorm=model.norm"),
        qkv(f"{LAYER}.self_attn.query_key_value", attention_of(decoder), grouped=True),
        *names(
            "self_attn.dense=self_attn.o_proj mlp.dense_h_to_4h=mlp.up_proj"
            " mlp.dense_4h_to_h=mlp.down_proj self_attn.q_layernorm=self_attn.q_norm"
            " self_attn.k_layernorm=self_attn.k_norm"
        ),
    )


def nemotron(config: HubConfig) -> DecoderConfig:
    """LayerNorm stored around zero, squared ReLU."""
    bias = config.get("mlp_bias", default=False)
    plain = config.feed_forward(activation="relu2", gated=False, bias=bias)
    norm = config.layer_norm("norm_eps", offset=1.0)
    return config.decoder(norm, plain, rope=config.rope(partial=0.5), **config.biases())


def hunyuan_attention(config: HubConfig) -> dict[str, Any]:
    """Queries and keys are normalised after RoPE; ``alpha`` stretches RoPE's base once for all."""
    config.expect(use_qk_norm=True, use_rotary_pos_emb=True, use_cla=False, mlp_bias=False)
    config.expect(norm_type="rms")
    config.ignore(
        "org_vocab_size cla_share_factor add_classification_head class_num pool_type dense_list"
        " im_start_id im_end_id im_newline_id mask_init_id text_start_id text_end_id"
        " image_token_id video_start_id video_end_id eod_token_id"
    )
    size = config.get("head_dim", "attention_head_dim", default=None) or config.head_dim()
    parameters = rope_parameters(config)
    alpha = parameters.pop("alpha", None)
    if alpha and parameters["rope_type"] == "dynamic":
        parameters["rope_type"] = "default"
        parameters["rope_theta"] *= alpha ** (size / (size - 2))
    return {
        "head_dim": size,
        "rope": make_rope(parameters, size, config.context),
        "norm_after_rope": True,
        **config.biases(),
        **head_norm(config.rms_norm(1e-5)),
    }


def hunyuan_v1_dense(config: HubConfig) -> DecoderConfig:
    attention = hunyuan_attention(config)
    return config.decoder(config.rms_norm(1e-5), config.feed_forward(), **attention)


HUNYUAN_NORMS = names(
    "self_attn.query_layernorm=self_attn.q_norm self_attn.key_layernorm=self_attn.k_norm"
)


def nanochat(config: HubConfig) -> DecoderConfig:
    """No norm has a weight, embeddings are normalised too, and RoPE turns the other way round."""
    norm = config.rms_norm(weight=False)
    return config.decoder(
        norm,
        config.feed_forward(activation="relu2", gated=False),
        embedding={"norm": norm},
        head={"softcap": config.nullable("final_logit_softcapping", 15.0)},
        rope=config.rope(fields={"backwards": True}),
        norm_after_rope=True,
        **config.biases(),
        **head_norm(norm),
    )


def granite(config: HubConfig, feed_forward: Any = None) -> DecoderConfig:
    """Multipliers on embeddings, scores, residuals and logits."""
    bias = config.get("mlp_bias", default=False)

    def multiplier(name: str) -> float:
        return float(config.get(name, default=1.0))

    return config.decoder(
        config.rms_norm(),
        feed_forward or config.feed_forward(bias=bias),
        block={"residual_multiplier": multiplier("residual_multiplier")},
        embedding={"multiplier": multiplier("embedding_multiplier")},
        head={"multiplier": 1 / multiplier("logits_scaling")},
        rope=config.rope(),
        scale=multiplier("attention_multiplier"),
        **config.biases(),
    )


PHI = outer("model.final_layernorm=model.norm") + names(
    "self_attn.dense=self_attn.o_proj self_attn.q_layernorm=self_attn.q_norm"
    " self_attn.k_layernorm=self_attn.k_norm mlp.fc1=mlp.up_proj mlp.fc2=mlp.down_proj"
)
APERTUS = names(
    "attention_layernorm=input_layernorm feedforward_layernorm=post_attention_layernorm"
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
    Family("llama", llama),
    Family("mistral", mistral),
    Family("ministral", ministral),
    Family("ministral3", ministral3),
    Family("qwen2", qwen2),
    Family("qwen3", qwen3),
    Family("smollm3", smollm3),
    Family("seed_oss", seed_oss),
    Family("internlm3", internlm3),
    Family("cwm", cwm),
    Family("helium", helium),
    Family("ernie4_5", ernie4_5),
    Family("arcee", arcee),
    Family("apertus", apertus, APERTUS),
    Family("exaone4", exaone4, OUTPUT_NORMS),
    Family("olmo", olmo),
    Family("olmo2", olmo2, OUTPUT_NORMS),
    Family("olmo3", olmo3, OUTPUT_NORMS),
    Family("glm", _glm, gate_up_rules),
    Family("glm4", glm4, glm4_rules),
    Family("phi", phi, PHI),
    Family("phi3", phi3, phi3_rules),
    Family("cohere", cohere),
    Family("cohere2", cohere2),
    Family("stablelm", stablelm, STABLELM),
    Family("starcoder2", starcoder2, names("mlp.c_fc=mlp.up_proj mlp.c_proj=mlp.down_proj")),
    Family("persimmon", persimmon, persimmon_rules),
    Family("nemotron", nemotron),
    Family("hunyuan_v1_dense", hunyuan_v1_dense, HUNYUAN_NORMS),
    Family("nanochat", nanochat, names("mlp.fc1=mlp.up_proj mlp.fc2=mlp.down_proj")),
    Family("granite", granite),
)
