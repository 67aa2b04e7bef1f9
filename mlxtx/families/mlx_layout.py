"""Where published MLX checkpoints have names of their own: families whose stacked experts stand
elsewhere than ``mlp.switch_mlp``, and GPT-2, whose projections are no longer transposed there.

Names as mlx-lm 0.32 reads and writes them (the ``sanitize`` functions of its models).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mlxtx.decoder.config import DecoderConfig
from mlxtx.families.names import Rule, stacked_experts
from mlxtx.families.rules import LAYER, attention_of, names, outer, qkv
from mlxtx.families.transforms import Reshaped

Rules = Callable[[DecoderConfig], tuple[Rule, ...]]


def _mlx(*rules: Rule) -> tuple[Rule, ...]:
    return tuple(replace(rule, layout="mlx") for rule in rules)


def _experts_at(theirs: str, ours: str = "mlp.switch_mlp", *others: str) -> Rules:
    """Stacked experts of a layer under ``theirs``; ``others`` are more pairs ``a=b``."""
    pairs = [f"{theirs}.{part}={ours}.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    rules = _mlx(*names(" ".join([*pairs, *others])))
    return lambda decoder: rules


def _dbrx(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """One module an expert, although the family itself keeps all in one tensor."""
    theirs = "transformer.blocks.{i}.ffn.experts.{e}"
    parts = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}
    return _mlx(*stacked_experts(theirs, f"{LAYER}.mlp.switch_mlp", parts))


def _gpt2(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs = "model.h.{i}"
    return _mlx(
        *outer("model.wte=model.embed_tokens model.wpe=model.embed_positions"),
        *outer("model.ln_f=model.norm"),
        qkv(f"{theirs}.attn.c_attn", attention_of(decoder)),
        *names(
            "ln_1=input_layernorm ln_2=post_attention_layernorm attn.c_proj=self_attn.o_proj"
            " mlp.c_fc=mlp.up_proj mlp.c_proj=mlp.down_proj",
            theirs,
        ),
    )


def _latent(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """The expansion of latent rows in one piece, as the families themselves have it."""
    from mlxtx.families.deepseek import latent_rules

    return _mlx(*(rule for rule in latent_rules(decoder) if "kv_b_proj" in rule.sources[0]))


def _apertus(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """xIELU's strengths as numbers without an axis."""
    return tuple(
        Rule(
            (f"{LAYER}.mlp.act_fn.{name}",),
            (f"{LAYER}.mlp.act_fn.{name}",),
            Reshaped((), (1,)),
            layout="read",
            when=lambda shape: shape == (),
            single=True,
        )
        for name in ("alpha_p", "alpha_n")
    )


_BLOCK_SPARSE = _experts_at("block_sparse_moe.switch_mlp")

RULES: dict[str, Rules] = {
    "afmoe": _experts_at("mlp.experts"),
    "apertus": _apertus,
    "dbrx": _dbrx,
    "deepseek_v2": _latent,
    "dots1": _experts_at("mlp.experts"),
    "gemma4_text": _experts_at("experts.switch_glu", "experts.switch_mlp"),
    "gpt2": _gpt2,
    "gpt_oss": _experts_at("mlp.experts", "mlp.switch_mlp", "mlp.router=mlp.gate"),
    "granitemoe": _BLOCK_SPARSE,
    "granitemoeshared": _BLOCK_SPARSE,
    "llama4_text": _experts_at("feed_forward.experts"),
    "minicpm3": _latent,
    "minimax_m2": _BLOCK_SPARSE,
    "mixtral": _BLOCK_SPARSE,
    "phimoe": _BLOCK_SPARSE,
}

# Other spellings in MLX checkpoints: (pattern, replacement), see ``NameMap.aliases``.
ALIASES: dict[str, tuple[tuple[str, str], ...]] = {
    "gptj": ((r"^model\.(wte|ln_f|h)\.", r"transformer.\1."),),
    "gpt_neox": (
        (r"^model\.h\.", "gpt_neox.layers."),
        (r"^model\.(embed_in|final_layer_norm)\.", r"gpt_neox.\1."),
        (r"^model\.embed_out\.", "embed_out."),
    ),
}


def mlx_rules(model_type: str, decoder: DecoderConfig) -> tuple[Rule, ...]:
    """The rules of a family for MLX's layout, in front of its own."""
    return RULES[model_type](decoder) if model_type in RULES else ()
