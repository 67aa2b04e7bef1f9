"""The safetensors format: a reader that trusts nothing, and a writer that streams.

A file is: the header's length (8 bytes, little endian), the header (JSON: name -> dtype, shape,
data_offsets; ``__metadata__`` holds strings), then the tensors' bytes one after the other without
holes. Source: the format section of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from mlxtx.errors import MlxtxError

if TYPE_CHECKING:
    import mlx.core as mx

# The format's own limit; a longer header is an attack or a file of another kind.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32
# Tensors read ahead while the load is planned. Planning wants a core of its own: reading more takes
# it away on a machine of two, and MLX makes the caller wait where ten operations are under way.
AHEAD = 2

# Bits of one number of each type in the format.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# The names of these types in MLX; 8-bit floats arrive as the bytes they are.
MLX_DTYPES = {
    "BOOL": "bool_",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "uint8",
    "F8_E8M0": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "I64": "int64",
    "U64": "uint64",
}


class TensorInfo(NamedTuple):
    """Where a tensor lies: ``start`` and ``end`` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises ValueError for an unknown type or bits that fill no whole byte."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown type {dtype!r:.40}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{bits} bits fill no whole number of bytes")
    return bits // 8


def read_header(path: str | Path) -> Header:
    """The checked header of a safetensors file, tensors in the order of their bytes.

    Nothing is read but the header, whose length is bounded. Raises MlxtxError, with the file's
    name, for anything that does not follow the format: a file cut short, offsets that overlap,
    leave holes or leave the file, shapes that do not fit them, names that come twice.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise MlxtxError(f"{path} is no file")  # a pipe would wait for ever
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _parse(file, size)
    except _BadHeader as error:
        raise MlxtxError(f"{path} is not a sound safetensors file: {error}") from None
    except OSError as error:
        raise MlxtxError(f"cannot read {path}: {error.strerror or error}") from None


class _BadHeader(Exception):
    pass


# What lies there instead when something went wrong, by its first bytes.
_OTHER_KINDS = {
    b"version ": "a Git LFS pointer, not the weights; run `git lfs pull`, or download the file",
    b"<": "a web page, not the weights; download the file again",
    b"GGUF": "a GGUF file under another name; use a safetensors version of the model",
    b"PK\x03\x04": "a zip archive, perhaps a pickled model; use a safetensors version",
}


def _parse(file: IO[bytes], size: int) -> Header:
    first = file.read(8)
    if len(first) < 8:
        raise _BadHeader(f"it holds {size} bytes, too few for a header (a cut download?)")
    (length,) = struct.unpack("<Q", first)
    if length > MAX_HEADER_BYTES:
        for start, kind in _OTHER_KINDS.items():
            if first.startswith(start):
                raise _BadHeader(f"it is {kind}")
        raise _BadHeader(f"its header claims {length} bytes, above {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise _BadHeader(f"its header claims {length} bytes, and the file holds {size} in all")
    text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise _BadHeader(f"its header is not JSON ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise _BadHeader("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _BadHeader("its __metadata__ is not a map of strings")
    tensors = {name: _tensor(name, entry, 8 + length) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 8 + length
    for name, info in tensors.items():
        if info.start != position:
            what = "overlaps what is before it" if info.start < position else "leaves a hole"
            raise _BadHeader(f"tensor {name!r:.200} {what} (byte {info.start}, not {position})")
        position = info.end
    if position != size:
        what = "is cut short" if position > size else "has bytes left over"
        raise _BadHeader(f"the file {what}: {size} bytes, and its header describes {position}")
    return Header(tensors, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice!r:.200} comes twice")
    return found


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    def bad(why: str) -> _BadHeader:
        return _BadHeader(f"tensor {name!r:.200}: {why}")

    if not name.isprintable():  # also keeps terminal escapes out of messages
        raise bad("its name holds control characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("it needs dtype, shape and data_offsets, and nothing else")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise bad(f"its shape is {shape!r:.80}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise bad(f"its data_offsets are {offsets!r:.80}")
    if not isinstance(dtype, str):
        raise bad(f"its dtype is {dtype!r:.40}")
    try:
        expected = tensor_bytes(dtype, tuple(shape))
    except ValueError as error:
        raise bad(str(error)) from None
    begin, end = offsets
    if end - begin != expected:
        raise bad(f"{dtype} {shape!r:.80} is {expected} bytes; its offsets hold {end - begin}")
    if max(shape, default=0) >= 2**31:
        raise bad(f"its shape is {shape!r:.80}, and MLX counts to 2**31")
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def _is_sizes(value: Any) -> bool:
    """A list of whole numbers that a file can hold (2**63 keeps the products bounded too)."""
    return type(value) is list and all(type(n) is int and 0 <= n < 2**63 for n in value)


class Reader:
    """The tensors of one file, read one at a time when they are evaluated."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self.tensors = header.tensors
        self.metadata = header.metadata
        # mx.load reads straight into the array's own memory, but it refuses the whole file for
        # one type that it does not know.
        self._plain = all(info.dtype in MLX_DTYPES for info in self.tensors.values())
        self._lazy: dict[str, mx.array] = {}

    def read(self, name: str) -> mx.array:
        """The tensor, lazy where MLX can read the file. 8-bit floats come as uint8, float64 as
        float32. A name can be read once more after it was taken: the file stays the source."""
        info = self.tensors[name]
        if not self._plain or 0 in info.shape:
            return self._read_bytes(info)
        if name not in self._lazy:
            self._lazy = self._load()
        return self._lazy.pop(name)  # keeps no reference, so a used tensor's memory is free

    def read_ahead(self, nbytes: int) -> None:
        """Starts to read a few of the largest tensors, up to ``nbytes``, before they are asked for."""
        import mlx.core as mx

        if not self._plain:
            return
        self._lazy = self._load()
        largest = sorted(self.tensors, key=lambda name: -self.tensors[name].nbytes)[:AHEAD]
        sizes = accumulate(self.tensors[name].nbytes for name in largest)
        mx.async_eval(
            [self._lazy[n] for n, size in zip(largest, sizes, strict=True) if size <= nbytes]
        )

    def _load(self) -> dict[str, mx.array]:
        import mlx.core as mx

        loaded = mx.load(str(self.path), format="safetensors")
        assert isinstance(loaded, dict)
        return loaded

    def read_rows(self, name: str, start: int, stop: int) -> mx.array:
        """Some rows of a tensor [..., O, I], counted over all axes but the last: [stop - start, I].
        Only their bytes are read, at once."""
        info = self.tensors[name]
        rows = math.prod(info.shape[:-1])
        width = info.nbytes // rows
        piece = TensorInfo(
            info.dtype,
            (stop - start, info.shape[-1]),
            info.start + start * width,
            info.start + stop * width,
        )
        return self._read_bytes(piece)

    def _read_bytes(self, info: TensorInfo) -> mx.array:
        import mlx.core as mx
        import numpy as np

        if info.dtype not in (*MLX_DTYPES, "F64", "F8_E5M2"):
            raise MlxtxError(f"{self.path} holds {info.dtype} tensors, which are not supported yet")
        with open(self.path, "rb") as file:
            file.seek(info.start)
            data = np.fromfile(file, np.uint8, info.nbytes)
        if len(data) != info.nbytes:
            raise MlxtxError(f"{self.path} ended while it was read; is it still being written?")
        if info.dtype == "F64":
            return mx.array(data.view(np.float64).astype(np.float32).reshape(info.shape))
        if info.dtype == "F8_E5M2":  # the upper byte of a half-precision number
            wide = data.astype(np.uint16) << 8
            return mx.array(wide.view(np.float16).reshape(info.shape))
        target = getattr(mx, MLX_DTYPES[info.dtype])
        if 0 in info.shape:
            return mx.zeros(info.shape, target)
        if info.dtype == "BOOL":
            return mx.array(data.view(np.bool_).reshape(info.shape))
        if info.dtype == "BF16":
            return mx.array(data.view(np.uint16)).view(target).reshape(info.shape)
        kind = MLX_DTYPES[info.dtype]
        return mx.array(data.view(kind).reshape(info.shape))


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a file whose tensors (name -> dtype, shape) follow in this order."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    return struct.pack("<Q", len(text)) + text


def dtype_name(array: mx.array) -> str:
    """The format's name of an array's type."""
    return _NAMES[str(array.dtype).rpartition(".")[2]]


_NAMES = {
    mlx_name.rstrip("_"): name for name, mlx_name in MLX_DTYPES.items() if not name.startswith("F8")
}


def array_bytes(array: mx.array) -> memoryview:
    """An array's bytes, row after row, in the array's own memory. The array is evaluated."""
    import mlx.core as mx

    if array.size == 0:
        return memoryview(b"")
    array = mx.contiguous(array.reshape(-1))
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(plain)
    return memoryview(plain).cast("B")  # type: ignore[arg-type]


def write_array(file: IO[bytes], array: mx.array) -> int:
    """Append an array's bytes; returns how many."""
    return file.write(array_bytes(array))
