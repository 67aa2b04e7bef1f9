"""The same config.json in the words of the checkpoints that are published.

transformers 5 nests every rotary setting in `rope_parameters`; published checkpoints carry
`rope_theta`, `rope_scaling`, `partial_rotary_factor` and family keys of their own that
transformers 5 reads or ignores but never writes. `legacy_config` translates, family by family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from cases import FULL, SLIDING

Config = dict[str, Any]


def legacy_config(config: Config) -> Config:
    """A published-style copy of a config.json that transformers 5 saved."""
    legacy = copy.deepcopy(config)
    family = FAMILIES.get(legacy["model_type"])
    if legacy["model_type"] not in KEEPS_ROPE_PARAMETERS:
        _flatten_rope(legacy)
    if "dtype" in legacy:
        legacy["torch_dtype"] = legacy.pop("dtype")
    legacy["transformers_version"] = "4.40.0"
    if family is not None:
        family(legacy)
    return legacy


KEEPS_ROPE_PARAMETERS = {"gemma4_text", "ministral3", "nanochat"}  # published with version 5


def _flatten_rope(legacy: Config) -> None:
    rope = legacy.pop("rope_parameters", None)
    if not rope:
        return
    if FULL in rope:  # one setting per kind of layer: the family below says the second one
        legacy["_sliding_rope"] = rope.get(SLIDING, rope[FULL])
        rope = rope[FULL]
    legacy["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        legacy["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {
        key: value
        for key, value in rope.items()
        if key not in ("rope_theta", "partial_rotary_factor")
    }
    legacy["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling


def _only_type(legacy: Config) -> None:
    """Early checkpoints say `type` where later ones say `rope_type`."""
    scaling = legacy.get("rope_scaling")
    if scaling:
        scaling["type"] = scaling.pop("rope_type")


def _llama(legacy: Config) -> None:
    if legacy["head_dim"] * legacy["num_attention_heads"] == legacy["hidden_size"]:
        legacy.pop("head_dim")
    legacy["pretraining_tp"] = 1
    scaling = legacy["rope_scaling"]
    if scaling and scaling["rope_type"] in ("linear", "dynamic"):
        _only_type(legacy)


def _qwen2(legacy: Config) -> None:
    legacy.pop("layer_types", None)
    if not legacy["use_sliding_window"]:
        legacy["sliding_window"] = 131072  # published with a window that is switched off
    if legacy["rope_scaling"]:
        scaling = legacy["rope_scaling"]
        legacy["rope_scaling"] = {
            "type": "yarn",
            "factor": scaling["factor"],
            "original_max_position_embeddings": scaling["original_max_position_embeddings"],
        }


def _qwen3(legacy: Config) -> None:
    legacy.pop("layer_types", None)
    legacy["sliding_window"] = None


def _phi3(legacy: Config) -> None:
    scaling = legacy["rope_scaling"]
    if scaling:
        scaling.pop("original_max_position_embeddings")
        _only_type(legacy)
    legacy["attention_bias"] = False
    legacy["full_attn_mod"] = 1
    legacy["interpolate_factor"] = 1
    legacy["lm_head_bias"] = False
    legacy["mlp_bias"] = False
    legacy["num_experts_per_tok"] = 2
    legacy["num_local_experts"] = 16
    legacy["auto_map"] = {"AutoConfig": "configuration_phi3.Phi3Config"}


def _gemma(legacy: Config) -> None:
    legacy["hidden_act"] = "gelu"
    legacy["hidden_activation"] = None
    legacy.pop("rope_scaling", None)


def _gemma2(legacy: Config) -> None:
    legacy["hidden_act"] = "gelu_pytorch_tanh"
    legacy["cache_implementation"] = "hybrid"
    legacy.pop("layer_types", None)
    legacy.pop("rope_scaling", None)


def _gemma3(legacy: Config) -> None:
    legacy["rope_local_base_freq"] = legacy.pop("_sliding_rope")["rope_theta"]
    kinds = legacy.pop("layer_types")
    legacy["sliding_window_pattern"] = kinds.index(FULL) + 1
    legacy.pop("_sliding_window_pattern", None)
    legacy["cache_implementation"] = "hybrid"


def _gemma4(legacy: Config) -> None:
    heads = legacy.pop("per_layer_config", None) or {}
    full = next(iter(heads.values()), {})
    legacy["global_head_dim"] = full.get("head_dim", 2 * legacy["head_dim"])
    legacy["num_global_key_value_heads"] = full.get("num_key_value_heads")


def _cohere(legacy: Config) -> None:
    legacy.pop("tie_word_embeddings", None)  # always tied, and not said
    legacy.pop("rope_scaling", None)


def _cohere2(legacy: Config) -> None:
    _cohere(legacy)
    legacy["sliding_window_pattern"] = 4
    legacy.pop("layer_types", None)
    legacy.update(
        layer_switch=4,
        order_of_interleaved_layers="local_attn_first",
        position_embedding_type="rope_gptj",
        rotary_pct=1.0,
        use_embedding_sharing=True,
        use_gated_activation=True,
        use_parallel_block=True,
        use_parallel_embedding=False,
        use_qk_norm=False,
        cache_implementation="hybrid",
        rope_scaling=None,
        attention_bias=False,
    )


def _olmo3(legacy: Config) -> None:
    legacy.pop("_sliding_rope", None)  # scaled layers are the full ones, by rule


def _granite(legacy: Config) -> None:
    legacy["attention_dropout"] = 0.1


def _starcoder2(legacy: Config) -> None:
    legacy.update(activation_function="gelu", mlp_type="default", norm_type="layer_norm")
    legacy.update(attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True)
    legacy.update(
        scale_attn_weights=True, attention_bias=legacy["use_bias"], layer_norm_epsilon=1e-5
    )
    legacy.pop("rope_scaling", None)


def _stablelm(legacy: Config) -> None:
    legacy.pop("rope_scaling", None)
    legacy["rotary_scaling_factor"] = 1.0


def _gpt2(legacy: Config) -> None:
    legacy.setdefault("n_ctx", legacy["n_positions"])
    legacy["task_specific_params"] = {"text-generation": {"do_sample": True, "max_length": 50}}
    for key in (
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "add_cross_attention",
    ):
        if legacy.get(key) is False:
            legacy.pop(key)


def _gpt_bigcode(legacy: Config) -> None:
    legacy.update(n_inner=legacy.get("n_inner") or 4 * legacy["n_embd"])
    legacy.update(attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True)
    legacy.update(inference_runner=0, max_batch_size=None, max_sequence_length=None)
    legacy.update(pad_key_length=True, pre_allocate_kv_cache=False, validate_runner_input=True)


def _gpt_neo(legacy: Config) -> None:
    kinds = [kind for block, times in legacy["attention_types"] for kind in block * times]
    legacy["attention_layers"] = kinds
    legacy.update(gradient_checkpointing=False, tokenizer_class="GPT2Tokenizer")


def _gpt_neox(legacy: Config) -> None:
    legacy["rotary_pct"] = legacy.pop("partial_rotary_factor", 0.25)
    legacy["rotary_emb_base"] = int(legacy.pop("rope_theta", 10000))
    if legacy.get("attention_bias") is True:
        legacy.pop("attention_bias")
    legacy.pop("rope_scaling", None)


def _gptj(legacy: Config) -> None:
    legacy.setdefault("n_ctx", legacy["n_positions"])
    legacy.update(gradient_checkpointing=False, rotary=True, scale_attn_weights=True)
    legacy.update(summary_type="cls_index", tokenizer_class="GPT2Tokenizer")


def _bloom(legacy: Config) -> None:
    legacy["n_embed"] = legacy.pop("hidden_size")
    legacy["num_attention_heads"] = legacy.pop("n_head")
    legacy.update(offset_alibi=100, seq_length=2048, skip_bias_add=True, unk_token_id=0)
    legacy.update(skip_bias_add_qkv=False, attention_softmax_in_fp32=True, bias_dropout_fusion=True)
    legacy["masked_softmax_fusion"] = True


def _mpt(legacy: Config) -> None:
    legacy.update(embedding_fraction=1.0, init_device="cpu", logit_scale=None, no_bias=True)
    legacy.update(norm_type="low_precision_layernorm", verbose=0, use_cache=False)
    legacy["attn_config"] = {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": legacy["attn_config"].get("clip_qkv"),
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": legacy["attn_config"].get("softmax_scale"),
    }
    legacy["init_config"] = {"name": "kaiming_normal_", "fan_mode": "fan_in"}


def _falcon(legacy: Config) -> None:
    legacy["apply_residual_connection_post_layernorm"] = False
    if not legacy["new_decoder_architecture"]:
        legacy.pop("new_decoder_architecture")
    legacy.pop("rope_scaling", None)
    if legacy.get("rope_theta") == 10000.0:
        legacy.pop("rope_theta")


def _opt(legacy: Config) -> None:
    legacy.update(activation_dropout=0.0, prefix="</s>", output_projection=True)
    legacy.setdefault("_remove_final_layer_norm", False)


def _mixtral(legacy: Config) -> None:
    legacy.update(output_router_logits=False, router_aux_loss_coef=0.02)


def _qwen2_moe(legacy: Config) -> None:
    legacy.pop("layer_types", None)
    if not legacy["use_sliding_window"]:
        legacy["sliding_window"] = 32768


def _qwen3_moe(legacy: Config) -> None:
    if "num_local_experts" in legacy:
        legacy["num_experts"] = legacy.pop("num_local_experts")
    legacy["max_window_layers"] = legacy["num_hidden_layers"]


def _phimoe(legacy: Config) -> None:
    legacy.update(input_jitter_noise=0.01, attention_dropout=0.0, hidden_dropout=0.0)


def _gpt_oss(legacy: Config) -> None:
    legacy.update(experts_per_token=legacy["num_experts_per_tok"], swiglu_limit=7.0)
    legacy.update(initial_context_length=4096, output_router_logits=False)
    legacy["quantization_config"] = {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        "quant_method": "mxfp4",
    }


def _ernie_moe(legacy: Config) -> None:
    legacy.update(moe_gate="topk", moe_capacity=[64, 64, 64], moe_use_aux_free=True)
    legacy.update(fuse_rms_norm=True, moe_gate_act="softmax", num_nextn_predict_layers=0)
    legacy.pop("rope_scaling", None)


def _llama4(legacy: Config) -> None:
    legacy["for_llm_compressor"] = False


def _deepseek(score: str, method: str) -> Callable[[Config], None]:
    def change(legacy: Config) -> None:
        legacy.setdefault("scoring_func", score)
        legacy.setdefault("topk_method", method)
        legacy.setdefault("moe_layer_freq", 1)
        legacy.update(aux_loss_alpha=0.001, seq_aux=True, ep_size=1)
        if "qk_rope_head_dim" in legacy:
            _drop_derived_heads(legacy)
        if legacy.get("rope_scaling"):
            _only_type(legacy)

    return change


def _drop_derived_heads(legacy: Config) -> None:
    for key in ("qk_head_dim", "head_dim"):
        legacy.pop(key, None)


def _minicpm3(legacy: Config) -> None:
    _drop_derived_heads(legacy)
    scaling = legacy.get("rope_scaling")
    if scaling:
        _only_type(legacy)
    legacy.update(scale_emb=legacy["scale_emb"], auto_map={"AutoConfig": "x.MiniCPM3Config"})


def _minimax(legacy: Config) -> None:
    legacy["rotary_dim"] = int(legacy["head_dim"] * legacy.pop("partial_rotary_factor"))
    legacy.update(shared_intermediate_size=0, scoring_func="sigmoid", use_qk_norm=True)
    legacy.update(qk_norm_type="per_layer", use_routing_bias=True, use_mtp=False)
    legacy.update(attn_type_list=[1] * legacy["num_hidden_layers"])
    legacy.pop("rope_scaling", None)


def _dbrx(legacy: Config) -> None:
    legacy.pop("rope_scaling", None)
    theta = legacy.pop("rope_theta", 500000.0)
    attention, experts = legacy["attn_config"], legacy["ffn_config"]
    legacy["attn_config"] = {
        "clip_qkv": attention["clip_qkv"],
        "kv_n_heads": attention["kv_n_heads"],
        "model_type": "",
        "rope_theta": theta,
    }
    legacy["ffn_config"] = {
        "ffn_hidden_size": experts["ffn_hidden_size"],
        "model_type": "",
        "moe_jitter_eps": 0.01,
        "moe_loss_weight": 0.05,
        "moe_num_experts": experts["moe_num_experts"],
        "moe_top_k": experts["moe_top_k"],
    }
    legacy.pop("num_key_value_heads", None)


def _apertus(legacy: Config) -> None:
    legacy.update(mlp_bias=False, post_norm=False, qk_norm=True)


def _exaone4(legacy: Config) -> None:
    legacy["head_dim"] = legacy["hidden_size"] // legacy["num_attention_heads"]
    if legacy.get("sliding_window_pattern"):
        legacy["sliding_window_pattern"] = "LLLG"


def _solar(legacy: Config) -> None:
    legacy.update(first_k_dense_replace=0, use_qk_norm=False)
    legacy.setdefault("partial_rotary_factor", 1.0)


def _hunyuan(legacy: Config) -> None:
    if legacy.get("rope_scaling"):
        legacy["rope_scaling"]["type"] = legacy["rope_scaling"].pop("rope_type")
    legacy.update(attention_head_dim=legacy["head_dim"], use_qk_norm=True, use_cla=False)
    legacy.update(org_vocab_size=legacy["vocab_size"], mlp_bias=False, norm_type="rms")
    legacy.update(use_rotary_pos_emb=True)


FAMILIES: dict[str, Callable[[Config], None]] = {
    "apertus": _apertus,
    "bloom": _bloom,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "codegen": _gptj,
    "dbrx": _dbrx,
    "deepseek_v2": _deepseek("softmax", "greedy"),
    "deepseek_v3": _deepseek("sigmoid", "noaux_tc"),
    "dots1": _deepseek("noaux_tc", "noaux_tc"),
    "ernie4_5_moe": _ernie_moe,
    "exaone4": _exaone4,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma4_text": _gemma4,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "gptj": _gptj,
    "granite": _granite,
    "hunyuan_v1_dense": _hunyuan,
    "hunyuan_v1_moe": _hunyuan,
    "llama": _llama,
    "llama4_text": _llama4,
    "minicpm3": _minicpm3,
    "minimax_m2": _minimax,
    "mixtral": _mixtral,
    "mpt": _mpt,
    "olmo3": _olmo3,
    "opt": _opt,
    "phi3": _phi3,
    "phimoe": _phimoe,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "solar_open": _solar,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
