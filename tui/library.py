"""Models on this machine: the Hub cache and the folders of the settings, read from their headers."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtx.checkpoint.bundled import FOLDER as BUNDLED
from mlxtx.checkpoint.bundled import NAME

_LARGEST_HEADER = 100_000_000
# Files that were worth a download, in our format or in others.
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".npz", ".pt", ".pth")


@dataclass(frozen=True)
class LocalModel:
    """``source`` is what ``mlxtx.load`` takes; ``bits`` is 0 for weights that are not quantized."""

    name: str
    source: str
    folder: Path
    family: str = ""
    bits: int = 0
    dtype: str = ""
    bytes: int = 0
    problem: str = ""
    in_hub_cache: bool = False
    adapters: tuple[Path, ...] = field(default=())

    @property
    def precision(self) -> str:
        return f"{self.bits}-bit" if self.bits else self.dtype


def hub_cache() -> Path:
    """Where huggingface_hub keeps repositories, by its own environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", default)).expanduser() / "hub"


def local_models(folders: Iterable[str] = ()) -> list[LocalModel]:
    """The one that comes with the package, then the others by name; what can't be read is there
    with its ``problem``."""
    found = [*_cached(hub_cache())]
    for folder in folders:
        found += _in_folder(Path(folder).expanduser())
    bundled = [read_model(BUNDLED, NAME, NAME)] if (BUNDLED / "config.json").is_file() else []
    return bundled + sorted(found, key=lambda model: model.name.lower())


def _cached(cache: Path) -> Iterator[LocalModel]:
    for repo in _children(cache, "models--*"):
        name = repo.name.removeprefix("models--").replace("--", "/")
        snapshots = _children(repo / "snapshots", "*")
        if not snapshots:
            continue
        reference = repo / "refs" / "main"
        try:
            revision = reference.read_text().strip()
        except OSError:
            revision = ""
        folder = next((s for s in snapshots if s.name == revision), snapshots[-1])
        if (folder / "config.json").exists():
            partial = any(_children(repo / "blobs", "*.incomplete"))
            model = read_model(folder, name, name, in_hub_cache=True)
            yield _with_problem(model, "not complete: download it to go on") if partial else model


def _in_folder(folder: Path) -> Iterator[LocalModel]:
    for child in [folder, *_children(folder, "*"), *_children(folder, "*/*")]:
        # A conversion that is not done, or was not proven, is no model yet.
        if child.suffix not in (".partial", ".replaced") and (child / "config.json").is_file():
            name = child.name if child == folder else str(child.relative_to(folder))
            yield read_model(child, name, str(child))


def _children(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _with_problem(model: LocalModel, problem: str) -> LocalModel:
    from dataclasses import replace

    return replace(model, problem=model.problem or problem)


def read_model(folder: Path, name: str, source: str, in_hub_cache: bool = False) -> LocalModel:
    """What ``config.json`` and the weights' headers in ``folder`` say."""
    base = LocalModel(name, source, folder, in_hub_cache=in_hub_cache)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (OSError, ValueError):
        return _with_problem(base, "config.json can't be read")
    weights = _children(folder, "*.safetensors")
    if not weights:
        return _with_problem(base, "no safetensors weights")
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    bits = quantization.get("bits", 0) if isinstance(quantization, dict) else 0
    dtype = str(text.get("torch_dtype") or text.get("dtype") or _first_dtype(weights[0]))
    return LocalModel(
        name,
        source,
        folder,
        family=str(config.get("model_type", "")),
        bits=bits if isinstance(bits, int) else 0,
        dtype={"bfloat16": "bf16", "float16": "f16", "float32": "f32"}.get(dtype, dtype.lower()),
        bytes=sum(_size(file) for file in weights),
        in_hub_cache=in_hub_cache,
        adapters=tuple(find_adapters(folder)),
    )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _first_dtype(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(min(length, _LARGEST_HEADER)))
        return next(str(v["dtype"]) for k, v in header.items() if k != "__metadata__")
    except (OSError, ValueError, struct.error, StopIteration, KeyError, TypeError):
        return ""


def find_adapters(folder: Path) -> list[Path]:
    """Folders in ``folder`` that hold an adapter."""
    names = ("adapters.safetensors", "adapter_model.safetensors")
    return [
        child
        for child in [folder, *_children(folder, "*/")]
        if any((child / name).is_file() for name in names)
        and (child / "adapter_config.json").is_file()
    ]


def adapter_base(adapter: Path) -> str:
    """The model an adapter says it was made for, or ""."""
    try:
        config: Any = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        own = config.get("mlxtx", config)
        return str(config.get("base_model_name_or_path") or own.get("model") or "")
    except (OSError, ValueError, AttributeError):
        return ""


def tidy_download(repo: str, state: str) -> None:
    """Remove what a download of ``repo`` that is done or cancelled has left in the Hub cache: half
    files, which nobody goes on with, and all of a repository that was given up without weights."""
    if state not in ("done", "cancelled"):
        return
    folder = hub_cache() / ("models--" + repo.replace("/", "--"))
    for part in _children(folder / "blobs", "*.incomplete"):
        part.unlink(missing_ok=True)
    files = _children(folder / "snapshots", "**/*")
    if state == "cancelled" and not any(file.suffix in _WEIGHTS for file in files):
        shutil.rmtree(folder, ignore_errors=True)


def delete_model(model: LocalModel) -> int:
    """Remove a model from this machine; gives the bytes that are free again. Raises OSError."""
    if model.folder == BUNDLED:
        raise PermissionError(1, "it is part of mlxtx")
    folder = model.folder.parent.parent if model.in_hub_cache else model.folder
    freed = sum(_size(file) for file in folder.rglob("*") if not file.is_symlink())
    shutil.rmtree(folder)
    return freed
