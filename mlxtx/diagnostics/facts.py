"""What a memory plan has to know of a model, from config.json and tensor headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtx.checkpoint.hub import cached_folder, explained, quiet_bars, resolve
from mlxtx.checkpoint.loading import planned_model
from mlxtx.checkpoint.safetensors import TensorInfo
from mlxtx.checkpoint.source import Checkpoint, read_config
from mlxtx.checkpoint.text_part import text_part
from mlxtx.decoder.config import DecoderConfig
from mlxtx.errors import MlxtxError

# Modules that see one row of a prompt, or look rows up: never unpacked.
SINGLE_ROWS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class ModelFacts:
    """``weights``: bytes once loaded. ``itemsize``: bytes of an activation's number.
    ``unpacked``: shapes [O, I] of the packed weights that a CPU unpacks for a prompt.
    ``shapes``: the weight matrices [O, I] by name, for what an adapter adds to them."""

    name: str
    config: DecoderConfig
    weights: int
    itemsize: int
    unpacked: frozenset[tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]


class HubHeaders:
    """A Hub repository as a checkpoint whose tensors were not downloaded."""

    def __init__(self, repo: str, revision: str | None = None):
        from huggingface_hub import get_safetensors_metadata, hf_hub_download
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        with explained(repo, revision), quiet_bars():
            try:
                saved = hf_hub_download(repo, "config.json", revision=revision)
                metadata = get_safetensors_metadata(repo, revision=revision)
            except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
                raise MlxtxError(f"{repo} has no sound safetensors weights: {error}") from None
        config = read_config(Path(saved).parent)
        tensors: dict[str, TensorInfo] = {}
        for file in metadata.files_metadata.values():
            for name, tensor in file.tensors.items():
                start, end = tensor.data_offsets
                tensors[name] = TensorInfo(tensor.dtype, tuple(tensor.shape), start, end)
        self.config: Mapping[str, Any]
        self.config, stored = text_part(config, tensors)
        self.tensors = {name: tensors[old] for name, old in stored.items()}

    def read(self, name: str, *_: Any) -> mx.array:
        raise AssertionError(f"{name} is planned, not read")

    read_rows = read

    def same(self, one: str, other: str) -> bool:
        """Not known without the numbers; a copy is what is found there nearly always."""
        return self.tensors[one].shape == self.tensors[other].shape


def _cached(repo: str, revision: str | None) -> Checkpoint | None:
    """What was downloaded of a Hub repository, where that is all of it. Asks nobody."""
    try:
        with explained(repo, revision), quiet_bars():
            folder = cached_folder(repo, revision)
        return None if folder is None else Checkpoint(folder)
    except MlxtxError:
        return None


def read_facts(
    path_or_repo: str | Path, *, revision: str | None = None, dtype: str | mx.Dtype | None = None
) -> ModelFacts:
    """The facts of a folder, of "bundled", or of a Hub id, whose weights are not downloaded."""
    path = Path(path_or_repo).expanduser()
    local = path.exists() or str(path_or_repo) == "bundled" or str(path_or_repo)[:1] in "./~"
    checkpoint: Any
    if local:
        checkpoint = Checkpoint(resolve(path_or_repo, revision))
    else:
        try:
            checkpoint = HubHeaders(str(path_or_repo), revision)
        except MlxtxError:
            checkpoint = _cached(str(path_or_repo), revision)
            if checkpoint is None:
                raise
    return facts_of(checkpoint, str(path_or_repo), dtype)


def facts_of(checkpoint: Any, name: str, dtype: str | mx.Dtype | None = None) -> ModelFacts:
    """The facts of an open checkpoint."""
    model, plan, wanted = planned_model(checkpoint, dtype)
    sizes = {}
    for parameter, form in plan.forms.items():
        cast = wanted is not None and mx.issubdtype(form.dtype, mx.floating)
        sizes[parameter] = math.prod(form.shape) * (wanted if cast and wanted else form.dtype).size
    norms = [p for p in plan.forms if p == "model.norm.weight"] or list(plan.forms)
    activation = wanted or plan.forms[norms[0]].dtype
    shapes = {
        parameter.removesuffix(".weight"): tuple(array.shape)
        for parameter, array in _weights(model, plan).items()
    }
    unpacked = {
        (shape[-2], shape[-1])
        for path, shape in shapes.items()
        if path in plan.quantizations and path.rpartition(".")[2] not in SINGLE_ROWS
    }
    return ModelFacts(
        name=name,
        config=model.config,
        weights=sum(sizes.values()),
        itemsize=activation.size,
        unpacked=frozenset(unpacked),
        shapes=shapes,
    )


def _weights(model: Any, plan: Any) -> dict[str, Any]:
    """Weight matrices [.., O, I] as they are unpacked."""
    from mlx.utils import tree_flatten

    found: dict[str, Any] = {}
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, array in parameters.items():
        path = name.removesuffix(".weight")
        if path == name or array.ndim < 2:
            continue
        quantization = plan.quantizations.get(path)
        if quantization is None:
            found[name] = array
        else:
            shape = (*array.shape[:-1], array.shape[-1] * 32 // quantization.bits)
            found[name] = mx.zeros(shape, mx.uint8)
    return found
