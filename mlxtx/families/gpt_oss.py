"""gpt-oss and Llama 4: experts in one tensor a layer, with attention that sees windows or chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlxtx.decoder.config import DecoderConfig, ExpertsConfig, TemperatureConfig
from mlxtx.families.common import FULL, HubConfig, first, head_norm
from mlxtx.families.family import Family
from mlxtx.families.llama import INTERLEAVED, llama
from mlxtx.naming.map import Rule, rename
from mlxtx.naming.rules import LAYER, experts_at, names, shared_expert
from mlxtx.naming.transforms import Blocks, Split, Transposed, chain

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def gpt_oss(config: HubConfig) -> DecoderConfig:
    """Sinks, a window in every other layer, experts with biases and a clipped SwiGLU."""
    config.ignore("initial_context_length experts_per_token")
    clip = config.get("swiglu_limit", default=7.0)
    alpha = config.get("swiglu_alpha", default=1.702)
    expert = config.feed_forward(bias=True)
    clipped = {"expert": expert, "clip": clip, "clip_alpha": alpha}
    sparse = config.experts(fields=clipped, normalize=True, bias=True)
    window = config.windows(config.layer_types(config.every(2)), 128)
    rope = {"theta": 150000.0, "otherwise": YARN}
    attention: dict[str, Any] = {"window": window, "sinks": True, "bias": config.bias(True)}
    return llama(config, 1e-5, 64, rope=rope, feed_forward=sparse, **attention)


def _gpt_oss_rules(packed: bool) -> Callable[[DecoderConfig], tuple[Rule, ...]]:
    """Gate and up alternate in one tensor. Plain weights are [E, in, out]; packed ones [E, out,
    in] in blocks, with a scale for each block."""
    theirs, ours = f"{LAYER}.mlp.experts", f"{LAYER}.mlp.switch_mlp"

    def both(ending: str) -> tuple[str, ...]:
        return tuple(f"{ours}.{part}_proj.{ending}" for part in ("gate", "up"))

    def rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
        pairs = Split((1, 1), groups=first(ExpertsConfig, decoder).expert.width)
        turn, ending = (Blocks(), "_blocks") if packed else (Transposed(), "")
        return (
            *names("mlp.router=mlp.gate"),
            Rule((f"{theirs}.gate_up_proj{ending}",), both("weight"), chain(turn, pairs)),
            Rule((f"{theirs}.down_proj{ending}",), (f"{ours}.down_proj.weight",), turn),
            Rule((f"{theirs}.gate_up_proj_scales",), both("scales"), pairs),
            rename(f"{theirs}.down_proj_scales", f"{ours}.down_proj.scales"),
            Rule((f"{theirs}.gate_up_proj_bias",), both("bias"), pairs),
            rename(f"{theirs}.down_proj_bias", f"{ours}.down_proj.bias"),
        )

    return rules


def llama4_text(config: HubConfig) -> DecoderConfig:
    """Three layers that see chunks to one that sees everything, has no positions and lets queries
    grow; the router's scores multiply what goes into an expert."""
    config.ignore("for_llm_compressor")
    norm, count, size = config.rms_norm(1e-5), config.layers, config.head_dim(128)
    interval = config.get("no_rope_layer_interval", default=4)
    fourth = [(i + 1) % interval != 0 for i in range(count)]
    turned = config.get("no_rope_layers", default=None) or fourth
    types = config.layer_types(["chunked_attention" if has else FULL for has in turned])
    rope = config.rope(size, theta=5e5, fields=INTERLEAVED)
    chunk = config.nullable("attention_chunk_size", 8192)
    beta = config.get("attn_scale", default=0.1)
    floor = config.get("floor_scale", default=8192)
    tuned = config.get("attn_temperature_tuning", default=True)
    grown = TemperatureConfig(beta=beta, floor=floor, shift=1.0) if tuned else None
    normed = config.get("use_qk_norm", default=True)
    own = head_norm(replace(norm, weight=False)) if normed else {}
    plain = config.attention(
        head_dim=size,
        rope=[rope if has else None for has in turned],
        norm_after_rope=True,
        bias=config.bias(),
    )
    attention = [
        replace(
            layer,
            chunk=chunk if kind == "chunked_attention" else None,
            **(own if has else {"temperature": grown}),
        )
        for layer, has, kind in zip(plain, turned, types, strict=True)
    ]
    expert = config.feed_forward()
    config.config.setdefault("num_experts_per_tok", 1)
    sparse = config.experts(shared=expert, fields={"scale_input": True}, scores="sigmoid")
    dense = config.feed_forward(config.get("intermediate_size_mlp", default=16384))
    step = config.get("interleave_moe_layer_step", default=1)
    listed = config.nullable("moe_layers", None)
    chosen = range(step - 1, count, step) if listed is None else listed
    body = [sparse if i in chosen else dense for i in range(count)]
    return config.decoder(norm, body, layers=attention)


def _llama4_rules(decoder: DecoderConfig) -> tuple[Rule, ...]:
    theirs, ours = f"{LAYER}.feed_forward.experts", f"{LAYER}.mlp.switch_mlp"
    width = first(ExpertsConfig, decoder).expert.width
    both = tuple(f"{ours}.{part}_proj.weight" for part in ("gate", "up"))
    return (
        Rule((f"{theirs}.gate_up_proj",), both, chain(Transposed(), Split((width, width)))),
        Rule((f"{theirs}.down_proj",), (f"{ours}.down_proj.weight",), Transposed()),
        *shared_expert("feed_forward.shared_expert"),
        *names(
            "feed_forward.router=mlp.gate feed_forward.gate_proj=mlp.gate_proj"
            " feed_forward.up_proj=mlp.up_proj feed_forward.down_proj=mlp.down_proj"
        ),
    )


FAMILIES = (
    Family(
        "gpt_oss",
        gpt_oss,
        _gpt_oss_rules(False),
        packed_rules=_gpt_oss_rules(True),
        mlx_rules=experts_at("mlp.experts", "mlp.switch_mlp", "mlp.router=mlp.gate"),
    ),
    Family(
        "llama4_text",
        llama4_text,
        _llama4_rules,
        mlx_rules=experts_at("feed_forward.experts"),
    ),
)
