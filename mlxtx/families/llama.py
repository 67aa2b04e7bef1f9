"""Llama and the families that differ from it by biases, windows and query/key norms."""

from __future__ import annotations

from typing import Any

from mlxtx.decoder.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    FeedForwardConfig,
    HeadConfig,
    HeadNormConfig,
    NormConfig,
)
from mlxtx.families.family import Family
from mlxtx.families.reader import ConfigReader
from mlxtx.families.rope import read_rope

# transformers' names of activations -> ours
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}


def activation(reader: ConfigReader, *names: str, default: str = "silu") -> str:
    name = reader.get(*(names or ("hidden_act",)), default=default)
    return ACTIVATIONS.get(name, name)


def sizes(reader: ConfigReader) -> dict[str, Any]:
    """heads, kv_heads and head_dim under Llama's names."""
    heads = reader.get("num_attention_heads")
    return {
        "heads": heads,
        "kv_heads": reader.get("num_key_value_heads", default=heads),
        "head_dim": reader.get("head_dim", default=reader.get("hidden_size") // heads),
    }


def layer_windows(reader: ConfigReader, windowed: list[bool]) -> list[int | None]:
    """The window of each layer: ``layer_types`` where given, else ``windowed``."""
    window = reader.get("sliding_window", default=None)
    types = reader.get("layer_types", default=None)
    if types is not None:
        windowed = [kind == "sliding_attention" for kind in types]
    return [window if on else None for on in windowed]


def decoder(
    reader: ConfigReader,
    blocks: list[BlockConfig],
    norm: NormConfig,
    *,
    tied: bool = False,
    head: dict[str, Any] | None = None,
    **extra: Any,
) -> DecoderConfig:
    """What is the same in most families: sizes, the final norm and the head."""
    return DecoderConfig(
        vocabulary=reader.get("vocab_size"),
        width=reader.get("hidden_size"),
        context=reader.get("max_position_embeddings"),
        blocks=tuple(blocks),
        final_norm=norm,
        head=HeadConfig(tied=reader.get("tie_word_embeddings", default=tied), **(head or {})),
        **extra,
    )


def _llama_like(
    reader: ConfigReader,
    *,
    windowed: bool = False,
    qkv_bias: bool | None = None,
    output_bias: bool | None = None,
    head_norm: bool = False,
    theta: float = 10000.0,
) -> DecoderConfig:
    layers = reader.get("num_hidden_layers")
    norm = NormConfig(eps=reader.get("rms_norm_eps", default=1e-6))
    shape = sizes(reader)
    bias = reader.get("attention_bias", default=False)
    each_head = HeadNormConfig(norm=norm) if head_norm else None
    windows = layer_windows(reader, [windowed] * layers)
    rope = read_rope(
        reader, shape["head_dim"], context=reader.get("max_position_embeddings"), theta=theta
    )
    feed_forward = FeedForwardConfig(
        width=reader.get("intermediate_size"),
        activation=activation(reader),
        bias=reader.get("mlp_bias", default=False),
    )
    blocks = [
        BlockConfig(
            attention=AttentionConfig(
                **shape,
                rope=rope,
                qkv_bias=bias if qkv_bias is None else qkv_bias,
                output_bias=bias if output_bias is None else output_bias,
                q_norm=each_head,
                k_norm=each_head,
                window=window,
            ),
            feed_forward=feed_forward,
            attention_norm=norm,
            feed_forward_norm=norm,
        )
        for window in windows
    ]
    return decoder(reader, blocks, norm)


def llama(reader: ConfigReader) -> DecoderConfig:
    return _llama_like(reader)


def mistral(reader: ConfigReader) -> DecoderConfig:
    return _llama_like(reader, windowed=True, qkv_bias=False, output_bias=False)


def _qwen_windows(reader: ConfigReader) -> None:
    """Qwen's window counts only when it is switched on, and from a given layer on."""
    layers = reader.get("num_hidden_layers")
    first = reader.get("max_window_layers", default=28)
    if not reader.get("use_sliding_window", default=False):
        reader.config["sliding_window"] = None
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    reader.config.setdefault("layer_types", types)


def qwen2(reader: ConfigReader) -> DecoderConfig:
    _qwen_windows(reader)
    return _llama_like(reader, qkv_bias=True, output_bias=False)


def qwen3(reader: ConfigReader) -> DecoderConfig:
    _qwen_windows(reader)
    reader.config.setdefault("head_dim", 128)
    return _llama_like(reader, head_norm=True)


FAMILIES = (
    Family("llama", llama),
    Family("mistral", mistral),
    Family("qwen2", qwen2),
    Family("qwen3", qwen3),
)
