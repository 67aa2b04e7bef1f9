"""The work of a conversion, cut into units: what has to be read together and is written together.

Everything is planned from shapes. A unit whose tensors only follow each other row by row is worked
off in pieces, so that not even one large tensor has to be in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from mlxtx.checkpoint.formats import Tensor
from mlxtx.checkpoint.quantization import Quantization
from mlxtx.checkpoint.safetensors import dtype_name
from mlxtx.checkpoint.shards import ShardWriter
from mlxtx.checkpoint.weights import Form, WeightPlan
from mlxtx.errors import MlxtxError
from mlxtx.naming.map import Group, Plan, split_suffix
from mlxtx.naming.transforms import Same, Stacked

# Weights read at a time where rows can be read alone.
PIECE_BYTES = 8 << 20


@dataclass
class Output:
    """One array to write: packed where ``quantization`` says so, else as it is."""

    name: str
    form: Form
    quantization: Quantization | None = None

    @property
    def module(self) -> str:
        return split_suffix(self.name)[0]

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What the file holds of it: name -> (type, shape)."""
        stand_in = mx.zeros(self.form.shape, self.form.dtype)
        parts = {self.name: stand_in}
        if self.quantization:
            parts = {self.module + k: a for k, a in self.quantization.pack(stand_in).items()}
        return {name: (dtype_name(a), tuple(a.shape)) for name, a in parts.items()}


@dataclass
class Unit:
    """loads turn stored tensors into ours, saves turn ours into ``outputs``."""

    loads: list[Group] = field(default_factory=list)
    saves: list[Group] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)

    def nbytes(self, plan: WeightPlan) -> int:
        return sum(plan.nbytes(group) for group in self.loads)


def make_units(plan: WeightPlan, saving: Plan, cast: Callable[[mx.Dtype], mx.Dtype]) -> list[Unit]:
    """Units in the order in which their first tensor is stored. ``cast`` gives the type to write
    a tensor of a type as."""
    unit_of: dict[str, Unit] = {}
    for group in plan.groups:
        unit = Unit([group])
        unit_of.update(dict.fromkeys(group.targets, unit))
    for group in saving.groups:
        first = unit_of[group.sources[0]]
        for name in group.sources[1:]:
            other = unit_of[name]
            if other is not first:
                first.loads += other.loads
                first.saves += other.saves
                first.outputs += other.outputs
                for load in other.loads:
                    unit_of.update(dict.fromkeys(load.targets, first))
        first.saves.append(group)
        forms = [plan.forms[name] for name in group.sources]
        stand_ins = [mx.zeros(form.shape, cast(form.dtype)) for form in forms]
        first.outputs += [
            Output(name, Form(tuple(a.shape), a.dtype))
            for name, a in zip(group.targets, group.apply(stand_ins), strict=True)
        ]
    order = {id(unit_of[group.targets[0]]): unit_of[group.targets[0]] for group in plan.groups}
    return list(order.values())


def run_unit(unit: Unit, plan: WeightPlan, writer: ShardWriter) -> Iterator[int]:
    """Read, convert and write a unit; yields the bytes read, piece by piece."""
    pieces = _pieces(unit, plan)
    if pieces is None:
        yield from _whole(unit, plan, writer)
        return
    (output,) = unit.outputs
    offsets: dict[str, int] = {}
    for tensor, start, stop in pieces:
        assert tensor.rows is not None
        _write(output, tensor.rows(start, stop), writer, offsets)
        yield tensor.nbytes * (stop - start) // max(_rows(tensor.shape), 1)


def _whole(unit: Unit, plan: WeightPlan, writer: ShardWriter) -> Iterator[int]:
    ours: dict[str, mx.array] = {}
    for group in unit.loads:
        ours.update(plan.read(group))
    outputs = {output.name: output for output in unit.outputs}
    for group in unit.saves:
        arrays = [ours[name] for name in group.sources]
        for name, array in zip(group.targets, group.apply(arrays), strict=True):
            _write(outputs[name], array, writer, {})
    yield unit.nbytes(plan)


def _write(output: Output, array: mx.array, writer: ShardWriter, offsets: dict[str, int]) -> None:
    """Write an array (or some rows of it) behind what ``offsets`` says is there already."""
    wide, array = array, array.astype(output.form.dtype)
    halved = array.dtype == mx.float16 and wide.dtype != mx.float16
    if halved and not mx.array_equal(mx.isfinite(wide), mx.isfinite(array)).item():
        raise MlxtxError(f"{output.name} holds numbers beyond float16's 65504; use bfloat16")
    parts = {output.name: array}
    if output.quantization:
        parts = {output.module + k: a for k, a in output.quantization.pack(array).items()}
    mx.eval(list(parts.values()))
    for name, part in parts.items():
        offsets[name] = writer.write(name, part, offsets.get(name, 0))


def _pieces(unit: Unit, plan: WeightPlan) -> list[tuple[Tensor, int, int]] | None:
    """The rows of a unit's only output in order, or None where it has to be seen whole."""
    if len(unit.loads) != 1 or len(unit.saves) != 1 or len(unit.outputs) != 1:
        return None
    load, save = unit.loads[0], unit.saves[0]
    if not isinstance(load.transform, Same | Stacked) or not isinstance(save.transform, Same):
        return None
    pieces = []
    for name in load.sources:
        tensor = plan.tensors[name]
        if tensor.rows is None:
            return None
        count = _rows(tensor.shape)
        step = max(PIECE_BYTES // max(tensor.shape[-1] * 4, 1), 1)
        step = -(-step // tensor.row_step) * tensor.row_step
        pieces += [(tensor, at, min(at + step, count)) for at in range(0, count, step)]
    return pieces or None


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def stored_layout(units: list[Unit]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Everything that the new files hold, in order."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for unit in units:
        for output in unit.outputs:
            layout.update(output.stored())
    return layout


def original_modules(unit: Unit, output: Output) -> list[str]:
    """Paths of our modules that an output's numbers come from."""
    return [
        split_suffix(name)[0]
        for group in unit.saves
        if output.name in group.targets
        for name in group.sources
    ]
