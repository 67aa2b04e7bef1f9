"""Granite: multipliers on embeddings, scores, residuals and logits; dense or with experts."""

from __future__ import annotations

from mlxtx.decoder.config import DecoderConfig, EmbeddingConfig, ExpertsConfig, RouterConfig
from mlxtx.families.common import (
    attention_layers,
    blocks,
    decoder,
    feed_forward,
    rms_norm,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import biases, head_dim
from mlxtx.families.names import Rule, rename
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope
from mlxtx.families.rules import LAYER, experts_of, gate_up_rule
from mlxtx.families.transforms import Split


def _granite(reader: ConfigReader, body) -> DecoderConfig:
    norm = rms_norm(reader)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader)),
        scale=float(reader.get("attention_multiplier", default=1.0)),
        **biases(reader),
    )
    multiplier = float(reader.get("residual_multiplier", default=1.0))
    return decoder(
        reader,
        blocks(attention, body, norm, residual_multiplier=multiplier),
        norm,
        embedding=EmbeddingConfig(
            multiplier=float(reader.get("embedding_multiplier", default=1.0))
        ),
        head={"multiplier": 1.0 / reader.get("logits_scaling", default=1.0)},
    )


def granite(reader: ConfigReader) -> DecoderConfig:
    return _granite(reader, feed_forward(reader, bias=reader.get("mlp_bias", default=False)))


def _experts(reader: ConfigReader, **fields) -> ExpertsConfig:
    reader.ignore("router_aux_loss_coef", "output_router_logits")
    return ExpertsConfig(
        count=reader.get("num_local_experts", default=8),
        per_token=reader.get("num_experts_per_tok", default=2),
        expert=feed_forward(reader),
        router=RouterConfig(scores="softmax_chosen"),
        **fields,
    )


def granitemoe(reader: ConfigReader) -> DecoderConfig:
    return _granite(reader, _experts(reader))


def granitemoeshared(reader: ConfigReader) -> DecoderConfig:
    """Experts, and one feed-forward that every token goes through."""
    size = reader.get("shared_intermediate_size", default=0)
    shared = feed_forward(reader, size) if size else None
    return _granite(reader, _experts(reader, shared=shared))


def _expert_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs, ours = f"{LAYER}.block_sparse_moe", f"{LAYER}.mlp"
    experts = experts_of(decoder)
    width = experts.expert.width
    rules = (
        rename(f"{theirs}.router.layer", f"{ours}.gate"),
        Rule(
            (f"{theirs}.input_linear",),
            (f"{ours}.switch_mlp.gate_proj", f"{ours}.switch_mlp.up_proj"),
            Split((width, width)),
        ),
        rename(f"{theirs}.output_linear", f"{ours}.switch_mlp.down_proj"),
    )
    if experts.shared is None:
        return rules
    return (
        *rules,
        gate_up_rule(
            f"{LAYER}.shared_mlp.input_linear", experts.shared.width, "mlp.shared_experts"
        ),
        rename(f"{LAYER}.shared_mlp.output_linear", f"{ours}.shared_experts.down_proj"),
    )


FAMILIES = (
    Family("granite", granite),
    Family("granitemoe", granitemoe, _expert_rules),
    Family("granitemoeshared", granitemoeshared, _expert_rules),
)
