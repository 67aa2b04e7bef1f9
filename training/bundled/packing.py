"""From the trained float32 weights to the checkpoint that is shipped, with its model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtx.decoder.config import DecoderConfig
from mlxtx.families import family_for
from mlxtx.files import write_bytes_atomic
from mlxtx.text.tokenizer import Tokenizer
from training.bundled.vocabulary import END

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
GROUP = 64


def decoder_config(config: dict[str, Any], heads: int) -> DecoderConfig:
    """The decoder, with extra prediction heads or without: a checkpoint has those it holds."""
    return family_for(config).decoder_config(dict(config), ["eh_proj.weight"] * heads)


def load_weights(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))


def rounded(weights: dict[str, mx.array], bits: int | None) -> dict[str, mx.array]:
    """Float32 weights as they are after ``bits`` (16: bf16, None: as they are) and back."""
    if bits is None:
        return weights
    if bits == 16:
        return {name: w.astype(mx.bfloat16).astype(mx.float32) for name, w in weights.items()}
    return {name: _through(w, bits) if w.ndim == 2 else w for name, w in weights.items()}


def _through(weight: mx.array, bits: int) -> mx.array:
    codes = mx.quantize(weight, group_size=GROUP, bits=bits)
    return mx.dequantize(*codes, group_size=GROUP, bits=bits)


def quantized(weights: dict[str, mx.array], bits: int) -> dict[str, mx.array]:
    """MLX's layout: NAME.weight holds the codes, beside NAME.scales and NAME.biases."""
    out: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if weight.ndim != 2:
            out[name] = weight
            continue
        stem = name.removesuffix(".weight")
        codes, scales, biases = mx.quantize(weight, group_size=GROUP, bits=bits)
        out |= {name: codes, stem + ".scales": scales, stem + ".biases": biases}
    return out


def theirs(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """The weights under the names of the family's checkpoints."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    plan = family_for(config).names(config).plan_save(shapes)
    return {
        target: moved
        for group in plan.groups
        for target, moved in zip(
            group.targets, group.apply([weights[name] for name in group.sources]), strict=True
        )
    }


def write_checkpoint(
    source: Path, out: Path, config: dict[str, Any], *, bits: int, card: str
) -> None:
    """The shipped folder: weights at ``bits``, tokenizer, template, generation config, card."""
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, out / name)
    end = Tokenizer.load(out).id_of(END)
    quantization = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    generation = {"eos_token_id": end, "pad_token_id": end, "do_sample": False}
    config = {**config, "eos_token_id": end, "pad_token_id": end, "quantization": quantization}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        write_bytes_atomic(out / name, (json.dumps(value, indent=2) + "\n").encode())
    weights = quantized(theirs(load_weights(source), config), bits)
    if config["tie_word_embeddings"]:
        # for readers that know no tied embeddings in this family; ours leaves them out
        table = [name for name in weights if ".embed_tokens." in name]
        weights |= {name.replace("model.embed_tokens", "lm_head"): weights[name] for name in table}
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    write_bytes_atomic(out / "README.md", card.encode())
