"""Checkpoint formats: what is stored, seen as named tensors that can be read one by one.

``read_tensors`` gives ``Tensor`` entries: name, shape, type and how to read the numbers. Packed
weights stay packed (with how to unpack them), FP8 weights appear unpacked. A further format is one
more function in ``_FORMATS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlxtx.checkpoint.quantization import Quantization, QuantizationTable
from mlxtx.checkpoint.safetensors import MLX_DTYPES
from mlxtx.checkpoint.source import Checkpoint
from mlxtx.errors import MlxtxError


class Packing(NamedTuple):
    """A weight stored in several tensors.

    name: what it is called unpacked; parts: the tensors that hold it, the packed numbers first;
    plain: the tensor it is unpacked.
    """

    name: str
    parts: tuple[str, ...]
    plain: Tensor
    quantization: Quantization


class Tensor(NamedTuple):
    """shape and dtype as ``read`` gives them (lazy); nbytes on disk; packing where it is packed.

    rows: reads some rows, counted over all axes but the last, as [rows, I]; a piece has to begin
    at a multiple of ``row_step``. None where that can't be done.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    nbytes: int
    read: Callable[[], mx.array]
    packing: Packing | None = None
    rows: Callable[[int, int], mx.array] | None = None
    row_step: int = 1


Tensors = dict[str, Tensor]
# What ``read`` gives for each type in a file (else float32).
_DTYPES = {name: getattr(mx, kind) for name, kind in MLX_DTYPES.items()} | {"F8_E5M2": mx.float16}


def read_tensors(checkpoint: Checkpoint) -> Tensors:
    """The checkpoint's tensors by name, in the files' order. Nothing is read yet."""
    tensors: Tensors = {}
    for name, info in checkpoint.tensors.items():
        dtype = _DTYPES.get(info.dtype, mx.float32)
        rows = partial(checkpoint.read_rows, name) if len(info.shape) > 1 else None
        tensors[name] = Tensor(
            info.shape, dtype, info.nbytes, partial(checkpoint.read, name), rows=rows
        )
    config = checkpoint.config
    if config.get("quantization"):
        return _mlx(checkpoint, tensors)
    settings = config.get("quantization_config")
    if not settings:
        return _fp8(checkpoint, tensors, {})
    if not isinstance(settings, Mapping):
        raise MlxtxError(f"config.json: unreadable quantization_config {settings!r:.120}")
    method = str(settings.get("quant_method") or ("mlx" if "bits" in settings else "something"))
    if method not in _FORMATS:
        raise MlxtxError(
            f"weights quantized by {method:.60} are not supported (known: "
            f"{', '.join(_FORMATS)}); use the original or an MLX version of the model"
        )
    return _FORMATS[method](checkpoint, tensors, settings)


