"""Adapters under a family's own names, where it fuses or stacks what we keep apart.

A fused projection W = [W1; W2] with one adapter B A is our two with B cut along its rows and the
same A. The other way our adapters B1 A1 and B2 A2 become one of the summed rank:
A = [A1; A2], B = [[B1, 0], [0, B2]]. Both ways are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxtx.errors import MlxtxError
from mlxtx.families import family_for
from mlxtx.naming.map import Layout
from mlxtx.naming.transforms import Chain, Same, Split, Stacked, Transform, Transposed
from mlxtx.tuning.lora import EMBEDDING, EXPERTS, LEAVES, LowRank, input_width
from mlxtx.tuning.targets import adaptable


@dataclass(frozen=True)
class Part:
    """One adapter as matrices: a [..., rank, in], b [..., out, rank], and DoRA's m [out]."""

    a: mx.array
    b: mx.array
    how: LowRank
    m: mx.array | None = None


@dataclass(frozen=True)
class Tie:
    """Modules of theirs and the modules of ours that hold the same weights."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform


def ties(model: Any, config: Mapping[str, Any], layout: Layout) -> list[Tie]:
    """How our adaptable layers stand to the family's own."""
    layers = adaptable(model)
    shapes = {f"{p}.weight": (*m.weight.shape[:-1], input_width(m)) for p, m in layers.items()}
    if not config:
        return [Tie((p,), (p,), Same()) for p in layers]
    plan = family_for(config).names(config).plan_save(shapes, layout)
    return [
        Tie(tuple(map(_module, g.targets)), tuple(map(_module, g.sources)), g.transform)
        for g in plan.groups
    ]


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _steps(transform: Transform, tie: Tie) -> list[Transform]:
    """The steps that move rows. A transposed weight has the same adapter."""
    steps = list(transform.steps) if isinstance(transform, Chain) else [transform]
    kept: list[Transform] = []
    for step in steps:
        if isinstance(step, Chain):
            kept += _steps(step, tie)
        elif isinstance(step, Split | Stacked):
            kept.append(step)
        elif not isinstance(step, Same | Transposed):
            raise MlxtxError(f"an adapter on {tie.theirs[0]} can't be told as one on {tie.ours[0]}")
    return kept


def to_ours(tie: Tie, parts: Sequence[Part]) -> dict[str, Part]:
    """The adapters of all their modules as ours."""
    steps = _steps(tie.transform, tie)
    how, stacked = parts[0].how, any(isinstance(s, Stacked) for s in steps)
    if stacked:  # all in one array: of one rank, and of one scale
        how = replace(how, rank=max(p.how.rank for p in parts))
        parts = [_padded(_scaled(p, how.scale), how.rank) for p in parts]
    a = mx.stack([p.a for p in parts]) if stacked else parts[0].a
    bs = _apply(steps, [p.b for p in parts], -2)
    ms = [p.m for p in parts]
    if all(m is not None for m in ms):
        cut: list[Any] = _apply(steps, ms, -1)
    else:
        cut = [None] * len(bs)
    return {path: Part(a, b, how, m) for path, b, m in zip(tie.ours, bs, cut, strict=True)}


def to_theirs(tie: Tie, parts: Mapping[str, Part], rows: Mapping[str, int]) -> dict[str, Part]:
    """Our adapters as those of their modules. rows: the height of each of our weights."""
    steps = _steps(tie.transform, tie)
    first = next(iter(parts.values()))
    total = sum(p.how.rank for p in parts.values())
    bs, start = [], 0
    for path in tie.ours:
        part = parts.get(path)
        lead = first.b.shape[:-2]
        if part is None:
            bs.append(mx.zeros((*lead, rows[path], total), first.b.dtype))
            continue
        wide = [(0, 0)] * (part.b.ndim - 1)
        b = _scaled(part, first.how.scale).b
        bs.append(mx.pad(b, [*wide, (start, total - start - part.how.rank)]))
        start += part.how.rank
    a = mx.concatenate([parts[p].a for p in tie.ours if p in parts], axis=-2)
    moved = _apply(steps, bs, -2, saving=True)
    ms: list[Any] = [None] * len(moved)
    if first.m is not None:
        if len(parts) < len(tie.ours):
            raise MlxtxError(f"DoRA on a part of {tie.theirs[0]} can't be written under its name")
        ms = _apply(steps, [parts[p].m for p in tie.ours], -1, saving=True)
    stacked = any(isinstance(s, Stacked) for s in steps)
    how = replace(first.how, rank=total)
    return {
        path: Part(a[n] if stacked else a, b, how, m)
        for n, (path, b, m) in enumerate(zip(tie.theirs, moved, ms, strict=True))
    }


