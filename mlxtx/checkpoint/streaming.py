"""A checkpoint that runs from the disk, in float32: one block in memory at a time, and of most of
its matrices only some rows.

The order of all sums is fixed, so that the same files always give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache import LayerCache, Step
from mlxtx.checkpoint.formats import Tensor
from mlxtx.checkpoint.loading import quantize_modules
from mlxtx.checkpoint.quantization import Quantization
from mlxtx.checkpoint.source import Checkpoint
from mlxtx.checkpoint.weights import describe
from mlxtx.decoder.config import DecoderConfig
from mlxtx.decoder.experts import ExpertLinear, QuantizedExpertLinear
from mlxtx.decoder.latent_attention import HeadLinear, QuantizedHeadLinear
from mlxtx.naming.map import Group, split_suffix
from mlxtx.naming.transforms import Same

# What is in memory at a time of a matrix that is read by rows.
ROWS_BYTES = 8 << 20


class StreamedModel:
    """The model of a folder. ``embed``, ``block`` for each layer and ``logits`` follow each other."""

    def __init__(self, folder: Path):
        self.checkpoint = Checkpoint(folder)
        self.model, self.plan = describe(self.checkpoint)
        quantize_modules(self.plan)
        widen(self.model)
        self.model.eval()
        self._modules: dict[str, nn.Module] = dict(self.model.named_modules())
        self._groups: dict[str, list[Group]] = {}
        for group in self.plan.groups:
            self._groups.setdefault(_part(group.targets[0]), []).append(group)
        for path, module in self._modules.items():
            table = self._by_rows(path) if isinstance(module, _Linear | _Embedding) else None
            if table:
                parent, _, key = path.rpartition(".")
                self._modules[parent][key] = table
        self._modules.update(self.model.named_modules())
        self._own: mx.array | None = None

    @property
    def config(self) -> DecoderConfig:
        return self.model.config

    def stored(self, layer: int) -> set[Quantization | mx.Dtype]:
        """How a block's weights are stored: their packings and types."""
        prefix = f"model.layers.{layer}."
        packings = {**self.plan.quantizations, **self.plan.unpacked}
        packed = {q for path, q in packings.items() if path.startswith(prefix)}
        plain = {f.dtype for name, f in self.plan.forms.items() if name.startswith(prefix)}
        return packed | plain

    def _by_rows(self, path: str) -> RowTable | None:
        """What stands in for a module whose weight can be read by rows, and then is not read
        whole; None where it can't."""
        module, part = self._modules[path], _part(path + ".weight")
        own = [g for g in self._groups.get(part, []) if split_suffix(g.targets[0])[0] == path]
        weight = [group for group in own if group.targets == (path + ".weight",)]
        if len(weight) != 1 or not isinstance(weight[0].transform, Same):
            return None
        tensors = self.plan.tensors
        tensor = tensors[weight[0].sources[0]]
        parts, packing = [tensor], tensor.packing
        if packing:
            parts = [tensors[name] for name in packing.parts]
        if any(each.rows is None or each.row_step > 1 for each in parts):
            return None
        shape = packing.plain.shape if packing else tensor.shape
        how = packing.quantization if packing else None
        table = RowTable(shape, parts, how, isinstance(module, _Linear))
        if "bias" in module:
            table.bias = module.bias
        self._groups[part] = [
            g for g in self._groups[part] if g not in own or g.targets == (path + ".bias",)
        ]
        return table

    def _fill(self, part: str) -> None:
        for group in self._groups.get(part, []):
            arrays = self.plan.read(group)
            for name, array in arrays.items():
                path, _, key = name.rpartition(".")
                wide = key == "weight" and isinstance(self._modules[path], Widened)
                if not wide and mx.issubdtype(array.dtype, mx.floating):
                    array = array.astype(mx.float32)
                mx.eval(array)
                self._modules[path][key] = array

    def _release(self, part: str) -> None:
        for group in self._groups.get(part, []):
            for name in group.targets:
                path, _, key = name.rpartition(".")
                old = self._modules[path][key]
                self._modules[path][key] = mx.zeros(old.shape, old.dtype)  # lazy: holds nothing

    def embed(self, tokens: mx.array, step: Step) -> mx.array:
        """Tokens [B, T] -> states [B, T, D]."""
        self._fill("")
        decoder = self.model.model
        x = decoder.embed(tokens, step)
        self._own = decoder.per_layer(tokens, x) if "per_layer" in decoder else None
        mx.eval(x, self._own)
        return x

    def own(self, index: int) -> mx.array | None:
        """A block's inputs of its own [B, T, w] for the tokens embedded last, where it has any."""
        return None if self._own is None else self._own[:, :, index]

    @contextmanager
    def held(self, index: int) -> Iterator[nn.Module]:
        """A block while its weights are there."""
        part = _part(f"model.layers.{index}.")
        self._fill(part)
        yield self.model.layers[index]
        self._release(part)

    def block(
        self,
        index: int,
        inputs: Sequence[tuple[mx.array, LayerCache, mx.array | None]],
        step: Step,
    ) -> list[mx.array]:
        """One block on several states [B, T, D], each with a cache and the inputs of ``own``."""
        outputs = []
        with self.held(index) as layer:
            for x, cache, own in inputs:
                outputs.append(layer(x, cache, step, own))
                mx.eval(outputs[-1])
        return outputs

    def logits(self, x: mx.array) -> mx.array:
        """States [B, T, D] behind the last block -> logits [B, T, V]."""
        decoder = self.model.model
        x = decoder.norm(x)
        y = self.model.head(decoder.project_out(x) if "project_out" in decoder else x)
        mx.eval(y)
        return y


