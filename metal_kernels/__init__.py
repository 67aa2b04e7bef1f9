"""Custom Metal kernels for MLX, each with a reference of the same results in plain ``mx`` ops.

One kernel is two files: ``NAME.metal`` (the text Metal compiles) and ``NAME.py`` (checks, launch,
``NAME_reference`` and ``available()``). A wrapper picks the kernel, MLX's own path or the
reference from the table in ``dispatch.py``; off Metal every call runs the reference, with the same
results. This package imports nothing; take each function from the module of its name::

    from mlxtx.metal_kernels.attention_decode import attention_decode
    from mlxtx.metal_kernels.attention_prefill import attention_prefill
    from mlxtx.metal_kernels.kv_quantize import QuantizedRows, kv_dequantize, kv_quantize
    from mlxtx.metal_kernels.rope import rope, rope_quantize
    from mlxtx.metal_kernels.warm_up import warm_up

Rows of a cache
    ``[B, K, S, D]``: batch, key/value heads, capacity, channels. Pass the *whole* buffer, never a
    slice of it: ``lengths [B]`` says how many rows are filled (a slice would be copied at each
    step). Quantized rows are a ``QuantizedRows``: ``words [B, K, S, W]`` uint32, each row one run
    of words: codes as in ``mx.quantize``, then scale and bias of each group of channels in the
    dtype of the rows. ``bits``, ``group_size``, ``dim`` (the true width D; the rest of the last
    group is zeros), ``dtype`` and ``rotated`` say how to read them. Slicing and concatenation
    along S work on ``words``.

Functions
    ``attention_decode(q, keys, values, *, lengths, scale, ...)``: one to eight query rows.
    ``attention_prefill(same arguments)``: any number of query rows. Every argument, and the rule
    of who sees what, stand at ``attention_reference.attention_reference``.
    ``kv_quantize(rows, *, bits, group_size, rotate=False) -> QuantizedRows`` and
    ``kv_dequantize(quantized, dtype=None) -> rows``.
    ``rope(q, k, *, inverse_frequencies, offsets, ...) -> (q, k)`` and
    ``rope_quantize(q, k, v, *, ..., key_bits, value_bits, ...) -> (q, keys, values)``, the last
    two as QuantizedRows of the new rows.
    ``warm_up(...)`` compiles the variants a model will use, to be called at load.

Everything takes float16, bfloat16 and float32 (the references also float64); sums run in float32
(float64 for float64). Nothing here has a vjp of its own: training uses ``mx.fast`` or the
references.
"""
