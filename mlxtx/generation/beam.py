"""Beam search: the likeliest whole answers instead of the likeliest next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxtx.generation.loop import PREFILL_CHUNK, broken, check_finite, feed_newest, fill

if TYPE_CHECKING:
    from mlxtx.cache import ModelCache
    from mlxtx.decoder.model import DecoderModel


@dataclass(frozen=True)
class Beam:
    """``tokens`` with their summed log-probability and the score it is ranked by."""

    tokens: tuple[int, ...]
    logprob: float
    score: float


@dataclass
class _Open:
    """A beam that goes on, with its own cache."""

    tokens: tuple[int, ...]
    logprob: float
    cache: ModelCache
    logprobs: np.ndarray  # [V], of the next token


def beam_search(
    model: DecoderModel,
    prompt: Sequence[int],
    *,
    beams: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    ends: Set[int] = frozenset(),
    kv: str | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int], None] = lambda cache_bytes: None,
) -> list[Beam]:
    """Up to ``beams`` answers, best first, ranked by logprob / tokens ** length_penalty.

    At each step the ``beams`` likeliest continuations stay open; those among them that end with
    an end token are set aside. The search stops when ``beams`` are done and the likeliest open one,
    ranked as if it ended now, is no better than the worst of them (the rule of transformers with
    ``early_stopping=False``; with one beam it is greedy decoding). Every beam has a copy of the
    cache, whose rows are shared until they change, and is fed by itself: any cache will do.
    ``on_step`` hears of every token chosen, with the bytes of all beams' caches.
    """
    cache = model.make_cache(kv=kv)
    first = fill(model, [prompt], cache, chunk=prefill_chunk, should_stop=should_stop)
    if first is None:
        return []
    open_beams = [_Open((), 0.0, cache, _log_softmax(first))]
    done: list[Beam] = []

    def closed(tokens: tuple[int, ...], logprob: float) -> Beam:
        return Beam(tokens, logprob, logprob / len(tokens) ** length_penalty)

    for length in range(1, max_tokens + 1):
        if should_stop():
            break
        on_step(sum(beam.cache.nbytes for beam in open_beams))
        # Each open beam has at most as many ending continuations as there are end tokens.
        candidates = _best_continuations(open_beams, beams * (1 + max(1, len(ends))))
        final = length == max_tokens
        for rank, (tokens, logprob, _) in enumerate(candidates):
            if rank < beams and (final or tokens[-1] in ends):
                done.append(closed(tokens, logprob))
        done = sorted(done, key=lambda beam: -beam.score)[:beams]
        going_on = [candidate for candidate in candidates if candidate[0][-1] not in ends][:beams]
        if final or not going_on:
            return done
        if len(done) == beams and closed(*going_on[0][:2]).score <= done[-1].score:
            return done
        open_beams = _advance(model, prompt, open_beams, going_on, prefill_chunk)
    done += [closed(beam.tokens, beam.logprob) for beam in open_beams if beam.tokens]
    return sorted(done, key=lambda beam: -beam.score)[:beams]


_Candidate = tuple[tuple[int, ...], float, int]  # tokens, summed logprob, the beam it continues


def _best_continuations(open_beams: list[_Open], count: int) -> list[_Candidate]:
    """The likeliest continuations of all open beams, best first."""
    flat = np.concatenate([beam.logprob + beam.logprobs for beam in open_beams])  # [W * V]
    vocabulary = len(open_beams[0].logprobs)
    # A stable sort: of equal scores the earlier token wins, as argmax does.
    order = np.argsort(-flat, kind="stable")[:count]
    return [
        (
            (*open_beams[index // vocabulary].tokens, index % vocabulary),
            float(flat[index]),
            index // vocabulary,
        )
        for index in order.tolist()
    ]


def _advance(
    model: DecoderModel,
    prompt: Sequence[int],
    open_beams: list[_Open],
    chosen: list[_Candidate],
    chunk: int,
) -> list[_Open]:
    """Feeds each chosen beam its newest token."""

    def feed(tokens: tuple[int, ...], cache: ModelCache) -> mx.array:
        newest = mx.array(tokens[-1:])
        logits = feed_newest(model, newest, cache, lambda: [[*prompt, *tokens]], chunk=chunk)
        assert logits is not None  # nothing was asked to stop it
        return logits

    caches = [open_beams[beam].cache.copy() for _, _, beam in chosen]
    logits = [feed(tokens, cache) for (tokens, _, _), cache in zip(chosen, caches, strict=True)]
    mx.eval(logits)
    return [
        _Open(tokens, logprob, cache, _log_softmax(row))
        for (tokens, logprob, _), cache, row in zip(chosen, caches, logits, strict=True)
    ]


def _log_softmax(logits: mx.array) -> np.ndarray:  # [1, V] -> [V]
    scores = logits[0].astype(mx.float32)
    check_finite(broken(scores))
    return np.array(scores - mx.logsumexp(scores), dtype=np.float64)
