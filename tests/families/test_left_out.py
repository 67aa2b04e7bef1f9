"""Keys that a config leaves out, says twice, says in another place, or that its family doesn't
read. What is expected is what transformers 5.23 makes of the same config.json."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlxtx.decoder.config import AttentionConfig, DecoderConfig, ExpertsConfig
from mlxtx.decoder.positions import wavelengths
from mlxtx.errors import MlxtxError
from mlxtx.families import family_for

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def described(model_type: str, **settings: Any) -> DecoderConfig:
    """The decoder of a small config; ``...`` leaves a key out."""
    config = {**SIZES, "model_type": model_type, **settings}
    config = {key: value for key, value in config.items() if value is not ...}
    return family_for(config).decoder_config(config)


def attention(model_type: str, layer: int = 0, **settings: Any) -> AttentionConfig:
    found = described(model_type, **settings).blocks[layer].attention
    assert isinstance(found, AttentionConfig)
    return found


@pytest.mark.parametrize(
    ("model_type", "heads", "kv_heads", "context"),
    [
        ("llama", 4, 4, 2048),
        ("mistral", 16, 8, 131072),
        ("qwen2", 32, 32, 32768),
        ("qwen3", 64, 32, 32768),
        ("gemma", 32, 16, 8192),
        ("gemma2", 8, 4, 8192),
        ("gemma3_text", 8, 4, 131072),
        ("phi3", 4, 4, 4096),
    ],
)
def test_sizes_left_out_are_those_of_the_family(model_type, heads, kv_heads, context):
    settings = {"num_attention_heads": heads, "num_key_value_heads": ..., "hidden_size": 256}
    assert attention(model_type, **settings).kv_heads == kv_heads
    assert described(model_type, **settings).context == context
    settings["num_key_value_heads"] = None
    assert attention(model_type, **settings).kv_heads == heads


def test_gemma3_needs_no_more_than_its_published_text_config_says():
    left_out = ("vocab_size", "num_attention_heads", "num_key_value_heads")
    scaling = {"factor": 8.0, "rope_type": "linear"}
    decoder = described("gemma3_text", **dict.fromkeys(left_out, ...), rope_scaling=scaling)
    one = decoder.blocks[0].attention
    assert isinstance(one, AttentionConfig)
    assert (decoder.vocabulary, one.heads, one.kv_heads, one.head_dim) == (262208, 8, 4, 256)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_hidden_act_is_not_read_where_hidden_activation_is(model_type):
    assert described(model_type, hidden_act="relu").blocks[0].feed_forward.activation == "gelu_tanh"
    both = described(model_type, hidden_act="relu", hidden_activation="silu")
    assert both.blocks[0].feed_forward.activation == "silu"


def test_gemma_reads_hidden_act_alone_and_takes_gelu_for_its_tanh_form():
    for act in ("gelu", "gelu_pytorch_tanh"):
        both = described("gemma", hidden_act=act, hidden_activation="gelu")
        assert both.blocks[0].feed_forward.activation == "gelu_tanh"
    relu = described("gemma", hidden_act="relu", hidden_activation="gelu_pytorch_tanh")
    assert relu.blocks[0].feed_forward.activation == "relu"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_an_activation_under_another_familys_key_is_refused(model_type):
    with pytest.raises(MlxtxError, match="hidden_activation"):
        described(model_type, hidden_act="silu", hidden_activation="gelu")


def test_a_mistral_with_layer_types_has_windows_where_they_say():
    mixed = {"layer_types": [SLIDING, FULL], "sliding_window": 5}
    assert [attention("mistral", i, **mixed).window for i in (0, 1)] == [5, None]
    whole = {"layer_types": [FULL, FULL], "sliding_window": 5}
    assert attention("mistral", **whole).window is None
    assert attention("mistral").window == 4096


def test_biases_that_a_family_never_has():
    one = attention("mistral", attention_bias=True)
    assert not one.qkv_bias and not one.output_bias
    with pytest.raises(MlxtxError, match="qkv_bias"):
        described("llama", qkv_bias=True)


@pytest.mark.parametrize("name", ["tie_word_embeddings", "attention_bias"])
def test_a_switch_that_is_text_is_refused(name):
    with pytest.raises(MlxtxError, match=f"{name}='false' is a text"):
        described("llama", **{name: "false"})


def test_an_unknown_key_counts_only_where_it_says_something():
    assert described("llama", layer_types=None, attn_logit_softcapping=None) == described("llama")
    with pytest.raises(MlxtxError, match="attn_logit_softcapping"):
        described("llama", attn_logit_softcapping=5.0)


def test_keys_that_no_decoder_reads_are_passed_over():
    sampling = {"max_length": 4096, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    traces = {"_flash_attn_2_enabled": True, "neftune_noise_alpha": 5, "max_sequence_length": 64}
    browser = {"transformers.js_config": {"dtype": "q4"}}
    assert described("llama", **sampling, **traces, **browser) == described("llama")
    assert described("llama", activation="swiglu") == described("llama")
    with pytest.raises(MlxtxError, match="rope_interleaved"):
        described("llama", rope_interleaved=True)


def test_all_that_transformers_4_says_of_any_model_is_passed_over():
    """The first versions of mlx-lm wrote every setting of transformers' class into config.json."""
    off = """
        add_cross_attention do_sample early_stopping is_decoder is_encoder_decoder
        output_attentions output_hidden_states output_scores remove_invalid_values
        return_dict_in_generate tf_legacy_loss tie_encoder_decoder torchscript use_bfloat16
        """
    zero = "chunk_size_feed_forward encoder_no_repeat_ngram_size min_length no_repeat_ngram_size"
    one = """
        length_penalty num_beam_groups num_beams num_return_sequences repetition_penalty
        temperature top_p typical_p
        """
    null = """
        bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id
        exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
        pad_token_id prefix problem_type sep_token_id suppress_tokens task_specific_params
        tokenizer_class
        """
    said: dict[str, Any] = dict.fromkeys(off.split(), False)
    said |= dict.fromkeys(zero.split(), 0) | dict.fromkeys(one.split(), 1)
    said |= dict.fromkeys(null.split()) | {"diversity_penalty": 0.0, "max_length": 20, "top_k": 50}
    said |= {"return_dict": True, "pruned_heads": {}, "torch_dtype": "bfloat16"}
    said |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "_name_or_path": "a/b"}
    assert described("llama", **said) == described("llama")


