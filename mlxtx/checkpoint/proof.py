"""The proof of a conversion: source and result run side by side, one layer in memory at a time.

For each layer the result gets the source's own input, so that an error stands where it arises.
Everything is computed in float32 in a fixed order: the same files always give the same figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache import Step
from mlxtx.checkpoint.formats import Tensor
from mlxtx.checkpoint.loading import quantize_modules
from mlxtx.checkpoint.quantization import Quantization
from mlxtx.checkpoint.source import Checkpoint
from mlxtx.checkpoint.weights import WeightPlan, describe
from mlxtx.decoder.model import DecoderModel
from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress
from mlxtx.families.names import Group, split_suffix

# A few short prompts of arbitrary tokens: enough to reach every weight.
PROMPTS, LENGTH = 2, 12
# Rows of an embedding or head that are in memory at a time.
ROWS_BYTES = 8 << 20


@dataclass
class Proof:
    """layers: each block's relative error on its own contribution; logits: largest and mean
    error and the spread of the source's; kl: mean divergence in nats; agree: the share of
    positions with the same most likely token; nbytes: sizes of source and result."""

    layers: list[float] = field(default_factory=list)
    allowed: list[float] = field(default_factory=list)
    logits_max: float = 0.0
    logits_mean: float = 0.0
    spread: float = 0.0
    kl: float = 0.0
    agree: float = 1.0
    nbytes: tuple[int, int] = (0, 0)

    @property
    def exact(self) -> bool:
        return self.logits_max == 0.0

    def lines(self) -> list[str]:
        """The figures for people."""
        before, after = self.nbytes
        size = f"size {after / 1e6:.1f} MB of {before / 1e6:.1f} MB ({after / before:.0%})"
        if self.exact:
            return ["logits equal bit for bit", size]
        worst = max(range(len(self.layers)), key=self.layers.__getitem__)
        return [
            f"logits differ by {self.logits_mean / self.spread:.2%} of their spread on average, "
            f"{self.logits_max / self.spread:.2%} at most",
            f"KL divergence {self.kl:.2e} nats, the same first choice at {self.agree:.0%} of places",
            f"largest error of a layer {self.layers[worst]:.2%} (layer {worst})",
            size,
        ]


def prove(
    source: Path,
    result: Path,
    *,
    on_event: Callable[[Event], None] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
) -> Proof:
    """Compare two checkpoints of one model. prompts: token ids, all of one length.

    Raises MlxtxError when a tensor is missing, left over or of another shape, when numbers are not
    finite, or when a layer differs by more than its bits allow.
    """
    first, second = Streamed(source), Streamed(result)
    tokens = mx.array(prompts) if prompts else _arbitrary(first.model.config.vocabulary)
    step = Step(tokens.shape[1], 0)
    proof = Proof(nbytes=(first.checkpoint.nbytes, second.checkpoint.nbytes))
    started = time.monotonic()
    a, b = first.embed(tokens, step), second.embed(tokens, step)
    _check_finite(b, "embeddings")
    count = len(first.model.layers)
    caches = first.model._uncached(), second.model._uncached()
    local = second.model._uncached()
    for i in range(count):
        after = first.layer(i, a, caches[0], step)
        own = second.layer(i, a, local, step, then=(b, caches[1]))
        theirs, b = own
        _check_finite(b, f"layer {i}")
        error = _relative(theirs - after, after - a)
        allowed = second.allowed(f"model.layers.{i}.", first)
        proof.layers.append(error)
        proof.allowed.append(allowed)
        if error > allowed:
            raise MlxtxError(
                f"layer {i} of the result differs by {error:.1%} from the source's, more than its "
                f"bits allow ({allowed:.1%}); --no-verify writes it all the same"
            )
        a = after
        if on_event:
            seconds = time.monotonic() - started
            on_event(
                Progress(stage="verify", done=i + 1, total=count, unit="layers", seconds=seconds)
            )
    _compare_logits(proof, first.logits(a), second.logits(b))
    return proof


def _arbitrary(vocabulary: int) -> mx.array:
    return mx.random.randint(0, vocabulary, (PROMPTS, LENGTH), key=mx.random.key(7))


def _relative(error: mx.array, of: mx.array) -> float:
    size = mx.sqrt(mx.square(of).sum()).item()
    return mx.sqrt(mx.square(error).sum()).item() / max(size, 1e-30)


def _check_finite(x: mx.array, where: str) -> None:
    if not mx.isfinite(x).all().item():
        raise MlxtxError(f"the result's {where} hold numbers that are not finite")


def _compare_logits(proof: Proof, a: mx.array, b: mx.array) -> None:
    error = mx.abs(a - b)
    log_a, log_b = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (a, b))
    proof.logits_max = error.max().item()
    proof.logits_mean = error.mean().item()
    proof.spread = mx.std(a).item()
    proof.kl = max((mx.exp(log_a) * (log_a - log_b)).sum(axis=-1).mean().item(), 0.0)
    proof.agree = (mx.argmax(a, -1) == mx.argmax(b, -1)).mean().item()
    _check_finite(b, "logits")


def rounding_error(quantization: Quantization) -> float:
    """About how large rounding is beside a weight: for affine bits, the step of a group's range
    (some five deviations of numbers from a bell curve) over the square root of 12."""
    if quantization.mode == "affine":
        return 5.0 / (2**quantization.bits - 1) / math.sqrt(12)
    return {"mxfp8": 0.03, "nvfp4": 0.1, "mxfp4": 0.13}[quantization.mode]


class Streamed:
    """A checkpoint whose blocks are read when they are needed and forgotten after."""

    def __init__(self, folder: Path):
        self.checkpoint = Checkpoint(folder)
        self.model, self.plan = describe(self.checkpoint)
        quantize_modules(self.model, self.plan.quantizations)
        self._groups: dict[str, list[Group]] = {}
        for group in self.plan.groups:
            self._groups.setdefault(_part(group.targets[0]), []).append(group)
        self.table = self._row_table("model.embed_tokens")
        self.head_table = self._row_table("lm_head") or self.table
        for module in self.model.modules():
            if type(module) in _IN_FLOAT32:
                module.__class__ = _IN_FLOAT32[type(module)]
        self.model.eval()

    def _row_table(self, path: str) -> RowTable | None:
        weights = [g for g in self.plan.groups if split_suffix(g.targets[0])[0] == path]
        plain = [group for group in weights if group.targets[0].endswith(".weight")]
        if len(plain) != 1 or len(plain[0].sources) != 1 or plain[0].transform.packed is False:
            return None
        tensor = self.plan.tensors[plain[0].sources[0]]
        tensor = tensor.packing.plain if tensor.packing else tensor
        if tensor.rows is None or tensor.row_step > 1:
            return None
        for group in weights:
            if not group.targets[0].endswith(".bias"):
                self._groups[_part(path + ".weight")].remove(group)
        return RowTable(tensor)

    def fill(self, part: str) -> None:
        fill_part(self.model, self.plan, self._groups.get(part, []))

    def release(self, part: str) -> None:
        modules = dict(self.model.named_modules())
        for group in self._groups.get(part, []):
            for name in group.targets:
                path, _, key = name.rpartition(".")
                old = modules[path][key]
                modules[path][key] = mx.zeros(old.shape, old.dtype)

    def embed(self, tokens: mx.array, step: Step) -> mx.array:
        """Tokens [B, T] -> [B, T, D], of the embedding only the rows that are used."""
        self.fill("")
        decoder = self.model.model
        if self.table is None:
            x = decoder.embed(tokens, step)
        else:
            kept, decoder.embed_tokens = decoder.embed_tokens, self.table
            x = decoder.embed(tokens, step)
            decoder.embed_tokens = kept
        mx.eval(x)
        return x

    def layer(self, index, x, caches, step, then=None):  # type: ignore[no-untyped-def]
        """Block ``index`` on x; with ``then`` (x, caches) on that as well, read once."""
        part = f"model.layers.{index}."
        self.fill(part)
        block = self.model.layers[index]
        y = block(x, caches[index], step)
        result = y if then is None else (y, block(then[0], then[1][index], step))
        mx.eval(result)
        self.release(part)
        return result

    def logits(self, x: mx.array) -> mx.array:
        """The final norm and the head on [B, T, D], the head some rows at a time."""
        decoder, model = self.model.model, self.model
        x = decoder.norm(x)
        if "project_out" in decoder:
            x = decoder.project_out(x)
        if self.head_table is not None:
            head = _RowHead(self.head_table, model)
            if model.config.head.tied:
                kept, decoder.embed_tokens = decoder.embed_tokens, head
                y = model.head(x)
                decoder.embed_tokens = kept
            else:
                kept, model.lm_head = model.lm_head, head
                y = model.head(x)
                model.lm_head = kept
        else:
            y = model.head(x)
        mx.eval(y)
        return y

    def allowed(self, prefix: str, source: Streamed) -> float:
        """How much a block's own contribution may differ: several times the rounding error of
        its coarsest weights, as errors of up to seven projections add up; nothing where nothing
        was rounded."""
        packed = [q for path, q in self.plan.quantizations.items() if path.startswith(prefix)]
        errors = [rounding_error(quantization) for quantization in packed]
        same = {
            path: q for path, q in source.plan.quantizations.items() if path.startswith(prefix)
        } == {path: q for path, q in self.plan.quantizations.items() if path.startswith(prefix)}
        mine = {n: f.dtype for n, f in self.plan.forms.items() if n.startswith(prefix)}
        theirs = {n: f.dtype for n, f in source.plan.forms.items() if n.startswith(prefix)}
        if same and mine == theirs:
            return 0.0
        if mx.float16 in mine.values() or mx.bfloat16 in mine.values():
            errors.append(2**-8)
        return min(6 * max(errors, default=1e-4), 1.2)
