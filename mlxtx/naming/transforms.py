"""How numbers move between a family's tensors and ours: small two-way steps.

Every step has ``load`` (theirs to ours) and ``save`` (ours to theirs), exact inverses of each
other, on lists of arrays. ``axis`` is the axis of the rows (the output features): -2 of a weight
[..., O, I] and of what is packed with it, -1 of a bias [..., O]. The arrays stay lazy, so a shape
can be had without reading any numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import mlx.core as mx


class Transform:
    """packed: whether quantized weights, packed along the last axis, can go through unchanged."""

    packed: ClassVar[bool] = True

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        raise NotImplementedError

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        raise NotImplementedError


def _row_axis(array: mx.array, axis: int) -> int:
    """The rows' axis counted from the front; a vector's only axis holds its rows."""
    return array.ndim + max(axis, -array.ndim)


@dataclass(frozen=True)
class Same(Transform):
    """The same tensor under another name."""

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return arrays

    save = load


@dataclass(frozen=True)
class Split(Transform):
    """One fused projection <-> its parts along the rows.

    sizes: rows of each part in one group; groups: how often the parts follow each other. Plain
    [q; k; v] is one group; per-head [q k v] is one group a head; interleaved gate and up are
    ``sizes=(1, 1)`` and as many groups as rows of one.
    """

    sizes: tuple[int, ...]
    groups: int = 1

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        (array,) = arrays
        rows = _row_axis(array, axis)
        before, after = array.shape[:rows], array.shape[rows + 1 :]
        if array.shape[rows] != self.groups * sum(self.sizes):
            raise ValueError(
                f"{array.shape[rows]} rows, where {self.groups} x {list(self.sizes)} are expected"
            )
        array = array.reshape(*before, self.groups, sum(self.sizes), *after)
        parts = []
        start = 0
        for size in self.sizes:
            at = (slice(None),) * (rows + 1) + (slice(start, start + size),)
            parts.append(array[at].reshape(*before, self.groups * size, *after))
            start += size
        return parts

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        import mlx.core as mx

        rows = _row_axis(arrays[0], axis)
        before, after = arrays[0].shape[:rows], arrays[0].shape[rows + 1 :]
        parts = [
            array.reshape(*before, self.groups, size, *after)
            for array, size in zip(arrays, self.sizes, strict=True)
        ]
        fused = mx.concatenate(parts, axis=rows + 1)
        return [fused.reshape(*before, self.groups * sum(self.sizes), *after)]


@dataclass(frozen=True)
class Transposed(Transform):
    """Weights stored [I, O] (Conv1D, fused experts) <-> [O, I]; a bias stays as it is."""

    packed: ClassVar[bool] = False

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return [a.swapaxes(-1, -2) if axis == -2 and a.ndim > 1 else a for a in arrays]

    save = load


@dataclass(frozen=True)
class Stacked(Transform):
    """One tensor an expert [O, I] <-> all experts [E, O, I]."""

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        import mlx.core as mx

        return [mx.stack(arrays)]

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        (array,) = arrays
        return [array[e] for e in range(array.shape[0])]


@dataclass(frozen=True)
class Unflattened(Transform):
    """Experts one below the other [E * O, I] <-> stacked [E, O, I]."""

    count: int

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return [a.reshape(self.count, a.shape[0] // self.count, *a.shape[1:]) for a in arrays]

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return [a.reshape(-1, *a.shape[2:]) for a in arrays]


@dataclass(frozen=True)
class Moved(Transform):
    """One axis at another place: a convolution's [C, 1, K] <-> [C, K, 1] is ``Moved(1, 2)``."""

    packed: ClassVar[bool] = False
    source: int
    target: int

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        import mlx.core as mx

        return [mx.moveaxis(a, self.source, self.target) for a in arrays]

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        import mlx.core as mx

        return [mx.moveaxis(a, self.target, self.source) for a in arrays]


@dataclass(frozen=True)
class Reshaped(Transform):
    """The same numbers in another shape."""

    packed: ClassVar[bool] = False
    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return [a.reshape(self.ours) for a in arrays]

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return [a.reshape(self.theirs) for a in arrays]


@dataclass(frozen=True)
class Blocks(Transform):
    """fp4 numbers in blocks of 16 bytes, [E, out, blocks, 16] <-> in 32-bit words, [E, out, words]."""

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        import mlx.core as mx

        return [a.view(mx.uint32).flatten(-2) for a in arrays]

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        import mlx.core as mx

        return [a.reshape(*a.shape[:-1], -1, 4).view(mx.uint8) for a in arrays]


@dataclass(frozen=True)
class Shifted(Transform):
    """Norm weights stored with a constant added: ours = theirs + ``by``."""

    packed: ClassVar[bool] = False
    by: float

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return [a + self.by for a in arrays]

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return [a - self.by for a in arrays]


@dataclass(frozen=True)
class Reversed(Transform):
    """A step with its two directions exchanged: parts that ours keep fused."""

    step: Transform

    @property
    def packed(self) -> bool:  # type: ignore[override]
        return self.step.packed

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return self.step.save(arrays, axis)

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        return self.step.load(arrays, axis)


@dataclass(frozen=True)
class Chain(Transform):
    """Steps one after the other when reading, in reverse when writing."""

    steps: tuple[Transform, ...]

    @property
    def packed(self) -> bool:  # type: ignore[override]
        return all(step.packed for step in self.steps)

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        for step in self.steps:
            arrays = step.load(arrays, axis)
        return arrays

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        for step in reversed(self.steps):
            arrays = step.save(arrays, axis)
        return arrays


@dataclass(frozen=True)
class Each(Transform):
    """A step of its own for each of several parts: ``Each((Transposed(), Same()))``."""

    steps: tuple[Transform, ...]

    @property
    def packed(self) -> bool:  # type: ignore[override]
        return all(step.packed for step in self.steps)

    def load(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        pairs = zip(self.steps, arrays, strict=True)
        return [moved for step, array in pairs for moved in step.load([array], axis)]

    def save(self, arrays: list[mx.array], axis: int) -> list[mx.array]:
        pairs = zip(self.steps, arrays, strict=True)
        return [moved for step, array in pairs for moved in step.save([array], axis)]


def chain(*steps: Transform) -> Chain:
    return Chain(steps)
