"""One case of the grid: run the kernel on the emulator, compare with float64 numpy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlxtx.metal_kernels import attention_decode, attention_prefill
from mlxtx.metal_kernels.kv_quantize import (
    QuantizedRows,
    kv_dequantize,
    kv_quantize,
    kv_quantize_reference,
)
from mlxtx.metal_kernels.rope import rope, rope_quantize

from tests.metal_emulator import Emulator

from .numpy_attention import attention_float64
from .on_emulator import DIGITS, TYPES, draw, emulated, to_float64, units_in_the_last_place

KV_HEADS = 2


def attention_inputs(case: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernel takes, and what numpy takes for the same."""
    draws = np.random.default_rng(seed)
    dtype = TYPES[case["dtype"]]
    dim, value_dim = case["dims"]
    latent = dim == 576
    sliced = case["group_size"] == 32  # rows 3 to the end of a longer buffer, q as projected
    lengths = list(case["lengths"])
    batch, queries = len(lengths), case["queries"]
    kv_heads = 1 if latent else KV_HEADS
    heads = kv_heads * case["group"]
    capacity = max(lengths) + 5  # the buffer is longer than what is filled
    q = draw(draws, dtype, batch, heads, queries, dim)
    k = draw(draws, dtype, batch, kv_heads, capacity, dim)
    v = draw(draws, dtype, batch, kv_heads, capacity, value_dim)
    keys: Any = k
    values: Any = v
    if case["cache"] != "plain":
        key_bits, value_bits = map(int, case["cache"].split("/"))
        rotate = case.get("rotate", False)
        keys = kv_quantize(k, bits=key_bits, group_size=case["group_size"], rotate=rotate)
        values = kv_quantize(v, bits=value_bits, group_size=case["group_size"], rotate=rotate)
    if latent:
        values = None
    options = attention_options(case["option"], draws, batch, heads, queries, capacity, lengths)
    scale = dim**-0.5
    if sliced:
        q = mx.contiguous(q.swapaxes(1, 2)).swapaxes(1, 2)
        keys, values = (_in_a_longer_buffer(side) for side in (keys, values))
    kernel = {"q": q, "keys": keys, "values": values, "lengths": lengths, "scale": scale}
    kernel |= {n: mx.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    if latent:
        kernel["value_dim"] = value_dim
    dense_keys = _dense(keys)
    dense_values = dense_keys[..., :value_dim] if latent else _dense(values)
    expected = {"q": to_float64(q), "k": dense_keys, "v": dense_values, "lengths": lengths}
    return kernel, expected | {"scale": scale} | options


def _in_a_longer_buffer(rows: Any) -> Any:
    """The same rows as a slice of a buffer, which is not contiguous."""
    if rows is None:
        return None
    if isinstance(rows, QuantizedRows):
        return rows._replace(words=_in_a_longer_buffer(rows.words))
    buffer = mx.pad(rows, [(0, 0), (0, 0), (3, 2), (0, 0)])
    return buffer[:, :, 3:-2]


def attention_options(
    option: str, draws: np.random.Generator, batch: int, heads: int, queries: int, capacity: int,
    lengths: list[int],
) -> dict[str, Any]:  # fmt: skip
    """The features named by ``option``, as numpy arrays and numbers."""
    sinks = draws.normal(size=heads).astype(np.float32)
    slopes = draws.uniform(0.01, 0.5, size=heads).astype(np.float32)
    mask = draws.random((batch, 1, queries, capacity)) > 0.4
    mask[0, 0, -1] = False  # a query that sees nothing
    starts = [min(2 + i, n) for i, n in enumerate(lengths)]
    return {
        "none": {},
        "window": {"window": 13},
        "window of nothing": {"window": 1, "starts": list(lengths)},
        "sinks": {"sinks": sinks},
        "softcap": {"softcap": 2.5},
        "slopes": {"slopes": slopes},
        "mask": {"mask": mask},
        "starts": {"starts": starts},
        "all": {
            "window": 20, "sinks": sinks, "softcap": 5.0, "slopes": slopes,
            "mask": draws.random((1, heads, queries, capacity)) > 0.2, "starts": starts,
        },
    }[option]  # fmt: skip


def check_decode(case: dict[str, Any], mode: str = "checked") -> Emulator:
    """attention_decode against float64 numpy within the stated tolerance."""
    kernel, expected = attention_inputs(case, seed=len(str(case)))
    tuning = {"single_pass_rows": 16, "simdgroups": 2} if case["split"] else {}
    with emulated(mode, seed=case["queries"] % 3, tuning=tuning) as emulator:
        found = attention_decode.launch(**kernel)
    assert emulator.launches, "the kernel was not used"
    check_attention(found, expected)
    return emulator


def check_prefill(case: dict[str, Any], mode: str = "checked") -> Emulator:
    """attention_prefill against float64 numpy within the stated tolerance."""
    kernel, expected = attention_inputs(case, seed=len(str(case)))
    with emulated(mode, seed=case["queries"] % 3) as emulator:
        found = attention_prefill.launch(**kernel)
    check_attention(found, expected)
    return emulator


def check_attention(found: mx.array, expected: dict[str, Any]) -> None:
    exact = attention_float64(**expected)
    blind = ~exact.any(axis=-1)
    assert not to_float64(found)[blind].any(), "a row that sees nothing must give 0"
    error = units_in_the_last_place(found, exact)
    limit = 4.0
    if found.dtype == mx.float32:
        plain = mx.array(attention_float64(**expected, dtype=np.float32).astype(np.float32))
        limit = max(limit, 2 * units_in_the_last_place(plain, exact))
    assert error <= limit, f"{error:.2f} units in the last place, more than {limit:.2f}"


def check_quantize(case: dict[str, Any], mode: str = "checked") -> Emulator:
    """kv_quantize: bit-identical to mx.quantize in float32; else by ``check_codes``."""
    draws = np.random.default_rng(len(str(case)))
    dtype, dim, bits = TYPES[case["dtype"]], case["dim"], case["bits"]
    options = {"bits": bits, "group_size": case["group_size"], "rotate": case["rotate"]}
    rows = draw(draws, dtype, 2, case["rows"], dim)
    rows[0, 0] = -1 - mx.abs(rows[0, 0])  # a row all of whose values are negative
    if case["rows"] > 1:
        rows[1, 0] = 0
    with emulated(mode, seed=2) as emulator:
        found = kv_quantize(rows, **options)
    if dtype == mx.float32 and not case["rotate"]:
        expected = kv_quantize_reference(rows, **options)
        assert (np.array(found.words) == np.array(expected.words)).all()
    check_codes(found, to_float64(rows), case["rotate"])
    return emulator


def check_codes(found: QuantizedRows, rows: np.ndarray, rotate: bool) -> None:
    """Scales and biases follow the formula, and each code is the nearest there is."""
    if rotate:
        rows = hadamard(rows)
    group, steps = found.group_size, 2**found.bits - 1
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, found.padded_dim - rows.shape[-1])]
    x = np.pad(rows, padding).reshape(*rows.shape[:-1], -1, group)
    rebuilt = to_float64(
        kv_dequantize(found._replace(rotated=False, dim=found.padded_dim), mx.float32)
    ).reshape(x.shape)
    scale, bias = (to_float64(a)[..., None] for a in (found.scales, found.biases))
    unit = 2.0 ** -DIGITS[found.dtype] * (np.abs(x).max(axis=-1, keepdims=True) * 4 + 1e-6)

    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    edge = np.where(np.abs(low) > np.abs(high), low, high)
    ratio = edge / np.maximum((high - low) / steps, 1e-7)
    # The row was rounded to its dtype on the way: where that cannot move the rounding of ratio.
    doubt = 0.01 + 4 * np.abs(ratio) * 2.0 ** -DIGITS[found.dtype]
    clear = np.abs(np.abs(ratio) % 1 - 0.5) > doubt
    whole = np.sign(ratio) * np.floor(np.abs(ratio) + 0.5)
    away = whole != 0
    wanted = edge / np.where(away, whole, 1)
    assert (np.abs(np.abs(scale) - np.abs(wanted)) <= unit)[clear & away].all()
    assert (np.abs(bias - edge) <= unit)[clear & away].all()

    # The representable values run from bias to bias + steps * scale; beyond, the end is nearest.
    bottom, top = np.minimum(bias, bias + steps * scale), np.maximum(bias, bias + steps * scale)
    outside = np.maximum(np.maximum(bottom - x, x - top), 0)
    assert (np.abs(rebuilt - x) <= np.maximum(np.abs(scale) * 0.5001, outside) + unit).all()


