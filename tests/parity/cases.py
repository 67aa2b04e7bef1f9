"""The parity cases: which tiny models are built, in the words of transformers' own configs.

A case is a model type and a function from `Sizes` to config settings, so the same table builds the
fixtures of the suite and models of any other size, seed, window or head count. What a family's
config spells unusually (n_embd, d_model ...) is spelled here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]

SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"


@dataclass(frozen=True)
class Sizes:
    """The numbers a case may use. Everything is small: a case runs in a blink."""

    vocab: int = 96
    hidden: int = 64
    intermediate: int = 80
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    window: int = 12
    context: int = 128
    original_context: int = 16  # where longrope and dynamic scaling switch
    experts: int = 8
    chosen: int = 2
    expert_width: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One tiny model: `settings(sizes)` are the keyword arguments of its transformers config."""

    name: str
    model_type: str
    settings: Callable[[Sizes], Settings]
    hub_renames: tuple[tuple[str, str], ...] = ()  # names of older checkpoints, for the legacy side
    packed_experts: bool = False  # experts in mxfp4 blocks and scales, as published
    ahead: bool = False  # with an extra prediction head, behind the last layer
    steps: bool = False  # rotary frequencies depend on the length: record step by step too


CASES: dict[str, Case] = {}


def case(name: str, model_type: str, settings: Callable[[Sizes], Settings], **extra: Any) -> None:
    CASES[name] = Case(name, model_type, settings, **extra)


# --------------------------------------------------------------------- building blocks of settings


def base(s: Sizes, **more: Any) -> Settings:
    """Settings nearly every config takes; a value of None in `more` drops the key."""
    common: Settings = {
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "max_position_embeddings": s.context,
        "tie_word_embeddings": False,
        **tokens(),
    }
    merged = {**common, **more}
    return {key: value for key, value in merged.items() if value is not DROP}


DROP: Any = object()


def tokens() -> Settings:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def rope(theta: float = 10000.0, **more: Any) -> Settings:
    return {"rope_type": "default", "rope_theta": theta, **more}


def linear(factor: float = 4.0, theta: float = 10000.0) -> Settings:
    return {"rope_type": "linear", "factor": factor, "rope_theta": theta}


def dynamic(factor: float = 4.0) -> Settings:
    return {"rope_type": "dynamic", "factor": factor, "rope_theta": 10000.0}


def llama3(s: Sizes) -> Settings:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": s.original_context,
    }


def yarn(s: Sizes, theta: float = 10000.0, **more: Any) -> Settings:
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": 4.0,
        "original_max_position_embeddings": s.original_context,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        **more,
    }


def longrope(s: Sizes, rotary_dim: int, **more: Any) -> Settings:
    half = rotary_dim // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": s.original_context,
        "short_factor": [1.0 + 0.07 * i for i in range(half)],
        "long_factor": [1.5 + 0.8 * i for i in range(half)],
        **more,
    }


def pattern(s: Sizes, *kinds: str) -> list[str]:
    """`kinds` repeated over the layers."""
    return [kinds[i % len(kinds)] for i in range(s.layers)]


def dense_first(s: Sizes, dense: int = 1) -> list[str]:
    return ["dense" if i < dense else "sparse" for i in range(s.layers)]


def latent(s: Sizes, q_rank: int | None = 24) -> Settings:
    """Multi-head latent attention: rotary, plain and value parts of a head all differ in width."""
    return {
        "q_lora_rank": q_rank,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "num_key_value_heads": s.heads,
    }


def routed(s: Sizes, **more: Any) -> Settings:
    """Experts in the words of the DeepSeek line."""
    return {
        "n_routed_experts": s.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": s.chosen,
        "moe_intermediate_size": s.expert_width,
        **more,
    }


# --------------------------------------------------------------------- Llama and its likes