@pytest.mark.parametrize(("end", "sparse"), [(-1, 3), (1, 1), (3, 3), (4, 3), (9, 3)])
def test_ernies_experts_end_with_a_layer_that_may_lie_behind_the_last(end, sparse):
    sizes = {"num_hidden_layers": 4, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}
    blocks = described("ernie4_5_moe", **sizes, moe_layer_end_index=end).blocks
    assert sum(isinstance(block.feed_forward, ExpertsConfig) for block in blocks) == sparse


@pytest.mark.parametrize("cap", [0, 0.0, "5", -1.0])
def test_a_soft_cap_is_a_number_above_zero(cap):
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        with pytest.raises(MlxtxError, match="softcap must be a number above 0"):
            described("gemma2", **{name: cap})


def test_a_base_that_is_null_is_refused():
    with pytest.raises(MlxtxError, match="base must be a number above 0, not None"):
        described("llama", rope_parameters={"rope_theta": None})


# ------------------------------------------------------------------------------------ scalings


def scaling(model_type: str, layer: int = 0, **settings: Any) -> Any:
    rope = attention(model_type, layer, **settings).rope
    assert rope is not None
    return rope.scaling


def test_keys_of_other_scalings_change_nothing():
    plain = scaling("llama", rope_scaling={"type": "linear", "factor": 2.0})
    more = {"low_freq_factor": 1.0, "mrope_section": [1, 1, 2]}
    assert scaling("llama", rope_scaling={"type": "linear", "factor": 2.0, **more}) == plain
    assert scaling("qwen2", rope_scaling={"type": "default", "mrope_section": [1, 1, 2]}) is None


