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

from mlxtx.cache import Step
from mlxtx.checkpoint.quantization import Quantization
from mlxtx.checkpoint.streaming import StreamedModel
from mlxtx.decoder.config import ExpertsConfig
from mlxtx.decoder.model import uncached
from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress

# A few short prompts of arbitrary tokens: enough to reach every weight.
PROMPTS, LENGTH = 2, 8
# A block that differs by more than this from the source's has nothing to do with it.
MOST = 1.2


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
    repacked: bool = False,
) -> Proof:
    """Compare two checkpoints of one model. prompts: token ids, all of one length. repacked: what
    was packed was packed anew, and so rounded even where the bits are the same.

    Raises MlxtxError when a tensor is missing, left over or of another shape, when numbers are not
    finite, or when a layer differs by more than its bits allow.
    """
    first, second = StreamedModel(source), StreamedModel(result)
    blocks = first.config.blocks
    tokens = (
        mx.array([list(prompt) for prompt in prompts])
        if prompts
        else _arbitrary(first.config.vocabulary)
    )
    step = Step(tokens.shape[1], 0)
    proof = Proof(nbytes=(first.checkpoint.nbytes, second.checkpoint.nbytes))
    started = time.monotonic()
    # a runs through the source and b through the result; each block of the result also gets a.
    a, b = first.embed(tokens, step), second.embed(tokens, step)
    _check_finite(b, "embeddings")
    caches, own, local = uncached(blocks), uncached(blocks), uncached(blocks)
    for i in range(len(blocks)):
        (after,) = first.block(i, [(a, caches[i], first.own(i))], step)
        both = [(a, local[i], first.own(i)), (b, own[i], second.own(i))]
        theirs, b = second.block(i, both, step)
        _check_finite(b, f"layer {i}")
        error, allowed = _relative(theirs - after, after - a), _allowed(first, second, i, repacked)
        if error > allowed:
            raise MlxtxError(
                f"layer {i} of the result differs by {error:.1%} from the source's, more than its "
                f"bits allow ({allowed:.1%}); --no-verify writes it all the same"
            )
        proof.layers.append(error)
        proof.allowed.append(allowed)
        a = after
        if on_event:
            seconds = time.monotonic() - started
            on_event(
                Progress(
                    stage="verify", done=i + 1, total=len(blocks), unit="layers", seconds=seconds
                )
            )
    _compare_logits(proof, first.logits(a), second.logits(b))
    return proof


def _allowed(
    source: StreamedModel, result: StreamedModel, layer: int, repacked: bool = False
) -> float:
    """How much a block's own contribution may differ: several times the rounding error of its
    coarsest weights, as the errors of up to seven projections add up; nothing where nothing was
    rounded. A router that meets rounded states may choose another expert, rightly."""
    before, after = source.stored(layer), result.stored(layer)
    errors = [rounding_error(form) for form in after if isinstance(form, Quantization)]
    if before == after and not (repacked and errors):
        return 0.0
    if not {mx.bfloat16, mx.float16}.isdisjoint(after):
        errors.append(2**-8)
    if errors and isinstance(source.config.blocks[layer].feed_forward, ExpertsConfig):
        return MOST
    return min(6 * max(errors, default=1e-4), MOST)


def _arbitrary(vocabulary: int) -> mx.array:
    return mx.random.randint(0, vocabulary, (PROMPTS, LENGTH), key=mx.random.key(7))


def _number(x: mx.array) -> float:
    return float(x.item())  # type: ignore[arg-type]


def _relative(error: mx.array, of: mx.array) -> float:
    size = _number(mx.sqrt(mx.square(of).sum()))
    return _number(mx.sqrt(mx.square(error).sum())) / max(size, 1e-30)


def _check_finite(x: mx.array, where: str) -> None:
    if not mx.isfinite(x).all().item():
        raise MlxtxError(f"the result's {where} hold numbers that are not finite")


def _compare_logits(proof: Proof, a: mx.array, b: mx.array) -> None:
    _check_finite(b, "logits")
    error = mx.abs(a - b)
    log_a, log_b = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (a, b))
    proof.logits_max = _number(error.max())
    proof.logits_mean = _number(error.mean())
    proof.spread = _number(mx.std(a))
    proof.kl = max(_number((mx.exp(log_a) * (log_a - log_b)).sum(axis=-1).mean()), 0.0)
    proof.agree = _number((mx.argmax(a, -1) == mx.argmax(b, -1)).mean())


def rounding_error(quantization: Quantization) -> float:
    """About how large rounding is beside a weight: for affine bits, the step of a group's range
    (some five deviations of numbers from a bell curve) over the square root of 12."""
    if quantization.mode == "affine":
        return 5.0 / (2**quantization.bits - 1) / math.sqrt(12)
    return {"mxfp8": 0.03, "nvfp4": 0.1, "mxfp4": 0.13}[quantization.mode]