case("llama", "llama", lambda s: base(s, rope_parameters=rope(), rms_norm_eps=1e-5))
case(
    "llama_tied_llama3",
    "llama",
    lambda s: base(s, rope_parameters=llama3(s), tie_word_embeddings=True),
)
case("llama_linear", "llama", lambda s: base(s, rope_parameters=linear()))
case(
    "llama_dynamic",
    "llama",
    lambda s: base(s, rope_parameters=dynamic(), max_position_embeddings=s.original_context),
    steps=True,
)
case("llama_yarn", "llama", lambda s: base(s, rope_parameters=yarn(s)))
case(
    "llama_yarn_scaled",
    "llama",
    lambda s: base(s, rope_parameters=yarn(s, attention_factor=0.8, truncate=False)),
)
case(
    "llama_longrope",
    "llama",
    lambda s: base(s, rope_parameters=longrope(s, s.hidden // s.heads, factor=4.0)),
    steps=True,
)
case(
    "llama_bias_headdim",
    "llama",
    lambda s: base(
        s, attention_bias=True, mlp_bias=True, head_dim=s.head_dim + 8, rope_parameters=rope(5e4)
    ),
)
case(
    "mistral",
    "mistral",
    lambda s: base(s, sliding_window=None, head_dim=s.head_dim + 4, rope_parameters=rope(1e6)),
)
case(
    "mistral_window",
    "mistral",
    lambda s: base(s, sliding_window=s.window, rope_parameters=rope(1e6)),
)
case(
    "ministral",
    "ministral",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        sliding_window=s.window,
        layer_types=pattern(s, SLIDING, FULL),
        rope_parameters=rope(1e6),
    ),
)
case(
    "ministral3",
    "ministral3",
    lambda s: base(
        s,
        sliding_window=None,
        head_dim=s.head_dim,
        rope_parameters=yarn(s, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1),
    ),
)
case("qwen2", "qwen2", lambda s: base(s, rope_parameters=rope(1e6)))
case(
    "qwen2_window",
    "qwen2",
    lambda s: base(
        s,
        rope_parameters=rope(1e6),
        use_sliding_window=True,
        sliding_window=s.window,
        max_window_layers=s.layers // 2,
    ),
)
case(
    "qwen2_yarn",
    "qwen2",
    lambda s: base(s, rope_parameters=yarn(s), tie_word_embeddings=True),
)
case(
    "qwen3",
    "qwen3",
    lambda s: base(s, head_dim=s.head_dim, rope_parameters=rope(1e6), tie_word_embeddings=True),
)
case(
    "qwen3_headdim",
    "qwen3",
    lambda s: base(s, head_dim=s.head_dim + 8, attention_bias=True, rope_parameters=rope(1e6)),
)
case("phi", "phi", lambda s: base(s, rope_parameters=rope(partial_rotary_factor=0.5)))
case(
    "phi_qk_layernorm",
    "phi",
    lambda s: base(
        s,
        num_key_value_heads=s.heads,
        qk_layernorm=True,
        rope_parameters=rope(partial_rotary_factor=0.5),
    ),
)
case(
    "phi3",
    "phi3",
    lambda s: base(s, rope_parameters=rope(), original_max_position_embeddings=s.context),
)
case(
    "phi3_window",
    "phi3",
    lambda s: base(
        s,
        rope_parameters=rope(),
        original_max_position_embeddings=s.context,
        sliding_window=s.window,
    ),
)
case(
    "phi3_longrope",
    "phi3",
    lambda s: base(
        s,
        rope_parameters=longrope(s, s.hidden // s.heads),
        original_max_position_embeddings=s.original_context,
    ),
    steps=True,
)
case(
    "phi3_longrope_partial",
    "phi3",
    lambda s: base(
        s,
        rope_parameters=longrope(s, s.hidden // s.heads * 3 // 4, partial_rotary_factor=0.75),
        original_max_position_embeddings=s.original_context,
        tie_word_embeddings=True,
    ),
    steps=True,
)
case(
    "smollm3",
    "smollm3",
    lambda s: base(
        s,
        no_rope_layers=[int((i + 1) % 4 != 0) for i in range(s.layers)],
        rope_parameters=rope(2e6),
    ),
)
case(
    "smollm3_window",
    "smollm3",
    lambda s: base(
        s,
        use_sliding_window=True,
        sliding_window=s.window,
        layer_types=pattern(s, SLIDING, SLIDING, FULL),
        no_rope_layer_interval=2,
        rope_parameters=rope(2e6),
    ),
)
case(
    "seed_oss",
    "seed_oss",
    lambda s: base(s, head_dim=s.head_dim, attention_bias=True, attention_out_bias=False),
)
case("ernie4_5", "ernie4_5", lambda s: base(s, head_dim=s.head_dim, use_bias=False))
case("ernie4_5_bias", "ernie4_5", lambda s: base(s, head_dim=s.head_dim, use_bias=True))
case("helium", "helium", lambda s: base(s, head_dim=s.head_dim, rope_parameters=rope(1e5)))
case("hunyuan_v1_dense", "hunyuan_v1_dense", lambda s: base(s, head_dim=s.head_dim))
case(
    "hunyuan_v1_dense_dynamic",
    "hunyuan_v1_dense",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        rope_parameters={
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "alpha": 1000.0,
            "factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
        },
    ),
)
case("arcee", "arcee", lambda s: base(s, rope_parameters=yarn(s)))
case("apertus", "apertus", lambda s: base(s, rope_parameters=llama3(s)))
case(
    "nemotron",
    "nemotron",
    lambda s: base(s, head_dim=s.head_dim, rope_parameters=rope(partial_rotary_factor=0.5)),
)
case(
    "cwm",
    "cwm",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        sliding_window=s.window,
        layer_types=pattern(s, FULL, SLIDING, SLIDING),
        rope_parameters=llama3(s),
    ),
)
case(
    "internlm3",
    "internlm3",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        rope_parameters=dynamic(),
        max_position_embeddings=s.original_context,
    ),
    steps=True,
)
case(
    "internlm3_bias",
    "internlm3",
    lambda s: base(s, head_dim=s.head_dim, qkv_bias=True, bias=True, rope_parameters=rope(5e4)),
)
case(
    "nanochat",
    "nanochat",
    lambda s: base(s, num_key_value_heads=s.kv_heads, final_logit_softcapping=15.0),
)
case(
    "exaone4",
    "exaone4",
    lambda s: base(
        s,
        sliding_window=s.window,
        sliding_window_pattern=4,
        layer_types=pattern(s, SLIDING, SLIDING, SLIDING, FULL),
        rope_parameters=llama3(s),
    ),
)
case(
    "exaone4_full",
    "exaone4",
    lambda s: base(
        s,
        sliding_window=None,
        sliding_window_pattern=None,
        layer_types=pattern(s, FULL),
        tie_word_embeddings=True,
    ),
)
case(
    "glm",
    "glm",
    lambda s: base(
        s, head_dim=s.head_dim, rope_parameters=rope(partial_rotary_factor=0.5), attention_bias=True
    ),
)
case(
    "glm4",
    "glm4",
    lambda s: base(
        s, head_dim=s.head_dim, rope_parameters=rope(partial_rotary_factor=0.5), attention_bias=True
    ),
)

