"""The grid every kernel is proven on, and a pairwise part of it for the suite."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

TYPES = ("float32", "float16", "bfloat16")
CACHES = ("plain", "8/8", "8/4", "6/6", "5/3", "4/4", "3/5", "2/2")  # key / value bits

ATTENTION: dict[str, Sequence[Any]] = {
    "dtype": TYPES,
    "dims": ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (512, 512),
             (192, 128), (576, 512)),
    "cache": CACHES,
    "group": (1, 2, 4, 5, 8, 16),  # query heads a key/value head
    "lengths": ((1,), (33, 7), (65,), (130, 1, 97)),
    "option": ("none", "window", "window of nothing", "sinks", "softcap", "slopes", "mask",
               "starts", "all"),
    "group_size": (32, 64),
}  # fmt: skip
DECODE = {**ATTENTION, "queries": (1, 2, 3, 8), "split": (False, True), "rotate": (False, True)}
PREFILL = {**ATTENTION, "queries": (9, 17, 33), "group": (1, 2, 3)}
# The suite leaves out what the whole grid covers: decode and prefill share their cache loads.
PREFILL_SUITE = {**PREFILL, "cache": ("plain", "8/4", "5/3", "4/4")}

QUANTIZE: dict[str, Sequence[Any]] = {
    "dtype": TYPES,
    "bits": (2, 3, 4, 5, 6, 8),
    "group_size": (32, 64, 128),
    "dim": (64, 80, 96, 128, 192, 256, 512, 576),
    "rows": (1, 7, 33),
    "rotate": (False, True),
}
ROPE: dict[str, Sequence[Any]] = {
    "dtype": TYPES,
    "dim": (64, 80, 96, 128, 192, 256, 512),
    "part": ("all", "half", "two"),  # how many channels turn
    "interleaved": (False, True),
    "norm": ("none", "queries", "both", "no weight"),
    "heads": ((4, 4), (8, 2), (6, 1)),
    "shape": ((1, 1), (2, 3), (3, 7)),  # batch, positions
    "positions": ("offsets", "each"),
    "layout": ("heads first", "projected"),
    "quantized": ("no", "8/4/32", "4/4/64", "3/5/32", "6/2/64"),
}


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A few cases in which every pair of values of two axes occurs (greedy)."""
    names = list(axes)
    wanted = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    cases = []
    while wanted:
        first = min(wanted)
        chosen: dict[str, int] = {first[0][0]: first[0][1], first[1][0]: first[1][1]}
        for name in names:
            if name in chosen:
                continue

            def gain(
                index: int, name: str = name, chosen: dict = chosen, left: set = wanted
            ) -> int:
                pairs = [
                    ((a, chosen[a]), (name, index))
                    if names.index(a) < names.index(name)
                    else ((name, index), (a, chosen[a]))
                    for a in chosen
                ]
                return sum(pair in left for pair in pairs)

            # Ties take turns, so that values without a wanted pair still spread.
            start = len(cases) % len(axes[name])
            order = [(start + i) % len(axes[name]) for i in range(len(axes[name]))]
            chosen[name] = max(order, key=gain)
        wanted = wanted - {
            ((a, chosen[a]), (b, chosen[b])) for a, b in itertools.combinations(names, 2)
        }
        cases.append({name: axes[name][chosen[name]] for name in names})
    return cases


def whole(axes: Mapping[str, Sequence[Any]], crossed: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of the ``crossed`` axes; the others take turns through their values."""
    others = [name for name in axes if name not in crossed]
    cases = []
    for number, values in enumerate(itertools.product(*(axes[name] for name in crossed))):
        case = dict(zip(crossed, values, strict=True))
        # Different strides for each axis, so that the turns do not run in step.
        for k, name in enumerate(others):
            case[name] = axes[name][(number * (2 * k + 1) + number // 7) % len(axes[name])]
        cases.append(case)
    return cases
