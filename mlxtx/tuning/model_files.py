"""Writes a whole model under its family's own names, beside the files it came with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxtx.checkpoint.card import copy_companions
from mlxtx.checkpoint.quantization import Quantization, QuantizationTable
from mlxtx.checkpoint.safetensors import dtype_name, encode_header, write_array
from mlxtx.checkpoint.source import INDEX
from mlxtx.families import family_for
from mlxtx.files import atomic_write, write_json_atomic
from mlxtx.naming.map import Plan
from mlxtx.tuning.trees import named

if TYPE_CHECKING:
    from mlxtx.language_model import LanguageModel


def save_like(language_model: LanguageModel, folder: str | Path) -> None:
    """Writes ``language_model`` in the layout it came in, with its tokenizer."""
    from mlxtx.checkpoint import resolve

    source = language_model.folder or resolve(language_model.name)
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
        copy_companions(source, folder)
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
        written["quantization"] = _told(packed, plan)
    # Of another model that lay here.
    (folder / INDEX).unlink(missing_ok=True)
    # Last, for its presence says that all is there.
    write_json_atomic(folder / "config.json", written)


def quantization_of(model: Any) -> dict[str, Quantization]:
    """How each packed layer is packed, by its path."""
    return {
        path: Quantization(m.bits, m.group_size, m.mode)
        for path, m in model.named_modules()
        if "scales" in m
    }


def _told(packed: Mapping[str, Quantization], plan: Plan) -> dict[str, Any]:
    """The config's ``quantization``: the commonest packing, and each layer that differs, under
    the names that are written."""
    written = {
        target.removesuffix(".scales"): packed[group.sources[0].removesuffix(".scales")]
        for group in plan.groups
        for target in group.targets
        if target.endswith(".scales")
    }
    default = Counter(written.values()).most_common(1)[0][0]
    return QuantizationTable(
        default, {path: kind for path, kind in written.items() if kind != default}
    ).to_json()