# --------------------------------------------------------------------- Gemma

case(
    "gemma",
    "gemma",
    lambda s: base(s, head_dim=s.head_dim, num_key_value_heads=1, tie_word_embeddings=True),
)
case(
    "gemma2",
    "gemma2",
    lambda s: base(
        s,
        head_dim=s.head_dim + 8,
        query_pre_attn_scalar=20,
        sliding_window=s.window,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
        layer_types=pattern(s, SLIDING, FULL),
        tie_word_embeddings=True,
    ),
)
case(
    "gemma3_text",
    "gemma3_text",
    lambda s: base(
        s,
        head_dim=s.head_dim + 8,
        query_pre_attn_scalar=20,
        sliding_window=s.window,
        layer_types=pattern(s, SLIDING, SLIDING, FULL),
        rope_parameters={SLIDING: rope(10000.0), FULL: rope(1e6)},
        tie_word_embeddings=True,
    ),
)
case(
    "gemma3_text_linear",
    "gemma3_text",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        query_pre_attn_scalar=s.head_dim,
        sliding_window=s.window,
        layer_types=pattern(s, SLIDING, SLIDING, FULL),
        rope_parameters={SLIDING: rope(10000.0), FULL: linear(8.0, 1e6)},
        tie_word_embeddings=True,
    ),
)


def gemma4(s: Sizes, **more: Any) -> Settings:
    return base(
        s,
        head_dim=s.head_dim,
        global_head_dim=2 * s.head_dim,
        sliding_window=s.window,
        layer_types=pattern(s, SLIDING, FULL),
        vocab_size_per_layer_input=s.vocab,
        hidden_size_per_layer_input=8,
        tie_word_embeddings=True,
        **more,
    )


