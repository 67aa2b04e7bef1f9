"""Adapters on disk and several of them on one model.

A folder holds ``adapters.safetensors`` and ``adapter_config.json`` as mlx-lm writes and reads
them; PEFT's two files are read as well (``peft.py``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxtx.checkpoint.text_part import text_name
from mlxtx.errors import MlxtxError
from mlxtx.files import write_json_atomic
from mlxtx.tuning.lora import LEAVES, LowRank, input_width
from mlxtx.tuning.state import save_arrays
from mlxtx.tuning.targets import (
    adaptable,
    adapters_in,
    add_adapters,
    layer_number,
    remove_adapters,
)
from mlxtx.tuning.trees import named, nested

WEIGHTS_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"


@dataclass
class Adapter:
    """An adapter apart from any model.

    layers: path -> how it is adapted. weights: by name, ``path.lora_a`` and so on; whole weights
    that were trained beside it (embeddings, a head) have their plain names.
    base: what ``base_mark`` said of the model it was trained on, "" when unknown.
    """

    layers: dict[str, LowRank]
    weights: dict[str, mx.array]
    base: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def base_mark(model: Any) -> str:
    """The same for models whose layers have the same names and shapes, packed or not."""
    layers = [f"{p} {(*m.weight.shape[:-1], input_width(m))}" for p, m in adaptable(model).items()]
    return hashlib.sha256("\n".join(layers).encode()).hexdigest()[:16]


def adapter_of(model: Any, facts: Mapping[str, Any] | None = None) -> Adapter:
    """The adapter that is on ``model``, with whatever else is trainable."""
    layers = {path: adapter.how for path, adapter in adapters_in(model).items()}
    own = {f"{p}.{n}": a for p, ad in adapters_in(model).items() for n, a in ad.trained().items()}
    weights = {**named(model.trainable_parameters()), **own}
    return Adapter(layers, weights, base_mark(model), dict(facts or {}))


def save_adapter(adapter: Adapter, folder: str | Path, blocks: int) -> None:
    """Writes the two files. ``blocks`` is how many the model has."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    how = next(iter(adapter.layers.values()), None)
    save_arrays(folder / WEIGHTS_FILE, _of_one_scale(adapter), {})
    numbers = [n for p in adapter.layers if (n := layer_number(p)) is not None]
    first = min(numbers, default=blocks)
    config: dict[str, Any] = {
        "fine_tune_type": "full" if how is None else "dora" if how.dora else "lora",
        "num_layers": blocks - first,
        "lora_parameters": None,
        "mlxtx": {"base": adapter.base, **adapter.facts},
    }
    if how is not None:
        config["lora_parameters"] = {
            "rank": how.rank,
            "scale": how.scale,
            "dropout": how.dropout,
            "keys": _keys(adapter.layers, range(first, blocks)),
        }
    write_json_atomic(folder / CONFIG_FILE, config)


def _of_one_scale(adapter: Adapter) -> dict[str, mx.array]:
    """The weights where all have the first one's scale, for the file holds a single one."""
    hows = adapter.layers
    first = next(iter(hows.values()), LowRank()).scale
    parts = {f"{p}.lora_b": how.scale / first for p, how in hows.items() if how.scale != first}
    return {
        n: (a * parts[n]).astype(a.dtype) if n in parts else a for n, a in adapter.weights.items()
    }


def _keys(layers: Mapping[str, LowRank], blocks: range) -> list[str]:
    """mlx-lm's spelling: names inside a block that hold for all these blocks, else whole paths."""
    seen: dict[str, list[int]] = {}
    keys = []
    for path in layers:
        number = layer_number(path)
        if number is None:
            keys.append(path)
        else:
            seen.setdefault(path.split(".", 3)[3], []).append(number)
    for name, numbers in seen.items():
        if numbers == list(blocks):
            keys.append(name)
        else:
            keys += [f"model.layers.{n}.{name}" for n in numbers]
    return keys


def read_adapter(folder: str | Path, model: Any, family_config: Mapping[str, Any] | None = None):
    """The adapter in a folder, mlx-lm's or PEFT's, checked against ``model``.

    family_config: the model's ``config.json``, for adapters that use its family's own names.
    """
    from mlxtx.tuning.layouts import from_layout
    from mlxtx.tuning.peft import read_peft

    folder = Path(folder)
    config = _read_config(folder)
    try:
        if "peft_type" in config:
            adapter = read_peft(folder, config, model, family_config or {})
        else:
            adapter = from_layout(_read_mlx(folder, config), model, family_config or {}, "mlx")
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise MlxtxError(f"{folder / CONFIG_FILE} holds what makes no sense: {error}") from error
    _check(adapter, model, folder)
    return adapter


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError:
        raise MlxtxError(f"{folder} holds no adapter: {CONFIG_FILE} is missing") from None
    except ValueError as error:
        raise MlxtxError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise MlxtxError(f"{path} must be a JSON object")
    return config


