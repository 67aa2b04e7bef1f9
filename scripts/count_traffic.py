"""Bytes and 128-byte lines the attention kernels read, counted on the emulator: ours and MLX's.

    python scripts/count_traffic.py [--write]

Prints the tables of docs/kernels.md; ``--write`` puts them there. Needs a checkout (the emulator is
part of the tests) and clang 19. Counts bound traffic, not time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlxtx.files import replace_between

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
ROWS = 512  # cache rows
# dims, query heads a kv head, cache
CASES = [
    ((64, 64), 4, "plain"), ((128, 128), 1, "plain"), ((128, 128), 4, "plain"),
    ((128, 128), 8, "plain"), ((256, 256), 8, "plain"), ((576, 512), 16, "plain"),
    ((128, 128), 8, "8/8"), ((128, 128), 8, "8/4"), ((128, 128), 8, "4/4"),
    ((128, 128), 4, "4/4"), ((96, 96), 4, "4/4"), ((64, 64), 8, "3/5"), ((128, 128), 1, "2/2"),
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="count_traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update docs/kernels.md")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from tests.metal_emulator import missing

    if missing():
        print(missing(), file=sys.stderr)
        return 2
    tables = {"traffic": traffic_table(), "estimate": estimate_table()}
    for name, table in tables.items():
        print(f"## {name}\n\n{table}\n")
        if options.write:
            replace_table(name, table)
    return 0


def traffic_table() -> str:
    lines = [
        "| kernel | cache | head dim | query heads / kv head | cache bytes | bytes read | times |"
        " lines as issued / least | lines cached / least |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, cache, dims, group, counts in measurements():
        size, read = counts["unique_read"], counts["read_bytes"]
        least = counts["minimum_lines"]
        dim = f"{dims[0]}" if dims[0] == dims[1] else f"{dims[0]} / {dims[1]}"
        lines.append(
            f"| {name} | {cache} | {dim} | {group} | {size:,} | {read:,} | {read / size:.2f} | "
            f"{counts['read_lines'] / least:.2f} | {counts['read_lines_cached'] / least:.2f} |"
        )
    return "\n".join(lines)


def measurements() -> Iterator[tuple[str, str, tuple[int, int], int, dict[str, int]]]:
    """Kernel, cache, dims, group and the counters of keys and values together."""
    for dims, group, cache in CASES:
        yield "attention_decode", cache, dims, group, count_ours(dims, group, cache)
        if cache == "plain" and dims[0] == dims[1]:
            yield "MLX sdpa_vector", cache, dims, group, count_mlx(dims[0], group)


def count_ours(dims: tuple[int, int], group: int, cache: str) -> dict[str, int]:
    """One query row over one kv head, in one pass; scales and biases count as cache."""
    import mlx.core as mx
    from mlxtx.metal_kernels import attention_decode
    from mlxtx.metal_kernels.kv_quantize import kv_quantize_reference

    from tests.kernels.on_emulator import emulated

    latent = dims[0] != dims[1]
    q = mx.random.normal((1, group, 1, dims[0])).astype(mx.float16)
    k = mx.random.normal((1, 1, ROWS, dims[0])).astype(mx.float16)
    v = mx.random.normal((1, 1, ROWS, dims[1])).astype(mx.float16)
    keys: Any = k
    values: Any = None if latent else v
    if cache != "plain":
        key_bits, value_bits = map(int, cache.split("/"))
        size = 32 if dims[0] % 64 else 64
        keys = kv_quantize_reference(k, bits=key_bits, group_size=size)
        values = kv_quantize_reference(v, bits=value_bits, group_size=size)
    with emulated("counted") as emulator:
        attention_decode.launch(
            q, keys, values, lengths=[ROWS], scale=0.1, value_dim=dims[1] if latent else None
        )
    (launch,) = emulator.launches
    return total(
        launch.counters,
        lambda name: name.startswith("key") or (name.startswith("value") and not latent),
    )


def count_mlx(dim: int, group: int) -> dict[str, int]:
    """MLX's decode kernel from the headers of the installed wheel, the same shapes."""
    import numpy as np

    from tests.metal_emulator import Kernel
    from tests.metal_emulator.test_mlx_kernels import PLAIN, SDPA, draw, numbers

    q, _ = draw("half", 1, group, 1, dim)
    k, _ = draw("half", 1, 1, ROWS, dim)
    buffers = {0: q, 1: k, 2: k, 3: np.zeros_like(q)}
    buffers |= {4: numbers(np.int32, group), 5: numbers(np.int32, ROWS)}
    buffers |= {6: numbers(np.uint64, ROWS * dim), 7: numbers(np.uint64, dim)}
    buffers |= {8: numbers(np.uint64, ROWS * dim), 9: numbers(np.uint64, dim)}
    buffers |= {10: numbers(np.float32, 0.1)}
    kernel = Kernel(SDPA, f"sdpa_vector<half, {dim}, {dim}>", "counted")
    launch = kernel.launch(
        buffers, grid=(1024 * group, 1, 1), threadgroup=(1024, 1, 1), constants=PLAIN
    )
    return total(launch.counters, lambda name: name in ("keys", "values"))


def total(counters: dict[str, dict[str, int]], wanted: Callable[[str], bool]) -> dict[str, int]:
    chosen = [
        counts
        for name, counts in counters.items()
        if wanted(name) and not name.endswith("_strides")
    ]
    return {key: sum(counts[key] for counts in chosen) for key in chosen[0]}


# An 8B model of today: layers, kv heads, head dim; and the length of the cache.
LAYERS, KV_HEADS, DIM, LENGTH = 32, 8, 128, 32768
KINDS = {"16 bits": (16, 16), "8/8": (8, 8), "8/4": (8, 4), "4/4": (4, 4)}


def estimate_table() -> str:
    from mlxtx.metal_kernels.chips import BANDWIDTH, decode_bytes

    sizes = {
        kind: decode_bytes(
            layers=LAYERS, kv_heads=KV_HEADS, dim=DIM, length=LENGTH, key_bits=k, value_bits=v
        )
        for kind, (k, v) in KINDS.items()
    }
    lines = [
        "| chip (GB/s) | " + " | ".join(f"{k}, {b / 1e9:.2f} GB" for k, b in sizes.items()) + " |",
        "| --- |" + " --- |" * len(sizes),
    ]
    for chip, speed in BANDWIDTH.items():
        times = " | ".join(f"{size / speed / 1e6:.1f} ms" for size in sizes.values())
        lines.append(f"| {chip} ({speed}) | {times} |")
    return "\n".join(lines)


def replace_table(name: str, table: str, page: Path = PAGE) -> None:
    """Put a table between its marks in a page."""
    replace_between(page, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", f"\n\n{table}\n\n")


if __name__ == "__main__":
    sys.exit(main())