case("gemma4_text", "gemma4_text", gemma4)
case(
    "gemma4_text_plain",
    "gemma4_text",
    lambda s: {
        **gemma4(s, final_logit_softcapping=10.0, attention_k_eq_v=True),
        "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 1,
    },
)
case(
    "gemma4_text_shared_kv",
    "gemma4_text",
    lambda s: gemma4(s, num_kv_shared_layers=2, use_double_wide_mlp=True),
)
case(
    "gemma4_text_experts",
    "gemma4_text",
    lambda s: {
        **gemma4(
            s,
            enable_moe_block=True,
            num_experts=s.experts,
            top_k_experts=s.chosen,
            moe_intermediate_size=s.expert_width,
        ),
        "hidden_size_per_layer_input": 0,
    },
)

# --------------------------------------------------------------------- OLMo, Granite, Cohere ...

case("olmo", "olmo", lambda s: base(s, clip_qkv=2.0))
case("olmo2", "olmo2", lambda s: base(s))
case(
    "olmo3",
    "olmo3",
    lambda s: base(
        s,
        sliding_window=s.window,
        layer_types=pattern(s, SLIDING, SLIDING, SLIDING, FULL),
        rope_parameters={SLIDING: rope(5e5), FULL: rope(5e5)},
    ),
)
case(
    "olmo3_yarn",
    "olmo3",
    lambda s: base(
        s,
        sliding_window=s.window,
        layer_types=pattern(s, SLIDING, SLIDING, SLIDING, FULL),
        rope_parameters={SLIDING: rope(5e5), FULL: yarn(s, theta=5e5)},
    ),
)
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.11,
}
case("granite", "granite", lambda s: base(s, **GRANITE, tie_word_embeddings=True))
case("granite_bias", "granite", lambda s: base(s, **GRANITE, attention_bias=True, mlp_bias=True))
case(
    "granitemoe",
    "granitemoe",
    lambda s: base(s, **GRANITE, num_local_experts=s.experts, num_experts_per_tok=s.chosen),
)
case(
    "granitemoeshared",
    "granitemoeshared",
    lambda s: base(
        s,
        **GRANITE,
        num_local_experts=s.experts,
        num_experts_per_tok=s.chosen,
        shared_intermediate_size=s.expert_width,
    ),
)
case(
    "cohere",
    "cohere",
    lambda s: base(s, logit_scale=0.5, use_qk_norm=False, tie_word_embeddings=True),
)
case(
    "cohere_qk_norm",
    "cohere",
    lambda s: base(
        s, logit_scale=0.5, use_qk_norm=True, attention_bias=True, tie_word_embeddings=True
    ),
)
case(
    "cohere2",
    "cohere2",
    lambda s: base(
        s,
        logit_scale=0.5,
        sliding_window=s.window,
        head_dim=s.head_dim,
        layer_types=pattern(s, SLIDING, SLIDING, SLIDING, FULL),
        tie_word_embeddings=True,
    ),
)
case(
    "starcoder2",
    "starcoder2",
    lambda s: base(s, rope_parameters=rope(1e5), sliding_window=None, use_bias=True),
)
case(
    "starcoder2_window",
    "starcoder2",
    lambda s: base(
        s,
        rope_parameters=rope(1e5),
        sliding_window=s.window,
        use_bias=False,
        tie_word_embeddings=True,
    ),
)
case(
    "stablelm",
    "stablelm",
    lambda s: base(s, rope_parameters=rope(partial_rotary_factor=0.25), use_qkv_bias=True),
)
case(
    "stablelm_parallel",
    "stablelm",
    lambda s: base(
        s,
        rope_parameters=rope(partial_rotary_factor=0.25),
        use_parallel_residual=True,
        qk_layernorm=True,
    ),
)

# --------------------------------------------------------------------- the older ones


def gpt2_sizes(s: Sizes, **more: Any) -> Settings:
    return {
        "vocab_size": s.vocab,
        "n_positions": s.context,
        "n_embd": s.hidden,
        "n_layer": s.layers,
        "n_head": s.heads,
        **tokens(),
        **more,
    }


BARE = ((r"^transformer\.", ""),)  # the first published checkpoints name no outer module

