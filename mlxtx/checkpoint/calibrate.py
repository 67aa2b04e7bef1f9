"""Bits for each module from what its rounding does to a text, measured.

Block after block, with the text's own states: each module alone is rounded to each number of bits,
and the error this leaves on the residual stream is noted, relative to the stream. To first order
these errors add up, so bits go where they take away most error a byte, until the mean number of
bits is reached. One block is in memory at a time.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxtx.cache import Step
from mlxtx.checkpoint.quantization import MODES, Quantization
from mlxtx.checkpoint.recipes import NEVER_PACKED, Recipe
from mlxtx.checkpoint.source import Checkpoint
from mlxtx.checkpoint.streaming import RowTable, StreamedModel, Widened
from mlxtx.decoder.model import uncached
from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress

BITS = tuple(sorted(MODES["affine"][0]))
# The text is cut into rows of this many tokens, and this many rows are used.
LENGTH, ROWS = 128, 8


@dataclass
class Sensitivity:
    """One module: its numbers, and for each packing the squared error it leaves on the residual
    stream, relative to the stream. others: modules that are written, and so packed, with it."""

    path: str
    size: int
    errors: dict[Quantization, float] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Calibration:
    """recipe: the choice; figures: quality on another part of the text of the source, of the
    largest uniform packing that is no larger than the choice, and of the choice."""

    recipe: Recipe
    uniform: Recipe
    figures: dict[str, Quality]

    def lines(self) -> list[str]:
        return [
            f"{name}: perplexity {q.perplexity:.4g}, KL divergence {q.kl:.2e} nats"
            for name, q in self.figures.items()
        ]


def calibrate(
    checkpoint: Checkpoint,
    text: Path,
    target_bpw: float,
    group_size: int = 64,
    *,
    scale_bits: int = 16,
    together: Iterable[list[str]] = (),
    on_event: Callable[[Event], None] | None = None,
) -> Calibration:
    """The recipe that ``target_bpw`` bits a weight (scales included) buy the least error with,
    measured on one part of a text file and judged on another. together: modules whose weights are
    written as one."""
    uniform = Recipe(largest_uniform(target_bpw, group_size, scale_bits))
    rows = _tokens(checkpoint.folder, text)
    train, test = rows[::2], rows[1::2]
    found = measure(checkpoint.folder, mx.array(train), group_size, on_event)
    recipe = choose(merged(found, together), target_bpw, group_size, scale_bits)
    figures = quality(checkpoint.folder, mx.array(test), [None, uniform, recipe])
    names = ("source", f"all modules at {uniform.default}", recipe.describe())
    return Calibration(recipe, uniform, dict(zip(names, figures, strict=True)))


def merged(found: list[Sensitivity], together: Iterable[list[str]]) -> list[Sensitivity]:
    """Modules that are written as one can only be packed as one: to first order errors add up."""
    left = {module.path: module for module in found}
    for paths in together:
        parts = [left[path] for path in dict.fromkeys(paths) if path in left]
        for other in parts[1:]:
            first = parts[0]
            first.others.append(left.pop(other.path).path)
            first.size += other.size
            first.errors = {how: e + other.errors[how] for how, e in first.errors.items()}
    return list(left.values())


def largest_uniform(target_bpw: float, group_size: int, scale_bits: int = 16) -> Quantization:
    """The most bits that all modules can have alike."""
    levels = [Quantization(bits, group_size) for bits in BITS]
    low, high = (levels[at].bits_per_weight(scale_bits) for at in (0, -1))
    if not low <= target_bpw <= high:
        raise MlxtxError(
            f"--target-bpw {target_bpw:g} is out of reach: with groups of {group_size} it can be "
            f"{low:g} to {high:g} (scales included)"
        )
    return [how for how in levels if how.bits_per_weight(scale_bits) <= target_bpw][-1]


def choose(
    found: list[Sensitivity], target_bpw: float, group_size: int, scale_bits: int = 16
) -> Recipe:
    """Start everywhere with the fewest bits; then always take the step that removes the most error
    for its size, as long as it fits. What was not measured gets what all could have alike."""
    default = largest_uniform(target_bpw, group_size, scale_bits)
    total = sum(module.size for module in found)
    levels = [Quantization(bits, group_size) for bits in BITS]
    width = [how.bits_per_weight(scale_bits) for how in levels]
    budget = target_bpw * total - width[0] * total
    level = dict.fromkeys(range(len(found)), 0)

    def best_step(index: int) -> tuple[float, int, int] | None:
        """(minus the error removed a bit, module, level): a step may skip levels of no use."""
        module, now = found[index], level[index]
        steps = []
        for new in range(now + 1, len(levels)):
            gain = module.errors[levels[now]] - module.errors[levels[new]]
            cost = (width[new] - width[now]) * module.size
            steps.append((-gain / cost, index, new))
        return min(steps, default=None)

    queue = [step for index in level if (step := best_step(index))]
    heapq.heapify(queue)
    while queue:
        _, index, new = heapq.heappop(queue)
        extra = width[new] - width[level[index]]
        if extra * found[index].size > budget:
            # Too large a step: perhaps a smaller one of the same module still fits.
            new = level[index] + 1
            extra = width[new] - width[level[index]]
            if extra * found[index].size > budget:
                continue
        budget -= extra * found[index].size
        level[index] = new
        if step := best_step(index):
            heapq.heappush(queue, step)
    rules = [
        (path, levels[at])
        for i, at in level.items()
        for path in (found[i].path, *found[i].others)
        if levels[at] != default
    ]
    return Recipe(default, rules, f"calibrated to {target_bpw:g} bits a weight")


def measure(
    folder: Path,
    tokens: mx.array,
    group_size: int = 64,
    on_event: Callable[[Event], None] | None = None,
) -> list[Sensitivity]:
    """The sensitivity of every module that can be packed, from token ids [B, T]."""
    model = StreamedModel(folder)
    step = Step(tokens.shape[1], 0)
    blocks = model.config.blocks
    levels = [Quantization(bits, group_size) for bits in BITS]
    started = time.monotonic()
    embedding = {"model.embed_tokens": model.model.model.embed_tokens}
    found = list(_each(embedding, levels, lambda: model.embed(tokens, step)))
    x, caches = model.embed(tokens, step), uncached(blocks)
    for i in range(len(blocks)):
        with model.held(i) as block:
            modules = {f"model.layers.{i}.{name}": m for name, m in block.named_modules()}
            run = partial(block, x, caches[i], step, model.own(i))
            found += _each(modules, levels, run)
            x = run()
            mx.eval(x)
        if on_event:
            seconds = time.monotonic() - started
            on_event(
                Progress(
                    stage="calibrate", done=i + 1, total=len(blocks), unit="layers", seconds=seconds
                )
            )
    if not model.config.head.tied:
        found += _each({"lm_head": model.model.lm_head}, levels, partial(model.logits, x))
    return found


@dataclass(frozen=True)
class Quality:
    """Perplexity on a text, and the divergence of its predictions from the source's in nats."""

    perplexity: float
    kl: float


