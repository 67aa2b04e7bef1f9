"""Weights from a recipe, so that a fixture holds no weights.

Every tensor of a tiny checkpoint is a pure function of its name, its shape and a seed: random bits
of a Philox counter, summed four at a time into something near a normal distribution with integer
arithmetic only. The same bits come out on every machine and in every version of numpy, so the
builder (with torch) and the suite (without) write the same checkpoint, bit for bit.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"

_STEPS = 65535  # each of the four summands is an integer from 0 to this
_DEVIATION = (4 * ((_STEPS + 1) ** 2 - 1) / 12) ** 0.5


@dataclass(frozen=True)
class Tensor:
    """One line of a recipe: mean + std * noise, or bytes drawn evenly from a range."""

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0
    bytes_between: tuple[int, int] | None = None

    def values(self, seed: int) -> np.ndarray:
        count = int(np.prod(self.shape, dtype=np.int64))
        bits = np.random.Philox(key=zlib.crc32(self.name.encode()) + (seed << 32))
        raw = np.asarray(bits.random_raw(count), dtype="<u8")
        if self.bytes_between is not None:
            low, high = self.bytes_between
            return (low + raw % (high - low)).astype(np.uint8).reshape(self.shape)
        quarters = raw.view("<u2").reshape(count, 4).astype(np.int64)
        noise = (quarters.sum(axis=1) - 2 * _STEPS) / _DEVIATION
        values = self.mean + self.std * noise
        return values.astype(np.float32).reshape(self.shape)

    def as_list(self) -> list[Any]:
        between = list(self.bytes_between) if self.bytes_between else None
        return [self.name, list(self.shape), self.mean, self.std, between]

    @staticmethod
    def from_list(fields: list[Any]) -> Tensor:
        name, shape, mean, std, between = fields
        return Tensor(name, tuple(shape), mean, std, tuple(between) if between else None)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """The safetensors layout: header length, JSON header, then the bytes one after another."""
    kinds = {"float32": "F32", "uint8": "U8", "uint16": "U16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        header[name] = {
            "dtype": kinds[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


@dataclass(frozen=True)
class Fixture:
    """A tiny checkpoint to be and what transformers computed with it.

    `arrays`: for each of the prompts `long` [48] and `short` [7]: `tokens_*`, `logits_*` [T, V]
    float32 of the whole prompt, `greedy_*` [16] and `margin_*` [16] (first minus second logit).
    Where rotary frequencies follow the length, also `logits_steps` (the long prompt fed token by
    token through transformers' cache), and `beam_short` [16] and `beam_scores`: the best answer of
    beam search to the short prompt, and the scores of all beams.
    """

    name: str
    model_type: str
    config: dict[str, Any]  # as transformers 5 saves it
    legacy_config: dict[str, Any]  # as published checkpoints carry it
    hub_renames: tuple[tuple[str, str], ...]
    tensors: tuple[Tensor, ...]
    seed: int
    arrays: dict[str, np.ndarray]

    def save(self, path: Path) -> None:
        description = {
            "name": self.name,
            "model_type": self.model_type,
            "config": self.config,
            "legacy_config": self.legacy_config,
            "hub_renames": self.hub_renames,
            "tensors": [tensor.as_list() for tensor in self.tensors],
            "seed": self.seed,
        }
        text = np.frombuffer(json.dumps(description).encode(), dtype=np.uint8)
        np.savez_compressed(path, description=text, **self.arrays)

    @staticmethod
    def load(name: str, folder: Path = FIXTURES) -> Fixture:
        with np.load(folder / f"{name}.npz") as stored:
            arrays = {key: stored[key] for key in stored.files}
        about = json.loads(arrays.pop("description").tobytes())
        about["tensors"] = tuple(Tensor.from_list(fields) for fields in about["tensors"])
        about["hub_renames"] = tuple((old, new) for old, new in about["hub_renames"])
        return Fixture(arrays=arrays, **about)

    def weights(self, legacy: bool = False) -> dict[str, np.ndarray]:
        values = {tensor.name: tensor.values(self.seed) for tensor in self.tensors}
        if not legacy:
            return values
        return {self._hub_name(name): array for name, array in values.items()}

    def _hub_name(self, name: str) -> str:
        for pattern, replacement in self.hub_renames:
            name = re.sub(pattern, replacement, name)
        return name

    def write_checkpoint(self, folder: Path, legacy: bool = False) -> Path:
        """config.json and model.safetensors, of either generation."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.legacy_config if legacy else self.config
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        write_safetensors(folder / "model.safetensors", self.weights(legacy))
        return folder


def fixture_names(folder: Path = FIXTURES) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.npz"))