case("gpt2", "gpt2", gpt2_sizes, hub_renames=BARE)
case(
    "gpt2_scaled",
    "gpt2",
    lambda s: gpt2_sizes(
        s, scale_attn_by_inverse_layer_idx=True, n_inner=s.intermediate, activation_function="gelu"
    ),
)
case("gpt_bigcode", "gpt_bigcode", lambda s: gpt2_sizes(s, multi_query=True))
case("gpt_bigcode_multihead", "gpt_bigcode", lambda s: gpt2_sizes(s, multi_query=False))
case(
    "gpt_neo",
    "gpt_neo",
    lambda s: {
        "vocab_size": s.vocab,
        "max_position_embeddings": s.context,
        "hidden_size": s.hidden,
        "num_layers": s.layers,
        "num_heads": s.heads,
        "attention_types": [[["global", "local"], s.layers // 2]],
        "window_size": s.window,
        **tokens(),
    },
)
case(
    "gpt_neox",
    "gpt_neox",
    lambda s: base(
        s,
        num_key_value_heads=DROP,
        rope_parameters=rope(partial_rotary_factor=0.25),
        use_parallel_residual=True,
    ),
)
case(
    "gpt_neox_sequential",
    "gpt_neox",
    lambda s: base(
        s,
        num_key_value_heads=DROP,
        rope_parameters=rope(partial_rotary_factor=1.0),
        use_parallel_residual=False,
        attention_bias=False,
    ),
)
case("gptj", "gptj", lambda s: gpt2_sizes(s, rotary_dim=s.hidden // s.heads // 2))
case(
    "codegen",
    "codegen",
    lambda s: gpt2_sizes(s, n_ctx=s.context, rotary_dim=s.hidden // s.heads // 2),
)


def bloom(s: Sizes, **more: Any) -> Settings:
    return {
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "n_layer": s.layers,
        "n_head": s.heads,
        **tokens(),
        **more,
    }


case("bloom", "bloom", bloom, hub_renames=BARE)
case(
    "bloom_six_heads",
    "bloom",
    lambda s: bloom(
        s, hidden_size=6 * s.head_dim, n_head=6, apply_residual_connection_post_layernorm=True
    ),
)


def mpt(s: Sizes, **more: Any) -> Settings:
    return {
        "vocab_size": s.vocab,
        "d_model": s.hidden,
        "n_heads": s.heads,
        "n_layers": s.layers,
        "max_seq_len": s.context,
        "expansion_ratio": 2,
        **tokens(),
        **more,
    }


case("mpt", "mpt", mpt)
case(
    "mpt_clipped",
    "mpt",
    lambda s: mpt(
        s,
        d_model=6 * s.head_dim,
        n_heads=6,
        attn_config={"clip_qkv": 1.5, "alibi": True, "softmax_scale": 0.3},
    ),
)


def falcon(s: Sizes, **more: Any) -> Settings:
    return {
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "max_position_embeddings": s.context,
        "alibi": False,
        "bias": False,
        **tokens(),
        **more,
    }


case(
    "falcon_7b",
    "falcon",
    lambda s: falcon(s, multi_query=True, parallel_attn=True, new_decoder_architecture=False),
)
case(
    "falcon_40b",
    "falcon",
    lambda s: falcon(s, num_kv_heads=s.kv_heads, new_decoder_architecture=True),
)
case(
    "falcon_rw",
    "falcon",
    lambda s: falcon(
        s,
        multi_query=False,
        parallel_attn=False,
        new_decoder_architecture=False,
        bias=True,
        alibi=True,
    ),
)


def opt(s: Sizes, **more: Any) -> Settings:
    return {
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "ffn_dim": s.intermediate,
        "max_position_embeddings": s.context,
        "word_embed_proj_dim": s.hidden,
        **tokens(),
        **more,
    }


case("opt", "opt", opt, hub_renames=((r"^model\.decoder\.", "decoder."),))
case(
    "opt_post_norm_projected",
    "opt",
    lambda s: opt(s, word_embed_proj_dim=s.hidden // 2, do_layer_norm_before=False),
)
case(
    "persimmon",
    "persimmon",
    lambda s: base(
        s,
        num_key_value_heads=DROP,
        rope_parameters=rope(partial_rotary_factor=0.5),
        qk_layernorm=True,
    ),
)

# --------------------------------------------------------------------- mixtures of experts

case(
    "mixtral",
    "mixtral",
    lambda s: base(s, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope(1e6)),
)
case(
    "mixtral_window",
    "mixtral",
    lambda s: base(
        s,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=s.window,
        head_dim=s.head_dim + 4,
        rope_parameters=rope(1e6),
    ),
)
case(
    "qwen2_moe",
    "qwen2_moe",
    lambda s: base(
        s,
        moe_intermediate_size=s.expert_width,
        shared_expert_intermediate_size=s.expert_width + 8,
        num_experts=s.experts,
        num_experts_per_tok=s.chosen,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
        rope_parameters=rope(1e6),
    ),
)
case(
    "qwen2_moe_window",
    "qwen2_moe",
    lambda s: base(
        s,
        moe_intermediate_size=s.expert_width,
        shared_expert_intermediate_size=s.expert_width,
        num_experts=s.experts,
        num_experts_per_tok=s.chosen,
        norm_topk_prob=True,
        qkv_bias=False,
        use_sliding_window=True,
        sliding_window=s.window,
        max_window_layers=s.layers - 1,
        rope_parameters=rope(1e6),
    ),
)
case(
    "qwen3_moe",
    "qwen3_moe",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        moe_intermediate_size=s.expert_width,
        num_experts=s.experts,
        num_experts_per_tok=s.chosen,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        rope_parameters=rope(1e6),
    ),
)
case(
    "qwen3_moe_window",
    "qwen3_moe",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        moe_intermediate_size=s.expert_width,
        num_experts=s.experts,
        num_experts_per_tok=s.chosen,
        use_sliding_window=True,
        sliding_window=s.window,
        decoder_sparse_step=2,
        rope_parameters=rope(1e6),
    ),
)
case(
    "phimoe",
    "phimoe",
    lambda s: base(
        s,
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
        router_jitter_noise=0.01,
        sliding_window=s.window,
        rope_parameters=rope(),
    ),
)
case(
    "phimoe_longrope",
    "phimoe",
    lambda s: base(
        s,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={
            **longrope(s, s.hidden // s.heads),
            "short_mscale": 1.1,
            "long_mscale": 1.3,
        },
    ),
    steps=True,
)
case(
    "olmoe",
    "olmoe",
    lambda s: base(
        s,
        num_experts=s.experts,
        num_experts_per_tok=s.chosen,
        norm_topk_prob=False,
        intermediate_size=s.expert_width,
        clip_qkv=2.0,
    ),
)
case(
    "gpt_oss",
    "gpt_oss",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=s.window,
        layer_types=pattern(s, SLIDING, FULL),
        rope_parameters=yarn(s, theta=150000.0, truncate=False),
    ),
)
case("gpt_oss_mxfp4", "gpt_oss", CASES["gpt_oss"].settings, packed_experts=True)
case(
    "ernie4_5_moe",
    "ernie4_5_moe",
    lambda s: base(
        s,
        moe_intermediate_size=s.expert_width,
        moe_k=s.chosen,
        moe_num_experts=s.experts,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=s.layers - 1,
        moe_layer_interval=1,
    ),
)
case(
    "llama4_text",
    "llama4_text",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        intermediate_size_mlp=s.intermediate,
        intermediate_size=s.expert_width,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layers=[int((i + 1) % 4 != 0) for i in range(s.layers)],
        attention_chunk_size=s.window,
        floor_scale=16,
        attn_scale=0.3,
        use_qk_norm=True,
        attn_temperature_tuning=True,
        layer_types=pattern(s, CHUNKED, CHUNKED, CHUNKED, FULL),
    ),
)
case(
    "hunyuan_v1_moe",
    "hunyuan_v1_moe",
    lambda s: base(s, head_dim=s.head_dim, num_experts=4, moe_topk=2),
)
case(
    "dbrx",
    "dbrx",
    lambda s: {
        "vocab_size": s.vocab,
        "d_model": s.hidden,
        "n_heads": s.heads,
        "n_layers": s.layers,
        "max_seq_len": s.context,
        "attn_config": {"kv_n_heads": s.kv_heads, "clip_qkv": 1.5, "rope_theta": 500000.0},
        "ffn_config": {
            "hidden_size": s.hidden,
            "ffn_hidden_size": s.expert_width,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
        **tokens(),
    },
)
case(
    "minimax_m2",
    "minimax_m2",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        num_local_experts=s.experts,
        num_experts_per_tok=s.chosen,
        intermediate_size=s.expert_width,
        rope_parameters=rope(partial_rotary_factor=0.5),
    ),
)
case(
    "afmoe",
    "afmoe",
    lambda s: base(
        s,
        head_dim=s.head_dim,
        num_experts=s.experts,
        num_experts_per_tok=s.chosen,
        num_shared_experts=1,
        moe_intermediate_size=s.expert_width,
        num_dense_layers=1,
        sliding_window=s.window,
        route_scale=1.5,
        layer_types=pattern(s, SLIDING, SLIDING, SLIDING, FULL),
    ),
)
case(
    "solar_open",
    "solar_open",
    lambda s: base(s, **routed(s), head_dim=s.head_dim, routed_scaling_factor=1.5),
)
case(
    "dots1",
    "dots1",
    lambda s: base(
        s,
        **routed(s),
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        head_dim=s.head_dim,
        sliding_window=None,
        layer_types=pattern(s, FULL),
    ),
)
case(
    "dots1_window",
    "dots1",
    lambda s: base(
        s,
        **routed(s, n_shared_experts=2),
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        head_dim=s.head_dim,
        attention_bias=True,
        sliding_window=s.window,
        max_window_layers=s.layers // 2,
    ),
)
case(
    "glm4_moe",
    "glm4_moe",
    lambda s: base(
        s,
        **routed(s),
        head_dim=s.head_dim,
        rope_parameters=rope(partial_rotary_factor=0.5),
        attention_bias=True,
        use_qk_norm=True,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
    ),
)

# --------------------------------------------------------------------- latent attention

case(
    "deepseek_v2",
    "deepseek_v2",
    lambda s: base(
        s,
        **latent(s),
        **routed(s, n_shared_experts=2, num_experts_per_tok=3),
        rope_parameters=yarn(s, mscale=0.707, mscale_all_dim=0.707),
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
    ),
)
case(
    "deepseek_v2_lite",
    "deepseek_v2",
    lambda s: base(
        s,
        **latent(s, q_rank=None),
        **routed(s, n_shared_experts=2, num_experts_per_tok=3),
        rope_parameters=yarn(s, mscale=0.707, mscale_all_dim=0.707),
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
)
case(
    "deepseek_v3",
    "deepseek_v3",
    lambda s: base(
        s,
        **latent(s),
        **routed(s, num_experts_per_tok=3),
        rope_parameters=yarn(s, mscale=1.0, mscale_all_dim=1.0),
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
    ),
)
case(
    "deepseek_v3_plain_q",
    "deepseek_v3",
    lambda s: base(
        s,
        **latent(s, q_rank=None),
        **routed(s),
        rope_parameters=rope(),
        rope_interleave=False,
        attention_bias=True,
        first_k_dense_replace=2,
        routed_scaling_factor=1.0,
        n_group=2,
        topk_group=1,
        norm_topk_prob=False,
        num_nextn_predict_layers=0,
    ),
)
MINICPM = {"scale_emb": 4, "scale_depth": 1.4, "dim_model_base": 32}
case("minicpm3", "minicpm3", lambda s: base(s, **latent(s), **MINICPM, rope_parameters=rope()))
case(
    "minicpm3_longrope",
    "minicpm3",
    lambda s: base(s, **latent(s), **MINICPM, rope_parameters=longrope(s, 8)),
    steps=True,
)
case(
    "glm4_moe_lite",
    "glm4_moe_lite",
    lambda s: base(
        s,
        **latent(s),
        **routed(s, num_experts_per_tok=3),
        mlp_layer_types=dense_first(s),
        rope_parameters=rope(),
        num_nextn_predict_layers=0,
    ),
)


def with_head(name: str) -> Callable[[Sizes], Settings]:
    return lambda s: {**CASES[name].settings(s), "num_nextn_predict_layers": 1}


case("deepseek_v3_ahead", "deepseek_v3", with_head("deepseek_v3"), ahead=True)
case("glm4_moe_ahead", "glm4_moe", with_head("glm4_moe"), ahead=True)
