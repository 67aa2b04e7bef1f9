"""A stand-in for ``mx.fast.metal_kernel``: the real host code launches on the emulator."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from .machine import Kernel, Launch, Mode

PRELUDE = '#include "mlx/backend/metal/kernels/utils.h"\n'
# Captured before any stand-in is in place: this is what generates the source.
_real_metal_kernel = mx.fast.metal_kernel
_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
_NUMPY_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Emulator:
    """Context manager: inside, ``mx.fast.metal_kernel`` makes kernels that run here.

    ``launches`` holds what each launch did. Results are evaluated at once, so it cannot be used
    inside ``mx.compile``; gradients do not flow through it.
    """

    def __init__(self, mode: Mode = "checked", seed: int = 0):
        self.mode: Mode = mode
        self.seed = seed
        self.launches: list[Launch] = []
        self._sources: dict[Any, str] = {}

    @property
    def sources(self) -> list[str]:
        """The text MLX generated for each kernel that ran."""
        return list(self._sources.values())

    def __enter__(self) -> Emulator:
        self._patch = mock.patch.object(mx.fast, "metal_kernel", self.metal_kernel)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: object | None = None,
    ) -> Callable[..., list[mx.array]]:
        """The signature of ``mx.fast.metal_kernel``."""
        options = {"compile_options": compile_options} if compile_options is not None else {}
        real = _real_metal_kernel(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
            **options,
        )

        def call(
            *,
            inputs: Sequence[Any],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            template: Sequence[tuple[str, Any]] | None = None,
            init_value: float | None = None,
            verbose: bool = False,
            stream: Any = None,
        ) -> list[mx.array]:
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            mx.eval(*arrays)
            arguments: dict[str, Any] = {
                "output_shapes": output_shapes,
                "output_dtypes": output_dtypes,
                "grid": grid,
                "threadgroup": threadgroup,
                "template": template,
            }
            key = (
                *(name, header, source, str(template), str(output_dtypes)),
                *((str(x.dtype), x.ndim, x.size < 8) for x in arrays),
            )
            if key not in self._sources:
                self._sources[key] = generated_source(real, arrays, arguments)
            text = self._sources[key]
            kernel = _kernel(text, self.mode)
            buffers = self._buffers(
                kernel, arrays, input_names, output_names, output_shapes, output_dtypes,
                init_value, ensure_row_contiguous,
            )  # fmt: skip
            launch = kernel.launch(
                buffers,
                grid=grid,
                threadgroup=threadgroup,
                seed=self.seed,
                filled=init_value is not None,
            )
            launch.name = name
            self.launches.append(launch)
            by_name = {p.name: p.buffer for p in kernel.parameters}
            return [
                _to_mlx(launch.outputs[by_name[n]], shape, dtype)
                for n, shape, dtype in zip(output_names, output_shapes, output_dtypes, strict=True)
            ]

        return call

    def _buffers(
        self,
        kernel: Kernel,
        arrays: Sequence[mx.array],
        input_names: Sequence[str],
        output_names: Sequence[str],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        init_value: float | None,
        ensure_row_contiguous: bool,
    ) -> dict[int, np.ndarray]:
        """What each buffer of the generated signature holds."""
        content: dict[str, np.ndarray] = {}
        for name, array in zip(input_names, arrays, strict=True):
            data, strides = _raw(array, ensure_row_contiguous)
            content[name] = data
            content[f"{name}_shape"] = np.array(array.shape, dtype=np.int32)
            content[f"{name}_strides"] = np.array(strides, dtype=np.int64)
            content[f"{name}_ndim"] = np.array([array.ndim], dtype=np.int32)
        for name, shape, dtype in zip(output_names, output_shapes, output_dtypes, strict=True):
            content[name] = _raw(mx.full(tuple(shape), init_value or 0, dtype=dtype), True)[0]
        return {p.buffer: content[p.name] for p in kernel.parameters if p.buffer is not None}


_kernels: dict[tuple[str, Mode], Kernel] = {}


def _kernel(text: str, mode: Mode) -> Kernel:
    if (text, mode) not in _kernels:
        _kernels[text, mode] = Kernel(PRELUDE + text, entry_of(text), mode)
    return _kernels[text, mode]


def entry_of(text: str) -> str:
    """``name<arguments>`` of the instantiation (or the plain name) in a generated source."""
    instantiated = re.search(r"\[\[kernel\]\]\s*decltype\((custom_kernel_.*?>)\)", text, re.S)
    if instantiated:
        return instantiated.group(1)
    plain = re.search(r"\[\[kernel\]\]\s*void\s+(\w+)", text)
    assert plain is not None
    return plain.group(1)


def generated_source(
    real: Callable[..., Any], arrays: Sequence[mx.array], arguments: dict[str, Any]
) -> str:
    """The text MLX itself generates for this launch: while a function is exported the call is only
    recorded, and ``verbose`` prints the source (to the C standard output)."""

    def recorded(*inputs: mx.array) -> Any:
        return real(inputs=list(inputs), verbose=True, **arguments)

    with tempfile.TemporaryDirectory() as folder, _captured_output() as read:
        # Sizes decide the signature, contents do not: a scalar must stay one.
        mx.export_function(os.path.join(folder, "kernel.mlxfn"), recorded, *arrays)
        text = read()
    found = re.search(r"```\n(.*)\n```", text, flags=re.S)
    assert found is not None, text
    return found.group(1)


@contextmanager
def _captured_output() -> Iterator[Callable[[], str]]:
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)

        def read() -> str:
            file.seek(0)
            return file.read().decode()

        try:
            yield read
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def _raw(array: mx.array, contiguous: bool) -> tuple[np.ndarray, list[int]]:
    """Bytes that hold an array, and its strides in elements."""
    size = array.dtype.size
    words = array.astype(mx.uint8) if array.dtype == mx.bool_ else array.view(_WORDS[size])
    if contiguous:
        words = mx.contiguous(words)
    mx.eval(words)
    view = np.array(words, copy=False)
    strides = [stride // size for stride in view.strides]
    if array.size == 0:
        return np.zeros(0, dtype=np.uint8), strides
    extent = sum((n - 1) * s for n, s in zip(view.shape, strides, strict=True)) + 1
    assert all(s >= 0 for s in strides), "negative strides are not emulated"
    flat = np.lib.stride_tricks.as_strided(view, shape=(extent,), strides=(size,))
    return flat.copy().view(np.uint8), strides


def _to_mlx(raw: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    words = raw.view(_NUMPY_WORDS[dtype.size]).reshape(tuple(shape))
    array = mx.array(words)
    return array.astype(mx.bool_) if dtype == mx.bool_ else array.view(dtype)
