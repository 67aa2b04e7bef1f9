"""How much memory a training step will need, before it is tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxtx.decoder.config import BlockConfig, ExpertsConfig
from mlxtx.diagnostics.memory_plan import memory_limit
from mlxtx.errors import MlxtxError
from mlxtx.tuning.head_loss import chunk_rows
from mlxtx.tuning.packing import bucket
from mlxtx.tuning.trees import named

# Arrays of optimizer state for each trained weight.
_SLOTS = {"adamw": 2, "adam": 2, "lion": 1, "muon": 1, "sgd": 0, "adafactor": 0.1}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part at the fullest moment of a step, and what the machine has."""

    weights: int
    trained: int  # gradients, optimizer state and float32 copies, and their new values
    activations: int
    logits: int
    available: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations + self.logits

    @property
    def fits(self) -> bool:
        return self.total <= self.available


def plan_memory(
    model: Any,
    lengths: list[int],
    *,
    optimizer: str = "adamw",
    checkpoint: bool = False,
    batch_size: int = 4,
    master: bool = True,
) -> MemoryPlan:
    """The plan for a batch of the longest samples (``lengths`` in tokens)."""
    config = model.config
    worst = [bucket(n) for n in sorted(lengths, reverse=True)[:batch_size]]
    everything = sum(a.nbytes for a in named(model.parameters()).values())
    trained = named(model.trainable_parameters())
    size = 4 if _dtype(model) == mx.float32 else 2
    blocks = [_block_bytes(block, config.width, worst, size) for block in config.blocks]
    stream = sum(worst) * config.width * size
    if checkpoint:
        activations = max(blocks) + stream * (len(blocks) + 4)
    else:
        activations = sum(blocks) + 4 * stream
    rows = min(sum(worst), chunk_rows(config.vocabulary))
    logits = 4 * rows * config.vocabulary * 4
    head = max(
        (a.nbytes for n, a in trained.items() if "embed_tokens" in n or "head" in n), default=0
    )
    logits += 2 * head
    return MemoryPlan(
        weights=everything,
        trained=int(sum(_trained_bytes(a, _SLOTS[optimizer], master) for a in trained.values())),
        activations=activations,
        logits=logits,
        available=memory_limit(),
    )


def _trained_bytes(weight: mx.array, slots: float, master: bool) -> float:
    """A gradient and a new weight; the optimizer's arrays, old and new, which are float32 beside a
    float32 copy of a weight in half precision."""
    half = master and weight.dtype in (mx.float16, mx.bfloat16)
    return 2 * weight.nbytes + (
        8 * (slots + 1) * weight.size if half else 2 * slots * weight.nbytes
    )


def _dtype(model: Any) -> mx.Dtype:
    """The type activations have: that of the last norm, which is never packed."""
    arrays = named(model.parameters())
    return arrays.get("model.norm.weight", next(iter(arrays.values()))).dtype


def _block_bytes(block: BlockConfig, width: int, lengths: list[int], size: int) -> int:
    """What one block keeps for its backward pass: inputs and outputs of its maps, and the
    attention weights, which are kept whole (in float32 where they are soft-capped)."""
    attention, feed_forward = block.attention, block.feed_forward
    heads = attention.heads
    head_dim = getattr(attention, "head_dim", 0) or (
        getattr(attention, "nope_dim", 0) + getattr(attention, "rope_dim", 0)
    )
    tokens = sum(lengths)
    channels = 6 * width + 8 * heads * head_dim
    if isinstance(feed_forward, ExpertsConfig):
        inner = feed_forward.expert.width * feed_forward.per_token
        channels += 2 * width * feed_forward.per_token
        inner += feed_forward.shared.width if feed_forward.shared else 0
    else:
        inner = feed_forward.width
    channels += 5 * inner
    scores = 2 * heads * sum(n * n for n in lengths)
    return (tokens * channels + scores) * size


def check_memory(plan: MemoryPlan, *, force: bool = False) -> None:
    """Raises MlxtxError with what to change, unless the plan fits or ``force``."""
    if plan.fits or force:
        return
    parts = ", ".join(
        f"{name} {getattr(plan, name) / 1e9:.1f}"
        for name in ("weights", "trained", "activations", "logits")
    )
    raise MlxtxError(
        f"a step would need about {plan.total / 1e9:.1f} GB ({parts}) of {plan.available / 1e9:.1f} GB: "
        "use a smaller batch_size with accumulate, a smaller max_length, checkpoint, or a packed base; "
        "--force tries it anyway"
    )
