"""What families make of RoPE settings that differ from what they were published with."""

from __future__ import annotations

import pytest

from mlxtx.families import family_for

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def rope_of(config: dict):
    return family_for(config).decoder_config(config).blocks[0].attention.rope


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
        {
            "rope_theta": 5000.0,
            "rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ],
)
def test_unscaled_llama_turns_all_channels_as_transformers_does(settings):
    rope = rope_of({**LLAMA, **settings})
    assert (rope.dims, rope.base) == (16, 5000.0)


@pytest.mark.parametrize("model_type", ["phi3", "solar_open", "stablelm", "phi"])
def test_families_with_partial_rope_read_the_factor(model_type):
    config = {**LLAMA, "model_type": model_type, "partial_rotary_factor": 0.5}
    if model_type in ("stablelm", "phi"):
        config["layer_norm_eps"] = config.pop("rms_norm_eps")
    if model_type == "solar_open":
        config |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        config["head_dim"] = 16
    assert rope_of(config).dims == 8


def test_a_window_of_one_layer_type_keeps_its_own_theta():
    config = {
        **LLAMA,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 8,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    local, whole = (b.attention.rope for b in family_for(config).decoder_config(config).blocks)
    assert (local.base, local.scaling) == (1e4, None)
    assert whole.base == 1e6 and whole.scaling is not None and whole.scaling.factor == 8.0
