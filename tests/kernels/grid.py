"""The whole grid of every kernel: ``python -m tests.kernels.grid [decode] [prefill] [quantize] [rope]``.

Crosses what decides the compiled code (dtype, dims, cache, group ...); the other axes take turns.
``--part 1/2`` runs every second case, for two processes side by side. Ends with 1 if a case fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.metal_emulator import missing

from .cases import DECODE, PREFILL, QUANTIZE, ROPE, whole
from .checks import check_decode, check_prefill, check_quantize, check_rope

GRIDS: dict[str, tuple[dict[str, Any], tuple[str, ...], Callable[[dict[str, Any]], Any]]] = {
    "decode": (DECODE, ("dtype", "dims", "cache", "group"), check_decode),
    "prefill": (PREFILL, ("dtype", "dims", "cache"), check_prefill),
    "quantize": (QUANTIZE, ("dtype", "bits", "group_size", "dim", "rotate"), check_quantize),
    "rope": (ROPE, ("dtype", "dim", "part", "interleaved", "quantized"), check_rope),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.grid", description=__doc__)
    parser.add_argument("kernels", nargs="*", choices=[[], *GRIDS], help="default: all")
    parser.add_argument("--part", default="1/1", help="n/m: the cases n, n + m, ...")
    options = parser.parse_args(arguments)
    if missing():
        print(missing(), file=sys.stderr)
        return 2
    part, parts = map(int, options.part.split("/"))
    failures = 0
    for name in options.kernels or GRIDS:
        axes, crossed, check = GRIDS[name]
        cases = whole(axes, crossed)[part - 1 :: parts]
        start, failed = time.monotonic(), 0
        for case in cases:
            try:
                check(case)
            except Exception as error:  # a report, so that one failure does not hide the rest
                failed += 1
                print(f"FAILED {name} {case}: {error}"[:600], flush=True)
        seconds = time.monotonic() - start
        print(f"{name}: {len(cases)} cases, {failed} failed, {seconds:.0f} s", flush=True)
        failures += failed
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
