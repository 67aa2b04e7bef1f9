"""Where published MLX checkpoints have names of their own: families whose stacked experts stand
elsewhere than ``mlp.switch_mlp``, and GPT-2, whose projections are no longer transposed there.

Names as mlx-lm 0.32 reads and writes them (the ``sanitize`` functions of its models).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mlxtx.decoder.config import DecoderConfig
from mlxtx.families.deepseek import latent_rules
from mlxtx.families.family import Rules, resolved
from mlxtx.families.gpt import FRAME, J, gpt2_rules, neox_rules
from mlxtx.naming.map import Rule, stacked_experts
from mlxtx.naming.rules import LAYER, names, tensor
from mlxtx.naming.transforms import Reshaped


def _mlx(*rules: Rule) -> tuple[Rule, ...]:
    return tuple(replace(rule, layout="mlx") for rule in rules)


def _experts_at(theirs: str, ours: str = "mlp.switch_mlp", *others: str) -> tuple[Rule, ...]:
    """Stacked experts of a layer under ``theirs``; ``others`` are more pairs ``a=b``."""
    pairs = [f"{theirs}.{part}={ours}.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    return _mlx(*names(" ".join([*pairs, *others])))


def _respelled(rules: Rules, *pairs: tuple[str, str]) -> Rules:
    """The family's own rules with their names spelled otherwise."""

    def spell(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    def spelled(decoder: DecoderConfig) -> tuple[Rule, ...]:
        own = resolved(rules, decoder)
        return _mlx(*(replace(rule, sources=tuple(map(spell, rule.sources))) for rule in own))

    return spelled


def _latent(decoder: DecoderConfig) -> tuple[Rule, ...]:
    """The expansion of latent rows in one piece, as the families themselves have it."""
    return _mlx(*(rule for rule in latent_rules(decoder) if "kv_b_proj" in rule.sources[0]))


# One module an expert, although the family itself keeps all in one tensor.
_DBRX = stacked_experts(
    "transformer.blocks.{i}.ffn.experts.{e}",
    f"{LAYER}.mlp.switch_mlp",
    {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"},
)
# xIELU's strengths as numbers without an axis.
_APERTUS = tuple(
    replace(tensor(name, name, Reshaped((), (1,))), when=lambda shape: shape == ())
    for name in ("mlp.act_fn.alpha_p", "mlp.act_fn.alpha_n")
)
_WITHOUT_OUTER = (("transformer.", "model."),)
_NEOX = (("gpt_neox.layers", "model.h"), ("gpt_neox.", "model."), ("embed_out", "model.embed_out"))
_BLOCK_SPARSE = _experts_at("block_sparse_moe.switch_mlp")

RULES: dict[str, Rules] = {
    "afmoe": _experts_at("mlp.experts"),
    "apertus": _mlx(*_APERTUS),
    "dbrx": _mlx(*_DBRX),
    "deepseek_v2": _latent,
    "dots1": _experts_at("mlp.experts"),
    "gemma4_text": _experts_at("experts.switch_glu", "experts.switch_mlp"),
    "gpt2": _respelled(partial(gpt2_rules, turned=False), *_WITHOUT_OUTER),
    "gpt_neox": _respelled(neox_rules, *_NEOX),
    "gpt_oss": _experts_at("mlp.experts", "mlp.switch_mlp", "mlp.router=mlp.gate"),
    "gptj": _respelled(FRAME + J, *_WITHOUT_OUTER),
    "granitemoe": _BLOCK_SPARSE,
    "granitemoeshared": _BLOCK_SPARSE,
    "llama4_text": _experts_at("feed_forward.experts"),
    "minicpm3": _latent,
    "minimax_m2": _BLOCK_SPARSE,
    "mixtral": _BLOCK_SPARSE,
    "phimoe": _BLOCK_SPARSE,
}
