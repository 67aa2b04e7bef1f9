"""Every Metal kernel run against its reference on this machine, and timed; the findings are kept.

A kernel that does not compile or disagrees is switched off on this machine. Where MLX has a path of
its own the faster one is remembered, for this GPU, this version of MLX and these kernels.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from mlxtx.diagnostics.memory_plan import machine_memory
from mlxtx.files import write_json_atomic
from mlxtx.metal_kernels import (
    attention_decode,
    attention_prefill,
    chips,
    dispatch,
    kv_quantize,
    rope,
)
from mlxtx.metal_kernels.attention_reference import AttentionOptions, attention_reference
from mlxtx.metal_kernels.mlx_attention import fused

# Largest error allowed, relative to the largest value: a few units in the last place.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
TIMED_ROWS = 8192
REPEATS = 15
DOES_NOT_RUN = "does not run"
FEWER_SIMDGROUPS = (4, 2)
WITH_A_RIVAL = ("attention_decode", "attention_prefill")  # in MLX: a time has to decide


@dataclass(frozen=True)
class Machine:
    """What the kernels run on."""

    chip: str
    memory_gb: float
    system: str
    mlx: str
    mlxtx: str
    metal: bool


@dataclass(frozen=True)
class Finding:
    """One kernel on this machine. Times in milliseconds; None where nothing was timed."""

    operation: str
    cases: int
    problem: str  # empty: it agrees with its reference
    kernel_ms: float | None = None
    other_ms: float | None = None
    other: str = ""  # what it was timed against
    simdgroups: str = ""  # of a threadgroup, where the device allows fewer than the table says
    bound_ms: float | None = None  # the bytes it must move at the chip's bandwidth

    @property
    def untimed(self) -> bool:
        """Right, but nobody knows how fast."""
        return not self.problem and self.kernel_ms is None

    @property
    def choice(self) -> str:
        """What ``dispatch`` shall do: "off", "fast" or "kernel"."""
        if self.problem:
            return "off"
        if self.kernel_ms is None or self.other_ms is None or self.kernel_ms <= self.other_ms:
            return "kernel"
        return "fast" if self.other == "mx.fast" else "kernel"


def machine() -> Machine:
    """Chip, memory, system and versions."""
    from mlxtx import __version__

    info = mx.device_info()
    system = platform.mac_ver()[0]
    return Machine(
        chip=str(info.get("device_name", platform.machine())),
        memory_gb=float(info.get("memory_size") or machine_memory()) / 2**30,
        system=f"macOS {system}" if system else f"{platform.system()} {platform.release()}",
        mlx=version("mlx"),
        mlxtx=__version__,
        metal=mx.metal.is_available(),
    )


def examine(*, timed: bool = True) -> Iterator[Finding]:
    """Check each kernel, one finding as each is done. Needs Metal (or a stand-in for it)."""
    yield _examine("kv_quantize", _quantize_cases, None)
    yield _examine("rope", _rope_cases, None)
    yield _examine("rope_quantize", _rope_quantize_cases, None)
    yield _examine_decode(_time_decode if timed else None)
    yield _examine("attention_prefill", _prefill_cases, _time_prefill if timed else None)


def _examine_decode(timing: Callable[[], Times] | None) -> Finding:
    """attention_decode with as many simdgroups as the device lets a threadgroup have."""
    finding = replace(
        _examine("attention_decode", _decode_cases, timing),
        simdgroups=dispatch.remembered().get("simdgroups", ""),  # it ran with so many
    )
    for count in FEWER_SIMDGROUPS:
        if not finding.problem.startswith(DOES_NOT_RUN):
            break
        with dispatch.trying(simdgroups=count):
            finding = replace(
                _examine("attention_decode", _decode_cases, timing), simdgroups=str(count)
            )
    return finding if not finding.problem else replace(finding, simdgroups="")


def remember(findings: list[Finding]) -> None:
    """Keep the choices for this machine; what was found on others stays, and so does an earlier
    choice between two paths where none was timed."""
    path = dispatch.memory_file()
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    if not isinstance(kept, dict):
        kept = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    before = kept.get(dispatch.machine_key())
    before = before if isinstance(before, dict) else {}
    choices = {f.operation: f.choice for f in findings}
    for finding in findings:
        if finding.untimed and finding.operation in WITH_A_RIVAL:
            del choices[finding.operation]
            if before.get(finding.operation) in ("kernel", "fast"):
                choices[finding.operation] = before[finding.operation]
        if finding.simdgroups:
            choices["simdgroups"] = finding.simdgroups
    kept[dispatch.machine_key()] = choices
    write_json_atomic(path, kept)
    dispatch.remembered.cache_clear()


Case = tuple[str, Callable[[], list[mx.array]], Callable[[], list[mx.array]], float]
Times = tuple[float, float, str, float | None]


def _examine(
    operation: str, cases: Callable[[], Iterator[Case]], timing: Callable[[], Times] | None
) -> Finding:
    count = 0
    try:
        for name, kernel, reference, tolerance in cases():
            count += 1
            found, expected = kernel(), reference()
            mx.eval(found, expected)
            for a, b in zip(found, expected, strict=True):
                a, b = a.astype(mx.float32), b.astype(mx.float32)
                ratio = mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-6)
                error = np.array(ratio).item()
                if not error <= tolerance:  # a NaN is not
                    return Finding(operation, count, f"{name}: differs by {error:.2g}")
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()
        return Finding(operation, count, f"{DOES_NOT_RUN}: {first[0][:200] if first else error}")
    if timing is None:
        return Finding(operation, count, "")
    kernel_ms, other_ms, other, bound = timing()
    return Finding(operation, count, "", kernel_ms, other_ms, other, bound_ms=bound)


def _attention_cases(
    queries: tuple[int, ...], launch: Callable[..., mx.array], rows: int
) -> Iterator[Case]:
    """Shapes and caches with a window and a soft cap; then every other option, over ``rows`` rows."""
    shapes = [(64, 64), (128, 128), (96, 96), (256, 256), (576, 512)]
    caches = [None, (8, 8), (8, 4), (4, 4), (3, 5)]
    for dtype, tolerance in TOLERANCE.items():
        cases = []
        for number, (dim, value_dim) in enumerate(shapes):
            for offset in range(2):
                bits = caches[(2 * number + offset) % len(caches)]
                arguments = _attention_arguments(
                    dtype, dim, value_dim, bits, queries[(number + offset) % len(queries)], 90
                )
                cases.append((f"head dim {dim}, cache {bits or 'plain'}", arguments))
        many = _attention_arguments(dtype, 64, 64, (8, 4), queries[0], rows)
        cases.append((f"{rows} rows, every option", many | _other_options(queries[0], rows)))
        for name, arguments in cases:
            yield (
                f"{dtype}, {name}".replace("mlx.core.", ""),
                lambda a=arguments: [launch(**a)],  # type: ignore[misc]
                lambda a=arguments: _exact_attention(a),  # type: ignore[misc]
                tolerance,
            )


def _exact_attention(arguments: dict[str, Any]) -> list[mx.array]:
    """The reference, on the CPU: the GPU of an M5 multiplies float32 matrices with ten bits."""
    with mx.stream(mx.cpu):
        return [attention_reference(**arguments)]


def _attention_arguments(
    dtype: mx.Dtype, dim: int, value_dim: int, bits: tuple[int, int] | None, queries: int, rows: int
) -> dict[str, Any]:
    latent = dim != value_dim
    kv_heads = 1 if latent else 2
    mx.random.seed(rows)
    q = mx.random.normal((2, 4 * kv_heads, queries, dim)).astype(dtype)
    keys: Any = mx.random.normal((2, kv_heads, rows, dim)).astype(dtype)
    values: Any = mx.random.normal((2, kv_heads, rows, value_dim)).astype(dtype)
    if bits is not None:
        keys = kv_quantize.kv_quantize_reference(keys, bits=bits[0], group_size=32)
        values = kv_quantize.kv_quantize_reference(values, bits=bits[1], group_size=32)
    return {
        "q": q,
        "keys": keys,
        "values": None if latent else values,
        "value_dim": value_dim if latent else None,
        "lengths": [rows, rows - 31],
        "scale": dim**-0.5,
        "softcap": 20.0,
        "window": 70,
    }


def _other_options(queries: int, rows: int) -> dict[str, Any]:
    """For two sequences and eight heads; without the window, all rows are in reach."""
    return {
        "window": None,
        "sinks": mx.random.normal((8,)),
        "slopes": mx.arange(1, 9) / 64,
        "starts": [0, 40],
        "mask": mx.random.uniform(shape=(2, 1, queries, rows)) < 0.8,
    }


def _decode_cases() -> Iterator[Case]:
    # More rows than a single pass takes: attention_merge has to run too.
    return _attention_cases(
        (1, 3), attention_decode.launch, dispatch.tuning().single_pass_rows + 90
    )


def _prefill_cases() -> Iterator[Case]:
    return _attention_cases((17, 40), attention_prefill.launch, 150)


def _quantize_cases() -> Iterator[Case]:
    """Codes may differ by one where a value lies between two: the rows they stand for may not."""
    for dtype in TOLERANCE:
        for bits, dim in ((2, 64), (3, 80), (4, 128), (5, 96), (6, 256), (8, 512)):
            rows = mx.random.normal((2, 9, dim)).astype(dtype)
            steps = 2 / (2**bits - 1) + 4 * TOLERANCE[dtype]

            def run(
                function: Callable[..., kv_quantize.QuantizedRows],
                rows: mx.array = rows,
                bits: int = bits,
            ) -> list[mx.array]:
                return [kv_quantize.kv_dequantize(function(rows, bits=bits, group_size=32))]

            yield (
                f"{bits} bits of {dim}",
                lambda run=run: run(kv_quantize.launch),  # type: ignore[misc]
                lambda run=run: run(kv_quantize.kv_quantize_reference),  # type: ignore[misc]
                steps,
            )


def _rope_arguments(dtype: mx.Dtype, dim: int) -> dict[str, Any]:
    return {
        "q": mx.random.normal((2, 5, 8, dim)).astype(dtype).swapaxes(1, 2),
        "k": mx.random.normal((2, 5, 2, dim)).astype(dtype).swapaxes(1, 2),
        "inverse_frequencies": 1e4 ** (-mx.arange(dim // 2) / (dim // 2)),
        "offsets": mx.array([0, 1000]),
        "q_norm": (mx.random.normal((dim,)).astype(dtype), 1e-6, 0.0),
        "k_norm": (None, 1e-6, 0.0),
    }


def _rope_cases() -> Iterator[Case]:
    for dtype, tolerance in TOLERANCE.items():
        for dim, interleaved in ((64, False), (128, True), (256, False)):
            arguments = {**_rope_arguments(dtype, dim), "interleaved": interleaved}
            yield (
                f"head dim {dim}",
                lambda a=arguments: list(rope.launch(**a)),  # type: ignore[misc]
                lambda a=arguments: list(rope.rope_reference(**a)),  # type: ignore[misc]
                max(tolerance, 2e-4),  # float32 sines at position 1000
            )


def _rope_quantize_cases() -> Iterator[Case]:
    for dtype, tolerance in TOLERANCE.items():
        for dim in (64, 128):
            arguments = _rope_arguments(dtype, dim)
            arguments |= {"v": arguments["k"] * 2, "key_bits": 8, "value_bits": 6, "group_size": 32}

            def run(
                function: Callable[..., Any], arguments: dict[str, Any] = arguments
            ) -> list[mx.array]:
                q, keys, values = function(**arguments)
                return [q, kv_quantize.kv_dequantize(keys), kv_quantize.kv_dequantize(values)]

            yield (
                f"head dim {dim}",
                lambda run=run: run(rope.launch_quantize),  # type: ignore[misc]
                lambda run=run: run(rope.rope_quantize_reference),  # type: ignore[misc]
                2 / 63 + 4 * tolerance,
            )


def _time_decode() -> Times:
    """One query row over a plain bfloat16 cache, against MLX's own kernel."""
    size = 2 * 8 * TIMED_ROWS * 128 * 2
    return *_times(attention_decode.launch, 1), "mx.fast", _bound_ms(size)


def _time_prefill() -> Times:
    """512 query rows over a plain bfloat16 cache, against MLX's own kernel."""
    return *_times(attention_prefill.launch, 512), "mx.fast", None


def _times(launch: Callable[..., mx.array], queries: int) -> tuple[float, float]:
    q = mx.random.normal((1, 32, queries, 128)).astype(mx.bfloat16)
    keys, values = mx.random.normal((2, 1, 8, TIMED_ROWS, 128)).astype(mx.bfloat16)
    options: AttentionOptions = {"lengths": [TIMED_ROWS], "scale": 128**-0.5}
    mx.eval(q, keys, values)
    return (
        _milliseconds(lambda: launch(q, keys, values, **options)),
        _milliseconds(lambda: fused(q, keys, values, options)),
    )


def _bound_ms(size: int) -> float | None:
    speed = chips.bandwidth_of(machine().chip)
    return None if speed is None else size / speed / 1e6


def _milliseconds(run: Callable[[], mx.array]) -> float:
    """The median of a few runs, the first (which compiles) left out."""
    mx.eval(run())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        mx.eval(run())
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)
