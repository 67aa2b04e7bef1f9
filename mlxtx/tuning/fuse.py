"""Puts an adapter into the weights of its base, and proves that it is still there.

A packed base has few values for each weight, and a small change is rounded away when the sum is
packed again. So the loss of base, base with adapter, and fused model is measured on held-out
text, and a model that lost too much of the improvement is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxtx.checkpoint.quantization import Quantization
from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress
from mlxtx.tuning.adapters import Adapters
from mlxtx.tuning.evaluate import evaluate_samples, held_out
from mlxtx.tuning.lora import _Adapter, dense_weight, plain_layer
from mlxtx.tuning.model_files import save_model
from mlxtx.tuning.samples import Sample, sample
from mlxtx.tuning.targets import adapters_in
from mlxtx.tuning.trees import named, nested

AUTO_BITS = (4, 5, 6, 8)
_FLOATS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
_SENTENCES = (
    "The train left the station at nine and reached the coast before noon.",
    "What is the difference between a list and a tuple in Python?",
    "She opened the window, looked at the rain, and closed it again.",
    "Please write three short sentences about the history of bread.",
)


@dataclass(frozen=True)
class FuseReport:
    """Losses on held-out text. kept: 1 less the distance of the fused model's loss from the
    adapter's, as a part of the adapter's improvement (a lower loss counts as well: it is rounding,
    not learning); where the adapter improved nothing, the same with the divergence of the
    probabilities. logit_difference: the largest between adapter and fused model. bits: of the fused
    layers, None where they are not packed."""

    base_loss: float
    adapter_loss: float
    fused_loss: float
    kept: float
    logit_difference: float
    bits: int | None
    layers: int
    written: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fuse(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    dequantize: bool = False,
    bits: int | str | None = None,
    keep: float = 0.95,
    force: bool = False,
    revision: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> FuseReport:
    """Writes the fused model to ``out`` if it kept at least ``keep`` of the adapter's improvement.

    data: held-out text (as ``held_out`` reads it). dequantize: write all weights unpacked.
    bits: pack the layers of a packed model that had an adapter in so many bits, or "auto" for the
    fewest that keep enough. force: write in any case. Raises MlxtxError with what was lost otherwise.
    """
    from mlxtx.checkpoint import load_model, resolve
    from mlxtx.language_model import LanguageModel
    from mlxtx.text.tokenizer import Tokenizer

    if not 0 <= keep <= 1:
        raise MlxtxError(f"keep must be a part from 0 to 1, not {keep}")
    counts = _bit_counts(bits, dequantize)
    folder = resolve(model, revision, on_event=on_event)
    out = Path(out)
    if out.resolve() in (folder.resolve(), Path(adapter).resolve()):
        raise MlxtxError(f"{out} is where the model or the adapter lies: choose another folder")
    net, config = load_model(folder, unpack=False, on_event=on_event)
    language_model = LanguageModel(net, Tokenizer.load(folder), config, name=str(model))
    samples = _samples(language_model, data)
    adapters = Adapters(net, config)
    name = adapters.load(adapter)
    measured = _Measured(net, adapters, name, samples)
    fusing, stored = adapters_in(net), stored_dtype(folder)
    if counts != (None,) and not any("scales" in adapter.base for adapter in fusing.values()):
        raise MlxtxError(
            f"{model} is not packed, so --bits has no effect: fuse without it, then convert"
        )
    report = None
    for count in counts:
        put_in(net, fusing, stored, bits=count, dequantize=dequantize)
        report = measured.report(fusing)
        if on_event:
            on_event(Progress(stage="fuse", done=1, total=1, details=report.to_json()))
        if report.kept >= keep or force:
            break
    assert report is not None
    if not (report.kept >= keep or force):  # what is no number was not kept
        raise MlxtxError(
            f"the fused model would keep {report.kept:.0%} of what the adapter learned (loss "
            f"{report.base_loss:.4f} without, {report.adapter_loss:.4f} with it, "
            f"{report.fused_loss:.4f} fused), below {keep:.0%}, so nothing was written: use more "
            "bits (--bits 8, --bits auto), --dequantize, or keep the adapter apart"
        )
    if dequantize:
        unpack_all(net)
    as_stored(net, folder, stored)
    save_model(net, config, out, folder)
    return FuseReport(**{**asdict(report), "written": True})


def _bit_counts(bits: int | str | None, dequantize: bool) -> Sequence[int | None]:
    if bits is None or dequantize:
        return (None,)
    if bits == "auto":
        return AUTO_BITS
    try:
        return (Quantization(int(bits), 64).bits,)
    except ValueError:
        raise MlxtxError(f"bits must be a number or 'auto', not {bits!r}") from None


def _samples(language_model: Any, data: str | Path | None) -> list[Sample]:
    if data is not None:
        return held_out(language_model, data)
    return [sample(language_model.tokenizer.encode(text)) for text in _SENTENCES]


class _Measured:
    """What base and adapter say about the held-out text, for comparing fused models with."""

    def __init__(self, net: Any, adapters: Adapters, name: str, samples: Sequence[Sample]):
        self.net, self.samples = net, samples
        self.base_loss = evaluate_samples(net, samples).loss
        self._base = self._log_probabilities()
        adapters.use(name)
        self.adapter_loss = evaluate_samples(net, samples).loss
        self._logits = self._last_logits()
        self._adapter = self._log_probabilities()

    def _tokens(self) -> mx.array:
        return mx.array(self.samples[0].tokens[None, :256])

    def _last_logits(self) -> mx.array:
        logits = self.net(self._tokens()).astype(mx.float32)
        mx.eval(logits)
        return logits

    def _log_probabilities(self) -> mx.array:
        logits = self._last_logits()
        result = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(result)
        return result

    def _divergence(self, other: mx.array) -> float:
        """Mean KL divergence of ``other`` from the model with its adapter."""
        each = (mx.exp(self._adapter) * (self._adapter - other)).sum(axis=-1)
        return float(each.mean())

    def report(self, fusing: Mapping[str, _Adapter]) -> FuseReport:
        fused_loss = evaluate_samples(self.net, self.samples).loss
        improvement = self.base_loss - self.adapter_loss
        if improvement > 1e-3 * self.base_loss:
            kept = 1 - abs(fused_loss - self.adapter_loss) / improvement
        else:
            whole = self._divergence(self._base)
            kept = 1 - self._divergence(self._log_probabilities()) / max(whole, 1e-12)
        modules = dict(self.net.named_modules())
        packed = {modules[p].bits for p in fusing if "scales" in modules[p]}
        return FuseReport(
            base_loss=self.base_loss,
            adapter_loss=self.adapter_loss,
            fused_loss=fused_loss,
            kept=kept,
            logit_difference=float(mx.abs(self._last_logits() - self._logits).max()),
            bits=min(packed) if packed else None,
            layers=len(fusing),
        )


def put_in(
    net: Any,
    fusing: Mapping[str, _Adapter],
    stored: mx.Dtype,
    *,
    bits: int | None = None,
    dequantize: bool = False,
) -> None:
    """Replaces each adapter by one layer that computes the same, packed like its base.

    stored: the type the checkpoint is written in, so that what is measured is what is written.
    bits: in place of the base's own number of bits.
    """
    for path, adapter in fusing.items():
        base = adapter.base
        packed = "scales" in base
        loaded = base.scales.dtype if packed else base.weight.dtype
        layer: nn.Module = plain_layer(base, adapter.fused_weight().astype(stored))
        if packed and not dequantize:
            changed = bits is not None and bits != base.bits
            layer = layer.to_quantized(
                group_size=64 if changed and base.mode != "affine" else base.group_size,
                bits=bits if changed else base.bits,
                mode="affine" if changed else base.mode,
            )
        if mx.issubdtype(loaded, mx.floating):
            layer.set_dtype(loaded)
        mx.eval(layer.parameters())
        net.update_modules(tree_unflatten([(path, layer)]))
    net.eval()


def unpack_all(net: Any) -> None:
    for path, module in list(net.named_modules()):
        if "scales" in module:
            layer = plain_layer(module, dense_weight(module))
            mx.eval(layer.parameters())
            net.update_modules(tree_unflatten([(path, layer)]))


def as_stored(net: Any, folder: Path, stored: mx.Dtype) -> None:
    """Gives all weights the checkpoint's type again, but for those that it keeps in float32."""
    from mlxtx.checkpoint import Checkpoint
    from mlxtx.checkpoint.weights import describe

    kept = {n for n, f in describe(Checkpoint(folder))[1].forms.items() if f.dtype == mx.float32}
    weights = {
        n: a for n, a in named(net.parameters()).items() if mx.issubdtype(a.dtype, mx.floating)
    }
    changed = {n: a.astype(mx.float32 if n in kept else stored) for n, a in weights.items()}
    net.update(nested(changed))


def stored_dtype(folder: Path) -> mx.Dtype:
    """The floating type that most of a checkpoint's bytes have; a CPU may have loaded another."""
    from mlxtx.checkpoint import Checkpoint

    sizes: dict[str, int] = {}
    for info in Checkpoint(folder).tensors.values():
        if info.dtype in _FLOATS:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return _FLOATS[max(sizes, key=sizes.__getitem__)] if sizes else mx.float32