def test_yarn_takes_zero_betas_for_none_and_a_null_truncate_for_false():
    assert scaling("llama", rope_scaling=YARN).truncate is True
    assert scaling("llama", rope_scaling={**YARN, "truncate": None}).truncate is False
    betas = scaling("llama", rope_scaling={**YARN, "beta_fast": 0, "beta_slow": 0})
    assert (betas.beta_fast, betas.beta_slow) == (32.0, 1.0)


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (1.0, 1.0), (2.0, 0.5)])
def test_llama3_with_its_factors_in_any_order(low, high):
    more = {"low_freq_factor": low, "high_freq_factor": high}
    given = {**YARN, "rope_type": "llama3", "rope_theta": 10.0, **more}
    rope = attention("llama", rope_parameters=given).rope
    expected = []
    for i in range(8):
        frequency = 10.0 ** (-i / 8)
        length = 2 * math.pi / frequency
        if length > 16 / low:
            frequency /= 4.0
        elif length >= 16 / high:
            smooth = (16 / length - low) / (high - low)
            frequency = (1 - smooth) * frequency / 4.0 + smooth * frequency
        expected.append(1 / frequency)
    assert rope is not None
    assert wavelengths(rope).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_original_context_counts_outside_for_flat_scalings_and_inside_for_nested_ones():
    outside = {"original_max_position_embeddings": 64}
    assert scaling("llama", rope_scaling=YARN, **outside).original_context == 64
    nested = {"rope_parameters": {FULL: YARN}, "sliding_window_pattern": 2}
    assert scaling("gemma3_text", 1, **nested, **outside).original_context == 16


def test_phi3_does_not_read_the_original_context_beside_its_factors():
    inside = {"original_max_position_embeddings": 16}
    assert described("phi3", rope_scaling={**LONG, **inside}).refeed_beyond == 4096
    assert scaling("phi3", rope_scaling={**LONG, **inside}).original_context == 4096
    assert scaling("phi3", rope_scaling=LONG, **inside).original_context == 16


def test_a_factor_of_no_channels_is_not_all_of_them():
    with pytest.raises(MlxtxError, match=r"RopeConfig\.dims must be even: 0"):
        described("phi3", partial_rotary_factor=0.0)


def test_settings_by_layer_type_are_refused_where_layers_do_not_differ():
    with pytest.raises(MlxtxError, match="keys that nothing knows: full_attention"):
        described("llama", rope_parameters={FULL: {"rope_type": "default", "rope_theta": 99.0}})


def bases(**settings: Any) -> list[float]:
    ropes = [attention("gemma3_text", i, **settings).rope for i in (0, 1)]
    return [rope.base for rope in ropes if rope is not None]


def test_gemma3_merges_a_flat_scaling_into_what_its_full_layers_have():
    every = {"sliding_window_pattern": 2}
    nested = {SLIDING: {"rope_theta": 11.0}, FULL: {"rope_type": "default", "rope_theta": 22.0}}
    both = {"rope_parameters": nested, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert bases(**both, **every) == [11.0, 22.0]
    assert scaling("gemma3_text", 1, **both, **every).factor == 2.0
    old = {"rope_scaling": {**YARN, "truncate": False}, "rope_theta": 5e5}
    assert bases(**old, **every) == [1e4, 5e5]
    assert scaling("gemma3_text", 1, **old, **every).truncate is True  # not read in there
    typed = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert scaling("gemma3_text", 1, **typed, **every) is None


def test_gemma3_reads_no_flat_rope_parameters():
    flat = {"rope_type": "linear", "factor": 4.0, "rope_theta": 99.0}
    given = {"rope_parameters": flat, "rope_theta": 55.0, "rope_local_base_freq": 66.0}
    assert bases(**given, sliding_window_pattern=2) == [66.0, 55.0]
    assert scaling("gemma3_text", 1, **given, sliding_window_pattern=2) is None


def test_gemma3_reads_its_pattern_under_one_name():
    kinds = [attention("gemma3_text", i, _sliding_window_pattern=2).window for i in (0, 1)]
    assert kinds == [4096, 4096]
