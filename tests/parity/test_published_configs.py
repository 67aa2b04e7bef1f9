"""Configs as model makers publish them, with the keys that transformers itself never writes.

Each entry is the whole of a published config.json apart from token ids and the like; what is
asserted of it is what its makers say of the model.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlxtx.checkpoint.weights import check_kinds
from mlxtx.errors import MlxtxError
from mlxtx.families import family_for

COMMON = {"architectures": ["X"], "torch_dtype": "bfloat16", "use_cache": True}
SHAPE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"


def shape(*numbers: int, **more: Any) -> dict[str, Any]:
    names = [*SHAPE.split(), "num_key_value_heads", "max_position_embeddings"]
    return {**COMMON, **dict(zip(names, numbers, strict=False)), **more}


LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": shape(
        128256, 4096, 14336, 32, 32, 8, 131072, model_type="llama", rope_theta=500000.0,
        rope_scaling=LLAMA3_ROPE, rms_norm_eps=1e-05, hidden_act="silu", attention_bias=False,
        attention_dropout=0.0, mlp_bias=False, pretraining_tp=1, tie_word_embeddings=False,
        initializer_range=0.02, transformers_version="4.42.3", bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    "llama 4-bit by mlx": shape(
        128256, 2048, 8192, 16, 32, 8, 131072, model_type="llama", head_dim=64,
        rope_theta=500000.0, rope_scaling={**LLAMA3_ROPE, "factor": 32.0}, rms_norm_eps=1e-05,
        tie_word_embeddings=True, quantization={"group_size": 64, "bits": 4},
        quantization_config={"group_size": 64, "bits": 4},
    ),
    "llama (SmolLM2-135M)": shape(
        49152, 576, 1536, 30, 9, 3, 8192, model_type="llama", is_llama_config=True,
        rope_interleaved=False, rope_scaling=None, rope_theta=100000, rms_norm_eps=1e-05,
        tie_word_embeddings=True, attention_bias=False, attention_dropout=0.0, pretraining_tp=1,
        hidden_act="silu", initializer_range=0.041666666666666664, bos_token_id=0, eos_token_id=0,
    ),
    "mistral": shape(
        32768, 4096, 14336, 32, 32, 8, 32768, model_type="mistral", rope_theta=1000000.0,
        sliding_window=None, rms_norm_eps=1e-05, tie_word_embeddings=False, hidden_act="silu",
        attention_dropout=0.0,
    ),
    "qwen2": shape(
        152064, 3584, 18944, 28, 28, 4, 32768, model_type="qwen2", rope_theta=1000000.0,
        max_window_layers=28, sliding_window=131072, use_sliding_window=False, use_mrope=False,
        rms_norm_eps=1e-06, tie_word_embeddings=False, hidden_act="silu",
    ),
    "qwen3_moe": shape(
        151936, 2048, 6144, 48, 32, 4, 40960, model_type="qwen3_moe", head_dim=128,
        decoder_sparse_step=1, max_window_layers=48, mlp_only_layers=[], norm_topk_prob=True,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, rope_scaling=None,
        output_router_logits=False, router_aux_loss_coef=0.001, rope_theta=1000000.0,
        rms_norm_eps=1e-06, sliding_window=None, use_sliding_window=False, attention_bias=False,
        tie_word_embeddings=False,
    ),
    "qwen3 (distilled from R1-0528)": shape(
        151936, 4096, 12288, 36, 32, 8, 131072, model_type="qwen3", head_dim=128,
        max_window_layers=36, rms_norm_eps=1e-06, rope_theta=1000000, sliding_window=None,
        rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
            "attn_factor": 0.8782488562869419,
        },
        use_sliding_window=False, attention_bias=False, tie_word_embeddings=False,
    ),
    "qwen3_moe (Coder)": shape(
        151936, 2048, 5472, 48, 32, 4, 262144, model_type="qwen3_moe", head_dim=128,
        decoder_sparse_step=1, max_window_layers=28, mlp_only_layers=[], norm_topk_prob=True,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, qkv_bias=False,
        output_router_logits=False, router_aux_loss_coef=0.0, rope_scaling=None,
        rope_theta=10000000, rms_norm_eps=1e-06, shared_expert_intermediate_size=0,
        sliding_window=None, use_qk_norm=True, use_sliding_window=False,
        tie_word_embeddings=False,
    ),
    "smollm3": shape(
        128256, 2048, 11008, 36, 16, 4, 65536, model_type="smollm3", attention_bias=False,
        layer_types=["full_attention"] * 36, max_window_layers=28, mlp_bias=False,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, pretraining_tp=2,
        rms_norm_eps=1e-06, rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
        use_sliding_window=False, pad_token_id=128004,
    ),
    "gemma": shape(
        256000, 2048, 16384, 18, 8, 1, 8192, model_type="gemma", head_dim=256, hidden_act="gelu",
        hidden_activation=None, rms_norm_eps=1e-06, rope_theta=10000.0, rope_scaling=None,
        attention_bias=False,
    ),
    "gemma2": shape(
        256000, 2304, 9216, 26, 8, 4, 8192, model_type="gemma2", head_dim=256,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, cache_implementation="hybrid",
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096,
        attention_bias=False, _attn_implementation="eager",
    ),
    "gemma2 (27b)": shape(
        256000, 4608, 36864, 46, 32, 16, 8192, model_type="gemma2", head_dim=128,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, cache_implementation="hybrid",
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=144, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096,
        sliding_window_size=4096, attention_bias=False, _attn_implementation="eager",
    ),
    "gemma3_text": shape(
        262144, 1152, 6912, 26, 4, 1, 32768, model_type="gemma3_text", head_dim=256,
        attn_logit_softcapping=None, final_logit_softcapping=None, cache_implementation="hybrid",
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rms_norm_eps=1e-06,
        rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
        sliding_window_pattern=6, attention_bias=False,
    ),
    "phi": shape(
        51200, 2560, 10240, 32, 32, 32, 2048, model_type="phi", partial_rotary_factor=0.4,
        qk_layernorm=False, rope_scaling=None, rope_theta=10000.0, layer_norm_eps=1e-05,
        hidden_act="gelu_new", embd_pdrop=0.0, resid_pdrop=0.1, tie_word_embeddings=False,
    ),
    "phi3 (Phi-4-mini)": shape(
        200064, 3072, 8192, 32, 24, 8, 131072, model_type="phi3", attention_bias=False,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, full_attn_mod=1,
        interpolate_factor=1, lm_head_bias=False, mlp_bias=False, partial_rotary_factor=0.75,
        original_max_position_embeddings=4096, rms_norm_eps=1e-05, rope_theta=10000.0,
        rope_scaling={"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        sliding_window=262144, tie_word_embeddings=True, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "cohere2": shape(
        256000, 4096, 14336, 32, 32, 8, 132096, model_type="cohere2", head_dim=128,
        cache_implementation="hybrid", layer_norm_eps=1e-05, layer_switch=4, logit_scale=0.25,
        order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj",
        rope_scaling=None, rope_theta=50000, rotary_pct=1.0, sliding_window=4096,
        sliding_window_pattern=4, use_embedding_sharing=True, use_gated_activation=True,
        use_parallel_block=True, use_parallel_embedding=True, attention_bias=False,
    ),
    "starcoder2": shape(
        49152, 3072, 12288, 30, 24, 2, 16384, model_type="starcoder2", use_bias=True,
        activation_function="gelu", attention_dropout=0.1, embedding_dropout=0.1,
        hidden_act="gelu_pytorch_tanh", layer_norm_epsilon=1e-05, mlp_type="default",
        norm_epsilon=1e-05, norm_type="layer_norm", residual_dropout=0.1, sliding_window=4096,
        rope_theta=999999.4420358813,
    ),
    "gpt2": {
        **COMMON, "model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
        "layer_norm_epsilon": 1e-05, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "attn_pdrop": 0.1, "task_specific_params": {"text-generation": {"do_sample": True}},
    },
    "gpt_neox": shape(
        50304, 1024, 4096, 24, 16, model_type="gpt_neox", hidden_act="gelu", layer_norm_eps=1e-05,
        max_position_embeddings=2048, rotary_emb_base=10000, rotary_pct=0.25,
        tie_word_embeddings=False, use_parallel_residual=True,
    ),
    "bloom": {
        **COMMON, "model_type": "bloom", "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "hidden_dropout": 0.0,
        "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "n_embed": 1024,
        "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100,
        "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True, "vocab_size": 250880,
        "skip_bias_add_qkv": False, "unk_token_id": 0,
    },
    "falcon": {
        **COMMON, "model_type": "falcon", "alibi": False, "vocab_size": 65024,
        "apply_residual_connection_post_layernorm": False, "bias": False, "hidden_size": 4544,
        "layer_norm_epsilon": 1e-05, "multi_query": True, "new_decoder_architecture": False,
        "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
    },
    "opt": {
        **COMMON, "model_type": "opt", "_remove_final_layer_norm": False, "vocab_size": 50272,
        "activation_dropout": 0.0, "activation_function": "relu", "do_layer_norm_before": False,
        "dropout": 0.1, "ffn_dim": 4096, "hidden_size": 1024, "init_std": 0.02, "layerdrop": 0.0,
        "max_position_embeddings": 2048, "num_attention_heads": 16, "num_hidden_layers": 24,
        "prefix": "</s>", "word_embed_proj_dim": 512,
    },
    "deepseek_v2": shape(
        102400, 2048, 10944, 27, 16, 16, 163840, model_type="deepseek_v2", kv_lora_rank=512,
        auto_map={"AutoConfig": "x"}, aux_loss_alpha=0.001, ep_size=1, first_k_dense_replace=1,
        moe_intermediate_size=1408, moe_layer_freq=1, n_group=1, n_routed_experts=64,
        n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=6, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, routed_scaling_factor=1.0, seq_aux=True,
        rope_scaling={
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "type": "yarn",
            "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
        },
        rope_theta=10000, scoring_func="softmax", topk_group=1, topk_method="greedy",
        v_head_dim=128, rms_norm_eps=1e-06, attention_bias=False, tie_word_embeddings=False,
    ),
    "glm4_moe": shape(
        151552, 4096, 10944, 46, 96, 8, 131072, model_type="glm4_moe", attention_bias=True,
        first_k_dense_replace=1, head_dim=128, moe_intermediate_size=1408, n_group=1,
        n_routed_experts=128, n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8,
        num_nextn_predict_layers=1, partial_rotary_factor=0.5, rms_norm_eps=1e-05,
        rope_scaling=None, rope_theta=1000000, routed_scaling_factor=1.0, topk_group=1,
        use_qk_norm=False, tie_word_embeddings=False,
    ),
    "gpt_oss": shape(
        201088, 2880, 2880, 24, 64, 8, 131072, model_type="gpt_oss", attention_bias=True,
        experts_per_token=4, head_dim=64, initial_context_length=4096, num_experts_per_tok=4,
        layer_types=["sliding_attention", "full_attention"] * 12, num_local_experts=32,
        output_router_logits=False, rms_norm_eps=1e-05, router_aux_loss_coef=0.9,
        rope_scaling={
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
            "original_max_position_embeddings": 4096, "truncate": False,
        },
        rope_theta=150000, sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False,
        quantization_config={"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    ),
    "minimax_m2": shape(
        200064, 3072, 1536, 62, 48, 8, 196608, model_type="minimax_m2", head_dim=128,
        attn_type_list=[1] * 62, layernorm_full_attention_beta=1.0, num_local_experts=256,
        layernorm_linear_attention_beta=1.0, layernorm_mlp_beta=1.0, mtp_transformer_layers=1,
        num_experts_per_tok=8, num_mtp_modules=3, qk_norm_type="per_layer", rms_norm_eps=1e-06,
        rope_theta=5000000, rotary_dim=64, router_aux_loss_coef=0.001, router_jitter_noise=0.0,
        scoring_func="sigmoid", shared_intermediate_size=0, use_mtp=True, use_qk_norm=True,
        use_routing_bias=True, attention_bias=False, tie_word_embeddings=False,
    ),
    "hunyuan_v1_dense": shape(
        128167, 4096, 14336, 32, 32, 8, 32768, model_type="hunyuan_v1_dense", head_dim=128,
        attention_head_dim=128, cla_share_factor=2, add_classification_head=False, class_num=0,
        dense_list=[4096, 0], im_end_id=5, im_newline_id=11, im_start_id=4, mask_init_id=12,
        mlp_bias=False, norm_type="rms", org_vocab_size=128167, pool_type="last",
        rope_scaling={
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "type": "dynamic",
        },
        rope_theta=10000.0, text_end_id=7, text_start_id=6, use_cla=False, use_qk_norm=True,
        use_rotary_pos_emb=True, rms_norm_eps=1e-05, sep_token_id=127962, eod_token_id=127957, pad_id=127961,
        attention_bias=False, tie_word_embeddings=True,
    ),
    "exaone4": shape(
        102400, 5120, 27392, 64, 40, 8, 131072, model_type="exaone4", head_dim=128,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 16, sliding_window=4096,
        sliding_window_pattern="LLLG", rope_theta=1000000, rms_norm_eps=1e-05,
        rope_scaling={**LLAMA3_ROPE, "factor": 16.0}, tie_word_embeddings=False,
    ),
    "apertus": shape(
        131072, 4096, 21504, 32, 32, 8, 65536, model_type="apertus", hidden_act="xielu",
        hidden_dropout=0.0, mlp_bias=False, post_norm=False, qk_norm=True, rms_norm_eps=1e-05,
        rope_scaling=LLAMA3_ROPE, rope_theta=12000000, attention_bias=False,
        tie_word_embeddings=False,
    ),
    "afmoe": shape(
        200192, 2048, 6144, 32, 32, 4, 131072, model_type="afmoe", head_dim=128,
        global_attn_every_n_layers=4, load_balance_coeff=0.001, moe_intermediate_size=1024,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8, mup_enabled=True,
        n_group=1, num_dense_layers=2, num_expert_groups=1, num_experts=128,
        num_experts_per_tok=8, num_limited_groups=1, num_shared_experts=1, rms_norm_eps=1e-05,
        rope_scaling=None, rope_theta=10000, route_norm=True, route_scale=2.826,
        score_func="sigmoid", sliding_window=2048, topk_group=1, use_grouped_mm=True,
        attention_bias=False, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_understood(name: str) -> None:
    config = PUBLISHED[name]
    decoder = family_for(config).decoder_config(config)
    check_kinds(decoder)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    assert len(decoder.blocks) == layers
    assert decoder.vocabulary == config["vocab_size"]


def described(name: str) -> Any:
    return family_for(PUBLISHED[name]).decoder_config(PUBLISHED[name])


def test_windows_and_bases_alternate_as_published() -> None:
    blocks = described("gemma3_text").blocks
    assert [b.attention.window for b in blocks[:6]] == [512] * 5 + [None]
    assert [b.attention.rope.base for b in blocks[:6]] == [10000.0] * 5 + [1000000.0]
    exaone = described("exaone4").blocks
    assert [b.attention.rope is None for b in exaone[:4]] == [False] * 3 + [True]
    assert all(b.attention.window is None for b in described("qwen2").blocks)  # switched off


def test_sizes_follow_from_what_is_published() -> None:
    assert described("phi").blocks[0].attention.rope.dims == 32  # 0.4 of 80
    assert described("minimax_m2").blocks[0].attention.rope.dims == 64
    assert described("opt").embedding.width == 512 and described("opt").final_norm is None
    rope = described("hunyuan_v1_dense").blocks[0].attention.rope
    assert rope.scaling is None and rope.base == pytest.approx(10000 * 1000 ** (128 / 126))
    assert described("falcon").blocks[0].attention.kv_heads == 1
    assert described("gpt_oss").blocks[0].feed_forward.per_token == 4
    coder = described("qwen3_moe (Coder)").blocks[0]
    assert coder.attention.q_norm and coder.feed_forward.shared is None
    assert [b.attention.rope is None for b in described("smollm3").blocks[:4]] == [False] * 3 + [
        True
    ]
    assert described("gemma2 (27b)").blocks[0].attention.scale == 1 / 12


def test_yarn_grows_by_its_factor_alone() -> None:
    """As transformers 5.23 has it, which passes over ``attn_factor``."""
    scaling = described("qwen3 (distilled from R1-0528)").blocks[0].attention.rope.scaling
    assert scaling.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "attention_window_sizes", [1, 2]),
        ("qwen2", "dual_chunk_attention_config", {"chunk_size": 262144}),
        ("cohere2", "use_qk_norm", True),
        ("qwen3_moe (Coder)", "shared_expert_intermediate_size", 512),
        ("gpt_oss", "swiglu_beta", 1.0),
        ("gemma2", "use_bidirectional_attention", True),
        ("apertus", "post_norm", True),
    ],
)
def test_key_that_changes_the_model_is_an_error_that_names_it(name, key, value) -> None:
    config = {**PUBLISHED[name], key: value}
    with pytest.raises(MlxtxError, match=key):
        family_for(config).decoder_config(config)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llama", {"num_key_value_heads": 5}, "kv_heads must divide heads: 5"),
        ("qwen3_moe", {"num_experts_per_tok": 200}, "per_token 200 is above count 128"),
        ("llama", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ("llama", {"hidden_act": "snake"}, "activation is unknown: 'snake'"),
        ("gpt_oss", {"sliding_window": -3}, "window must be a whole number above 0"),
        ("phi3 (Phi-4-mini)", {"partial_rotary_factor": 0.5}, "48 entries for 32"),
    ],
)
def test_impossible_mix_is_an_error_that_names_the_field(name, change, says) -> None:
    config = {**PUBLISHED[name], **change}
    with pytest.raises(MlxtxError, match=says):
        family_for(config).decoder_config(config)
