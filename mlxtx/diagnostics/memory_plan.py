"""What a model will need, before it is loaded, against what this machine has."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtx.cache.numerics import on_gpu
from mlxtx.cache.settings import KVSettings, kv_from_bits, parse_kv
from mlxtx.diagnostics.cache_bytes import cache_bytes
from mlxtx.diagnostics.facts import ModelFacts, read_facts
from mlxtx.diagnostics.transients import prefill_bytes, training_bytes
from mlxtx.errors import MlxtxError
from mlxtx.generation.loop import PREFILL_CHUNK
from mlxtx.generation.session import context_limit

CHUNKS = (PREFILL_CHUNK, 512, 256, 128, 64)  # tokens of a prompt at a time
SMALLEST_CONTEXT = 256
DEFAULT_CONTEXT = 8192  # planned for when nobody says how long a conversation gets
POOL_SHARE = 16  # the buffer pool may keep this part of the limit
WITHOUT_LORA = ("gate", "embed_q", "unembed_out")  # routers, and heads of latent attention


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of every part, and whether they fit. ``measured``: the transients follow formulas that
    were compared with measurements on this kind of device."""

    model: str
    context: int
    longest: int  # tokens the model was made for
    batch: int
    kv: str
    weights: int
    cache: int
    cache_per_1k: int
    prefill_chunk: int
    prefill: int
    training: int
    limit: int
    largest_context: int
    measured: bool

    @property
    def total(self) -> int:
        return self.weights + (self.training or self.cache + self.prefill)

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "fits": self.fits}


def memory_limit() -> int:
    """Bytes that may be used without swapping: on a Mac the recommended working set of its GPU,
    elsewhere the machine's memory. ``MLXTX_MEMORY_LIMIT`` (bytes) sets another."""
    if given := os.environ.get("MLXTX_MEMORY_LIMIT"):
        try:
            return max(0, int(given))
        except ValueError:
            raise MlxtxError(f"MLXTX_MEMORY_LIMIT is {given!r}; it counts bytes") from None
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return machine_memory()


def machine_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan_memory(
    path_or_repo: str | Path,
    *,
    context: int | None = None,
    kv: str | KVSettings | None = None,
    kv_bits: str | None = None,
    batch: int = 1,
    lora: bool = False,
    rank: int = 8,
    checkpoint: bool = False,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    shortest: int = DEFAULT_CONTEXT,
) -> MemoryPlan:
    """The plan of a folder or Hub id; nothing is loaded, and of a Hub id only headers are read.

    context: tokens of each of ``batch`` sequences; None takes the model's own, ``shortest`` at most. kv:
    the cache's setting (``kv_bits`` "8,4" says the same). lora: a training step of ``batch``
    sequences with adapters of ``rank`` instead of a conversation.
    """
    facts = read_facts(path_or_repo, revision=revision, dtype=dtype)
    settings = kv_from_bits(kv_bits) if kv_bits else _settings(kv, path_or_repo)
    return plan_of(
        facts,
        context=min(context_limit(facts.config), shortest) if context is None else context,
        settings=settings,
        batch=batch,
        lora_rank=rank if lora else None,
        checkpoint=checkpoint,
    )


def _settings(kv: str | KVSettings | None, path_or_repo: str | Path) -> KVSettings:
    if kv == "auto":
        from mlxtx.diagnostics.kv_defaults import default_kv

        return parse_kv(default_kv(path_or_repo))
    return parse_kv(kv)


