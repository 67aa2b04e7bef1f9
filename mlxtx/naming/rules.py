"""Rules that many checkpoints need: renamed modules, fused projections, experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from mlxtx.naming.map import Rule, rename
from mlxtx.naming.transforms import Same, Split, Stacked, Transform

if TYPE_CHECKING:
    from mlxtx.decoder.config import AttentionConfig, DecoderConfig

LAYER = "model.layers.{i}"


def names(pairs: str, theirs: str = LAYER) -> tuple[Rule, ...]:
    """Modules of a layer under other names: ``a=b`` ties ``theirs.a`` to our ``b``, ``a`` alone
    to our ``a``; pairs are separated by spaces."""
    split = [(pair.split("=")[0], pair.split("=")[-1]) for pair in pairs.split()]
    return tuple(rename(f"{theirs}.{a}", f"{LAYER}.{b}") for a, b in split)


def outer(pairs: str) -> tuple[Rule, ...]:
    """Modules outside the layers: ``a=b`` ties their ``a`` to our ``b``."""
    split = [pair.split("=") for pair in pairs.split()]
    return tuple(rename(theirs, ours) for theirs, ours in split)


def tensor(theirs: str, ours: str, transform: Transform | None = None) -> Rule:
    """One tensor of a layer that is no weight or bias of a module."""
    return Rule((f"{LAYER}.{theirs}",), (f"{LAYER}.{ours}",), transform or Same(), single=True)


def mlx_only(*rules: Rule) -> tuple[Rule, ...]:
    """The rules for names that only published MLX checkpoints have (as mlx-lm 0.32 reads and
    writes them, in the ``sanitize`` functions of its models)."""
    return tuple(replace(rule, layout="mlx") for rule in rules)


def experts_at(theirs: str, ours: str = "mlp.switch_mlp", *others: str) -> tuple[Rule, ...]:
    """Stacked experts of a layer under ``theirs`` in MLX checkpoints; ``others`` are more pairs
    ``a=b``."""
    pairs = [f"{theirs}.{part}={ours}.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    return mlx_only(*names(" ".join([*pairs, *others])))


def qkv(theirs: str, decoder: DecoderConfig, *, grouped: bool = False) -> Rule:
    """One projection for queries, keys and values: [q; k; v], or ``grouped`` by key-value head,
    each with its queries in front ([q k v] of each head when every head has its own). The first
    layer's sizes are those of all."""
    attention = cast("AttentionConfig", decoder.blocks[0].attention)
    heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.head_dim
    split = Split((heads * dim, kv_heads * dim, kv_heads * dim))
    if grouped:
        split = Split((heads // kv_heads * dim, dim, dim), groups=kv_heads)
    return Rule((theirs,), tuple(f"{LAYER}.self_attn.{part}_proj" for part in "qkv"), split)


def gate_up(theirs: str, width: int, ours: str = "mlp") -> Rule:
    """One projection for gate and up, gate first."""
    parts = tuple(f"{LAYER}.{ours}.{part}_proj" for part in ("gate", "up"))
    return Rule((f"{LAYER}.{theirs}",), parts, Split((width, width)))


def experts(theirs: str = "mlp.experts", parts: str = "gate_proj up_proj down_proj") -> tuple:
    """One module an expert, ``theirs.{e}``, with these names for gate, up and down."""
    return tuple(
        Rule(
            (f"{LAYER}.{theirs}.{{e}}.{part}",),
            (f"{LAYER}.mlp.switch_mlp.{our}_proj",),
            Stacked(),
            layout="hf",
        )
        for our, part in zip(("gate", "up", "down"), parts.split(), strict=True)
    )


def shared_expert(theirs: str) -> tuple[Rule, ...]:
    """The shared expert under another name."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return names(" ".join(f"{theirs}.{part}=mlp.shared_experts.{part}" for part in parts))


CORRECTION = "mlp.gate.e_score_correction_bias"

# Norms behind the branches, as OLMo 2 and Gemma 2 call them.
OUTPUT_NORMS = names(
    "post_attention_layernorm=attention_output_layernorm"
    " post_feedforward_layernorm=feed_forward_output_layernorm"
)
