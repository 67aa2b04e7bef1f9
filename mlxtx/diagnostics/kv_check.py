"""What a quantized cache costs in quality, measured on a model and a text of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mlxtx.cache.make import layer_layouts
from mlxtx.cache.settings import parse_kv
from mlxtx.diagnostics.cache_bytes import row_bytes
from mlxtx.errors import MlxtxError
from mlxtx.generation.session import context_limit

LADDER = (
    "k8v8g64",
    "k8v6g64",
    "k8v4g64",
    "k6v4g64",
    "k6v4g64r",
    "k5v4g32r",
    "k4v4g32",
    "k4v4g32r",
    "k3v3g32r",
)
CHUNK = 64  # tokens at a time: logits of all settings are held for that many
SKIPPED = 8  # the first tokens, whose caches hold nothing yet
LARGEST_LOSS = 0.01  # nats of KL divergence a token


@dataclass(frozen=True)
class KVScore:
    """``divergence``: mean KL divergence a token, in nats, of the next token's distribution from
    the one with a plain cache; ``worst``: its 99th percentile; ``agreement``: how often both have
    the same likeliest token; ``bytes_per_token``: of the cache, over all layers."""

    kv: str
    bytes_per_token: int
    divergence: float
    worst: float
    agreement: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_kv(
    model: Any,
    tokens: Sequence[int],
    *,
    ladder: Sequence[str] = LADDER,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[KVScore]:
    """A score of "plain" and of each setting, in the order of ``ladder``. The text is fed once,
    side by side through a plain cache and through one of each setting."""
    tokens = list(tokens)[: context_limit(model.config)]
    if len(tokens) < 4 * SKIPPED:
        raise MlxtxError(f"{len(tokens)} tokens say little; give a text of a page or more (--text)")
    caches = {kv: model.make_cache(kv) for kv in dict.fromkeys(["plain", *ladder])}
    losses: dict[str, list[mx.array]] = {kv: [] for kv in caches}
    agreed: dict[str, list[mx.array]] = {kv: [] for kv in caches}
    for start in range(0, len(tokens), CHUNK):
        piece = mx.array([tokens[start : start + CHUNK]])
        wanted = None
        for kv, cache in caches.items():
            found = _log_probabilities(model(piece, cache, length=len(tokens))[0])
            wanted = found if wanted is None else wanted  # plain comes first
            losses[kv].append((mx.exp(wanted) * (wanted - found)).sum(axis=-1))
            agreed[kv].append(wanted.argmax(axis=-1) == found.argmax(axis=-1))
            mx.eval(losses[kv][-1], agreed[kv][-1], cache.state())
        mx.clear_cache()
        if on_progress:
            on_progress(min(start + CHUNK, len(tokens)), len(tokens))
    return [_score(model, kv, losses[kv], agreed[kv]) for kv in caches]


def _log_probabilities(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _score(model: Any, kv: str, losses: list[mx.array], agreed: list[mx.array]) -> KVScore:
    loss = mx.sort(mx.maximum(mx.concatenate(losses)[SKIPPED:], 0))
    same = mx.concatenate(agreed)[SKIPPED:].astype(mx.float32)
    return KVScore(
        kv=kv,
        bytes_per_token=bytes_per_token(model, kv),
        divergence=float(loss.mean()),
        worst=float(loss[int(0.99 * (loss.size - 1))]),
        agreement=float(same.mean()),
    )


def bytes_per_token(model: Any, kv: str) -> int:
    """Bytes of one token's rows over all layers that have rows of their own."""
    blocks = model.config.blocks
    itemsize = model.model.norm.weight.dtype.size if "weight" in model.model.norm else 4
    return sum(
        row_bytes(block.attention, (layout.key_format, layout.value_format), itemsize)
        for block, layout in zip(blocks, layer_layouts(blocks, parse_kv(kv)), strict=True)
        if getattr(block.attention, "shares_cache_of", None) is None
    )


def smallest_within(scores: Sequence[KVScore], largest_loss: float = LARGEST_LOSS) -> KVScore:
    """The score with the fewest bytes whose mean divergence stays within ``largest_loss``; plain,
    which costs nothing, is always one of them."""
    within = [s for s in scores if s.kv == "plain" or s.divergence <= largest_loss]
    return min(within, key=lambda score: (score.bytes_per_token, score.divergence))


def render(scores: Sequence[KVScore], chosen: KVScore, largest_loss: float) -> str:
    """The scores as a table and the choice as a line."""
    lines = [f"{'cache':<12}{'bytes/token':>12}{'KL':>11}{'99th':>11}{'same top':>10}"]
    lines += [
        f"{s.kv:<12}{s.bytes_per_token:>12,}{s.divergence:>11.5f}{s.worst:>11.5f}"
        f"{100 * s.agreement:>9.1f}%"
        for s in scores
    ]
    lines.append(f"smallest within {largest_loss:g} nats a token: {chosen.kv}")
    return "\n".join(lines)
