"""Low-rank adapters around linear maps, embeddings and stacks of experts.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + scale B A x.
DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): y = m / |W + scale B A| (W x + scale B A x),
the norm taken over each row and held constant in the backward pass.
The base W may be packed in any number of bits; it is never unpacked as a whole for a step.

``lora_a`` is [in, rank] and ``lora_b`` [rank, out]; for experts [E, rank, in] and [E, out, rank].
They may be float32 under a half-precision base: each step uses them in the input's type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxtx.decoder.experts import ExpertLinear, QuantizedExpertLinear
from mlxtx.errors import MlxtxError

LEAVES = ("lora_a", "lora_b", "m")  # an adapter's own weights
_LEAST = 1e-24  # of a row's squares: rows of zeros stay zeros


@dataclass(frozen=True)
class LowRank:
    """Rank, scale of the product, dropout of the adapter's input, and the type of its weights."""

    rank: int = 8
    scale: float = 2.0
    dropout: float = 0.0
    dora: bool = False
    dtype: mx.Dtype = mx.float32


def dense_weight(layer: nn.Module) -> mx.array:
    """The layer's weight [..., out, in], unpacked if it is packed."""
    if "scales" not in layer:
        return layer.weight
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        layer.group_size,
        layer.bits,
        mode=layer.mode,
    )


def input_width(layer: nn.Module) -> int:
    width = layer.weight.shape[-1]
    return width * 32 // layer.bits if "scales" in layer else width


def _uniform(shape: tuple[int, ...], width: int, how: LowRank, key: mx.array) -> mx.array:
    bound = 1 / math.sqrt(width)
    return mx.random.uniform(-bound, bound, shape, key=key).astype(how.dtype)


class _Adapter(nn.Module):
    """What all adapters share: the frozen base, and dropout in front of ``lora_a``."""

    base_name = "linear"

    def __init__(self, base: nn.Module, how: LowRank):
        super().__init__()
        self[self.base_name] = base
        self.dropout = nn.Dropout(how.dropout)
        self._how = how

    @property
    def base(self) -> nn.Module:
        return self[self.base_name]

    @property
    def how(self) -> LowRank:
        return self._how

    def trained(self) -> dict[str, mx.array]:
        """The adapter's own weights."""
        return {name: self[name] for name in LEAVES if name in self}

    def freeze_base(self) -> None:
        self.freeze()
        self.unfreeze(recurse=False, keys=list(LEAVES))

    def fused_weight(self) -> mx.array:
        """The base's weight with the adapter inside, float32."""
        raise NotImplementedError


class LoRALinear(_Adapter):
    def __init__(self, base: nn.Module, how: LowRank, key: mx.array):
        super().__init__(base, how)
        inputs, outputs = input_width(base), base.weight.shape[0]
        self.lora_a = _uniform((inputs, how.rank), inputs, how, key)
        self.lora_b = mx.zeros((how.rank, outputs), how.dtype)
        self.freeze_base()

    def add_to(self, y: mx.array, x: mx.array) -> mx.array:
        """y + scale B A x. The scale goes to the narrow product, and the sum to the wide one, so
        that no pass over y is needed for them."""
        narrow = self._how.scale * (self.dropout(x) @ self.lora_a.astype(x.dtype))
        return mx.addmm(y, narrow.astype(y.dtype), self.lora_b.astype(y.dtype))

    def __call__(self, x: mx.array) -> mx.array:
        return self.add_to(self.linear(x), x)

    def fused_weight(self) -> mx.array:
        delta = self.lora_a.astype(mx.float32) @ self.lora_b.astype(mx.float32)
        return dense_weight(self.base).astype(mx.float32) + self._how.scale * delta.T


class _DoRA(_Adapter):
    """A magnitude ``m`` for each row of the weight, in front of the adapter without one."""

    def __init__(self, base: nn.Module, how: LowRank, key: mx.array):
        super().__init__(base, how, key)  # type: ignore[call-arg]
        self._squares = mx.square(dense_weight(base).astype(mx.float32)).sum(axis=-1)
        mx.eval(self._squares)
        self.m = mx.sqrt(self._squares)
        self.freeze_base()

    def _ratio(self, cross: mx.array, square: mx.array) -> mx.array:
        """m / |w + scale BA| of each row, where that sum is never made: the norm is the root of
        |w|^2 + 2 scale ``cross`` + scale^2 ``square``, cross = w.(BA), square = |BA|^2."""
        scale = self._how.scale
        squares = self._squares + 2 * scale * cross + scale * scale * square
        norms = mx.sqrt(mx.maximum(squares, _LEAST))
        return self.m / mx.stop_gradient(norms)

    def fused_weight(self) -> mx.array:
        weight = super().fused_weight()
        norms = mx.sqrt(mx.maximum(mx.square(weight).sum(axis=-1), _LEAST))
        return (self.m.astype(mx.float32) / norms)[..., None] * weight


