"""Which stored tensors fill which parameters: planned from shapes alone, before anything is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxtx.checkpoint.formats import Tensors, read_tensors, unpacked
from mlxtx.checkpoint.quantization import Quantization, infer
from mlxtx.checkpoint.source import Checkpoint
from mlxtx.decoder.config import DecoderConfig
from mlxtx.decoder.model import DecoderModel
from mlxtx.errors import MlxtxError
from mlxtx.families import family_for
from mlxtx.naming.map import Group, NameMap, Plan, split_suffix
from mlxtx.naming.transforms import Same

# How many tensors an error names one by one, before layers that lack the same are put together.
LISTED = 12
MOST_LISTED = 200
LONGEST_NAME = 200  # characters of a name in an error


class Form(NamedTuple):
    """What a tensor will be: its shape and type, known without its numbers."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass
class WeightPlan:
    """groups turn ``tensors`` into parameters of ``modules`` (by path, the model itself under "");
    ``forms`` describes each parameter;
    ``quantizations`` says how the packed ones are packed, by module path, and ``unpacked`` how
    those are stored that cannot stay so here; ``dropped`` are tensors known to be of no use."""

    groups: list[Group]
    tensors: Tensors
    modules: dict[str, nn.Module]
    forms: dict[str, Form]
    quantizations: dict[str, Quantization]
    unpacked: dict[str, Quantization]
    dropped: list[str]

    @property
    def size(self) -> int:
        """How many numbers the model has, packed or not."""
        total = 0
        for name, form in self.forms.items():
            path, ending = split_suffix(name)
            how = self.quantizations.get(path)
            if how is None or ending == ".bias":
                total += math.prod(form.shape)
            elif ending == ".weight":
                total += math.prod(form.shape[:-1]) * how.columns(form.shape[-1])
        return total

    def nbytes(self, group: Group) -> int:
        """What reading a group takes from the disk."""
        return sum(self.tensors[name].nbytes for name in group.sources)

    def read(self, group: Group) -> dict[str, mx.array]:
        """The group's parameters, lazy."""
        arrays = group.apply([self.tensors[name].read() for name in group.sources])
        return dict(zip(group.targets, arrays, strict=True))


def describe(checkpoint: Checkpoint, *, unpack: bool = False) -> tuple[DecoderModel, WeightPlan]:
    """A checkpoint's model with nothing in it yet, and how to fill it.

    unpack: treat packed weights as the plain ones they stand for.
    """
    tensors = read_tensors(checkpoint)
    family = family_for(checkpoint.config)
    decoder = family.decoder_config(checkpoint.config, checkpoint.tensors)
    check_kinds(decoder)
    if decoder.head.tied:
        names = family.names(checkpoint.config, decoder)
        tensors, tied = _tied_head(checkpoint, names, tensors)
        if not tied:
            checkpoint.config = {**checkpoint.config, "tie_word_embeddings": False}
            decoder = family.decoder_config(checkpoint.config, checkpoint.tensors)
    model, config = empty_model(decoder), checkpoint.config
    if unpack:
        tensors = unpacked(tensors, [name for name in tensors if tensors[name].packing])
        config = plain_config(config)
    return model, plan_weights(model, family.names(config, decoder), tensors)


def _tied_head(checkpoint: Checkpoint, names: NameMap, tensors: Tensors) -> tuple[Tensors, bool]:
    """The tensors of a model whose config ties its head to the embeddings, and whether that is so.

    As in transformers 5: a head that equals the embeddings is left out, one that stands there
    without them is both, and one that differs from them is right and the config wrong.
    """
    plan = names.plan_load({name: tensor.shape for name, tensor in tensors.items()})
    head, embeddings = _stored(plan, "lm_head"), _stored(plan, "model.embed_tokens")
    if not head:
        return tensors, True
    if not embeddings and not any(tensors[name].packing for name in head.values()):
        moved = {name: "model.embed_tokens" + ending for ending, name in head.items()}
        return {moved.get(name, name): tensor for name, tensor in tensors.items()}, True
    if head.keys() != embeddings.keys():
        return tensors, False
    if not all(checkpoint.same(head[ending], embeddings[ending]) for ending in head):
        return tensors, False
    return {name: tensor for name, tensor in tensors.items() if name not in head.values()}, True