def read_weights(path: Path) -> dict[str, mx.array]:
    if not path.is_file():
        raise MlxtxError(f"the adapter's weights are missing: {path}")
    try:
        return cast("dict[str, mx.array]", mx.load(str(path)))
    except RuntimeError as error:
        raise MlxtxError(f"{path} can't be read: {error}") from None


def _read_mlx(folder: Path, config: Mapping[str, Any]) -> Adapter:
    # Where the base was a multimodal model, names are longer.
    weights = {text_name(n) or n: a for n, a in read_weights(folder / WEIGHTS_FILE).items()}
    parameters = config.get("lora_parameters") or {}
    dora = config.get("fine_tune_type") == "dora"
    layers: dict[str, LowRank] = {}
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "lora_b":
            experts = array.ndim == 3
            layers[path] = LowRank(
                rank=array.shape[-1] if experts else array.shape[0],
                scale=float(parameters.get("scale", 20.0)),
                dropout=float(parameters.get("dropout", 0.0)),
                dora=dora and f"{path}.m" in weights,
                dtype=array.dtype,
            )
    own = config.get("mlxtx") or {}
    return Adapter(layers, weights, own.get("base", ""), dict(own))


def _check(adapter: Adapter, model: Any, folder: Path) -> None:
    if adapter.base and adapter.base != base_mark(model):
        raise MlxtxError(f"{folder} was trained on a model of another shape than this one")
    there = adaptable(model)
    whole = named(model.parameters())
    for name, array in adapter.weights.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            if name not in whole or whole[name].shape != array.shape:
                raise MlxtxError(f"{folder} is for another base: it has {name} {array.shape}")
            continue
        if path not in there:
            raise MlxtxError(f"{folder} is for another base: this model has no layer {path}")
        if path not in adapter.layers:
            raise MlxtxError(f"{folder} is not whole: {path} has no lora_b")
    for path, how in adapter.layers.items():
        wanted = {k: a.shape for k, a in _shapes(there[path], how).items()}
        for leaf, shape in wanted.items():
            found = adapter.weights.get(f"{path}.{leaf}")
            if found is None or found.shape != shape:
                got = "nothing" if found is None else str(found.shape)
                raise MlxtxError(
                    f"{folder} is for another base: {path}.{leaf} must be {shape}, not {got}"
                )


def _shapes(layer: nn.Module, how: LowRank) -> dict[str, mx.array]:
    from mlxtx.tuning.lora import adapter_for

    return adapter_for(layer, how, mx.random.key(0)).trained()


class Adapters:
    """Several adapters for one model, of which one or none is active; the base stays loaded."""

    def __init__(self, model: Any, family_config: Mapping[str, Any] | None = None):
        self.model, self.family_config = model, family_config
        self.active: str | None = None
        self._kept: dict[str, Adapter] = {}
        self._whole: dict[str, mx.array] = {}  # base weights that the active adapter replaced

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._kept)

    def load(self, folder: str | Path, name: str | None = None) -> str:
        """Reads an adapter; ``use`` puts it on. The name is the folder's unless given."""
        name = name or Path(folder).resolve().name
        active = self.active
        self.use(None)
        try:
            self._kept[name] = read_adapter(folder, self.model, self.family_config)
        finally:
            self.use(active)
        return name

    def use(self, name: str | None) -> None:
        """Makes this adapter the active one; None leaves the base alone."""
        if name is not None and name not in self._kept:
            known = ", ".join(self._kept) or "none"
            raise MlxtxError(f"no adapter {name!r} is loaded (loaded: {known})")
        remove_adapters(self.model)
        self.model.update(nested(self._whole) if self._whole else {})
        self._whole, self.active = {}, name
        if name is not None:
            self._whole = put_on(self.model, self._kept[name])
        self.model.weights_version += 1
        self.model.eval()


def put_on(model: Any, adapter: Adapter) -> dict[str, mx.array]:
    """Puts an adapter on the model; what it replaced of the base is returned."""
    own = {n: a for n, a in adapter.weights.items() if n.rsplit(".", 1)[-1] in LEAVES}
    whole = {n: a for n, a in adapter.weights.items() if n not in own}
    current = named(model.parameters())
    replaced = {name: current[name] for name in whole}
    # First what is under the adapters: PEFT keeps embeddings beside the adapter on them.
    model.update(nested(whole) if whole else {})
    add_adapters(model, adapter.layers)
    model.update(nested(own))
    return replaced


def load_adapter(
    model: Any, folder: str | Path, family_config: Mapping[str, Any] | None = None
) -> Adapters:
    """Reads an adapter and puts it on the model."""
    adapters = Adapters(model, family_config)
    adapters.use(adapters.load(folder))
    return adapters
