"""One case of the grid: run the kernel on the emulator, compare with float64 numpy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlxtx.metal_kernels.attention_decode import attention_decode
from mlxtx.metal_kernels.kv_quantize import QuantizedRows, kv_dequantize, kv_quantize

from tests.metal_emulator import Emulator

from .numpy_attention import attention_float64
from .on_emulator import TYPES, draw, emulated, to_float64, units_in_the_last_place

KV_HEADS = 2


def attention_inputs(case: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernel takes, and what numpy takes for the same."""
    draws = np.random.default_rng(seed)
    dtype = TYPES[case["dtype"]]
    dim, value_dim = case["dims"]
    latent = dim == 576
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
    kernel = {"q": q, "keys": keys, "values": values, "lengths": lengths, "scale": scale}
    kernel |= {n: mx.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    if latent:
        kernel["value_dim"] = value_dim
    dense_keys = _dense(keys)
    dense_values = dense_keys[..., :value_dim] if latent else _dense(values)
    expected = {"q": to_float64(q), "k": dense_keys, "v": dense_values, "lengths": lengths}
    return kernel, expected | {"scale": scale} | options


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
        found = attention_decode(**kernel)
    assert emulator.launches, "the kernel was not used"
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


def _dense(rows: Any) -> np.ndarray:
    """The rows attention must see, in float64: dequantized in float64 where quantized."""
    if not isinstance(rows, QuantizedRows):
        return to_float64(rows)
    return to_float64(kv_dequantize(rows, mx.float32))
