"""Small checkpoints on disk for the tests, written without the code under test."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

# How each generation calls "model." and "lm_head." of the text part.
SPELLINGS = {
    "transformers 4 and mlx-lm": ("language_model.model.", "language_model.lm_head."),
    "transformers 5": ("model.language_model.", "lm_head."),
    "Idefics": ("model.text_model.", "lm_head."),
    "Idefics in MLX": ("language_model.", "language_model.lm_head."),
}
OTHER_PARTS = (
    "vision_tower.blocks.0.attn.qkv.weight", "multi_modal_projector.linear_1.weight",
    "model.vision_tower.embed_tokens.weight", "model.visual.layers.0.norm.weight",
    "model.audio_tower.layers.0.mlp.up_proj.weight", "embed_vision.norm.weight",
)  # fmt: skip
QUANTIZED = ("quantization", "quantization_config")


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (JSON, or the bytes themselves) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def save(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Tensors as (format's type name, array of the same item size)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    raw_file(path, header, data)


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width)
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (width,),
            layer + "self_attn.q_proj.weight": (width, width),
            layer + "self_attn.k_proj.weight": (kv, width),
            layer + "self_attn.v_proj.weight": (kv, width),
            layer + "self_attn.o_proj.weight": (width, width),
            layer + "post_attention_layernorm.weight": (width,),
            layer + "mlp.gate_proj.weight": (inner, width),
            layer + "mlp.up_proj.weight": (inner, width),
            layer + "mlp.down_proj.weight": (width, inner),
        }
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def llama_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (
            1 + 0.1 * rng.standard_normal(shape)
            if "norm" in name
            else rng.standard_normal(shape) / np.sqrt(shape[-1])
        ).astype(np.float32)
        for name, shape in llama_shapes(config).items()
    }


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as the 16 bits that are stored."""
    return np.array(mx.array(array).astype(mx.bfloat16).view(mx.uint16))


def write_llama(
    folder: Path, *, dtype: str = "F32", seed: int = 0, **changes: Any
) -> dict[str, np.ndarray]:
    """A llama checkpoint in one file; returns its weights as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LLAMA | changes
    weights = llama_weights(config, seed)
    if dtype == "BF16":
        save(folder / "model.safetensors", {n: (dtype, bfloat16(w)) for n, w in weights.items()})
        config["torch_dtype"] = "bfloat16"
    elif dtype == "F16":
        halves = {n: (dtype, w.astype(np.float16)) for n, w in weights.items()}
        save(folder / "model.safetensors", halves)
        config["torch_dtype"] = "float16"
    else:
        save(folder / "model.safetensors", {n: (dtype, w) for n, w in weights.items()})
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def shard(folder: Path, parts: int = 2) -> None:
    """Split ``model.safetensors`` in ``folder`` into shards with an index."""
    loaded = mx.load(str(folder / "model.safetensors"))
    names = list(loaded)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = {name: loaded[name] for name in names[part::parts]}
        mx.save_safetensors(str(folder / file), mine)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def respelled(name: str, spelling: str) -> str:
    for ours, theirs in zip(("model.", "lm_head."), SPELLINGS[spelling], strict=True):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def wrap(source: Path, target: Path, spelling: str, **outer: Any) -> Path:
    """The checkpoint of ``source`` as the text part of a multimodal one."""
    target.mkdir()
    text = json.loads((source / "config.json").read_text())
    config = {"model_type": "looking_glass", "architectures": ["LookingGlass"], **outer}
    for key in QUANTIZED:
        if key in text:
            table = text.pop(key)
            config[key] = {
                respelled(f"{path}.", spelling).removesuffix(".") if "." in path else path: entry
                for path, entry in table.items()
            }
            config[key]["vision_tower.blocks.0.attn.qkv"] = {"group_size": 64, "bits": 8}
    if "torch_dtype" in text:
        config["torch_dtype"] = text.pop("torch_dtype")
    config |= {"text_config": text, "vision_config": {"model_type": "eye", "hidden_size": 3}}
    (target / "config.json").write_text(json.dumps(config))
    stored = mx.load(str(source / "model.safetensors"))
    weights = {respelled(name, spelling): values for name, values in stored.items()}
    weights |= dict.fromkeys(OTHER_PARTS, mx.full((3, 5), float("nan")))
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "pt"})
    return target
