"""PEFT's adapter files, both ways: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtx.checkpoint.text_part import text_name
from mlxtx.errors import MlxtxError
from mlxtx.files import write_json_atomic
from mlxtx.tuning.adapters import CONFIG_FILE, Adapter, read_weights
from mlxtx.tuning.layouts import Part, parts_of, ties, to_ours, to_theirs, weights_from
from mlxtx.tuning.lora import EMBEDDING, LEAVES, LowRank
from mlxtx.tuning.state import save_arrays
from mlxtx.tuning.targets import adaptable

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDINGS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "b",  # PEFT writes an embedding's transposed: A is [rank, V]
    "lora_embedding_B": "a",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
# What PEFT can do to an adapter and we do not.
_UNKNOWN = ("lora_bias", "layer_replication", "target_parameters", "trainable_token_indices")


def read_peft(
    folder: Path, config: Mapping[str, Any], model: Any, family_config: Mapping[str, Any]
) -> Adapter:
    """A LoRA, rsLoRA or DoRA adapter as PEFT saved it."""
    if config.get("peft_type") != "LORA":
        raise MlxtxError(
            f"{folder} holds a PEFT adapter of type {config.get('peft_type')}, not LORA"
        )
    used = [key for key in _UNKNOWN if config.get(key)]
    if used or config.get("bias", "none") != "none":
        raise MlxtxError(f"{folder} uses {', '.join(used) or 'bias'}, which is not supported")
    theirs, whole = _grouped(read_weights(folder / WEIGHTS_FILE), folder)
    layers: dict[str, LowRank] = {}
    weights: dict[str, mx.array] = {}
    modules = adaptable(model)
    for tie in ties(model, family_config, "hf"):
        found = [theirs.pop(name, None) for name in tie.theirs]
        if not any(found):
            continue
        if not all(found):
            raise MlxtxError(f"{folder} adapts only some of {tie.theirs[0]} and its neighbours")
        parts = [
            Part(f["a"], f["b"], _how(config, name, f), f.get("m"))
            for name, f in zip(tie.theirs, found, strict=True)
            if f is not None
        ]
        for path, part in to_ours(tie, parts).items():
            layers[path] = part.how
            weights |= weights_from(modules[path], part, path)
    apart = not config.get("ensure_weight_tying")
    if apart and model.config.head.tied and "model.embed_tokens" in layers:
        raise MlxtxError(
            f"{folder} adapts the embeddings and not the head, which are one in this model: "
            "merge it with PEFT, and load what that gives"
        )
    if theirs:
        raise MlxtxError(f"{folder} is for another base: this model has no layer {min(theirs)}")
    return Adapter(
        layers, {**weights, **_ours(whole, model, family_config)}, "", {"format": "peft"}
    )


def _grouped(tensors: Mapping[str, mx.array], folder: Path):
    """Their module -> its matrices by what they are; and weights that were trained as they are."""
    theirs: dict[str, dict[str, mx.array]] = {}
    whole: dict[str, mx.array] = {}
    for name, array in tensors.items():
        name = name.removeprefix(_PREFIX)
        name = text_name(name) or name  # where the base was a multimodal model
        for ending, kind in _ENDINGS.items():
            if name.endswith("." + ending):
                turned = array.T if "embedding" in ending else array
                theirs.setdefault(name[: -len(ending) - 1], {})[kind] = turned
                break
        else:
            whole[name.replace(".modules_to_save", "").replace(".base_layer", "")] = array
    for name, found in theirs.items():
        if not {"a", "b"} <= found.keys():
            raise MlxtxError(f"{folder} is not whole: {name} lacks one of its two matrices")
    return theirs, whole


def _ours(
    whole: Mapping[str, mx.array], model: Any, family_config: Mapping[str, Any]
) -> dict[str, mx.array]:
    names = {t.theirs[0]: t.ours[0] for t in ties(model, family_config, "hf") if len(t.ours) == 1}
    parts = {n: n.rpartition(".") for n in whole}
    return {f"{names.get(path, path)}.{leaf}": whole[n] for n, (path, _, leaf) in parts.items()}


def _how(config: Mapping[str, Any], name: str, found: Mapping[str, mx.array]) -> LowRank:
    rank = found["a"].shape[0]
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(
        rank,
        scale,
        float(config.get("lora_dropout") or 0.0),
        bool(config.get("use_dora")) and "m" in found,
        found["a"].dtype,
    )


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: a pattern is the whole name or an ending of it that starts at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def write_peft(
    adapter: Adapter,
    folder: str | Path,
    model: Any,
    family_config: Mapping[str, Any],
    *,
    base_model: str = "",
) -> None:
    """Writes an adapter for PEFT, under the names of the base's family."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = adaptable(model)
    rows = {path: module.weight.shape[-2] for path, module in modules.items()}
    parts = parts_of(model, adapter.layers, adapter.weights)
    tensors: dict[str, mx.array] = {}
    hows: dict[str, LowRank] = {}
    whole = {n: a for n, a in adapter.weights.items() if n.rpartition(".")[2] not in LEAVES}
    renamed: dict[str, mx.array] = {}
    for tie in ties(model, family_config, "hf"):
        if len(tie.ours) == len(tie.theirs) == 1 and not _is_conv(tie):
            for leaf in ("weight", "bias"):
                if f"{tie.ours[0]}.{leaf}" in whole:
                    renamed[f"{tie.theirs[0]}.{leaf}"] = whole.pop(f"{tie.ours[0]}.{leaf}")
        own = {path: parts[path] for path in tie.ours if path in parts}
        if not own:
            continue
        embedding = isinstance(modules[tie.ours[0]], EMBEDDING)
        for name, part in to_theirs(tie, own, rows).items():
            hows[name] = part.how
            if embedding:
                tensors[f"{_PREFIX}{name}.lora_embedding_A"] = part.b.T
                tensors[f"{_PREFIX}{name}.lora_embedding_B"] = part.a.T
            else:
                tensors[f"{_PREFIX}{name}.lora_A.weight"] = part.a
                tensors[f"{_PREFIX}{name}.lora_B.weight"] = part.b
            if part.m is not None:
                tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = part.m
    if whole:
        raise MlxtxError(f"{min(whole)} was trained as it is, which PEFT's files can't tell")
    tensors |= {_PREFIX + name: array for name, array in renamed.items()}
    first = next(iter(hows.values()), LowRank())
    transposed = any(_is_conv(t) for t in ties(model, family_config, "hf") if t.theirs[0] in hows)
    save_arrays(folder / WEIGHTS_FILE, tensors, {})
    write_json_atomic(
        folder / CONFIG_FILE,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": first.rank,
            "lora_alpha": first.scale * first.rank,
            "lora_dropout": first.dropout,
            "rank_pattern": {n: h.rank for n, h in hows.items() if h.rank != first.rank},
            "alpha_pattern": {
                n: h.scale * h.rank
                for n, h in hows.items()
                if h.scale * h.rank != first.scale * first.rank
            },
            "use_rslora": False,  # the scale says it all
            "use_dora": first.dora,
            "ensure_weight_tying": model.config.head.tied and "model.embed_tokens" in parts,
            "fan_in_fan_out": transposed,
            "target_modules": sorted(hows),
            "modules_to_save": sorted({n.rsplit(".", 2)[-2] for n in renamed}) or None,
            "bias": "none",
            "inference_mode": True,
        },
    )


def _is_conv(tie: Any) -> bool:
    from mlxtx.naming.transforms import Chain, Transposed

    steps = tie.transform.steps if isinstance(tie.transform, Chain) else (tie.transform,)
    return any(isinstance(step, Transposed) for step in steps)