def unpacked(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """The same tensors with those of ``names`` unpacked, under the name they have then."""
    packings = {name: packing for name in names if (packing := tensors[name].packing)}
    gone = {part for packing in packings.values() for part in packing.parts}
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name in packings:
            result[packings[name].name] = packings[name].plain
        elif name not in gone:
            result[name] = tensor
    return result


def _mlx(checkpoint: Checkpoint, tensors: Tensors, settings: Any = None) -> Tensors:
    """MLX's own: X.weight (packed uint32), X.scales and, for affine, X.biases."""
    table = QuantizationTable.from_config(checkpoint.config)
    result = dict(tensors)
    for name, scales in tensors.items():
        path = name.removesuffix(".scales")
        weight = tensors.get(path + ".weight")
        if path == name or weight is None or weight.dtype != mx.uint32:
            continue
        parts = tuple(
            path + ending
            for ending in (".weight", ".scales", ".biases")
            if path + ending in tensors
        )
        quantization = table(path) or table.default
        if quantization is None or not quantization.matches(weight.shape, scales.shape):
            quantization = _only_match(weight, scales, quantization)
        if quantization is None:
            raise MlxtxError(
                f"{path}: packed {list(weight.shape)} with scales {list(scales.shape)} does not "
                "fit the quantization that config.json gives"
            )
        if scales.dtype != mx.uint8 and path + ".biases" not in tensors:
            raise MlxtxError(
                f"{path} is packed with affine scales and lacks {path}.biases {list(scales.shape)}"
            )
        stored = [tensors[part] for part in parts]
        unpack = partial(_unpack, quantization)
        plain = Tensor(
            (*weight.shape[:-1], quantization.columns(weight.shape[-1])),
            scales.dtype if quantization.mode == "affine" else mx.bfloat16,
            sum(tensor.nbytes for tensor in stored),
            partial(_together, unpack, [tensor.read for tensor in stored]),
            rows=partial(_together, unpack, [tensor.rows for tensor in stored if tensor.rows]),
        )
        packing = Packing(path + ".weight", parts, plain, quantization)
        result[path + ".weight"] = weight._replace(packing=packing)
    return result


def _together(
    unpack: Callable[..., mx.array], reads: list[Callable[..., mx.array]], *rows: int
) -> mx.array:
    """Read all parts (or the same rows of all parts) and unpack them."""
    return unpack(*[read(*rows) for read in reads])


def _only_match(
    weight: Tensor, scales: Tensor, default: Quantization | None
) -> Quantization | None:
    """Another packing of the default's group size that these shapes fit, or the only one at all."""
    from mlxtx.checkpoint.quantization import MODES

    fp = scales.dtype == mx.uint8
    found = [
        Quantization(bits, group, mode)
        for mode, (all_bits, groups) in MODES.items()
        for bits in all_bits
        for group in groups
        if (mode != "affine") == fp
        and Quantization(bits, group, mode).matches(weight.shape, scales.shape)
    ]
    same = [q for q in found if default and q.group_size == default.group_size]
    found = same or found
    return found[0] if len(found) == 1 else None


def _unpack(
    quantization: Quantization, weight: mx.array, scales: mx.array, biases: mx.array | None = None
) -> mx.array:
    dtype = scales.dtype if quantization.mode == "affine" else mx.bfloat16
    return quantization.unpack(weight, scales, biases, dtype)


def _fp8(checkpoint: Checkpoint, tensors: Tensors, settings: Mapping[str, Any]) -> Tensors:
    """8-bit floats (E4M3), with a scale for the tensor, for each row or for each block.

    DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 3.3): weight = number * weight_scale_inv
    of its 128 x 128 block. Unpacked into the type the configuration names (bfloat16 otherwise).
    """
    eights = {name for name, info in checkpoint.tensors.items() if info.dtype == "F8_E4M3"}
    if not eights:
        return tensors
    dtype = _main_dtype(checkpoint.config)
    result = dict(tensors)
    for name in eights:
        scale = next((name + end for end in _FP8_SCALES if name + end in tensors), None)
        if scale is None and settings:
            raise MlxtxError(f"{name} holds 8-bit floats and {name}_scale_inv is not there")
        scales = tensors[scale] if scale else None
        stored = tensors[name]
        block = _block(stored.shape, scales, settings, name)
        powers = scale is not None and checkpoint.tensors[scale].dtype == "F8_E8M0"
        flat = len(stored.shape) == 2 and (scales is None or len(scales.shape) == 2)
        result[name] = Tensor(
            stored.shape,
            dtype,
            stored.nbytes + (scales.nbytes if scales else 0),
            partial(_unpack_fp8, stored, scales, block, powers, dtype),
            rows=partial(_unpack_fp8, stored, scales, block, powers, dtype) if flat else None,
            row_step=block[0],
        )
        for other in (scale, *(name.removesuffix("weight") + end for end in _FP8_ACTIVATIONS)):
            if other:
                result.pop(other, None)
    return result


_FP8_SCALES = ("_scale_inv", "_scale")
_FP8_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_inv")  # for 8-bit inputs


def _block(
    shape: tuple[int, ...], scales: Tensor | None, settings: Mapping[str, Any], name: str
) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if scales is None or math.prod(scales.shape) == 1:
        return (1, 1)
    if len(shape) < 2:
        raise MlxtxError(f"{name} {list(shape)} has no blocks for scales {list(scales.shape)}")
    size = settings.get("weight_block_size") or (1, shape[-1])
    if not isinstance(size, list | tuple) or [type(n) is int and n > 0 for n in size] != [True] * 2:
        raise MlxtxError(f"config.json: unreadable weight_block_size {size!r:.60}")
    rows, columns = size
    blocks = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    if scales.shape not in (blocks, blocks[:-1] if blocks[-1] == 1 else blocks):
        raise MlxtxError(
            f"{name} {list(shape)} in blocks of {rows} x {columns} needs scales {list(blocks)}, "
            f"and there are {list(scales.shape)}"
        )
    return rows, columns


def _unpack_fp8(
    stored: Tensor,
    scales: Tensor | None,
    block: tuple[int, int],
    powers: bool,
    dtype: mx.Dtype,
    *rows: int,
) -> mx.array:
    """All of a weight or, with ``rows`` (start, stop), some rows that begin with a block."""
    high, wide = block
    assert not rows or rows[0] % high == 0
    data = stored.rows(*rows) if rows and stored.rows else stored.read()
    numbers = mx.from_fp8(data, mx.float32)
    if scales is None:
        return numbers.astype(dtype)
    if rows and scales.rows and scales.shape != (1, 1):
        scale = scales.rows(rows[0] // high, -(-rows[1] // high))
    else:
        scale = scales.read()
    scale = _powers_of_two(scale) if powers else scale.astype(mx.float32)
    if scale.size > 1:
        *lead, height, width = numbers.shape
        scale = scale.reshape(*lead, -(-height // high), -(-width // wide))
        scale = mx.repeat(mx.repeat(scale, high, axis=-2), wide, axis=-1)
        scale = scale[..., :height, :width]
    return (numbers * scale).astype(dtype)


def _powers_of_two(exponents: mx.array) -> mx.array:
    """E8M0: a biased exponent and nothing else, as float32 (255 is no number)."""
    bits = exponents.astype(mx.uint32) << 23
    values = mx.where(exponents == 0, mx.array(0x00400000, mx.uint32), bits)  # 2**-127
    values = mx.where(exponents == 255, mx.array(0x7FC00000, mx.uint32), values)
    return values.view(mx.float32)


def _mxfp4(checkpoint: Checkpoint, tensors: Tensors, settings: Any = None) -> Tensors:
    """gpt-oss: X_blocks [..., O, G, 16] bytes of two 4-bit floats each, X_scales [..., O, G].

    The bytes are in MLX's order, so four of them are one of MLX's packed words. Unpacked it is X
    [..., I, O], the way such fused experts are stored.
    """
    result = dict(tensors)
    mxfp4 = Quantization.of("mxfp4")
    for name, scales in tensors.items():
        path = name.removesuffix("_scales")
        blocks = tensors.get(path + "_blocks")
        if path == name or blocks is None:
            continue
        if blocks.shape != (*scales.shape, 16):
            raise MlxtxError(
                f"{path}: blocks {list(blocks.shape)} do not fit scales {list(scales.shape)}"
            )
        *lead, rows, groups = scales.shape
        parts = [blocks.read, scales.read]
        plain = Tensor(
            (*lead, groups * 32, rows),
            mx.bfloat16,
            blocks.nbytes + scales.nbytes,
            partial(_together, _unpack_blocks, parts),
        )
        result[path + "_blocks"] = blocks._replace(
            packing=Packing(path, (path + "_blocks", name), plain, mxfp4)
        )
    return result


def _unpack_blocks(blocks: mx.array, scales: mx.array) -> mx.array:
    words = blocks.view(mx.uint32).flatten(-2)
    return _unpack(Quantization.of("mxfp4"), words, scales).swapaxes(-1, -2)


_FORMATS: dict[str, Callable[[Checkpoint, Tensors, Any], Tensors]] = {
    "mlx": _mlx,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
}


def _main_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    return FLOAT_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), mx.bfloat16)


FLOAT_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