def _stored(plan: Plan, module: str) -> dict[str, str]:
    """The tensors of a module's weight, packed or not, by their endings; not its bias."""
    found = {}
    for group in plan.groups:
        for path, ending in map(split_suffix, group.targets):
            if path == module and ending != ".bias":
                found[ending] = group.sources[0]
    return found


def empty_model(decoder: DecoderConfig) -> DecoderModel:
    """A model with nothing in it yet."""
    try:
        return DecoderModel(decoder)
    except (OverflowError, ValueError) as error:  # larger than any array can be
        raise MlxtxError(f"config.json describes no possible decoder: {error}") from None


# What the values of a description's fields can be, by the first word of the field's type.
_KINDS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def check_kinds(part: Any) -> None:
    """Raises MlxtxError for the first value in a ``DecoderConfig`` that is not of its field's
    kind: a family passes on what ``config.json`` holds."""
    for name, kinds, optional in _field_kinds(part.__class__):
        value = getattr(part, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is None:
                good = optional
            elif kinds is None:
                good = is_dataclass(one)
            else:
                good = type(one) in kinds and (type(one) is not int or abs(one) < 2**63)
            if not good:
                where = f"{type(part).__name__}.{name}"
                raise MlxtxError(
                    f"config.json describes no possible decoder: {where} is {one!r:.60}"
                )
            if kinds is None and one is not None:
                check_kinds(one)


@cache
def _field_kinds(description: type) -> list[tuple[str, tuple[type, ...] | None, bool]]:
    """The name, the kinds (None: another description) and whether it may be None, of each field."""
    found: list[tuple[str, tuple[type, ...] | None, bool]] = []
    for field in fields(description):
        words = re.split(r"\W+", str(field.type))
        word = words[1] if words[0] == "tuple" else words[0]
        if word != "Literal":
            found.append((field.name, _KINDS.get(word), "None" in words))
    return found


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the same model with nothing packed."""
    return {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}


def plan_weights(model: nn.Module, names: NameMap, tensors: Tensors) -> WeightPlan:
    """How ``tensors`` fill ``model``, a ``DecoderModel`` with nothing quantized.

    Weights stay packed where the module and the family's rules allow it. Raises MlxtxError that names every tensor that is missing, unexpected or has another shape.
    """
    modules = dict(model.named_modules())
    plan = names.plan_load({name: tensor.shape for name, tensor in tensors.items()})
    loose = [
        name
        for group in plan.groups
        for name in group.sources
        if tensors[name].packing and not _stays_packed(group, modules)
    ]
    packings = {p.name: p.quantization for name in loose if (p := tensors[name].packing)}
    if loose:
        tensors = unpacked(tensors, loose)
        plan = names.plan_load({name: tensor.shape for name, tensor in tensors.items()})
    forms: dict[str, Form] = {}
    for group in plan.groups:
        for name, form in zip(group.targets, _forms(group, tensors), strict=True):
            if name in forms:
                raise MlxtxError(f"the checkpoint fills {name} twice, from {group.sources[0]} too")
            forms[name] = form
    quantizations = {
        split_suffix(name)[0]: _packing_of(name, forms, modules)
        for group in plan.groups
        if any(tensors[source].packing for source in group.sources)
        for name in group.targets
    }
    _check(modules, plan.groups, plan.incomplete, forms, quantizations)
    loosened = {
        split_suffix(name)[0]: packings[group.sources[0]]
        for group in plan.groups
        if group.sources[0] in packings
        for name in group.targets
    }
    return WeightPlan(plan.groups, tensors, modules, forms, quantizations, loosened, plan.dropped)


def _stays_packed(group: Group, modules: Mapping[str, nn.Module]) -> bool:
    """Whether every target of the group can hold the packed form."""
    if not group.keeps_packing:
        return False
    return all(
        name.endswith(".weight") and hasattr(modules.get(split_suffix(name)[0]), "to_quantized")
        for name in group.targets
    )


def _forms(group: Group, tensors: Tensors) -> list[Form]:
    """The targets' forms: the rule is applied to arrays that are never evaluated."""
    if isinstance(group.transform, Same):
        return [Form(tensors[n].shape, tensors[n].dtype) for n in group.sources]
    stand_ins = [mx.zeros(tensors[n].shape, tensors[n].dtype) for n in group.sources]
    return [Form(tuple(a.shape), a.dtype) for a in group.apply(stand_ins)]


def _packing_of(
    name: str, forms: Mapping[str, Form], modules: Mapping[str, nn.Module]
) -> Quantization:
    """How a packed weight is packed: certain, as the module's own columns are known."""
    path = split_suffix(name)[0]
    scales = forms.get(path + ".scales")
    columns = modules[path]["weight"].shape[-1]
    found = infer(forms[name].shape, scales.shape, scales.dtype, columns) if scales else None
    if found is None:
        beside = list(scales.shape) if scales else "none"
        raise MlxtxError(
            f"{name}: packed shape {list(forms[name].shape)} with scales {beside} does not fit "
            f"{columns} columns in any quantization that is known"
        )
    return found


def parameter_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its full name."""
    return {
        f"{path}.{key}" if path else key: tuple(value.shape)
        for path, module in modules.items()
        for key, value in module.items()
        if isinstance(value, mx.array) and not key.startswith("_")
    }


def _check(
    modules: Mapping[str, nn.Module],
    groups: Iterable[Group],
    incomplete: Iterable[tuple[tuple[str, ...], tuple[str, ...]]],
    forms: Mapping[str, Form],
    quantizations: Mapping[str, Quantization],
) -> None:
    expected = parameter_shapes(modules)
    origin = {name: group.sources for group in groups for name in group.targets}
    halves = {name: lack for have, lack in incomplete for name in have}
    problems: list[tuple[str, str, str]] = []  # what, the tensor's name, what else
    for name, form in forms.items():
        path, ending = split_suffix(name)
        quantization = quantizations.get(path)
        if name not in expected:
            if quantization and ending in (".scales", ".biases"):
                continue
            source = origin[name][0]
            without = f" (without {', '.join(halves[source][:3])})" if source in halves else ""
            problems.append(("unexpected ", source, f"{without} {list(form.shape)}"))
            continue
        packed = quantization and ending != ".bias"
        if not packed and not mx.issubdtype(form.dtype, mx.floating):
            kind = str(form.dtype).rpartition(".")[2]
            problems.append(("", origin[name][0], f" holds {kind}, not floating-point numbers"))
        shape = form.shape
        if quantization and ending == ".weight":
            shape = (*shape[:-1], quantization.columns(shape[-1]))
        if shape != expected[name]:
            source = ", ".join(origin[name][:3])
            sizes = f"{list(shape)}, not {list(expected[name])} as configured"
            problems.append(("", source, f" is {sizes}"))
    for name, shape in expected.items():
        if name not in forms:
            problems.append(("missing ", name, f" {list(shape)}"))
    if problems:
        raise MlxtxError("the weights do not fit config.json: " + "; ".join(_listed(problems)))


def _listed(problems: Sequence[tuple[str, str, str]]) -> list[str]:
    """Every tensor by its name; where there are many, ``layers.{0-31}`` stands for all of these."""
    together: dict[tuple[str, ...], list[str]] = {}
    for what, name, more in problems:
        number = re.search(r"\.(\d{1,19})\.", name) if len(problems) > LISTED else None
        start, end = number.span(1) if number else (len(name), len(name))
        key = (what, name[:start][:LONGEST_NAME], name[end:][:LONGEST_NAME], more)
        together.setdefault(key, []).append(name[start:end])
    lines = [
        what + before + (_ranges(numbers) if len({*numbers}) > 1 else numbers[0]) + after + more
        for (what, before, after, more), numbers in together.items()
    ]
    left = len(lines) - MOST_LISTED
    return [*lines[:MOST_LISTED], f"and {left} more"] if left > 0 else lines


def _ranges(numbers: Iterable[str]) -> str:
    """ "{0-3,7}" for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return "{" + ",".join(parts) + "}"
