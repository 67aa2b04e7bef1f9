"""Llama and the families that differ from it by biases, windows, norms or rotary layout."""

from __future__ import annotations

from typing import Any

from mlxtx.decoder.config import DecoderConfig, TemperatureConfig
from mlxtx.errors import MlxtxError
from mlxtx.families.common import (
    attention_layers,
    blocks,
    context,
    decoder,
    every,
    feed_forward,
    head_norm,
    layer_types,
    layers,
    rms_norm,
    sizes,
    windows,
)
from mlxtx.families.family import Family
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope, rope_parameters
from mlxtx.families.rules import LAYER, OUTPUT_NORMS, layer_rules


def llama_like(
    reader: ConfigReader,
    *,
    eps: float = 1e-6,
    tied: bool = False,
    refeed_beyond: int | None = None,
    **attention: Any,
) -> DecoderConfig:
    """Pre-norm blocks of attention and SwiGLU; ``attention`` are fields of ``AttentionConfig``."""
    norm = rms_norm(reader, eps)
    layers = attention_layers(reader, **attention)
    gated = feed_forward(reader, bias=reader.get("mlp_bias", default=False))
    body = blocks(layers, gated, norm)
    return decoder(reader, body, norm, tied=tied, refeed_beyond=refeed_beyond)


def biases(reader: ConfigReader, default: bool = False) -> dict[str, Any]:
    """One switch for the biases of all four projections."""
    bias = reader.get("attention_bias", "qkv_bias", default=default)
    return {"qkv_bias": bias, "output_bias": bias}


def head_dim(reader: ConfigReader, default: int | None = None) -> int:
    if default is not None and "head_dim" not in reader:
        return default
    return sizes(reader)["head_dim"]


def llama(reader: ConfigReader) -> DecoderConfig:
    rope = read_rope(reader, head_dim(reader))
    return llama_like(reader, rope=rope, **biases(reader))


def mistral(reader: ConfigReader) -> DecoderConfig:
    """A window in every layer, or in none."""
    window = reader.nullable("sliding_window", 4096)
    kinds = set(layer_types(reader))
    if len(kinds) > 1:
        raise MlxtxError(
            "config.json: layer_types differ between layers, which model_type 'ministral' has and"
            " 'mistral' has not"
        )
    return llama_like(reader, rope=read_rope(reader, head_dim(reader)), window=window)


def ministral(reader: ConfigReader) -> DecoderConfig:
    window = reader.nullable("sliding_window", 4096)
    types = layer_types(reader, ["sliding_attention"] * layers(reader) if window else None)
    return llama_like(
        reader, rope=read_rope(reader, head_dim(reader)), window=windows(reader, types, window)
    )


def ministral3(reader: ConfigReader) -> DecoderConfig:
    """Queries grow with their position, as YaRN's settings say."""
    parameters = rope_parameters(reader, theta=1e6)
    temperature = TemperatureConfig(
        beta=parameters.get("llama_4_scaling_beta") or 0.0,
        floor=parameters.get("original_max_position_embeddings") or context(reader),
    )
    return llama_like(
        reader,
        eps=1e-5,
        rope=read_rope(reader, head_dim(reader, 128), theta=1e6),
        window=reader.nullable("sliding_window", None),
        temperature=temperature if temperature.beta else None,
    )


def smollm3(reader: ConfigReader) -> DecoderConfig:
    """Every fourth layer goes without positions."""
    count = layers(reader)
    interval = reader.get("no_rope_layer_interval", default=4)
    turned = reader.get("no_rope_layers", default=[(i + 1) % interval != 0 for i in range(count)])
    on = reader.get("use_sliding_window", default=False)
    guessed = ["full_attention" if has or not on else "sliding_attention" for has in turned]
    types = layer_types(reader, guessed)
    window = reader.get("sliding_window", default=None)
    rope = read_rope(reader, head_dim(reader), theta=2e6)
    return llama_like(
        reader,
        tied=True,
        rope=[rope if has else None for has in turned],
        window=[window if on and kind == "sliding_attention" else None for kind in types],
        **biases(reader),
    )


def seed_oss(reader: ConfigReader) -> DecoderConfig:
    reader.ignore("residual_dropout")
    return llama_like(
        reader,
        head_dim=head_dim(reader, 128),
        rope=read_rope(reader, head_dim(reader, 128)),
        qkv_bias=reader.get("attention_bias", default=True),
        output_bias=reader.get("attention_out_bias", default=False),
    )


