"""How weights are packed into few bits, and what ``config.json`` says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxtx.errors import MlxtxError

# mode -> (bits, group sizes); the first of each is the default.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Quantization:
    """One way to pack a weight [..., O, I]: ``bits`` a number, ``group_size`` numbers a scale.

    The numbers are MLX's (``mx.quantize``): affine has a scale and a bias a group in the weight's
    own type; the others have one 8-bit scale and no bias. Raises MlxtxError for a mix that MLX
    does not have.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise MlxtxError(f"unknown quantization mode {self.mode!r} (known: {', '.join(MODES)})")
        bits, groups = MODES[self.mode]
        whole = type(self.bits) is type(self.group_size) is int
        if not whole or self.bits not in bits or self.group_size not in groups:
            raise MlxtxError(
                f"{self.mode} quantization has {_either(bits)} bits and groups of "
                f"{_either(groups)}, not {self.bits!r} and {self.group_size!r}"
            )

    @classmethod
    def of(
        cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None
    ) -> Quantization:
        """With the mode's defaults for what is None."""
        if mode not in MODES:
            raise MlxtxError(f"unknown quantization mode {mode!r} (known: {', '.join(MODES)})")
        default_bits, default_groups = MODES[mode]
        return cls(
            default_bits[0] if bits is None else bits,
            default_groups[0] if group_size is None else group_size,
            mode,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Quantization:
        try:
            mode = value.get("mode") or "affine"
            return cls(int(value["bits"]), int(value["group_size"]), str(mode))
        except (KeyError, TypeError, ValueError):
            raise MlxtxError(f"config.json: unreadable quantization {value!r:.120}") from None

    def to_json(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        if self.mode == "affine":
            return f"{self.bits} bits, groups of {self.group_size}"
        return self.mode

    def bits_per_weight(self, scale_bits: int = 16) -> float:
        """With the scales (and biases) of affine packing in a type of ``scale_bits``."""
        beside = 2 * scale_bits if self.mode == "affine" else 8
        return self.bits + beside / self.group_size

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be packed."""
        return len(shape) >= 2 and shape[-1] % self.group_size == 0 and 0 not in shape

    def pack(self, weight: mx.array) -> dict[str, mx.array]:
        """The packed weight by the ending of each tensor: .weight, .scales and (affine) .biases."""
        parts = mx.quantize(weight, self.group_size, self.bits, mode=self.mode)
        return dict(zip((".weight", ".scales", ".biases"), parts, strict=False))

    def unpack(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        dtype: mx.Dtype | None = None,
    ) -> mx.array:
        """The weight [..., O, I] again, in the scales' type unless ``dtype`` is given."""
        whole = mx.dequantize(
            weight, scales, biases, self.group_size, self.bits, self.mode, dtype=dtype
        )
        return whole

    def columns(self, packed_columns: int) -> int:
        """The weight's columns, from those of its packed form."""
        return packed_columns * 32 // self.bits

    def matches(self, packed: tuple[int, ...], scales: tuple[int, ...]) -> bool:
        """Whether these two shapes belong to one weight packed this way."""
        return (
            packed[:-1] == scales[:-1]
            and packed[-1] * 32 == scales[-1] * self.group_size * self.bits
        )


def infer(
    packed: tuple[int, ...], scales: tuple[int, ...], scales_dtype: mx.Dtype, columns: int
) -> Quantization | None:
    """The packing of a weight whose number of columns is known, or None where none fits."""
    if not scales or not scales[-1] or not columns or columns % scales[-1]:
        return None
    bits, rest = divmod(packed[-1] * 32, columns)
    group_size = columns // scales[-1]
    modes = ["mxfp4", "mxfp8", "nvfp4"] if scales_dtype == mx.uint8 else ["affine"]
    for mode in modes:
        if not rest and bits in MODES[mode][0] and group_size in MODES[mode][1]:
            return Quantization(bits, group_size, mode)
    return None


@dataclass(frozen=True)
class QuantizationTable:
    """``config.json``'s word: how modules are packed by default, and each module that differs
    (None: not packed)."""

    default: Quantization | None = None
    modules: Mapping[str, Quantization | None] = field(default_factory=dict)

    def __call__(self, path: str) -> Quantization | None:
        return self.modules.get(path, self.default)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantizationTable:
        """From MLX's ``quantization`` (older conversions: the same under quantization_config)."""
        value = config.get("quantization")
        if value is None:
            value = config.get("quantization_config")
            if not isinstance(value, Mapping) or "quant_method" in value or "bits" not in value:
                return cls()
        if not isinstance(value, Mapping):
            raise MlxtxError(f"config.json: unreadable quantization {value!r:.120}")
        default = Quantization.from_json(value)
        modules: dict[str, Quantization | None] = {}
        for path, entry in value.items():
            if isinstance(entry, Mapping):
                # What an entry leaves out has MLX's own default, not this table's.
                modules[path] = cls._entry(entry)
            elif isinstance(entry, bool):
                modules[path] = default if entry else None
        return cls(default, modules)

    @staticmethod
    def _entry(entry: Mapping[str, Any]) -> Quantization:
        mode = str(entry.get("mode") or "affine")
        defaults = Quantization.of(mode).to_json()
        return Quantization.from_json({**defaults, **{k: v for k, v in entry.items() if v}})

    def to_json(self) -> dict[str, Any]:
        """As mlx-lm writes it: the default's keys, and every module that differs under its path."""
        assert self.default is not None
        entries = {
            path: entry.to_json() if entry else False for path, entry in self.modules.items()
        }
        return {**self.default.to_json(), **entries}


def _either(values: tuple[int, ...]) -> str:
    ordered = [str(value) for value in sorted(values)]
    return ordered[0] if len(ordered) == 1 else f"{', '.join(ordered[:-1])} or {ordered[-1]}"