def quality(folder: Path, tokens: mx.array, recipes: list[Recipe | None]) -> list[Quality]:
    """What each recipe would make of a text [B, T] (None: nothing is packed). Nothing is written:
    weights are rounded where they are used."""
    model = StreamedModel(folder)
    step = Step(tokens.shape[1], 0)
    exact = _log_probabilities(model, tokens, step, None)
    found = []
    for recipe in recipes:
        own = exact if recipe is None else _log_probabilities(model, tokens, step, recipe)
        picked = mx.take_along_axis(own[:, :-1], tokens[:, 1:, None], axis=-1)
        kl = (mx.exp(exact) * (exact - own)).sum(axis=-1).mean()
        found.append(Quality(math.exp(-_number(picked.mean())), max(_number(kl), 0.0)))
    return found


def _log_probabilities(
    model: StreamedModel, tokens: mx.array, step: Step, recipe: Recipe | None
) -> mx.array:
    """[B, T, V] with every module rounded as the recipe says."""
    modules = {path: m for path, m in model.model.named_modules() if _can_round(m)}
    for path, module in modules.items():
        how = recipe(path) if recipe and not path.endswith(NEVER_PACKED) else None
        module.rounding = how if how and how.fits(module.shape()) else None
    blocks = model.config.blocks
    x, caches = model.embed(tokens, step), uncached(blocks)
    for i in range(len(blocks)):
        (x,) = model.block(i, [(x, caches[i], model.own(i))], step)
    logits = model.logits(x)
    for module in modules.values():
        module.rounding = None
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _number(x: mx.array) -> float:
    return float(x.item())  # type: ignore[arg-type]


def _can_round(module: nn.Module) -> bool:
    return isinstance(module, RowTable | Widened)


def _each(
    modules: Mapping[str, nn.Module], levels: list[Quantization], run: Callable[[], mx.array]
) -> Iterator[Sensitivity]:
    """Round one module after the other and look at what comes out."""
    exact = run()
    mx.eval(exact)
    power = mx.square(exact).sum()
    for path, module in modules.items():
        if not _can_round(module) or path.endswith(NEVER_PACKED):
            continue
        if not all(level.fits(module.shape()) for level in levels):
            continue
        sensitivity = Sensitivity(path, math.prod(module.shape()))
        for level in levels:
            module.rounding = level
            sensitivity.errors[level] = _number(mx.square(run() - exact).sum() / power)
        module.rounding = None
        yield sensitivity


def _tokens(folder: Path, text: Path) -> list[list[int]]:
    """Rows of token ids, spread over the whole text."""
    from mlxtx.text.tokenizer import Tokenizer

    try:
        content = text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxtxError(f"cannot read the text {text}: {error}") from None
    ids = Tokenizer.load(folder).encode(content)
    if len(ids) < LENGTH:
        raise MlxtxError(f"{text} has {len(ids)} tokens; calibration needs at least {LENGTH}")
    length = min(LENGTH, len(ids) // 2)  # two rows at least: the choice is judged on others
    count = min(ROWS, len(ids) // length)
    stride = (len(ids) - length) // (count - 1)
    return [ids[row * stride : row * stride + length] for row in range(count)]