def _part(name: str) -> str:
    """``model.layers.7.`` for what is in a block, "" for what is around them."""
    pieces = name.split(".")
    return ".".join(pieces[:3]) + "." if pieces[1:2] == ["layers"] else ""


def unpacked(how: Quantization, weight: mx.array, *rest: mx.array) -> mx.array:
    """Packed parts as float32, with nothing rounded on the way."""
    scales, *biases = [x if x.dtype == mx.uint8 else x.astype(mx.float32) for x in rest]
    return how.unpack(weight, scales, biases[0] if biases else None, mx.float32)


def rounded(weight: mx.array, how: Quantization) -> mx.array:
    """A float32 weight after it was packed and unpacked."""
    return unpacked(how, *how.pack(weight).values())


def product(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., I] @ weight [O, I] transposed, in the order of operands that every BLAS is quick
    at for a few rows."""
    flat = mx.contiguous(x.reshape(-1, x.shape[-1]).T)  # [I, N]
    return (weight @ flat).T.reshape(*x.shape[:-1], -1)


class Widened(nn.Module):
    """A layer that keeps its weight as it is stored and computes in float32.

    rounding: for trying out: the weight is used as if it had been packed this way.
    """

    rounding: Quantization | None = None

    def whole(self) -> mx.array:
        return self._rounded(self._wide(self.weight))

    def some(self, index: int) -> mx.array:
        """One of several stacked matrices."""
        return self._rounded(self._wide(self.weight[index], index))

    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def _wide(self, weight: mx.array, index: int | None = None) -> mx.array:
        return weight.astype(mx.float32)

    def _rounded(self, weight: mx.array) -> mx.array:
        return weight if self.rounding is None else rounded(weight, self.rounding)


class _Packed(Widened):
    def shape(self) -> tuple[int, ...]:
        return (*self.weight.shape[:-1], self.weight.shape[-1] * 32 // self.bits)

    def _wide(self, weight: mx.array, index: int | None = None) -> mx.array:
        rest = [part for part in (self.scales, self.get("biases")) if part is not None]
        if index is not None:
            rest = [part[index] for part in rest]
        return unpacked(Quantization(self.bits, self.group_size, self.mode), weight, *rest)


class _Linear(Widened):
    def __call__(self, x: mx.array) -> mx.array:
        y = product(x, self.whole())
        mx.eval(y)
        return y + self.bias if "bias" in self else y


class _Embedding(Widened):
    def __call__(self, x: mx.array) -> mx.array:
        return self.whole()[x]

    def as_linear(self, x: mx.array) -> mx.array:
        return product(x, self.whole())


class _Experts(Widened):
    def __call__(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        """x [..., 1, I] through the experts ``chosen`` [...], one expert after the other."""
        x = mx.broadcast_to(x, (*chosen.shape, *x.shape[-2:])).reshape(chosen.size, -1)
        numbers: Any = chosen.flatten().tolist()
        y = mx.zeros((len(numbers), self.weight.shape[-2]))
        for expert in sorted(set(numbers)):
            rows = mx.array([i for i, number in enumerate(numbers) if number == expert])
            y[rows] = product(x[rows], self.some(expert))
            mx.eval(y)
        y = y.reshape(*chosen.shape, 1, -1)
        return y if "bias" not in self else y + self.bias[chosen][..., None, :]


class _Heads(Widened):
    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.whole().swapaxes(-1, -2)

    def transposed(self, x: mx.array) -> mx.array:
        return x @ self.whole()


class _PackedLinear(_Packed, _Linear):
    pass


class _PackedEmbedding(_Packed, _Embedding):
    pass


class _PackedExperts(_Packed, _Experts):
    pass


class _PackedHeads(_Packed, _Heads):
    pass


_WIDENED: dict[type, type] = {
    nn.Linear: _Linear,
    nn.Embedding: _Embedding,
    ExpertLinear: _Experts,
    HeadLinear: _Heads,
    nn.QuantizedLinear: _PackedLinear,
    nn.QuantizedEmbedding: _PackedEmbedding,
    QuantizedExpertLinear: _PackedExperts,
    QuantizedHeadLinear: _PackedHeads,
}


def widen(model: nn.Module) -> None:
    """Give a model's layers, in place, forms that compute in float32 from whatever is stored."""
    for module in model.modules():
        if type(module) in _WIDENED:
            module.__class__ = _WIDENED[type(module)]


class RowTable(nn.Module):
    """An embedding [V, D] or a linear map [O, I] that is read from the disk some rows at a time."""

    def __init__(
        self,
        shape: tuple[int, ...],
        parts: list[Tensor],
        quantization: Quantization | None,
        linear: bool,
    ):
        super().__init__()
        self._shape, self._linear = shape, linear
        self._parts, self._quantization = parts, quantization

    rounding: Quantization | None = None  # as in Widened

    def shape(self) -> tuple[int, ...]:
        return self._shape

    def _rows(self, start: int, stop: int) -> mx.array:
        read = [part.rows(start, stop) for part in self._parts if part.rows]
        if self._quantization is None:
            rows = read[0].astype(mx.float32)
        else:
            rows = unpacked(self._quantization, *read)
        return rows if self.rounding is None else rounded(rows, self.rounding)

    def __call__(self, x: mx.array) -> mx.array:
        if self._linear:
            y = self.as_linear(x)
            return y + self.bias if "bias" in self else y
        numbers: Any = x.flatten().tolist()
        rows = mx.concatenate([self._rows(number, number + 1) for number in numbers])
        return rows.reshape(*x.shape, -1)

    def as_linear(self, x: mx.array) -> mx.array:
        count, width = self._shape
        step = max(ROWS_BYTES // (4 * width), 1)
        parts = []
        for start in range(0, count, step):
            parts.append(product(x, self._rows(start, min(start + step, count))))
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=-1)
