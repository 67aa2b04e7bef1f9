"""Caches as files: safetensors with the model's fingerprint, the tokens and the settings inside.

Only rows that are filled are written, one tensor at a time; a ring is written in the order of its
rows. A file is written beside and renamed, so a full disk leaves nothing half-written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtx.cache.layer import RowsCache
from mlxtx.cache.model_cache import ModelCache
from mlxtx.cache.rows import array_of
from mlxtx.cache.segment import Segment
from mlxtx.cache.settings import KVSettings, parse_kv
from mlxtx.errors import MlxtxError

FORMAT = "mlxtx-cache-2"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class SavedCacheInfo:
    """What a cache file says of itself, from its header and its tokens."""

    path: Path
    model: str  # fingerprint
    settings: str
    offset: int
    left_padding: tuple[int, ...] | None
    tokens: list[list[int]]
    nbytes: int  # of the file
    title: str


def save_cache(
    path: str | Path,
    cache: ModelCache,
    *,
    model: str,
    tokens: Sequence[Sequence[int]],
    title: str = "",
) -> None:
    """Writes ``cache``. ``model``: the fingerprint of the model that filled it; ``tokens``: what
    each row of the batch was fed, padding included; ``title``: a line for people."""
    from mlxtx.checkpoint.safetensors import dtype_name, encode_header, write_array
    from mlxtx.files import atomic_write

    if any(len(row) != cache.offset for row in tokens):
        raise ValueError(f"tokens of {[len(row) for row in tokens]}, a cache of {cache.offset}")
    arrays: dict[str, mx.array] = {"tokens": mx.array([list(row) for row in tokens], mx.int32)}
    segments: dict[str, Any] = {}
    for number, layer in enumerate(cache.distinct()):
        for name, segment in layer.segments.items():
            prefix = f"layers.{number}.{name}"
            segments[prefix] = {
                "oldest": segment.oldest,
                "stop": segment.stop,
                "newest": segment.newest,
                "origin": segment.origin,
                "dims": [s.dim for s in (segment.keys, segment.values)],
                "dtypes": [s.dtype_name for s in (segment.keys, segment.values)],
            }
            arrays |= _arrays(prefix, segment)
    metadata = {
        "format": FORMAT,
        "model": model,
        "settings": str(cache.settings),
        "offset": str(cache.offset),
        "left_padding": json.dumps(cache.left_padding),
        "rewind": str(cache.layers[0].layout.rewind),
        "segments": json.dumps(segments),
        "title": title,
    }
    shapes = {name: (dtype_name(array), tuple(array.shape)) for name, array in arrays.items()}
    with atomic_write(path) as file:
        file.write(encode_header(shapes, metadata))
        for name in list(arrays):
            write_array(file, arrays.pop(name))


def _arrays(prefix: str, segment: Segment) -> dict[str, mx.array]:
    """The segment's rows, oldest first, by the names they have in a file."""
    parts = segment.parts()
    found = {}
    for kind in ("keys", "values"):
        rows = [getattr(part, kind) for part in parts]
        if not rows or rows[0] is None:
            continue
        pieces = [array_of(piece) for piece in rows]
        found[f"{prefix}.{kind}"] = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, 2)
    return found


def read_cache_info(path: str | Path) -> SavedCacheInfo:
    """What the file says of itself. Raises MlxtxError if it is no sound cache file."""
    return _info(_reader(path))


def load_cache(
    path: str | Path, model: Any, *, fingerprint: str, kv: str | KVSettings | None = None
) -> tuple[ModelCache, list[list[int]]]:
    """A cache for ``model`` and the tokens it holds.

    Raises MlxtxError, with the reason, for a file that is cut short or not a cache, and for a
    cache of another model, revision, adapter (``fingerprint``) or setting (``kv``; None takes
    the file's own).
    """
    reader = _reader(path)
    info = _info(reader)
    if info.model != fingerprint:
        raise MlxtxError(
            f"{path} was made by another model, revision, quantization or adapter "
            f"({info.model[:8]}, this one is {fingerprint[:8]}): build it again with this one"
        )
    settings = parse_kv(info.settings)
    if kv is not None and parse_kv(kv) != settings:
        raise MlxtxError(
            f"{path} keeps rows as {settings}, and {parse_kv(kv)} was asked for: build it again, "
            f"or ask for {settings}"
        )
    try:
        cache = model.make_cache(
            settings, left_padding=info.left_padding, rewind=int(reader.metadata["rewind"])
        )
        described = _json(reader.metadata["segments"])
        for number, layer in enumerate(cache.distinct()):
            for name, segment in layer.segments.items():
                prefix = f"layers.{number}.{name}"
                _check_facts(described[prefix], prefix, info.offset)
                _fill(segment, described[prefix], prefix, reader, len(info.tokens))
            layer.rows = info.offset
            _check_rows(layer, number)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise MlxtxError(f"{path} does not hold what its header says ({error})") from None
    cache.offset = info.offset
    mx.eval(cache.state())
    return cache, info.tokens