class DoRALinear(_DoRA, LoRALinear):
    def _without_bias(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        return y - self.linear.bias if "bias" in self.linear else y

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        cross = (self._without_bias(a.T).astype(mx.float32) * b).sum(axis=0)
        ratio = self._ratio(cross, (((a.T @ a) @ b) * b).sum(axis=0))  # [out]
        y = ratio.astype(x.dtype) * self.add_to(self._without_bias(x), x)
        return y + self.linear.bias if "bias" in self.linear else y


class LoRAEmbedding(_Adapter):
    """``lora_a`` [V, rank], ``lora_b`` [rank, D]."""

    base_name = "embedding"

    def __init__(self, base: nn.Module, how: LowRank, key: mx.array):
        super().__init__(base, how)
        rows, width = base.weight.shape[0], input_width(base)
        self.lora_a = _uniform((rows, how.rank), rows, how, key)
        self.lora_b = mx.zeros((how.rank, width), how.dtype)
        self.freeze_base()

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.embedding(tokens)
        z = self.dropout(self.lora_a[tokens] @ self.lora_b)
        return y + (self._how.scale * z).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        z = (self.dropout(x) @ b.T) @ a.T
        return y + (self._how.scale * z).astype(y.dtype)

    def fused_weight(self) -> mx.array:
        delta = self.lora_a.astype(mx.float32) @ self.lora_b.astype(mx.float32)
        return dense_weight(self.base).astype(mx.float32) + self._how.scale * delta


class LoRAExperts(_Adapter):
    """An adapter of its own for each expert."""

    def __init__(self, base: nn.Module, how: LowRank, key: mx.array):
        super().__init__(base, how)
        (experts, outputs), inputs = base.weight.shape[:2], input_width(base)
        self.lora_a = _uniform((experts, how.rank, inputs), inputs, how, key)
        self.lora_b = mx.zeros((experts, outputs, how.rank), how.dtype)
        self.freeze_base()

    def __call__(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        return self.add_to(self.linear(x, chosen, ordered), x, chosen, ordered)

    def add_to(self, y: mx.array, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        z = self.dropout(x)
        for weight in (self.lora_a, self.lora_b):
            turned = weight.astype(x.dtype).swapaxes(-1, -2)
            z = mx.gather_mm(z, turned, rhs_indices=chosen, sorted_indices=ordered)
        return y + (self._how.scale * z).astype(y.dtype)

    def fused_weight(self) -> mx.array:
        delta = self.lora_b.astype(mx.float32) @ self.lora_a.astype(mx.float32)
        return dense_weight(self.base).astype(mx.float32) + self._how.scale * delta


class DoRAExperts(_DoRA, LoRAExperts):
    def __call__(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        every = mx.broadcast_to(mx.arange(len(a))[:, None], a.shape[:2])  # [E, rank]
        wa = self.linear.product(a[:, :, None], every, True).squeeze(-2)  # [E, rank, out]
        cross = (wa.astype(mx.float32).swapaxes(-1, -2) * b).sum(axis=-1)
        ratio = self._ratio(cross, ((b @ (a @ a.swapaxes(-1, -2))) * b).sum(axis=-1))  # [E, out]
        y = self.add_to(self.linear.product(x, chosen, ordered), x, chosen, ordered)
        y = ratio.astype(x.dtype)[chosen][..., None, :] * y
        return y + self.linear.bias[chosen][..., None, :] if "bias" in self.linear else y


LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
EXPERTS = (ExpertLinear, QuantizedExpertLinear)


def adapter_for(base: nn.Module, how: LowRank, key: mx.array) -> _Adapter:
    """The adapter for a layer. DoRA is for linear maps and experts."""
    if isinstance(base, LINEAR):
        return (DoRALinear if how.dora else LoRALinear)(base, how, key)
    if isinstance(base, EXPERTS):
        return (DoRAExperts if how.dora else LoRAExperts)(base, how, key)
    if how.dora:
        raise MlxtxError(
            "DoRA is not for embeddings: leave them out of the targets, use another method, or"
            " train them as they are (whole)"
        )
    return LoRAEmbedding(base, how, key)


def plain_layer(like: nn.Module, weight: mx.array) -> nn.Module:
    """An unpacked layer of the kind of ``like`` with this weight and the same bias."""
    if isinstance(like, EXPERTS):
        layer: nn.Module = ExpertLinear(1, 1, 1, False)
    elif isinstance(like, EMBEDDING):
        layer = nn.Embedding(1, 1)
    else:
        layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight
    if "bias" in like:
        layer.bias = like.bias
    return layer
