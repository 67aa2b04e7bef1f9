"""Llama and the families that differ from it by biases, windows, norms or rotary layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtx.decoder.config import DecoderConfig, FeedForwardConfig, RopeConfig, TemperatureConfig
from mlxtx.families.common import FULL, SLIDING, HubConfig, behind, first, head_norm
from mlxtx.families.family import Family
from mlxtx.families.rope import make_rope, rope_parameters
from mlxtx.naming.map import Rule
from mlxtx.naming.rules import LAYER, OUTPUT_NORMS, gate_up, mlx_only, names, qkv, tensor
from mlxtx.naming.transforms import Reshaped

INTERLEAVED = {"interleaved": True}


def llama(
    config: HubConfig,
    eps: float = 1e-6,
    head_dim: int | None = None,
    *,
    rope: dict[str, Any] | RopeConfig | list | None = None,
    mlp_bias: bool | None = None,
    feed_forward: Any = None,
    **fields: Any,
) -> DecoderConfig:
    """Pre-norm blocks of attention and SwiGLU, or another ``feed_forward``. ``rope`` may hold
    defaults of ``HubConfig.rope``; ``fields`` are those of ``HubConfig.decoder``, attention's
    among them."""
    config.expect(activation="swiglu")  # some say so beside hidden_act
    size = config.head_dim(head_dim)
    if rope is None or isinstance(rope, dict):
        rope = config.rope(size, **(rope or {}))
    if mlp_bias is None:
        mlp_bias = config.get("mlp_bias", default=False)
    attention = {"head_dim": size, "rope": rope, "bias": config.bias()}
    body = feed_forward or config.feed_forward(bias=mlp_bias)
    return config.decoder(config.rms_norm(eps), body, **{**attention, **fields})


def ministral(config: HubConfig) -> DecoderConfig:
    """A window in every layer, or where ``layer_types`` has it; no bias, whatever the config says."""
    windows = config.windows(config.layer_types([SLIDING] * config.layers), 4096)
    return llama(config, bias=False, mlp_bias=False, window=windows)


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
    defaults: dict[str, Any] = {"theta": 1e6, "otherwise": MINISTRAL3_ROPE}
    parameters = rope_parameters(config, **defaults)
    beta = parameters.get("llama_4_scaling_beta")
    floor = parameters.get("original_max_position_embeddings") or config.context
    grown = TemperatureConfig(beta=beta, floor=floor) if beta else None
    window = config.nullable("sliding_window", None)
    return llama(config, 1e-5, 128, rope=defaults, window=window, temperature=grown)


def qwen_windows(config: HubConfig, early: bool = False) -> list[int | None]:
    """A window counts only where it is switched on, from a given layer on or, ``early``, in every
    other layer before it."""
    on = config.get("use_sliding_window", default=False)
    first = config.get("max_window_layers", default=28)
    slide = [(i < first and i % 2 == 0) if early else i >= first for i in range(config.layers)]
    types = [SLIDING if slides else FULL for slides in slide]
    windows = config.windows(config.layer_types(types), 4096)
    return windows if on else [None] * config.layers


def qwen2(config: HubConfig) -> DecoderConfig:
    return llama(config, window=qwen_windows(config), qkv_bias=True, output_bias=False)


def qwen3(config: HubConfig) -> DecoderConfig:
    return llama(config, 1e-6, 128, window=qwen_windows(config), **head_norm(config.rms_norm()))


def smollm3(config: HubConfig) -> DecoderConfig:
    """Every fourth layer goes without positions."""
    config.ignore("max_window_layers")
    interval = config.get("no_rope_layer_interval", default=4)
    fourth = [(i + 1) % interval != 0 for i in range(config.layers)]
    turned = config.get("no_rope_layers", default=fourth)
    on = config.get("use_sliding_window", default=False)
    types = config.layer_types([FULL if has or not on else SLIDING for has in turned])
    windows, rope = config.windows(types), config.rope(theta=2e6)
    ropes = [rope if has else None for has in turned]
    return llama(config, tied=True, rope=ropes, window=windows)


def seed_oss(config: HubConfig) -> DecoderConfig:
    config.ignore("residual_dropout")
    bias = config.get("attention_bias", default=True)
    output = config.get("attention_out_bias", default=False)
    return llama(config, 1e-6, 128, qkv_bias=bias, output_bias=output)


def internlm3(config: HubConfig) -> DecoderConfig:
    qkv = config.get("qkv_bias", "attention_bias", default=False)
    rest = config.get("bias", "mlp_bias", default=False)
    return llama(config, 1e-5, 128, mlp_bias=rest, qkv_bias=qkv, output_bias=rest)


def llama3_scaling(factor: float) -> dict[str, Any]:
    """Llama 3.1's RoPE, which two families take for granted."""
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = {"original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **frequencies, **original}


def cwm(config: HubConfig) -> DecoderConfig:
    types = config.layer_types([SLIDING if i % 4 else FULL for i in range(config.layers)])
    rope = {"theta": 1e6, "otherwise": llama3_scaling(16.0)}
    return llama(config, 1e-5, 128, rope=rope, window=config.windows(types, 8192))


def helium(config: HubConfig) -> DecoderConfig:
    rope = {"theta": 1e5, "fields": INTERLEAVED}
    return llama(config, 1e-8, 128, rope=rope, output_bias=False)


def ernie4_5(config: HubConfig) -> DecoderConfig:
    bias = config.get("use_bias", default=False)
    rope = {"theta": 5e5, "fields": INTERLEAVED}
    return llama(config, 1e-5, 128, tied=True, rope=rope, mlp_bias=bias, bias=bias)


def arcee(config: HubConfig) -> DecoderConfig:
    """A feed-forward without gate: squared ReLU."""
    bias = config.get("mlp_bias", default=False)
    plain = config.feed_forward(activation="relu2", gated=False, bias=bias)
    return llama(config, 1e-5, feed_forward=plain)


def apertus(config: HubConfig) -> DecoderConfig:
    """xIELU without gate, norms of queries and keys."""
    config.expect(qk_norm=True, post_norm=False, mlp_bias=False)
    plain = config.feed_forward(activation="xielu", gated=False)
    rope = {"theta": 12e6, "otherwise": llama3_scaling(8.0)}
    own = head_norm(config.rms_norm(1e-5))
    return llama(config, 1e-5, rope=rope, feed_forward=plain, **own)


def _output_norms(config: HubConfig, over: str, **attention: Any) -> DecoderConfig:
    """Norms behind the branches only, and of queries and keys."""
    norm = config.rms_norm(1e-5)
    block = {"attention_norm": None, "feed_forward_norm": None, **behind(norm)}
    return llama(config, 1e-5, block=block, **attention, **head_norm(norm, over))


def exaone4(config: HubConfig) -> DecoderConfig:
    """Where some layers have windows, only those have RoPE."""
    window = config.nullable("sliding_window", 4096)
    pattern = config.get("sliding_window_pattern", default=4 if window else None)
    step = len(pattern) if isinstance(pattern, str) else pattern
    types = config.layer_types(config.every(step) if window and step else None)
    rope = config.rope()
    ropes = [rope if window is None or kind == SLIDING else None for kind in types]
    return _output_norms(config, "head", rope=ropes, window=config.windows(types, 4096))


def olmo2(config: HubConfig) -> DecoderConfig:
    return _output_norms(config, "width")


def olmo3(config: HubConfig) -> DecoderConfig:
    """Three layers with a window, and unscaled RoPE of a fixed base, to one that sees everything."""
    types = config.layer_types(config.every(4))
    ropes = {
        SLIDING: config.rope(None, SLIDING, theta=5e5, theta_names=()),
        FULL: config.rope(None, FULL, theta=5e5),
    }
    windows = config.windows(types, 4096)
    return _output_norms(config, "width", rope=[ropes[kind] for kind in types], window=windows)


def glm(config: HubConfig, **block: Any) -> DecoderConfig:
    """RoPE on half of each head."""
    rope = {"partial": 0.5, "fields": INTERLEAVED}
    bias = config.get("attention_bias", default=True)
    shape: dict[str, Any] = {"rope": rope, "qkv_bias": bias, "output_bias": False}
    return llama(config, 1.5625e-7, 128, block=block, **shape)


def glm4(config: HubConfig) -> DecoderConfig:
    return glm(config, **behind(config.rms_norm(1.5625e-7)))


def gate_up_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (gate_up("mlp.gate_up_proj", first(FeedForwardConfig, decoder).width),)


def glm4_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return gate_up_rules(decoder) + names(
        "post_self_attn_layernorm=attention_output_layernorm"
        " post_mlp_layernorm=feed_forward_output_layernorm"
    )


def phi3(config: HubConfig) -> DecoderConfig:
    """Where LongRoPE's factors switch, transformers computes the whole text anew."""
    config.expect(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    config.expect(full_attn_mod=1, interpolate_factor=1)
    config.ignore("num_experts_per_tok num_local_experts")  # of a sibling that has experts
    parameters = rope_parameters(config, partial=1.0)
    if parameters["rope_type"] == "yarn":  # what the first files called LongRoPE
        parameters["rope_type"] = "longrope"
    rope = make_rope(parameters, config.head_dim(), config.context)
    whole = {"refeed_beyond": rope.scaling.original_context if rope.scaling else None}
    window = config.nullable("sliding_window", None)
    return llama(config, 1e-5, rope=rope, window=window, whole=whole)


def phi3_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (qkv(f"{LAYER}.self_attn.qkv_proj", decoder), *gate_up_rules(decoder))


def hunyuan_attention(config: HubConfig) -> dict[str, Any]:
    """Queries and keys are normalised after RoPE; ``alpha`` stretches RoPE's base once for all."""
    config.expect(use_qk_norm=True, use_rotary_pos_emb=True, use_cla=False, mlp_bias=False)
    config.expect(norm_type="rms")
    config.config.setdefault("head_dim", config.get("attention_head_dim", default=None))
    config.ignore(
        "org_vocab_size cla_share_factor add_classification_head class_num pool_type dense_list"
        " im_start_id im_end_id im_newline_id mask_init_id text_start_id text_end_id"
        " image_token_id video_start_id video_end_id eod_token_id pad_id"
    )
    size, parameters = config.head_dim(), rope_parameters(config)
    alpha = parameters.pop("alpha", None)
    if alpha and parameters["rope_type"] == "dynamic":
        parameters["rope_type"] = "default"
        parameters["rope_theta"] *= alpha ** (size / (size - 2))
    rope = make_rope(parameters, size, config.context)
    return {"rope": rope, "norm_after_rope": True, **head_norm(config.rms_norm(1e-5))}


def hunyuan_v1_dense(config: HubConfig) -> DecoderConfig:
    return llama(config, 1e-5, **hunyuan_attention(config))


def nanochat(config: HubConfig) -> DecoderConfig:
    """No norm has a weight, embeddings are normalised too, and RoPE turns the other way round."""
    norm = config.rms_norm(weight=False)
    cap = config.nullable("final_logit_softcapping", 15.0)
    return config.decoder(
        norm,
        config.feed_forward(activation="relu2", gated=False),
        embedding={"norm": norm},
        head={"softcap": cap},
        rope=config.rope(fields={"backwards": True}),
        norm_after_rope=True,
        bias=config.bias(),
        **head_norm(norm),
    )


def granite(config: HubConfig, feed_forward: Any = None) -> DecoderConfig:
    """Multipliers on embeddings, scores, residuals and logits."""

    def multiplier(name: str) -> float:
        return float(config.get(name, default=1.0))

    return llama(
        config,
        feed_forward=feed_forward,
        block={"residual_multiplier": multiplier("residual_multiplier")},
        embedding={"multiplier": multiplier("embedding_multiplier")},
        head={"multiplier": 1 / multiplier("logits_scaling")},
        scale=multiplier("attention_multiplier"),
    )


APERTUS = names(
    "attention_layernorm=input_layernorm feedforward_layernorm=post_attention_layernorm"
)
# xIELU's strengths as numbers without an axis.
MLX_APERTUS = mlx_only(
    *(
        replace(tensor(name, name, Reshaped((), (1,))), when=lambda shape: shape == ())
        for name in ("mlp.act_fn.alpha_p", "mlp.act_fn.alpha_n")
    )
)
HUNYUAN = names(
    "self_attn.query_layernorm=self_attn.q_norm self_attn.key_layernorm=self_attn.k_norm"
)

# What transformers takes for granted where a config doesn't say.
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
PHI3 = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}

FAMILIES = (
    Family("llama", llama, defaults={"max_position_embeddings": 2048}),
    Family("mistral", ministral, defaults=MISTRAL),
    Family("ministral", ministral, defaults=MISTRAL),
    Family("ministral3", ministral3),
    Family("qwen2", qwen2, defaults=QWEN),
    Family("qwen3", qwen3, defaults=QWEN),
    Family("smollm3", smollm3),
    Family("seed_oss", seed_oss),
    Family("internlm3", internlm3),
    Family("cwm", cwm),
    Family("helium", helium),
    Family("ernie4_5", ernie4_5),
    Family("arcee", arcee),
    Family("apertus", apertus, APERTUS, mlx_rules=MLX_APERTUS),
    Family("exaone4", exaone4, OUTPUT_NORMS),
    Family("olmo2", olmo2, OUTPUT_NORMS),
    Family("olmo3", olmo3, OUTPUT_NORMS),
    Family("glm", glm, gate_up_rules),
    Family("glm4", glm4, glm4_rules),
    Family("phi3", phi3, phi3_rules, defaults=PHI3),
    Family("hunyuan_v1_dense", hunyuan_v1_dense, HUNYUAN),
    Family("nanochat", nanochat, names("mlp.fc1=mlp.up_proj mlp.fc2=mlp.down_proj")),
    Family("granite", granite),
)
