"""What tells one model from another, so that no cache is used with a model it was not made by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

SAMPLES = 64  # numbers of each parameter


def fingerprint(model: Any) -> str:
    """A hash over the model's config, how each adapter is applied, and its parameters. Another
    revision, an adapter or another quantization changes it. ``model`` is a ``DecoderModel`` with
    its weights."""
    from mlx.utils import tree_flatten

    said = [repr(model.config)]
    for name, module in sorted(model.named_modules()):
        how = getattr(module, "how", None)  # an adapter's scale is no parameter
        if how is not None:
            said.append(f"{name} {how};")
    return weights_mark(dict(tree_flatten(model.parameters())), "".join(said))


def weights_mark(weights: Mapping[str, mx.array], said: str = "") -> str:
    """A hash over ``said`` and each array's name, shape, dtype and a sample of numbers spread over
    it; the whole of the weights is not read."""
    digest = hashlib.sha256(said.encode())
    samples = []
    for name, array in sorted(weights.items()):
        digest.update(f"{name} {array.shape} {array.dtype};".encode())
        sample = _sample(array)
        exact = mx.issubdtype(sample.dtype, mx.integer)
        samples.append(sample.astype(mx.int64 if exact else mx.float32))
    mx.eval(samples)
    for sample in samples:
        digest.update(bytes(memoryview(sample)))  # type: ignore[arg-type]
    return digest.hexdigest()[:32]


def _sample(array: mx.array) -> mx.array:
    """Numbers spread over ``array``, each looked up where it lies: to flatten it would copy the
    whole of one that lies transposed."""
    import numpy as np

    array = array[None]  # a single number has a place as well
    step = array.size // SAMPLES | 1  # odd: not of the same column in row after row
    flat = np.arange(0, array.size, step)[:SAMPLES]
    return array[tuple(mx.array(places) for places in np.unravel_index(flat, array.shape))]
