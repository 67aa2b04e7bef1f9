"""Compile the kernels a model will use, before its first reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx

from . import attention_decode, attention_prefill, dispatch, rope
from .attention_reference import AttentionOptions, Rows
from .kv_quantize import QuantizedRows, kv_quantize, rotation_block


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
    q_norm: bool = False,
    k_norm: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    slopes: bool = False,
    sinks: bool = False,
    masked: bool = False,
    queries: Iterable[int] = (1,),
    prompt: bool = True,
) -> int:
    """Run each kernel variant once on a small cache of this layer's shape; returns how many ran.
    A kernel that the device does not take is switched off, with a warning: its operation goes the
    other way.

    ``key_bits`` None is a plain cache; ``rotate``: see ``kv_quantize``. What follows
    ``interleaved`` says what else the layer has, which decides whether MLX's kernel can do it;
    ``masked``: rows are chosen one by one, and prompts go another way. ``queries``: query rows of a
    decoding step, more than one for speculative checks. Lengths are no part of a variant; a batch
    of eight or more is one, compiled at its first step.
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
            _runs("kv_quantize", kv_quantize, few, bits=bits, group_size=group_size, rotate=rotate)
    if latent and rotate and value_dim % rotation_block(head_dim):
        return ran  # the cache attends over such rows by plain operations
    # A buffer long enough for the split into blocks, and one short enough for a single pass.
    for rows in (numbers.single_pass_rows, 2 * numbers.single_pass_rows + 64):
        plain = [mx.zeros((1, kv_heads, rows, dim), dtype=dtype) for dim in (head_dim, value_dim)]
        keys, beside = (
            x if bits is None else kv_quantize(x, bits=bits, group_size=group_size, rotate=rotate)
            for x, bits in zip(plain, (key_bits, value_bits), strict=True)
        )
        values = None if latent else beside
        shared: AttentionOptions = {
            "lengths": [rows],
            "scale": 1.0,
            "value_dim": value_dim if latent else None,
            "window": window,
            "softcap": softcap,
            "slopes": mx.zeros((heads,)) if slopes else None,
            "sinks": mx.zeros((heads,), dtype=dtype) if sinks else None,
            "mask": mx.ones((1, 1, 1, rows), dtype=mx.bool_) if masked else None,
        }
        for count in queries:
            q = mx.zeros((1, heads, count, head_dim), dtype=dtype)
            step = attention_decode.attention_decode
            ran += _runs("attention_decode", step, q, keys, values, **shared)
        if prompt and not masked:
            q = mx.zeros((1, heads, 32, head_dim), dtype=dtype)
            whole = _prompt(q, keys, values, shared)
            ran += _runs("attention_prefill", whole, q, keys, values, **shared)
    if not latent:
        weight = mx.ones((head_dim,), dtype=dtype)
        dims = rotated_dims or head_dim
        turn: rope.RopeOptions = {
            "inverse_frequencies": mx.ones((dims // 2,)),
            "offsets": mx.array([0]),
            "rotated_dims": dims,
            "interleaved": interleaved,
            "q_norm": (weight, 1e-6, 0.0) if q_norm else None,
            "k_norm": (weight, 1e-6, 0.0) if k_norm else None,
        }
        q = mx.zeros((1, heads, 1, head_dim), dtype=dtype)
        k = mx.zeros((1, kv_heads, 1, head_dim), dtype=dtype)
        if key_bits is not None and value_bits is not None:
            v = mx.zeros((1, kv_heads, 1, value_dim), dtype=dtype)
            codes = {"key_bits": key_bits, "value_bits": value_bits, "group_size": group_size}
            both = rope.rope_quantize
            ran += _runs("rope_quantize", both, q, k, v, **codes, rotate=rotate, **turn)
        else:
            ran += _runs("rope", rope.rope, q, k, **turn)
    return ran


def _prompt(
    q: mx.array, keys: Rows, values: Rows | None, options: AttentionOptions
) -> Callable[..., mx.array]:
    """What attends when a prompt is read. MLX's kernel gets short quantized caches, unpacked; long
    ones are for ours, which has to be tried as well."""
    quantized = isinstance(keys, QuantizedRows) or isinstance(values, QuantizedRows)
    supported = attention_prefill.supports(q, keys, values, options.get("value_dim"))
    ours = dispatch.choose("attention_prefill", supported=supported) == "kernel"
    return attention_prefill.launch if quantized and ours else attention_prefill.attention_prefill


def _runs(operation: str, function: Callable[..., Any], *arrays: Any, **options: Any) -> bool:
    """Whether it ran. Not every chip and system has seen these kernels: one that Apple's compiler
    refuses, or that wants more threads than there are, must not keep a model from loading."""
    try:
        mx.eval(function(*arrays, **options))
    except (RuntimeError, ValueError) as error:
        dispatch.switch_off(operation, error)
        return False
    return True
