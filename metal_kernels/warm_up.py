"""Compile the kernels a model will use, before its first reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx

from . import attention_decode, attention_prefill, dispatch, rope
from .kv_quantize import kv_quantize, rotation_block


def warm_up(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: mx.Dtype,
    value_dim: int | None = None,
    latent: bool = False,
    key_bits: int | None = None,
    value_bits: int | None = None,
    group_size: int = 64,
    rotate: bool = False,
    rotated_dims: int | None = None,
    interleaved: bool = False,
    queries: Iterable[int] = (1,),
    prompt: bool = True,
) -> int:
    """Run each kernel variant once on a small cache of this layer's shape; returns how many ran.
    A kernel that the device does not take is switched off, with a warning: its operation goes the
    other way.

    ``key_bits`` None is a plain cache; ``rotate``: see ``kv_quantize``. ``queries``: query rows of a
    decoding step, more than one for speculative checks. Lengths are no part of a variant, so what
    runs here is all that is compiled.
    To be called at load, for each kind of layer a model has. Off Metal it does nothing.
    """
    if not dispatch.on_metal():
        return 0
    value_dim = value_dim or head_dim
    ran = 0
    numbers = dispatch.tuning()

    for bits in {key_bits, value_bits}:
        if bits is not None:
            few = mx.zeros((1, kv_heads, 1, head_dim), dtype=dtype)
            _runs(kv_quantize, few, bits=bits, group_size=group_size, rotate=rotate)
    if latent and rotate and value_dim % rotation_block(head_dim):
        return ran  # the cache attends over such rows by plain operations
    # A buffer long enough for the split into blocks, and one short enough for a single pass.
    for rows in (numbers.single_pass_rows, 2 * numbers.single_pass_rows + 64):
        plain = [mx.zeros((1, kv_heads, rows, dim), dtype=dtype) for dim in (head_dim, value_dim)]
        keys, values = (
            x if bits is None else kv_quantize(x, bits=bits, group_size=group_size, rotate=rotate)
            for x, bits in zip(plain, (key_bits, value_bits), strict=True)
        )
        shared = {
            "lengths": [rows],
            "scale": 1.0,
            "value_dim": value_dim if latent else None,
        }
        steps = [(attention_decode.attention_decode, n) for n in queries]
        if prompt:
            steps.append((attention_prefill.attention_prefill, 32))
        for function, count in steps:
            q = mx.zeros((1, heads, count, head_dim), dtype=dtype)
            ran += _runs(function, q, keys, None if latent else values, **shared)
    if not latent:
        q = mx.zeros((1, heads, 1, head_dim), dtype=dtype)
        k = mx.zeros((1, kv_heads, 1, head_dim), dtype=dtype)
        dims = rotated_dims or head_dim
        frequencies, offsets = mx.ones((dims // 2,)), mx.array([0])
        if key_bits is not None and value_bits is not None:
            v = mx.zeros((1, kv_heads, 1, value_dim), dtype=dtype)
            ran += _runs(
                rope.rope_quantize, q, k, v, inverse_frequencies=frequencies, offsets=offsets,
                key_bits=key_bits, value_bits=value_bits, group_size=group_size,
                rotate=rotate, rotated_dims=dims, interleaved=interleaved,
            )  # fmt: skip
        else:
            ran += _runs(
                rope.rope, q, k, inverse_frequencies=frequencies, offsets=offsets,
                rotated_dims=dims, interleaved=interleaved,
            )  # fmt: skip
    return ran


def _runs(function: Callable[..., Any], *arrays: Any, **options: Any) -> bool:
    """Whether it ran. Not every chip and system has seen these kernels: one that Apple's compiler
    refuses, or that wants more threads than there are, must not keep a model from loading."""
    try:
        mx.eval(function(*arrays, **options))
    except (RuntimeError, ValueError) as error:
        dispatch.switch_off(function.__name__, error)
        return False
    return True