def _apply(steps: Sequence[Transform], arrays: list, axis: int, saving: bool = False) -> list:
    for step in reversed(steps) if saving else steps:
        arrays = step.save(arrays, axis) if saving else step.load(arrays, axis)
    return arrays


def parts_of(model: Any, layers: Mapping[str, LowRank], weights: Mapping[str, mx.array]):
    """Our adapters' weights as matrices."""
    modules = adaptable(model)
    return {path: part_from(modules[path], how, weights, path) for path, how in layers.items()}


def part_from(layer: Any, how: LowRank, weights: Mapping[str, mx.array], path: str) -> Part:
    a, b, m = (weights.get(f"{path}.{n}") for n in ("lora_a", "lora_b", "m"))
    assert a is not None and b is not None
    if not isinstance(layer, EXPERTS):
        # An embedding's rows are tokens: its weight [V, D] is lora_a @ lora_b.
        a, b = (b, a) if isinstance(layer, EMBEDDING) else (a.T, b.T)
    return Part(a, b, how, m)


def weights_from(layer: Any, part: Part, path: str) -> dict[str, mx.array]:
    """The other way round."""
    a, b = part.a, part.b
    if not isinstance(layer, EXPERTS):
        a, b = (b, a) if isinstance(layer, EMBEDDING) else (a.T, b.T)
    found = {f"{path}.lora_a": a, f"{path}.lora_b": b}
    if part.m is not None:
        found[f"{path}.m"] = part.m
    return found


def in_layout(adapter: Any, model: Any, config: Mapping[str, Any], layout: Layout) -> Any:
    """The adapter under the names of ``layout``, all of one rank (smaller ones get zeros), as
    mlx-lm's single ``rank`` wants it; the same object where the names are ours."""
    own = [t for t in ties(model, config, layout) if set(t.ours) & set(adapter.layers)]
    if all(tie.theirs == tie.ours for tie in own):
        return adapter
    modules = adaptable(model)
    rows = {path: module.weight.shape[-2] for path, module in modules.items()}
    parts = parts_of(model, adapter.layers, adapter.weights)
    found: dict[str, tuple[Part, Any]] = {}
    for tie in own:
        members = {p: parts[p] for p in tie.ours if p in parts}
        for name, part in to_theirs(tie, members, rows).items():
            found[name] = (part, modules[tie.ours[0]])
    rank = max(part.how.rank for part, _ in found.values())
    layers: dict[str, LowRank] = {}
    weights = {n: a for n, a in adapter.weights.items() if n.rpartition(".")[2] not in LEAVES}
    for name, (part, module) in found.items():
        wide = _padded(part, rank)
        layers[name] = wide.how
        weights |= weights_from(module, wide, name)
    return replace(adapter, layers=layers, weights=weights)


def _scaled(part: Part, scale: float) -> Part:
    """The same adapter, told with another scale."""
    if part.how.scale == scale:
        return part
    b = (part.b * (part.how.scale / scale)).astype(part.b.dtype)
    return replace(part, b=b, how=replace(part.how, scale=scale))


def _padded(part: Part, rank: int) -> Part:
    more = rank - part.how.rank
    none = [(0, 0)] * (part.a.ndim - 2)
    return Part(
        mx.pad(part.a, [*none, (0, more), (0, 0)]),
        mx.pad(part.b, [*none, (0, 0), (0, more)]),
        replace(part.how, rank=rank),
        part.m,
    )


def from_layout(adapter: Any, model: Any, config: Mapping[str, Any], layout: Layout) -> Any:
    """An adapter whose layers have the names of ``layout``, under ours."""
    modules = adaptable(model)
    if not config or all(path in modules for path in adapter.layers):
        return adapter
    layers, weights, left = {}, dict(adapter.weights), dict(adapter.layers)
    for tie in ties(model, config, layout):
        if not all(name in left for name in tie.theirs):
            continue
        module = modules[tie.ours[0]]
        parts = [part_from(module, left.pop(n), weights, n) for n in tie.theirs]
        for name in tie.theirs:
            for leaf in LEAVES:
                weights.pop(f"{name}.{leaf}", None)
        for path, part in to_ours(tie, parts).items():
            layers[path] = part.how
            weights |= weights_from(modules[path], part, path)
    return replace(adapter, layers={**layers, **left}, weights=weights)
