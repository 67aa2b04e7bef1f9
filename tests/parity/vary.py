"""Unusual settings for the parity cases, drawn at random: switches flipped, windows of any length,
other scalings of RoPE, layers in any order.

A setting is drawn only where the family's own config knows its key; combinations that transformers
refuses are passed over by those who build them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from cases import (
    CHUNKED,
    FULL,
    SLIDING,
    Case,
    Settings,
    Sizes,
    dynamic,
    linear,
    llama3,
    longrope,
    yarn,
)
from cases import rope as plain_rope

SWITCHES = """
    alibi apply_residual_connection_post_layernorm attention_bias attention_k_eq_v
    attention_out_bias attn_temperature_tuning bias do_layer_norm_before enable_bias
    layer_norm_elementwise_affine lm_head_bias mlp_bias multi_query mup_enabled
    new_decoder_architecture norm_topk_prob parallel_attn qk_layernorm qkv_bias rope_interleave
    scale_attn_by_inverse_layer_idx scale_attn_weights tie_word_embeddings use_bias
    use_double_wide_mlp use_parallel_residual use_qk_norm use_qkv_bias use_sliding_window
    """
WINDOWS = (None, 2, 3, 5, 11, 31, 47, 48, 60)
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", "relu2")
EPSILONS = (1e-3, 1e-5, 1e-8)
FACTORS = (0.3, 1.0, 2.5)
CAPS = (None, 3.0, 20.0)
CHOICES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(SWITCHES.split(), (False, True)),
    **dict.fromkeys(("sliding_window", "window_size"), WINDOWS),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), ACTIVATIONS),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), EPSILONS),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "logit_scale"), FACTORS),
    **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), FACTORS),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), CAPS),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), (1, 2, 3)),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), (0, 1, 2)),
    "moe_num_shared_experts": (0, 1, 3),
    "clip_qkv": (None, 0.5, 3.0),
    "max_window_layers": (0, 1, 3, 9),
    "no_rope_layer_interval": (1, 2, 3, 5),
    "attention_chunk_size": (1, 3, 7, 16, 47, 64),
    "floor_scale": (1, 5, 16),
    "attn_scale": (0.1, 0.5),
    "decoder_sparse_step": (1, 2, 3),
    "interleave_moe_layer_step": (1, 2),
    "query_pre_attn_scalar": (5, 64, 100),
    "moe_topk": (1, 3),
    "moe_k": (1, 3),
    "scale_emb": (1, 7),
    "head_dim": (8, 10, 12, 20, 36),
}


def varied(case: Case, sizes: Sizes, rng: random.Random, known: Mapping[str, Any]) -> Case:
    """The case with some settings drawn anew; ``known`` is what the family's config holds."""
    settings = dict(case.settings(sizes))
    for key, values in CHOICES.items():
        if (key in known or key in settings) and rng.random() < 0.35:
            settings[key] = rng.choice(values)
    heads = settings.get("num_attention_heads", 0)
    latent = "kv_lora_rank" in settings
    if latent:
        settings.pop("head_dim", None)
    if "num_key_value_heads" in settings and not latent and rng.random() < 0.5:
        counts = [n for n in range(1, heads + 1) if heads % n == 0]
        settings["num_key_value_heads"] = rng.choice(counts)
    kinds = {SLIDING, FULL, CHUNKED} & {*(settings.get("layer_types") or ())}
    if len(kinds) > 1 and rng.random() < 0.6:
        drawn = [rng.choice(sorted(kinds)) for _ in range(sizes.layers)]
        settings["layer_types"] = drawn
    if SLIDING in (settings.get("layer_types") or ()):
        settings["sliding_window"] = settings.get("sliding_window") or sizes.window
    steps = case.steps
    if "rope_parameters" in settings and rng.random() < 0.7:
        rope = settings["rope_parameters"]
        nested = {kind: value for kind, value in rope.items() if isinstance(value, dict)}
        for kind in nested:
            nested[kind] = another_rope(rope[kind], settings, sizes, rng)
        settings["rope_parameters"] = nested or another_rope(rope, settings, sizes, rng)
        said = list(nested.values()) or [settings["rope_parameters"]]
        steps = any(one["rope_type"] in ("dynamic", "longrope") for one in said)
        steps |= any("short_mscale" in one for one in said)
        if any(one["rope_type"] == "dynamic" for one in said):
            settings["max_position_embeddings"] = sizes.original_context
    if "rotary_dim" in settings:
        settings["rotary_dim"] = 2 * rng.randrange(1, sizes.hidden // sizes.heads // 2 + 1)
    return dataclasses.replace(case, settings=lambda _: settings, steps=steps)


def another_rope(given: Settings, settings: Settings, s: Sizes, rng: random.Random) -> Settings:
    """Any scaling; where the family turns a part of the channels, another part."""
    partial = given.get("partial_rotary_factor")
    if partial is not None:
        partial = rng.choice((0.25, 0.5, 0.75, 1.0))
    size = settings.get("head_dim") or s.hidden // s.heads
    dims = settings.get("qk_rope_head_dim") or int(size * (partial or 1.0))
    factor = rng.choice((1.5, 2.0, 4.0, 7.0))
    drawn: Settings = rng.choice(
        (
            plain_rope(),
            linear(factor),
            dynamic(factor),
            llama3(s),
            yarn(s),
            yarn(s, truncate=False, beta_fast=20.0, beta_slow=2.0),
            yarn(s, mscale=0.7, mscale_all_dim=0.4),
            longrope(s, dims, factor=factor),
            longrope(s, dims, attention_factor=0.9),
        )
    )
    drawn["rope_theta"] = rng.choice((100.0, 10000.0, 5e5))
    drawn |= {name: given[name] for name in ("short_mscale", "long_mscale") if name in given}
    return drawn if partial is None else {**drawn, "partial_rotary_factor": partial}