def _check_facts(facts: dict[str, Any], prefix: str, offset: int) -> None:
    """Numbers from a file decide how much memory is reserved: they must fit each other."""
    numbers = [facts[name] for name in ("origin", "oldest", "stop")]
    numbers += [facts["newest"], *facts["dims"]]
    whole = all(type(number) is int and 0 <= number < 1 << 31 for number in numbers)
    if not whole or not numbers[0] <= numbers[1] <= numbers[2] <= facts["newest"]:
        raise ValueError(f"{prefix} has rows {numbers}")
    if numbers[1] < numbers[2] and numbers[2] > offset:
        raise ValueError(f"{prefix} ends at row {numbers[2]} of {offset}")


def _fill(segment: Segment, facts: dict[str, Any], prefix: str, reader: Any, batch: int) -> None:
    count = facts["stop"] - facts["oldest"]
    segment.restart(facts["origin"])
    segment.stop = segment.newest = facts["oldest"]
    if count:
        found: list[Any] = []
        formats = (segment.key_format, segment.value_format)
        stored = zip(("keys", "values"), formats, facts["dims"], facts["dtypes"], strict=True)
        for kind, row_format, dim, dtype in stored:
            name = f"{prefix}.{kind}"
            if kind == "values" and not dim and name not in reader.tensors:
                found.append(None)
                continue
            array = reader.read(name)
            if array.ndim != 4 or array.shape[0] != batch or array.shape[2] != count:
                raise ValueError(f"{name} has a shape of another cache")
            found.append(row_format.from_array(array, dim, DTYPES[dtype]))
        segment.write(*found)
    segment.newest = facts["newest"]
    if segment.oldest != facts["oldest"]:
        raise ValueError(f"{prefix} begins with row {facts['oldest']}, not {segment.oldest}")


def _check_rows(layer: RowsCache, number: int) -> None:
    """The layer's segments follow each other to its last row and lack nothing that is seen again."""
    head, body, tail = layer.head, layer.body, layer.tail
    last = tail or body
    whole = body.origin == layer.layout.head and last.stop == max(layer.rows, body.origin)
    if head is not None:
        whole = whole and (head.origin, head.stop) == (0, min(layer.rows, body.origin))
    if tail is not None:
        whole = whole and tail.origin == body.stop
    if not whole or not layer.can_rollback(0):
        raise ValueError(f"layer {number} does not hold {layer.rows} rows")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _reader(path: str | Path) -> Any:
    from mlxtx.checkpoint.safetensors import Reader

    reader = Reader(path)
    if reader.metadata.get("format") != FORMAT:
        raise MlxtxError(f"{path} is not a cache of this version of mlxtx")
    return reader


def _info(reader: Any) -> SavedCacheInfo:
    data = reader.metadata
    try:
        padding = _json(data["left_padding"])
        tokens = reader.read("tokens").tolist()
        offset = int(data["offset"])
        if any(len(row) != offset for row in tokens):
            raise ValueError("tokens and offset differ")
        if padding is not None and not (
            len(padding) == len(tokens)
            and all(type(count) is int and 0 <= count < 1 << 31 for count in padding)
        ):
            raise ValueError("the padding is of other rows")
        return SavedCacheInfo(
            path=reader.path,
            model=data["model"],
            settings=data["settings"],
            offset=offset,
            left_padding=None if padding is None else tuple(padding),
            tokens=tokens,
            nbytes=os.path.getsize(reader.path),
            title=data.get("title", ""),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise MlxtxError(f"{reader.path} does not describe a cache ({error})") from None
