"""From ``NAME.metal`` to a kernel of ``mx.fast.metal_kernel``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

_BODY = "// ---- kernel body ----\n"


@functools.cache
def read_source(name: str) -> tuple[str, str]:
    """The helpers and the body of ``NAME.metal``; a compiler's message names the file."""
    text = Path(__file__).with_name(f"{name}.metal").read_text()
    header, _, body = text.partition(_BODY)
    line = header.count("\n") + 2
    return f'#line 1 "{name}.metal"\n{header}', f'\n#line {line} "{name}.metal"\n{body}'


def metal_kernel(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    contiguous: bool = True,
    helpers: tuple[str, ...] = (),
) -> Callable[..., list[mx.array]]:
    """The kernel of ``NAME.metal``, made once. ``contiguous=False`` passes strides on;
    ``helpers`` names files of helper functions that go before it."""
    return _made(mx.fast.metal_kernel, name, tuple(inputs), tuple(outputs), contiguous, helpers)


@functools.cache
def _made(
    factory: Callable[..., Any],  # part of the key: a test puts another in its place
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    contiguous: bool,
    helpers: tuple[str, ...],
) -> Callable[..., list[mx.array]]:
    header, body = read_source(name)
    return factory(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=body,
        header="".join(read_source(helper)[0] for helper in helpers) + header,
        ensure_row_contiguous=contiguous,
    )


@functools.lru_cache(maxsize=256)
def integers(*values: int) -> mx.array:
    """A small int32 array, kept: sizes change once in a while, launches come by the thousand."""
    array = mx.array(values, dtype=mx.int32)
    mx.eval(array)
    return array


@functools.lru_cache(maxsize=256)
def numbers(*values: float) -> mx.array:
    """A small float32 array, kept."""
    array = mx.array(values, dtype=mx.float32)
    mx.eval(array)
    return array


@functools.cache
def unused(dtype: mx.Dtype) -> mx.array:
    """Stands for an input a launch does not have; eight elements, for fewer would change the
    address space of the parameter, and so need another compilation."""
    array = mx.zeros((8,), dtype=dtype)
    mx.eval(array)
    return array