def plan_of(
    facts: ModelFacts,
    *,
    context: int | None = None,
    settings: KVSettings | None = None,
    batch: int = 1,
    lora_rank: int | None = None,
    checkpoint: bool = False,
    limit: int | None = None,
) -> MemoryPlan:
    """The plan from facts."""
    settings = settings or KVSettings()
    config = facts.config
    longest = context_limit(config)
    if batch < 1:
        raise MlxtxError(f"a batch of {batch} sequences holds nothing; give 1 or more")
    if context is not None and not 0 < context <= longest:
        raise MlxtxError(
            f"{facts.name} was made for {longest} tokens; a context of {context} is "
            + ("no context" if context < 1 else "beyond that")
        )
    context = context or min(longest, DEFAULT_CONTEXT)
    limit = memory_limit() if limit is None else limit
    gpu = on_gpu()

    def transient(chunk: int, context: int = context) -> int:
        return prefill_bytes(
            config,
            batch * chunk,
            context=context,
            itemsize=facts.itemsize,
            unpacked=facts.unpacked,
            gpu=gpu,
        )

    def cache(tokens: int) -> int:
        return cache_bytes(config, settings, tokens, batch=batch, itemsize=facts.itemsize)

    chunks = [chunk for chunk in CHUNKS if chunk < 2 * context] or [CHUNKS[-1]]
    room = limit - facts.weights - cache(context)
    # A chunk may take a quarter of what is left, so that a longer conversation still fits.
    chunk = next((c for c in chunks if transient(c) <= room // 4), chunks[-1])
    training = 0
    if lora_rank is not None:
        training = training_bytes(
            config,
            lora_numbers(facts, lora_rank),
            tokens=batch * context,
            length=context,
            itemsize=facts.itemsize,
            checkpoint=checkpoint,
        )
    return MemoryPlan(
        model=facts.name,
        context=context,
        longest=longest,
        batch=batch,
        kv=str(settings),
        weights=facts.weights,
        cache=cache(context),
        cache_per_1k=_growth(cache),
        prefill_chunk=chunk,
        prefill=transient(min(chunk, context)),
        training=training,
        limit=limit,
        largest_context=_largest_context(facts, cache, transient, limit),
        measured=not gpu and not training,
    )


def lora_numbers(facts: ModelFacts, rank: int) -> int:
    """Numbers of adapters of ``rank`` on every linear map of the blocks."""
    if rank < 1:
        raise MlxtxError(f"rank must be at least 1, not {rank}")
    return sum(
        rank * (shape[-1] + shape[-2]) * (shape[0] if len(shape) == 3 else 1)
        for path, shape in facts.shapes.items()
        if path.startswith("model.layers.") and path.rpartition(".")[2] not in WITHOUT_LORA
    )


def _growth(cache: Any) -> int:
    """Bytes that 1024 further tokens take, once no window is still filling."""
    return cache(1 << 20) - cache((1 << 20) - 1024)


def _largest_context(facts: ModelFacts, cache: Any, transient: Any, limit: int) -> int:
    """The longest context that fits with the smallest chunk of a prompt, 0 if none does."""
    longest = context_limit(facts.config)
    room = limit - facts.weights - transient(CHUNKS[-1], longest)
    low, high = 0, longest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cache(middle) <= room else (low, middle - 1)
    return low


def check_plan(plan: MemoryPlan, *, force: bool = False) -> None:
    """Raises MlxtxError with numbers and ways to make it fit, unless it fits or ``force``."""
    if plan.fits or force:
        return
    what = "training" if plan.training else "cache and prompt"
    rest = plan.total - plan.weights
    raise MlxtxError(
        f"{plan.model} needs about {size_text(plan.total)} ({size_text(plan.weights)} weights, {size_text(rest)} "
        f"{what}) and this machine has {size_text(plan.limit)}: {'; or '.join(_ways(plan))}; "
        "--force tries it anyway"
    )


def _ways(plan: MemoryPlan) -> list[str]:
    """Two or three things that make the plan smaller, the most likely to help first."""
    if plan.weights > plan.limit:
        return ["take a smaller model", "pack its weights into fewer bits (mlxtx convert)"]
    if plan.training:
        return [
            "train shorter samples or a smaller batch",
            "checkpoint activations",
            "start from packed weights (mlxtx convert)",
        ]
    ways = []
    if plan.largest_context >= SMALLEST_CONTEXT and plan.largest_context < plan.context:
        ways.append(
            f"a context of {plan.largest_context} tokens fits (--context of chat and generate)"
        )
    if plan.kv == "plain":
        ways.append("quantize the cache (--kv k8v4g64 of chat and generate)")
    if plan.batch > 1:
        ways.append("fewer sequences at once (--batch)")
    ways.append("pack the weights into fewer bits (mlxtx convert)")
    return ways[:3]


def bound_buffer_pool(limit: int | None = None) -> int:
    """Keeps MLX from holding on to freed buffers beyond a part of the limit; returns the bytes."""
    pool = (memory_limit() if limit is None else limit) // POOL_SHARE
    mx.set_cache_limit(pool)
    return pool


def render(plan: MemoryPlan) -> str:
    """The plan as lines of text."""
    lines = [
        ("weights", plan.weights, ""),
        ("cache", plan.cache, f"{plan.kv}, {plan.context} tokens x {plan.batch}"),
        ("  per 1K tokens", plan.cache_per_1k, ""),
        ("prompt", plan.prefill, f"for a moment, {plan.prefill_chunk} tokens at a time"),
    ]
    if plan.training:
        lines = [lines[0], ("training", plan.training, f"{plan.context} tokens x {plan.batch}")]
    lines += [("total", plan.total, ""), ("this machine", plan.limit, "")]
    text = [plan.model]
    text += [f"  {name:<16}{size_text(size):>10}  {note}".rstrip() for name, size, note in lines]
    verdict = "fits" if plan.fits else "does not fit: " + "; or ".join(_ways(plan))
    text.append(f"  {verdict}")
    if not plan.training:
        text.append(f"  largest context that fits: {plan.largest_context} of {plan.longest}")
    if not plan.measured:
        text.append("  what a pass holds for a moment is counted here, not measured")
    return "\n".join(text)


def size_text(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
