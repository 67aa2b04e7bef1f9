"""The experts' products on a CPU against the sum written out, for every number of rows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.checkpoint.cpu_layers import CpuExpertLinear, CpuQuantizedExpertLinear
from mlxtx.decoder.experts import ExpertLinear

EXPERTS, WIDTH, OUT = 5, 64, 32


def experts(dtype: mx.Dtype, bias: bool = True) -> ExpertLinear:
    mx.random.seed(0)
    layer = ExpertLinear(EXPERTS, WIDTH, OUT, bias)
    if bias:
        layer.bias = mx.random.normal((EXPERTS, OUT))
    layer.set_dtype(dtype)
    return layer


def written_out(x: np.ndarray, chosen: np.ndarray, weight: np.ndarray, bias: np.ndarray):
    rows = [weight[expert] @ row[0] + bias[expert] for row, expert in zip(x, chosen, strict=True)]
    return np.stack(rows)[:, None]


@pytest.mark.parametrize("rows", [1, 3, 12, 60])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-5), (mx.bfloat16, 2e-2)])
def test_product_is_that_of_each_rows_own_expert(rows, ordered, dtype, tolerance) -> None:
    layer = experts(dtype)
    layer.__class__ = CpuExpertLinear
    layer.eval()
    rng = np.random.default_rng(rows)
    chosen = rng.integers(0, EXPERTS - 1, rows)  # the last expert has no row
    chosen = np.sort(chosen) if ordered else chosen
    x = mx.array(rng.standard_normal((rows, 1, WIDTH)).astype(np.float32)).astype(dtype)
    got = layer(x, mx.array(chosen), ordered)
    plain = [np.array(a.astype(mx.float32)) for a in (x, layer.weight, layer.bias)]
    expected = written_out(plain[0], chosen, plain[1], plain[2])
    assert got.dtype == dtype
    assert (
        np.abs(np.array(got.astype(mx.float32)) - expected).max()
        <= tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize("rows", [2, 60])
def test_packed_experts_give_the_product_with_what_they_stand_for(rows) -> None:
    packed = experts(mx.float32).to_quantized(32, 4)
    weight = np.array(mx.dequantize(packed.weight, packed.scales, packed.biases, 32, 4))
    packed.__class__ = CpuQuantizedExpertLinear
    packed.eval()
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.integers(0, EXPERTS, rows))
    x = rng.standard_normal((rows, 1, WIDTH)).astype(np.float32)
    got = np.array(packed(mx.array(x), mx.array(chosen), True))
    expected = written_out(x, chosen, weight, np.array(packed.bias))
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_gradients_take_the_gathered_product() -> None:
    """Rows are not counted while gradients are taken, which needs the graph whole."""
    layer = experts(mx.float32, bias=False)
    layer.__class__ = CpuExpertLinear
    layer.train()
    chosen = mx.array(np.repeat(np.arange(EXPERTS), 12))
    x = mx.random.normal((60, 1, WIDTH))

    def loss(weight: mx.array) -> mx.array:
        layer.weight = weight
        return layer(x, chosen, True).sum()

    gradient = mx.grad(loss)(layer.weight)
    expected = np.array(x).reshape(EXPERTS, 12, 1, WIDTH).sum(axis=1)  # the same for every output
    np.testing.assert_allclose(
        np.array(gradient), np.broadcast_to(expected, gradient.shape), rtol=1e-4, atol=1e-4
    )
