"""Launches on the GPU for one decoded token in one layer, attention part: mlxtx and mlx-lm.

    python scripts/count_launches.py [--write]     (mlxtx; in an environment with mlx-lm, both)

Prints what each side launches, and with both sides the table of docs/kernels.md, which ``--write``
puts there.

From the projections' outputs to attention's output: q/k norm, rotation, appending to the cache,
attention. ``mx.fast.*``, ``mx.quantize`` and custom kernels are stood in for (on a CPU they fall
apart into plain operations) and count as what they launch on Metal; the array operations between
them are read from MLX's own graph, where views are free.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

HEADS, KV_HEADS, DIM, BITS, GROUP_SIZE = 32, 8, 128, 4, 64
# What Metal does without a launch: another look at the same memory. A reshape of rows that follow
# each other is one, and all here are of that kind at one token.
VIEWS = {
    "Slice", "Transpose", "Reshape", "Broadcast", "ExpandDims", "Squeeze", "Flatten", "Unflatten",
    "Split", "AsStrided", "StopGradient", "View", "Full",
}  # fmt: skip
# From this many rows MLX's decode attention takes two passes when heads are grouped.
TWO_PASSES = 4096
CASES: dict[str, dict[str, Any]] = {
    f"{'4-bit' if quantized else 'plain'}, {length} rows{', q/k norm' if norms else ''}": {
        "length": length, "quantized": quantized, "norms": norms,
    }
    for quantized in (False, True)
    for length in (300, 8192)
    for norms in (False, True)
}  # fmt: skip


class Launches:
    """Counts stand-ins, and keeps their inputs so that the graph behind them is counted too."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.inputs: list[mx.array] = []

    def stand_in(self, name: str, inputs: list[Any], *shapes: Any) -> list[mx.array]:
        """Note a launch; its outputs are fresh arrays with no graph behind them."""
        self.names.append(name)
        self.inputs += [x for x in inputs if isinstance(x, mx.array)]
        outputs = [mx.zeros(shape, dtype=dtype) for shape, dtype in shapes]
        mx.eval(outputs)
        return outputs

    def graph(self, outputs: list[mx.array]) -> list[str]:
        """Primitives of the graph that launch."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "graph.dot"))
            mx.export_to_dot(path, *outputs, *self.inputs)
            found = re.findall(r'label ="(\w+)"', Path(path).read_text())
        return [name for name in found if name not in VIEWS]


@contextlib.contextmanager
def standing_in(launches: Launches) -> Iterator[None]:
    """Replace the operations that are one launch on Metal."""

    def same(name: str) -> Callable[..., mx.array]:
        def call(x: mx.array, *arguments: Any, **named: Any) -> mx.array:
            inputs = [x, *arguments, *named.values()]
            return launches.stand_in(name, inputs, (x.shape, x.dtype))[0]

        return call

    def attention(q: mx.array, k: mx.array, v: mx.array, **named: Any) -> mx.array:
        if k.shape[2] >= TWO_PASSES:
            launches.names.append("attention, first pass")
        shape = (*q.shape[:-1], v.shape[-1])
        return launches.stand_in("attention", [q, k, v, *named.values()], (shape, q.dtype))[0]

    def quantize(x: mx.array, group_size: int = 64, bits: int = 4, **named: Any) -> Any:
        *rows, dim = x.shape
        codes, side = ((*rows, dim * bits // 32), mx.uint32), ((*rows, dim // group_size), x.dtype)
        return tuple(launches.stand_in("quantize", [x], codes, side, side))

    def metal_kernel(name: str, **made: Any) -> Callable[..., list[mx.array]]:
        def call(
            *, inputs: list[Any], output_shapes: Any, output_dtypes: Any, **named: Any
        ) -> list[mx.array]:
            shapes = zip(output_shapes, output_dtypes, strict=True)
            return launches.stand_in(name, inputs, *shapes)

        return call

    with (
        mock.patch.object(mx.fast, "rms_norm", same("rms_norm")),
        mock.patch.object(mx.fast, "rope", same("rope")),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attention),
        mock.patch.object(mx.fast, "metal_kernel", metal_kernel),
        mock.patch.object(mx, "quantize", quantize),
    ):
        yield


def projections() -> list[mx.array]:
    """q, k and v of one token as the projections leave them: [1, 1, heads * D]."""
    widths = (HEADS, KV_HEADS, KV_HEADS)
    arrays = [mx.random.normal((1, 1, n * DIM)).astype(mx.float16) for n in widths]
    mx.eval(arrays)
    return arrays


def split_heads(x: mx.array) -> mx.array:
    return x.reshape(1, 1, -1, DIM)


def count_mlx_lm(*, length: int, quantized: bool, norms: bool) -> list[str]:
    """mlx-lm's own cache and attention, after its models' use of them (qwen3.py, llama.py)."""
    from mlx_lm.models.base import scaled_dot_product_attention
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    cache = QuantizedKVCache(GROUP_SIZE, BITS) if quantized else KVCache()
    past = mx.zeros((1, KV_HEADS, length, DIM), dtype=mx.float16)
    mx.eval(cache.update_and_fetch(past, past))
    room = mx.zeros((1, KV_HEADS, 1, DIM), dtype=mx.float16)
    mx.eval(cache.update_and_fetch(room, room))  # the buffer has grown: the next token fits
    offset = cache.offset
    weight = mx.ones((DIM,), dtype=mx.float16)
    q, k, v = projections()
    launches = Launches()
    with standing_in(launches):
        q, k, v = split_heads(q), split_heads(k), split_heads(v)
        if norms:
            q, k = mx.fast.rms_norm(q, weight, 1e-6), mx.fast.rms_norm(k, weight, 1e-6)
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        turn = {"traditional": False, "base": 1e6, "scale": 1.0, "offset": offset}
        q, k = mx.fast.rope(q, DIM, **turn), mx.fast.rope(k, DIM, **turn)
        keys, values = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, keys, values, cache, scale=0.1, mask=None)
        out = out.transpose(0, 2, 1, 3).reshape(1, 1, -1)
        return launches.names + launches.graph([out])


def count_mlxtx(*, length: int, quantized: bool, norms: bool) -> list[str]:
    """The project's own cache, rotary step and attention, as a layer of a decoder uses them. What
    is made once a token for all layers (the table of frequencies, the offset) is not counted."""
    from mlxtx.metal_kernels import dispatch

    from mlxtx.cache import AttentionSpec, Step, parse_kv
    from mlxtx.cache import kernels as cache_kernels
    from mlxtx.cache.layer import RowsCache, layer_layout
    from mlxtx.decoder.attention import Prepare
    from mlxtx.decoder.config import HeadNormConfig, NormConfig, RopeConfig
    from mlxtx.decoder.norm import HeadNorm
    from mlxtx.decoder.positions import Rotary

    spec = AttentionSpec(scale=0.1)
    settings = parse_kv(f"k{BITS}v{BITS}g{GROUP_SIZE}" if quantized else "plain")
    cache = RowsCache(layer_layout(spec, settings), settings)
    past = mx.zeros((1, KV_HEADS, length, DIM), dtype=mx.float16)
    cache.body.append(past, past, length + 1)
    cache.rows = length
    norm = HeadNormConfig(norm=NormConfig())
    q_norm, k_norm = (HeadNorm(count, DIM, norm) if norms else None for count in (HEADS, KV_HEADS))
    prepare = Prepare(q_norm=q_norm, k_norm=k_norm, rotary=Rotary(RopeConfig(dims=DIM)))
    step = Step(1, length)
    q, k, v = projections()
    once = prepare.rope_arguments(q, step)
    assert once is not None
    mx.eval(cache.state(), once["inverse_frequencies"], once["offsets"])
    mx.eval([side.weight for side in (q_norm, k_norm) if side is not None])
    launches = Launches()
    with (
        standing_in(launches),
        mock.patch.object(dispatch, "on_metal", lambda: True),
        mock.patch.object(dispatch, "remembered", dict),
        mock.patch.object(cache_kernels, "on_metal", lambda: True),
    ):
        q, k, v = (split_heads(x).transpose(0, 2, 1, 3) for x in (q, k, v))
        out = cache.attend(q, k, v, prepare=prepare, spec=spec, step=step)
        out = out.transpose(0, 2, 1, 3).reshape(1, 1, -1)
        return launches.names + launches.graph([out])


def available() -> dict[str, Callable[..., list[str]]]:
    """The sides this environment can count."""
    sides: dict[str, Callable[..., list[str]]] = {}
    for name, module, count in (
        ("mlxtx", "mlxtx.metal_kernels.rope", count_mlxtx),
        ("mlx-lm", "mlx_lm.models.cache", count_mlx_lm),
    ):
        try:
            __import__(module)
        except ImportError:
            continue
        sides[name] = count
    return sides


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="count_launches", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update docs/kernels.md")
    options = parser.parse_args(argv)
    sides = available()
    for side, count in sides.items():
        for what, case in CASES.items():
            names = count(**case)
            print(f"{side:7}{what:34}{len(names):3}  ", end="")
            print(", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names)))
    if len(sides) < 2:
        return 0
    print(f"\n{table(sides)}")
    if options.write:
        from mlxtx.scripts.count_traffic import replace_table

        replace_table("launches", table(sides))
    return 0


def table(sides: dict[str, Callable[..., list[str]]]) -> str:
    """Launches of each case, one column a side."""
    from importlib.metadata import version

    named = [f"{s} {version(s)}" if s != "mlxtx" else s for s in sides]
    lines = [f"| cache | {' | '.join(named)} |", f"| --- |{' --- |' * len(sides)}"]
    for what, case in CASES.items():
        counts = [str(len(count(**case))) for count in sides.values()]
        lines.append(f"| {what} | {' | '.join(counts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
