"""The GPT line: learned positions (GPT-2, BigCode, Neo) or RoPE (NeoX, J, CodeGen), and OPT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlxtx.decoder.config import AttentionConfig, DecoderConfig, NormConfig, RopeConfig
from mlxtx.families.common import HubConfig
from mlxtx.families.family import Family, Rules, resolved
from mlxtx.naming.map import Rule
from mlxtx.naming.rules import LAYER, mlx_only, names, outer, qkv
from mlxtx.naming.transforms import Split, Transposed, chain

UNUSED = """
    attention_softmax_in_fp32 embed_dropout inference_runner max_batch_size max_sequence_length
    n_ctx pad_key_length pre_allocate_kv_cache reorder_and_upcast_attn resid_dropout
    scale_attention_softmax_in_fp32 summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj validate_runner_input
    """


def _plain(config: HubConfig, activation: str = "gelu_new") -> Any:
    width = config.get("n_inner", "intermediate_size", default=None) or 4 * config.width
    keys = ("activation_function",)
    return config.feed_forward(width, activation, keys, gated=False, bias=True)


def _learned(
    config: HubConfig, attention: Sequence[AttentionConfig], gelu: str = "gelu_new"
) -> DecoderConfig:
    """Learned positions, LayerNorm before both branches, biases, a tied head."""
    config.ignore(UNUSED)
    return config.decoder(
        config.layer_norm(),
        _plain(config, gelu),
        tied=True,
        embedding={"positions": config.context},
        layers=attention,
    )


def _scaled(config: HubConfig, **fields: Any) -> list[AttentionConfig]:
    """Scores are divided by the root of the head's size unless that is switched off."""
    on = config.get("scale_attn_weights", default=True)
    scale = (config.width // config.heads) ** -0.5 if on else 1.0
    return config.attention(scale=scale, bias=True, **fields)


def gpt2(config: HubConfig) -> DecoderConfig:
    attention = _scaled(config)
    if config.get("scale_attn_by_inverse_layer_idx", default=False):
        attention = [
            replace(layer, scale=(layer.scale or 1.0) / (i + 1))
            for i, layer in enumerate(attention)
        ]
    return _learned(config, attention)


def gpt_bigcode(config: HubConfig) -> DecoderConfig:
    """One key-value head for all, unless multi-query attention is switched off."""
    single = {"kv_heads": 1} if config.get("multi_query", default=True) else {}
    return _learned(config, _scaled(config, **single), "gelu_pytorch_tanh")


def gpt_neo(config: HubConfig) -> DecoderConfig:
    """Unscaled scores; every other layer sees a window."""
    alternating = [[["global", "local"], 12]]
    types = config.get("attention_types", default=alternating)
    kinds = [kind for block, times in types for kind in block * times]
    config.expect(attention_layers=kinds)
    window = config.get("window_size", default=256)
    windows = [window if kind == "local" else None for kind in kinds]
    return _learned(config, config.attention(scale=1.0, output_bias=True, window=windows))


def gpt_neox(config: HubConfig) -> DecoderConfig:
    """Attention and feed-forward side by side, each behind a norm of its own."""
    rope = config.rope(
        theta_names=("rope_theta", "rotary_emb_base"),
        partial=0.25,
        partial_names=("partial_rotary_factor", "rotary_pct"),
    )
    parallel = config.get("use_parallel_residual", default=True)
    return config.decoder(
        config.layer_norm("layer_norm_eps"),
        config.feed_forward(activation="gelu", gated=False, bias=True),
        block={"form": "parallel" if parallel else "sequential"},
        rope=rope,
        bias=config.bias(True),
    )


def gptj(config: HubConfig) -> DecoderConfig:
    """RoPE on the first channels of a head, one norm, both branches side by side."""
    config.ignore(UNUSED)
    config.expect(rotary=True, scale_attn_weights=True)
    dims = config.get("rotary_dim", default=config.width // config.heads)
    return config.decoder(
        config.layer_norm(),
        _plain(config),
        block={"form": "parallel", "feed_forward_norm": None},
        head={"bias": True},
        rope=RopeConfig(dims=dims, interleaved=True),
    )


def opt(config: HubConfig) -> DecoderConfig:
    """Learned positions two rows down; norms before the branches or (350m) behind the additions,
    and embeddings that may be narrower than the model."""
    config.ignore("activation_dropout dropout layerdrop init_std output_projection")
    before = config.get("do_layer_norm_before", default=True)
    affine = config.get("layer_norm_elementwise_affine", default=True)
    bias = config.get("enable_bias", default=True)
    norm = NormConfig(kind="layer", eps=1e-5, weight=affine, bias=affine)
    removed = config.get("_remove_final_layer_norm", default=False)
    embedding = {
        "width": config.get("word_embed_proj_dim", default=None),
        "positions": config.context + 2,
        "position_offset": 2,
    }
    return config.decoder(
        norm,
        config.feed_forward("ffn_dim", "relu", ("activation_function",), gated=False, bias=bias),
        tied=True,
        block={"norm_after_add": not before},
        embedding=embedding,
        whole={"final_norm": norm if before and not removed else None},
        bias=bias,
    )


GPT = "transformer.h.{i}"
FRAME = (
    *outer("transformer.wte=model.embed_tokens transformer.wpe=model.embed_positions"),
    *outer("transformer.ln_f=model.norm"),
    *names("ln_1=input_layernorm ln_2=post_attention_layernorm", GPT),
)
BARE = ((r"^(wte|wpe|ln_f|h)\.", r"transformer.\1."),)  # without the outer module's name
LINEAR = "attn.c_proj=self_attn.o_proj mlp.c_fc=mlp.up_proj mlp.c_proj=mlp.down_proj"


def gpt2_rules(decoder: DecoderConfig, turned: bool = True) -> tuple[Rule, ...]:
    """GPT-2 keeps its projections transposed (``turned``)."""
    linear = (qkv(f"{GPT}.attn.c_attn", decoder), *names(LINEAR, GPT))
    turn = (Transposed(),) if turned else ()
    return (*FRAME, *(replace(r, transform=chain(*turn, r.transform)) for r in linear))


def _bigcode_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    return (*FRAME, qkv(f"{GPT}.attn.c_attn", decoder, grouped=True), *names(LINEAR, GPT))


NEO = names(
    "attn.attention.q_proj=self_attn.q_proj attn.attention.k_proj=self_attn.k_proj"
    " attn.attention.v_proj=self_attn.v_proj attn.attention.out_proj=self_attn.o_proj"
    " mlp.c_fc=mlp.up_proj mlp.c_proj=mlp.down_proj",
    GPT,
)
J = names(
    "attn.q_proj=self_attn.q_proj attn.k_proj=self_attn.k_proj attn.v_proj=self_attn.v_proj"
    " attn.out_proj=self_attn.o_proj mlp.fc_in=mlp.up_proj mlp.fc_out=mlp.down_proj",
    GPT,
)


def _codegen_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """Queries, values and keys, in this order, of a quarter of the heads at a time."""
    quarter = decoder.width // 4
    ours = tuple(f"{LAYER}.self_attn.{part}_proj" for part in "qvk")
    split = Split((quarter, quarter, quarter), groups=4)
    return (*FRAME, Rule((f"{GPT}.attn.qkv_proj",), ours, split), *J)


def neox_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs = "gpt_neox.layers.{i}"
    return (
        *outer("gpt_neox.embed_in=model.embed_tokens gpt_neox.final_layer_norm=model.norm"),
        *outer("embed_out=lm_head"),
        qkv(f"{theirs}.attention.query_key_value", decoder, grouped=True),
        *names(
            "attention.dense=self_attn.o_proj input_layernorm post_attention_layernorm"
            " mlp.dense_h_to_4h=mlp.up_proj mlp.dense_4h_to_h=mlp.down_proj",
            theirs,
        ),
    )


OPT = outer(
    "model.decoder.embed_tokens=model.embed_tokens"
    " model.decoder.embed_positions=model.embed_positions"
    " model.decoder.project_in=model.project_in model.decoder.project_out=model.project_out"
    " model.decoder.final_layer_norm=model.norm"
) + names(
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj=self_attn.o_proj"
    " self_attn_layer_norm=input_layernorm final_layer_norm=post_attention_layernorm"
    " fc1=mlp.up_proj fc2=mlp.down_proj",
    "model.decoder.layers.{i}",
)


def _respelled(rules: Rules, *pairs: tuple[str, str]) -> Rules:
    """The family's own rules with their names spelled otherwise, as in MLX checkpoints."""

    def spell(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    def spelled(decoder: DecoderConfig) -> tuple[Rule, ...]:
        own = resolved(rules, decoder)
        return mlx_only(*(replace(rule, sources=tuple(map(spell, rule.sources))) for rule in own))

    return spelled


WITHOUT_OUTER = ("transformer.", "model.")
MLX_GPT2 = _respelled(partial(gpt2_rules, turned=False), WITHOUT_OUTER)
MLX_NEOX = _respelled(
    neox_rules,
    ("gpt_neox.layers", "model.h"),
    ("gpt_neox.", "model."),
    ("embed_out", "model.embed_out"),
)

FAMILIES = (
    Family("gpt2", gpt2, gpt2_rules, BARE, mlx_rules=MLX_GPT2),
    Family("gpt_bigcode", gpt_bigcode, _bigcode_rules, BARE),
    Family("gpt_neo", gpt_neo, FRAME + NEO, BARE),
    Family("gpt_neox", gpt_neox, neox_rules, mlx_rules=MLX_NEOX),
    Family("gptj", gptj, FRAME + J, BARE, mlx_rules=_respelled(FRAME + J, WITHOUT_OUTER)),
    Family("codegen", gptj, _codegen_rules, BARE),
    Family("opt", opt, OPT, ((r"^decoder\.", "model.decoder."),)),
)
