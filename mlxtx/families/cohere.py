"""Command R: attention and feed-forward side by side behind one LayerNorm without bias."""

from __future__ import annotations

from mlxtx.decoder.config import DecoderConfig
from mlxtx.families.common import (
    attention_layers,
    blocks,
    decoder,
    every,
    feed_forward,
    head_norm,
    layer_norm,
    layer_types,
    windows,
)
from mlxtx.families.family import Family
from mlxtx.families.llama import biases, head_dim
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope

INTERLEAVED = {"interleaved": True}


def _parallel(reader: ConfigReader, norm, **attention) -> DecoderConfig:
    body = blocks(
        attention_layers(reader, **biases(reader), **attention),
        feed_forward(reader),
        norm,
        form="parallel",
        feed_forward_norm=None,
    )
    scale = reader.get("logit_scale", default=0.0625)
    return decoder(reader, body, norm, tied=True, head={"multiplier": scale})


def cohere(reader: ConfigReader) -> DecoderConfig:
    norm = layer_norm(reader, bias=False)
    own = head_norm(norm, "each_head") if reader.get("use_qk_norm", default=False) else {}
    rope = read_rope(reader, head_dim(reader), theta=5e5, fields=INTERLEAVED)
    return _parallel(reader, norm, rope=rope, **own)


def cohere2(reader: ConfigReader) -> DecoderConfig:
    """Layers with a window have RoPE, layers that see everything have no positions."""
    reader.expect("position_embedding_type", "rope_gptj")
    reader.expect("order_of_interleaved_layers", "local_attn_first")
    reader.expect("rotary_pct", 1.0)
    for name in ("use_embedding_sharing", "use_gated_activation", "use_parallel_block"):
        reader.expect(name, True)
    for name in ("use_parallel_embedding", "use_qk_norm"):
        reader.expect(name, False)
    norm = layer_norm(reader, bias=False)
    step = reader.get(
        "sliding_window_pattern", "_sliding_window_pattern", "layer_switch", default=4
    )
    types = layer_types(reader, every(reader, step))
    rope = read_rope(reader, head_dim(reader), fields=INTERLEAVED)
    return _parallel(
        reader,
        norm,
        rope=[rope if kind == "sliding_attention" else None for kind in types],
        window=windows(reader, types, 4096),
    )


FAMILIES = (Family("cohere", cohere), Family("cohere2", cohere2))