def hadamard(rows: np.ndarray) -> np.ndarray:
    """Rows times the block-diagonal Hadamard matrix, in float64."""
    dim = rows.shape[-1]
    block = dim & -dim
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = rows.reshape(*rows.shape[:-1], dim // block, block)
    return (blocks @ matrix / np.sqrt(block)).reshape(rows.shape)


def check_rope(case: dict[str, Any], mode: str = "checked") -> Emulator:
    """rope and rope_quantize against float64 numpy, with the same float32 angles."""
    draws = np.random.default_rng(len(str(case)))
    dtype, dim = TYPES[case["dtype"]], case["dim"]
    (heads, kv_heads), (batch, count) = case["heads"], case["shape"]
    projected = case["layout"] == "projected"

    def rows(number: int) -> mx.array:
        if not projected:
            return draw(draws, dtype, batch, number, count, dim)
        return draw(draws, dtype, batch, count, number, dim).swapaxes(1, 2)

    q, k, v = rows(heads), rows(kv_heads), rows(kv_heads)
    rotated = {"all": dim, "half": dim // 2, "two": 2}[case["part"]]
    inverse = (1e5 ** (-np.arange(rotated // 2) / (rotated // 2))).astype(np.float32)
    if case["positions"] == "offsets":
        offsets = draws.integers(0, 5000, size=batch).astype(np.int32)
        positions = offsets[:, None] + np.arange(count)
    else:
        offsets = positions = draws.integers(0, 5000, size=(batch, count)).astype(np.int32)
    weights = [draw(draws, dtype, dim) for _ in range(2)]
    norms: dict[str, list[Any]] = {
        "none": [None, None],
        "queries": [(weights[0], 1e-5, 0.0), None],
        "both": [(weights[0], 1e-6, 1.0), (weights[1], 1e-6, 1.0)],
        "no weight": [(None, 1e-5, 0.0), (None, 1e-5, 0.0)],
    }
    q_norm, k_norm = norms[case["norm"]]
    options = {
        "inverse_frequencies": mx.array(inverse),
        "offsets": mx.array(offsets),
        "interleaved": case["interleaved"],
        "rotated_dims": rotated,
        "amplitude": 1.25,
        "q_norm": q_norm,
        "k_norm": k_norm,
    }
    exact = {}
    for name, x, norm in (("q", q, q_norm), ("k", k, k_norm)):
        exact[name] = rope_float64(
            to_float64(x), positions, inverse, case["interleaved"], 1.25, norm
        )
    bits = case["quantized"].split("/")
    with emulated(mode, seed=1) as emulator:
        if bits == ["no"]:
            found_q, found_k = rope(q, k, **options)
            assert units_in_the_last_place(found_k, exact["k"]) <= 4
        else:
            found_q, keys, values = rope_quantize(
                q, k, v, key_bits=int(bits[0]), value_bits=int(bits[1]), group_size=int(bits[2]),
                rotate=dim == 96, **options,
            )  # fmt: skip
            check_codes(keys, exact["k"], dim == 96)
            check_codes(values, to_float64(v), dim == 96)
    assert [launch.name for launch in emulator.launches] == [
        "rope" if bits == ["no"] else "rope_quantize"
    ]
    assert units_in_the_last_place(found_q, exact["q"]) <= 4
    return emulator


def rope_float64(
    x: np.ndarray, positions: np.ndarray, inverse: np.ndarray, interleaved: bool,
    amplitude: float, norm: Any,
) -> np.ndarray:  # fmt: skip
    """RMSNorm and rotation in float64; the angles are the float32 products the kernel takes."""
    if norm is not None:
        weight, eps, offset = norm
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
        x = x if weight is None else x * (to_float64(weight) + offset)
    angle = (positions.astype(np.float32)[..., None] * inverse).astype(np.float64)[:, None]
    turn = amplitude * np.exp(1j * angle)
    half = len(inverse)
    first, second = slice(0, half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    turned = (x[..., first] + 1j * x[..., second]) * turn
    result = x.copy()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def _dense(rows: Any) -> np.ndarray:
    """The rows attention must see, in float64: dequantized in float64 where quantized."""
    if not isinstance(rows, QuantizedRows):
        return to_float64(rows)
    return to_float64(kv_dequantize(rows, mx.float32))
