"""A checkpoint becomes a model, one group of tensors at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache.numerics import on_gpu
from mlxtx.checkpoint.cpu_layers import adapt_to_cpu
from mlxtx.checkpoint.formats import FLOAT_DTYPES
from mlxtx.checkpoint.hub import resolve
from mlxtx.checkpoint.quantization import Quantization
from mlxtx.checkpoint.source import Checkpoint
from mlxtx.checkpoint.weights import Form, WeightPlan, describe
from mlxtx.decoder.model import DecoderModel
from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress
from mlxtx.naming.map import Group

# On a CPU a quantized model whose unpacked weights fill no more than this is faster unpacked.
SMALL_MODEL_BYTES = 64 << 20
PARTS = ["weight", "scales", "biases"]  # of a packed weight
# Groups of tensors are read together up to this many bytes, and one batch is under way while the next
# is put together, which keeps the disk busy. What is stacked or cast on the way is in memory twice
# for that long, so where all is, they are fewer.
READ_BYTES = 128 << 20
CAST_BYTES = 4 << 20


def load_model(
    path_or_repo: str | Path,
    dtype: str | mx.Dtype | None = None,
    *,
    revision: str | None = None,
    unpack: bool | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> tuple[DecoderModel, dict[str, Any]]:
    """The model of a folder or Hub id, without a tokenizer, and its ``config.json``.

    dtype: "float32", "float16" or "bfloat16" for everything that is not packed. None keeps the
    checkpoint's own types on a GPU; on a CPU a quantized model computes in float32, which is about
    eight times as fast there, and a small one is unpacked (unpack=False keeps every packed weight,
    True unpacks all of them). Tensors are read one group at a time,
    so that memory peaks near the size of the weights. Raises MlxtxError with one line that names
    what is wrong (see docs/convert.md for the kinds of checkpoints).
    """
    folder = resolve(path_or_repo, revision, on_event=on_event)
    checkpoint = Checkpoint(folder)
    return build_model(checkpoint, dtype, unpack=unpack, on_event=on_event), checkpoint.config


def build_model(
    checkpoint: Checkpoint,
    dtype: str | mx.Dtype | None = None,
    *,
    unpack: bool | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> DecoderModel:
    """``load_model`` for an open checkpoint."""
    at_once = READ_BYTES if dtype is None else CAST_BYTES
    checkpoint.read_ahead(at_once)
    model, plan, wanted = planned_model(checkpoint, dtype, unpack)
    reading = fill(plan, wanted, at_once, on_event)
    if not on_gpu():
        adapt_to_cpu(plan.modules.values())
    model.eval()
    mx.eval(reading)
    return model


def planned_model(
    checkpoint: Checkpoint, dtype: str | mx.Dtype | None = None, unpack: bool | None = None
) -> tuple[DecoderModel, WeightPlan, mx.Dtype | None]:
    """The model still unfilled, how its weights come, and the type that floats will be cast to
    (None: their own). Headers are enough: no tensor is read."""
    on_cpu = not on_gpu()
    model, plan = describe(checkpoint)
    packed = bool(plan.quantizations)
    if unpack is None:
        unpack = on_cpu and packed and 4 * plan.size <= SMALL_MODEL_BYTES
    if unpack:
        model, plan = describe(checkpoint, unpack=True)
    quantize_modules(plan)
    wanted = float_dtype(dtype)
    if wanted is None and on_cpu and packed:
        wanted = mx.float32
    return model, plan, wanted


def quantize_modules(plan: WeightPlan) -> None:
    """Put the layers that hold packed weights (still unfilled) where the plan has such."""
    for path, quantization in plan.quantizations.items():
        module = plan.modules[path]
        if type(module) is nn.Linear:
            forms = {part: plan.forms.get(f"{path}.{part}") for part in PARTS}
            _pack_in_place(module, quantization, forms)
            continue
        parent, _, name = path.rpartition(".")
        packed = module.to_quantized(**quantization.to_json())
        plan.modules[parent][name] = plan.modules[path] = packed


def _pack_in_place(
    linear: nn.Module, quantization: Quantization, forms: Mapping[str, Form | None]
) -> None:
    """What ``to_quantized`` makes, without first drawing numbers and packing them: most layers are
    of this kind, and a model has hundreds."""
    linear.__class__ = nn.QuantizedLinear
    linear.group_size, linear.bits = quantization.group_size, quantization.bits
    linear.mode = quantization.mode
    linear.freeze(recurse=False, keys=PARTS)
    for part, form in forms.items():
        if form:
            linear[part] = mx.zeros(form.shape, form.dtype)  # lazy: holds nothing


def fill(
    plan: WeightPlan,
    dtype: mx.Dtype | None,
    at_once: int,
    on_event: Callable[[Event], None] | None = None,
) -> list[mx.array]:
    """Read every parameter, ``at_once`` bytes at a time; the next are on their way meanwhile.
    Returns the last ones, which still are."""
    batches = list(batched(plan, at_once))
    total = sum(nbytes for _, nbytes in batches)
    started, done = time.monotonic(), 0
    reading: list[mx.array] = []
    for groups, nbytes in batches:
        arrays = []
        for group in groups:
            for name, array in plan.read(group).items():
                if dtype is not None and mx.issubdtype(array.dtype, mx.floating):
                    array = array.astype(dtype)
                path, _, key = name.rpartition(".")
                plan.modules[path][key] = array
                arrays.append(array)
        mx.async_eval(arrays)
        mx.eval(reading)
        reading = arrays
        done += nbytes
        if on_event:
            seconds = time.monotonic() - started
            on_event(Progress(stage="load", done=done, total=total, unit="bytes", seconds=seconds))
    return reading


def batched(plan: WeightPlan, at_once: int) -> Iterator[tuple[list[Group], int]]:
    """The plan's groups, ``at_once`` bytes of them together, and how many those are."""
    batch: list[Group] = []
    size = 0
    for group in plan.groups:
        batch.append(group)
        size += plan.nbytes(group)
        if size >= at_once or group is plan.groups[-1]:
            yield batch, size
            batch, size = [], 0


def float_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    """A type by its name; None stays None."""
    if isinstance(dtype, str):
        dtype = FLOAT_DTYPES.get(dtype, dtype)
    if dtype is None or (isinstance(dtype, mx.Dtype) and dtype in FLOAT_DTYPES.values()):
        return dtype
    raise MlxtxError(f"unknown dtype {dtype!r} (known: {', '.join(FLOAT_DTYPES)})")
