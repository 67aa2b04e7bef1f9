"""MLX's own kernels, from the headers of the installed wheel, against float64 numpy.

They are the emulator's regression tests: text by other authors that is known to be right on Metal.
The wheel ships no rope or rms_norm source; softmax stands for the kernels of that kind.
"""

from __future__ import annotations

import ctypes

import mlx.core as mx
import numpy as np
import pytest

from tests.kernels.numpy_attention import attention_float64

from . import EmulatorError, Kernel, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "")

KERNELS = "mlx/backend/metal/kernels/"
UTILS = f'#include "{KERNELS}utils.h"\n'
TYPES = {"float": mx.float32, "half": mx.float16, "bfloat16_t": mx.bfloat16}
# Two units in the last place of values near 1.
TOLERANCE = {"float": 4e-6, "half": 1e-3, "bfloat16_t": 8e-3}
SDPA = UTILS + f'#include "{KERNELS}sdpa_vector.h"\n'
PLAIN = {20: False, 21: False, 22: False, 23: False, 24: False, 25: False}


def draw(kind: str, *shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bytes in the kernel's dtype, and the same numbers in float64."""
    x = mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    x = x.astype(TYPES[kind])
    raw = np.array(x.view(mx.uint16 if x.itemsize == 2 else mx.uint32))
    return raw, np.array(x.astype(mx.float32)).astype(np.float64)


def read(raw: np.ndarray, kind: str, *shape: int) -> np.ndarray:
    words = raw.view(np.uint32 if kind == "float" else np.uint16)
    return np.array(mx.array(words).view(TYPES[kind]).astype(mx.float32)).reshape(shape)


def numbers(kind: type, *values: float) -> np.ndarray:
    return np.array(values, dtype=kind)


@pytest.mark.parametrize("kind", TYPES)
def test_decode_attention_in_one_pass(kind):
    heads, kv_heads, length, dim = 8, 2, 77, 128
    q, q64 = draw(kind, 1, heads, 1, dim)
    k, k64 = draw(kind, 1, kv_heads, length, dim, seed=1)
    v, v64 = draw(kind, 1, kv_heads, length, dim, seed=2)
    buffers = {0: q, 1: k, 2: v, 3: np.zeros_like(q)}
    buffers |= {4: numbers(np.int32, heads // kv_heads), 5: numbers(np.int32, length)}
    buffers |= {6: numbers(np.uint64, length * dim), 7: numbers(np.uint64, dim)}
    buffers |= {8: numbers(np.uint64, length * dim), 9: numbers(np.uint64, dim)}
    buffers |= {10: numbers(np.float32, dim**-0.5)}
    kernel = Kernel(SDPA, f"sdpa_vector<{kind}, {dim}, {dim}>")
    launch = kernel.launch(
        buffers, grid=(1024 * heads, 1, 1), threadgroup=(1024, 1, 1), constants=PLAIN
    )
    expected = attention_float64(q64, k64, v64, lengths=[length], scale=dim**-0.5)
    found = read(launch.outputs[3], kind, 1, heads, 1, dim)
    assert np.abs(found - expected).max() < TOLERANCE[kind]


@pytest.mark.parametrize("kind", ["float", "half"])
def test_decode_attention_in_two_passes(kind):
    heads, kv_heads, length, dim, blocks = 4, 2, 301, 64, 32
    q, q64 = draw(kind, 1, heads, 1, dim)
    k, k64 = draw(kind, 1, kv_heads, length, dim, seed=1)
    v, v64 = draw(kind, 1, kv_heads, length, dim, seed=2)
    partial = np.zeros((heads, blocks, dim), dtype=q.dtype)
    floats = np.zeros((heads, blocks), dtype=np.float32)
    buffers = {0: q, 1: k, 2: v, 3: partial, 4: floats, 5: floats}
    buffers |= {7: numbers(np.int32, length), 12: numbers(np.float32, dim**-0.5)}
    buffers |= {8: numbers(np.uint64, length * dim), 9: numbers(np.uint64, dim)}
    buffers |= {10: numbers(np.uint64, length * dim), 11: numbers(np.uint64, dim)}
    constants = {**PLAIN, 26: blocks}
    first = Kernel(SDPA, f"sdpa_vector_2pass_1<{kind}, {dim}, {dim}>")
    group = heads // kv_heads
    launch = first.launch(
        buffers,
        grid=(kv_heads * 32, group, blocks),
        threadgroup=(32, group, 1),
        constants=constants,
    )
    outputs = launch.outputs
    second = Kernel(SDPA, f"sdpa_vector_2pass_2<{kind}, {dim}>")
    launch = second.launch(
        {
            0: outputs[3], 1: outputs[4], 2: outputs[5], 3: np.zeros_like(q),
            4: numbers(np.int32, blocks),
        },
        grid=(1024 * heads, 1, 1),
        threadgroup=(1024, 1, 1),
        constants=constants,
    )  # fmt: skip
    expected = attention_float64(q64, k64, v64, lengths=[length], scale=dim**-0.5)
    found = read(launch.outputs[3], kind, 1, heads, 1, dim)
    assert np.abs(found - expected).max() < TOLERANCE[kind]


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_barrier_taken_out_of_decode_attention_is_a_race(nth):
    from .compiler import mlx_include

    text = (mlx_include() / KERNELS / "sdpa_vector.h").read_text()
    pieces = text.split("threadgroup_barrier(mem_flags::mem_threadgroup);")
    kept = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    text = kept.join(pieces[: nth + 1]) + kept.join(pieces[nth + 1 :])
    kernel = Kernel(UTILS + text, "sdpa_vector<half, 64, 64>")
    q, _ = draw("half", 1, 1, 1, 64)
    k, _ = draw("half", 1, 1, 70, 64)
    buffers = {0: q, 1: k, 2: k, 3: np.zeros_like(q), 4: numbers(np.int32, 1)}
    buffers |= {5: numbers(np.int32, 70), 10: numbers(np.float32, 0.1)}
    buffers |= {n: numbers(np.uint64, 64) for n in (6, 7, 8, 9)}
    with pytest.raises(EmulatorError, match="RACE"):
        kernel.launch(buffers, grid=(1024, 1, 1), threadgroup=(1024, 1, 1), constants=PLAIN)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantize_is_bit_identical(bits):
    source = UTILS + "".join(
        f'#include "{KERNELS}{name}"\n' for name in ("steel/gemm/gemm.h", "quantized_utils.h",
                                                    "quantized.h")
    )  # fmt: skip
    x = np.random.default_rng(3).normal(size=(16, 256)).astype(np.float32)
    codes, scales, biases = mx.quantize(mx.array(x), group_size=64, bits=bits)
    outputs = [np.array(a) for a in (codes, scales, biases)]
    kernel = Kernel(source, f"affine_quantize<float, 64, {bits}>")
    buffers = {0: x, **{i + 1: np.zeros_like(a) for i, a in enumerate(outputs)}}
    launch = kernel.launch(buffers, grid=(x.size // 2, 1, 1), threadgroup=(256, 1, 1))
    for i, expected in enumerate(outputs):
        assert (
            launch.outputs[i + 1].view(expected.dtype).reshape(expected.shape) == expected
        ).all()


class AttentionParameters(ctypes.Structure):
    """AttnParams of steel/attn/params.h."""

    _fields_ = (
        *((n, ctypes.c_int) for n in ("B", "H", "D", "qL", "kL", "gqa_factor")),
        ("scale", ctypes.c_float),
        *((n, ctypes.c_int) for n in ("NQ", "NK", "NQ_aligned", "NK_aligned")),
        *((n, ctypes.c_int) for n in ("qL_rem", "kL_rem", "qL_off")),
        *((n, ctypes.c_int64 * 3) for n in ("Q", "K", "V", "O")),
    )


@pytest.mark.parametrize("kind", ["float", "half"])
def test_steel_attention_with_matrices(kind):
    heads, rows, length, dim, bq, bk = 2, 50, 75, 64, 32, 32
    q, q64 = draw(kind, 1, heads, rows, dim)
    k, k64 = draw(kind, 1, heads, length, dim, seed=1)
    v, v64 = draw(kind, 1, heads, length, dim, seed=2)
    strides = [
        (ctypes.c_int64 * 3)(heads * n * dim, n * dim, dim) for n in (rows, length, length, rows)
    ]
    parameters = AttentionParameters(
        1, heads, dim, rows, length, 1, dim**-0.5, 2, 3, 1, 2, rows - bq, length - 2 * bk,
        length - rows, *strides,
    )  # fmt: skip
    source = UTILS + f'#include "{KERNELS}steel/attn/kernels/steel_attention.h"\n'
    kernel = Kernel(source, f"attention<{kind}, {bq}, {bk}, {dim}, {dim}, 4, 1, float, float>")
    launch = kernel.launch(
        {0: q, 1: k, 2: v, 3: np.zeros_like(q), 4: np.frombuffer(bytes(parameters), np.uint8)},
        grid=(32 * 2, 4 * heads, 1),
        threadgroup=(32, 4, 1),
        constants={200: False, 201: False, 300: False, 301: True, 302: False, 303: False},
    )
    expected = attention_float64(q64, k64, v64, lengths=[length], scale=dim**-0.5)
    found = read(launch.outputs[3], kind, 1, heads, rows, dim)
    assert np.abs(found - expected).max() < TOLERANCE[kind]


@pytest.mark.parametrize("kind", TYPES)
def test_softmax_of_a_row(kind):
    rows, width = 3, 500
    x, x64 = draw(kind, rows, width)
    source = UTILS + f'#include "{KERNELS}softmax.h"\n'
    kernel = Kernel(source, f"softmax_single_row<{kind}, float>")
    launch = kernel.launch(
        {0: x, 1: np.zeros_like(x), 2: numbers(np.int32, width)},
        grid=(128 * rows, 1, 1),
        threadgroup=(128, 1, 1),
    )
    weights = np.exp(x64)
    expected = weights / weights.sum(1, keepdims=True)
    found = read(launch.outputs[1], kind, rows, width)
    assert np.abs(found / expected - 1).max() < 2 * TOLERANCE[kind]
