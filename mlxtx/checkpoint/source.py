"""A checkpoint folder as it lies on disk: its configuration and its tensors, checked, unread."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from mlxtx.checkpoint.safetensors import Reader, TensorInfo
from mlxtx.checkpoint.text_part import text_part
from mlxtx.errors import MlxtxError
from mlxtx.files import read_json, read_json_object

if TYPE_CHECKING:
    import mlx.core as mx

INDEX = "model.safetensors.index.json"
LONGEST_NAME = 255  # bytes, as most file systems have it
ROWS_BYTES = 8 << 20  # of a tensor, while it is compared with another
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
_OTHER_FORMATS = (".gguf", ".ggml", ".npz", ".npy", ".onnx", ".mlpackage", ".tflite")
# Weights of the same model in another layout, and of adapters: never the checkpoint itself.
_OTHER_WEIGHTS = ("consolidated", "adapter", "training_args", "optimizer")


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as a dictionary, with the quantization that some exporters keep beside it."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise MlxtxError(
                f"{folder} holds an adapter, not a model: name its model, and this with --adapter"
            )
        raise MlxtxError(f"{folder} holds no config.json; is it a model's folder?")
    config = read_json_object(path)
    beside = folder / "hf_quant_config.json"
    if "quantization_config" not in config and beside.is_file():
        config["quantization_config"] = read_json(beside)
    return config


class Checkpoint:
    """Configuration and tensors of one folder.

    folder: where it lies. config: ``config.json``. tensors: name -> TensorInfo, in the order of
    the files. Of a multimodal model both are those of its text part. Making one reads headers
    only; ``read`` reads one tensor. Raises MlxtxError for whatever is not sound; pickles are
    refused, code is never run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        config = read_config(self.folder)
        self._readers = {name: Reader(self.folder / name) for name in self.files}
        tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, str] = {}
        for file, reader in self._readers.items():
            for name, info in reader.tensors.items():
                if name in tensors:
                    raise MlxtxError(f"tensor {name} is in both {self._file_of[name]} and {file}")
                tensors[name] = info
                self._file_of[name] = file
        self._check_index()
        self.config, self._stored = text_part(config, tensors)
        self.tensors = {name: tensors[stored] for name, stored in self._stored.items()}

    @cached_property
    def files(self) -> list[str]:
        """Names of the weight files, shards in order."""
        return weight_files(self.folder, self._index)

    @cached_property
    def _index(self) -> dict[str, str]:
        return _weight_map(self.folder)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> mx.array:
        """One tensor, lazy: its numbers are read when it is evaluated."""
        stored = self._stored[name]
        return self._readers[self._file_of[stored]].read(stored)

    def read_ahead(self, nbytes: int) -> None:
        """Starts to read the first tensors, up to ``nbytes``, while others go on."""
        next(iter(self._readers.values())).read_ahead(nbytes)

    def read_rows(self, name: str, start: int, stop: int) -> mx.array:
        """Some rows of one tensor, see ``Reader.read_rows``."""
        stored = self._stored[name]
        return self._readers[self._file_of[stored]].read_rows(stored, start, stop)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; some rows are in memory at a time."""
        import mlx.core as mx

        first, second = self.tensors[one], self.tensors[other]
        if first.shape != second.shape or len(first.shape) < 2 or 0 in first.shape:
            return first.shape == second.shape and 0 in first.shape
        rows = math.prod(first.shape[:-1])
        step = max(1, ROWS_BYTES * rows // first.nbytes)
        return all(
            mx.array_equal(
                self.read_rows(one, start, min(start + step, rows)),
                self.read_rows(other, start, min(start + step, rows)),
                equal_nan=first.dtype.startswith(("F", "BF")),
            ).item()
            for start in range(0, rows, step)
        )

    def _check_index(self) -> None:
        for name, file in self._index.items():
            if self._file_of.get(name) != file:
                raise MlxtxError(f"{INDEX} promises {name!r:.200} in {file}, which lacks it")


def weight_files(folder: Path, index: Mapping[str, str] | None = None) -> list[str]:
    """The safetensors files that make up the model in ``folder``.

    By its ``index``, if it has one; else ``model.safetensors``; else a whole set of shards; else the one file there.
    """
    if index:
        return _present(folder, sorted(set(index.values())))
    there = sorted(
        p.name
        for p in folder.glob("*.safetensors")
        if not p.name.startswith((*_OTHER_WEIGHTS, "."))
    )
    if "model.safetensors" in there:
        return ["model.safetensors"]
    shards = [match for match in map(_SHARD.fullmatch, there) if match]
    if shards:
        stem, _, total = shards[0].groups()
        count = int(total)
        if not 0 < count <= 100_000 or any(s[1] != stem or s[3] != total for s in shards):
            raise MlxtxError(f"{folder} mixes shards of several models: {', '.join(there[:6])}")
        width = len(total)
        return _present(
            folder,
            [f"{stem}-{n:0{width}d}-of-{total}.safetensors" for n in range(1, count + 1)],
        )
    if len(there) == 1:
        return there
    if there:
        raise MlxtxError(
            f"{folder} holds several weight files and no {INDEX}: {', '.join(there[:6])}"
        )
    raise MlxtxError(_no_weights(folder))


def _present(folder: Path, files: Iterable[str]) -> list[str]:
    files = list(files)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        way = "download it again, it goes on where it stopped"
        if (folder / "model.safetensors").is_file() and "model.safetensors" not in files:
            way = f"if model.safetensors is the whole model, remove {INDEX}"
        raise MlxtxError(
            f"{folder} lacks {', '.join(missing[:4])}{more} of {len(files)} weight files; {way}"
        )
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor as the index has it; nothing where there is no index."""
    if not (folder / INDEX).is_file():
        return {}
    index = read_json(folder / INDEX)
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise MlxtxError(f"{folder / INDEX} holds no weight_map")
    for file in {str(file): file for file in mapping.values()}.values():
        check_inside(file, folder / INDEX)
        _check_link(folder, file)
    return mapping


def _check_link(folder: Path, file: str) -> None:
    """Refuse a link that leads out of the folder; in the Hub's cache all files are links."""
    home = folder.resolve()
    homes = (home, home.parent.parent / "blobs")
    if not any((folder / file).resolve().is_relative_to(one) for one in homes):
        raise MlxtxError(
            f"{folder / file} is a link out of its folder, which {INDEX} must not name; put the"
            " file itself there"
        )


def check_inside(file: Any, where: Path) -> None:
    """Refuse a file name that could lead out of its folder, on any system."""
    parts = [*PurePosixPath(str(file)).parts, *PureWindowsPath(str(file)).parts]
    if (
        not isinstance(file, str)
        or not file.endswith(".safetensors")
        or not file.isprintable()
        or len(file.encode()) > LONGEST_NAME
        or ".." in parts
        or PurePosixPath(file).is_absolute()
        or PureWindowsPath(file).drive
        or PureWindowsPath(file).root
    ):
        raise MlxtxError(f"{where} points at {file!r:.120}, not a weight file in its own folder")


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        return (
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when they are "
            "read; use a safetensors version of the model, or save one in a sandbox with "
            "transformers: from_pretrained(...).save_pretrained(out)"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        return (
            f"{folder} holds {others[0]} only, which is not in the Hugging Face layout; "
            "use a version of the model with model.safetensors"
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _OTHER_FORMATS)
    if others:
        return (
            f"{folder} holds no safetensors weights, and {others[0]} is of a kind that is not read"
            " here; use a version of the model with model.safetensors"
        )
    return f"{folder} holds no safetensors weights; is the download complete?"
