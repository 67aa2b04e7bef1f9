"""Where published MLX checkpoints have names of their own: families whose stacked experts stand
elsewhere than ``mlp.switch_mlp``, and GPT-2, whose projections are no longer transposed there.

Names as mlx-lm 0.32 reads and writes them (the ``sanitize`` functions of its models).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mlxtx.decoder.config import DecoderConfig
from mlxtx.families.common import attention_of
from mlxtx.naming.map import Rule, stacked_experts
from mlxtx.naming.rules import LAYER, names, qkv
from mlxtx.naming.transforms import Reshaped

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


def _respelled(rules: tuple[Rule, ...], *pairs: tuple[str, str]) -> tuple[Rule, ...]:
    """The family's own rules with their names spelled otherwise."""

    def spell(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return _mlx(*(replace(rule, sources=tuple(map(spell, rule.sources))) for rule in rules))


def _gpt2(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """GPT-2's own modules with nothing transposed."""
    from mlxtx.families.gpt import FRAME, GPT, LINEAR

    fused = qkv(f"{GPT}.attn.c_attn", attention_of(decoder))
    return _respelled((*FRAME, fused, *names(LINEAR, GPT)), ("transformer.", "model."))


def _gptj(decoder: DecoderConfig) -> tuple[Rule, ...]:
    from mlxtx.families.gpt import FRAME, J

    return _respelled(FRAME + J, ("transformer.", "model."))


def _neox(decoder: DecoderConfig) -> tuple[Rule, ...]:
    from mlxtx.families.gpt import neox_rules

    pairs = (
        ("gpt_neox.layers", "model.h"),
        ("gpt_neox.", "model."),
        ("embed_out", "model.embed_out"),
    )
    return _respelled(neox_rules(decoder), *pairs)


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
            layout="mlx",
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
    "gpt_neox": _neox,
    "gpt_oss": _experts_at("mlp.experts", "mlp.switch_mlp", "mlp.router=mlp.gate"),
    "gptj": _gptj,
    "granitemoe": _BLOCK_SPARSE,
    "granitemoeshared": _BLOCK_SPARSE,
    "llama4_text": _experts_at("feed_forward.experts"),
    "minicpm3": _latent,
    "minimax_m2": _BLOCK_SPARSE,
    "mixtral": _BLOCK_SPARSE,
    "phimoe": _BLOCK_SPARSE,
}


def mlx_rules(model_type: str, decoder: DecoderConfig) -> tuple[Rule, ...]:
    """The rules of a family for MLX's layout, in front of its own."""
    return RULES[model_type](decoder) if model_type in RULES else ()
