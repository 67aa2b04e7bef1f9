"""Name rules that families share: fused projections, experts and shared experts of a layer."""

from __future__ import annotations

from collections.abc import Mapping

from mlxtx.decoder.config import AttentionConfig, DecoderConfig, ExpertsConfig, FeedForwardConfig
from mlxtx.families.names import Layout, Rule, rename, stacked_experts
from mlxtx.families.transforms import Same, Split, Transform

LAYER = "model.layers.{i}"
GATED = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
W123 = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # Mixtral's names of the same


def attention_of(decoder: DecoderConfig) -> AttentionConfig:
    """The first layer's attention, for families in which all layers have the same sizes."""
    attention = decoder.blocks[0].attention
    assert isinstance(attention, AttentionConfig)
    return attention


def feed_forward_of(decoder: DecoderConfig) -> FeedForwardConfig:
    """The first dense feed-forward of a family."""
    return next(
        block.feed_forward
        for block in decoder.blocks
        if isinstance(block.feed_forward, FeedForwardConfig)
    )


def experts_of(decoder: DecoderConfig) -> ExpertsConfig:
    """The first mixture of experts of a family."""
    return next(
        block.feed_forward
        for block in decoder.blocks
        if isinstance(block.feed_forward, ExpertsConfig)
    )


def layer_rules(
    theirs: str, pairs: Mapping[str, str], layout: Layout | None = None
) -> tuple[Rule, ...]:
    """Modules of a layer under other names: ``theirs.<key>`` <-> ``model.layers.{i}.<value>``."""
    return tuple(rename(f"{theirs}.{a}", f"{LAYER}.{b}", layout) for a, b in pairs.items())


def qkv_rule(theirs: str, attention: AttentionConfig, *, grouped: bool = False) -> Rule:
    """One projection for queries, keys and values: [q; k; v], or ``grouped`` by key-value head,
    each with its queries in front ([q k v] of each head when every head has its own)."""
    heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.head_dim
    split = Split((heads * dim, kv_heads * dim, kv_heads * dim))
    if grouped:
        split = Split((heads // kv_heads * dim, dim, dim), groups=kv_heads)
    ours = tuple(f"{LAYER}.self_attn.{part}_proj" for part in "qkv")
    return Rule((theirs,), ours, split)


def gate_up_rule(theirs: str, width: int, ours: str = "mlp") -> Rule:
    """One projection for gate and up, gate first."""
    return Rule(
        (theirs,), (f"{LAYER}.{ours}.gate_proj", f"{LAYER}.{ours}.up_proj"), Split((width, width))
    )


def expert_rules(theirs: str = "mlp.experts", names: Mapping[str, str] = GATED) -> tuple[Rule, ...]:
    """One module an expert: ``theirs.{e}.<name>`` of a layer."""
    return stacked_experts(f"{LAYER}.{theirs}.{{e}}", f"{LAYER}.mlp.switch_mlp", names)


def shared_expert_rules(theirs: str) -> tuple[Rule, ...]:
    """The shared expert under another name."""
    return layer_rules(LAYER, {f"{theirs}.{part}": f"mlp.shared_experts.{part}" for part in GATED})


def tensor_rule(theirs: str, ours: str, transform: Transform | None = None) -> Rule:
    """One tensor of a layer that is no weight or bias of a module."""
    return Rule((f"{LAYER}.{theirs}",), (f"{LAYER}.{ours}",), transform or Same(), single=True)


CORRECTION = "mlp.gate.e_score_correction_bias"

# Norms behind the branches, as OLMo 2 and Gemma 2 call them.
OUTPUT_NORMS = {
    "post_attention_layernorm": "attention_output_layernorm",
    "post_feedforward_layernorm": "feed_forward_output_layernorm",
}