def internlm3(reader: ConfigReader) -> DecoderConfig:
    qkv = reader.get("qkv_bias", "attention_bias", default=False)
    rest = reader.get("bias", "mlp_bias", default=False)
    norm = rms_norm(reader, 1e-5)
    attention = attention_layers(
        reader,
        head_dim=head_dim(reader, 128),
        rope=read_rope(reader, head_dim(reader, 128)),
        qkv_bias=qkv,
        output_bias=rest,
    )
    return decoder(reader, blocks(attention, feed_forward(reader, bias=rest), norm), norm)


def cwm(reader: ConfigReader) -> DecoderConfig:
    types = layer_types(
        reader,
        ["sliding_attention" if i % 4 else "full_attention" for i in range(layers(reader))],
    )
    return llama_like(
        reader,
        eps=1e-5,
        head_dim=head_dim(reader, 128),
        rope=read_rope(reader, head_dim(reader, 128), theta=1e6),
        window=windows(reader, types, 8192),
    )


def helium(reader: ConfigReader) -> DecoderConfig:
    size = head_dim(reader, 128)
    rope = read_rope(reader, size, theta=1e5, fields={"interleaved": True})
    return llama_like(
        reader,
        eps=1e-8,
        head_dim=size,
        rope=rope,
        qkv_bias=reader.get("attention_bias", default=False),
    )


def ernie4_5(reader: ConfigReader) -> DecoderConfig:
    bias = reader.get("use_bias", default=False)
    size = head_dim(reader, 128)
    norm = rms_norm(reader, 1e-5)
    attention = attention_layers(
        reader,
        head_dim=size,
        rope=read_rope(reader, size, theta=5e5, fields={"interleaved": True}),
        qkv_bias=bias,
        output_bias=bias,
    )
    return decoder(
        reader, blocks(attention, feed_forward(reader, bias=bias), norm), norm, tied=True
    )


def arcee(reader: ConfigReader) -> DecoderConfig:
    """A feed-forward without gate: squared ReLU."""
    norm = rms_norm(reader, 1e-5)
    attention = attention_layers(reader, rope=read_rope(reader, head_dim(reader)), **biases(reader))
    bias = reader.get("mlp_bias", default=False)
    plain = feed_forward(reader, default="relu2", gated=False, bias=bias)
    return decoder(reader, blocks(attention, plain, norm), norm)


def apertus(reader: ConfigReader) -> DecoderConfig:
    """xIELU without gate, norms of queries and keys."""
    reader.expect("qk_norm", True)
    reader.expect("post_norm", False)
    reader.expect("mlp_bias", False)
    norm = rms_norm(reader, 1e-5)
    attention = attention_layers(
        reader,
        rope=read_rope(reader, head_dim(reader), theta=12e6),
        **biases(reader),
        **head_norm(norm),
    )
    plain = feed_forward(reader, default="xielu", gated=False)
    return decoder(reader, blocks(attention, plain, norm), norm)


def exaone4(reader: ConfigReader) -> DecoderConfig:
    """Norms behind the branches only; where some layers have windows, only those have RoPE."""
    norm = rms_norm(reader, 1e-5)
    pattern = reader.get("sliding_window_pattern", default=None)
    step = len(pattern) if isinstance(pattern, str) else pattern
    window = reader.nullable("sliding_window", 4096)
    types = layer_types(reader, every(reader, step) if window and step else None)
    size = head_dim(reader)
    rope = read_rope(reader, size)
    attention = attention_layers(
        reader,
        rope=[rope if window is None or kind == "sliding_attention" else None for kind in types],
        window=windows(reader, types, window),
        **head_norm(norm),
    )
    body = blocks(
        attention,
        feed_forward(reader),
        None,
        attention_output_norm=norm,
        feed_forward_output_norm=norm,
    )
    return decoder(reader, body, norm)


FAMILIES = (
    Family("llama", llama),
    Family("mistral", mistral),
    Family("ministral", ministral),
    Family("ministral3", ministral3),
    Family("smollm3", smollm3),
    Family("seed_oss", seed_oss),
    Family("internlm3", internlm3),
    Family("cwm", cwm),
    Family("helium", helium),
    Family("ernie4_5", ernie4_5),
    Family("arcee", arcee),
    Family(
        "apertus",
        apertus,
        layer_rules(
            LAYER,
            {
                "attention_layernorm": "input_layernorm",
                "feedforward_layernorm": "post_attention_layernorm",
            },
        ),
    ),
    Family("exaone4", exaone4, layer_rules(LAYER, OUTPUT_NORMS)),
)
