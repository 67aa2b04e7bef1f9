"""Writes a whole model under its family's own names, beside the files it came with."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxtx.checkpoint.safetensors import dtype_name, encode_header, write_array
from mlxtx.families import family_for
from mlxtx.files import atomic_write, write_json_atomic
from mlxtx.tuning.trees import named

if TYPE_CHECKING:
    from mlxtx.language_model import LanguageModel

# Files of a checkpoint that hold no weights and belong to every copy of the model.
_COMPANIONS = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken")
_LEFT_OUT = ("model.safetensors.index.json", "config.json", "adapter_config.json")


def save_like(language_model: LanguageModel, folder: str | Path) -> None:
    """Writes ``language_model`` in the layout it came in, with its tokenizer."""
    from mlxtx.checkpoint import resolve

    source = resolve(language_model.name)
    save_model(language_model.model, language_model.config, folder, source)


def save_model(
    model: Any, config: Mapping[str, Any], folder: str | Path, source: Path | None = None
) -> None:
    """``config.json`` and ``model.safetensors``; companions are copied from ``source``.

    Packed layers are written as MLX checkpoints have them and told in the config; the rest has
    the family's own names.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None and source.resolve() != folder.resolve():
        for pattern in _COMPANIONS:
            for path in sorted(source.glob(pattern)):
                if path.name not in _LEFT_OUT:
                    shutil.copyfile(path, folder / path.name)
    packed = quantization_of(model)
    written = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    names = family_for(written).names(written)  # of what is written, not of what was read
    weights = named(model.parameters())
    plan = names.plan_save(
        {n: tuple(a.shape) for n, a in weights.items()}, "mlx" if packed else "hf"
    )
    tensors: dict[str, mx.array] = {}
    for group in plan.groups:
        arrays = group.apply([weights[name] for name in group.sources])
        tensors.update(zip(group.targets, arrays, strict=True))
    header = {n: (dtype_name(a), tuple(a.shape)) for n, a in tensors.items()}
    with atomic_write(folder / "model.safetensors") as file:
        file.write(encode_header(header, {"format": "mlx"}))
        for name in list(tensors):
            write_array(file, tensors.pop(name))
    if packed:
        written["quantization"] = _told(packed, names, weights)
    # Last, for its presence says that all is there.
    write_json_atomic(folder / "config.json", written)


def quantization_of(model: Any) -> dict[str, dict[str, Any]]:
    """How each packed layer is packed, by its path."""
    return {
        path: {"group_size": m.group_size, "bits": m.bits, "mode": m.mode}
        for path, m in model.named_modules()
        if "scales" in m
    }


def _told(packed: Mapping[str, Any], names: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The config's ``quantization``: the commonest packing, and each layer that differs."""
    kinds = list(packed.values())
    common = max(kinds, key=kinds.count)
    told: dict[str, Any] = dict(common)
    plan = names.plan_save(
        {f"{p}.weight": tuple(weights[f"{p}.weight"].shape) for p in _modules(weights)}, "mlx"
    )
    for group in plan.groups:
        own = packed.get(group.sources[0].removesuffix(".weight"))
        for target in group.targets:
            path = target.removesuffix(".weight")
            if own is None and weights[group.sources[0]].ndim >= 2:
                told[path] = False
            elif own is not None and own != common:
                told[path] = own
    return told


def _modules(weights: Mapping[str, Any]) -> list[str]:
    return [n.removesuffix(".weight") for n in weights if n.endswith(".weight")]
