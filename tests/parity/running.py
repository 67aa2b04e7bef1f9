"""Running a fixture through mlxtx in every way of feeding a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from recipe import Fixture

from mlxtx.decoder.model import DecoderModel
from mlxtx.families import family_for
from mlxtx.generation.loop import TokenStep, padding, token_steps
from mlxtx.generation.sampling import Sampler, Sampling
from mlxtx.generation.session import Session
from mlxtx.naming.map import Plan

CHUNKS = (20, 20, 8)


def ours(fixture: Fixture, legacy: bool = False) -> dict[str, mx.array]:
    """The fixture's tensors under our names."""
    theirs = {name: mx.array(values) for name, values in fixture.weights(legacy).items()}
    return _move(_plan(fixture, theirs, legacy), theirs)


def _plan(fixture: Fixture, tensors: dict[str, Any], legacy: bool) -> Plan:
    config = fixture.legacy_config if legacy else fixture.config
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
    return family_for(config).names(config).plan_load(shapes)


def theirs(fixture: Fixture, ours: dict[str, mx.array]) -> dict[str, mx.array]:
    """Our tensors under the family's names."""
    shapes = {name: array.shape for name, array in ours.items()}
    return _move(family_for(fixture.config).names(fixture.config).plan_save(shapes), ours)


def _move(plan: Plan, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    assert not plan.incomplete, plan.incomplete
    moved: dict[str, mx.array] = {}
    for group in plan.groups:
        arrays = group.apply([tensors[name] for name in group.sources])
        moved.update(zip(group.targets, arrays, strict=True))
    return moved


def dropped(fixture: Fixture) -> set[str]:
    """Tensors that carry nothing: a prediction head's copies of the embeddings and the head."""
    return set(_plan(fixture, fixture.weights(), False).dropped)


def whole(model: DecoderModel, tokens: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(tokens)[None]))[0]


def in_pieces(
    model: DecoderModel, tokens: np.ndarray, pieces: Sequence[int], length: int | None = None
) -> np.ndarray:
    """Logits [T, V] of a prompt fed piece by piece through a cache."""
    cache, rows, start = model.make_cache(), [], 0
    for count in pieces:
        piece = mx.array(tokens[start : start + count])[None]
        rows.append(np.array(model(piece, cache=cache, length=length))[0])
        start += count
    return np.concatenate(rows)


def left_padded(model: DecoderModel, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits of prompts of different lengths in one batch, padded at the start, through a cache."""
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    batch = np.stack([np.pad(p, (n, 0)) for p, n in zip(prompts, padding, strict=True)])
    cache = model.make_cache(left_padding=padding)
    logits = np.array(model(mx.array(batch), cache=cache))
    return [rows[n:] for rows, n in zip(logits, padding, strict=True)]


def greedy(
    model: DecoderModel,
    prompts: Sequence[np.ndarray],
    count: int,
    *,
    chunk: int = 1024,
    session: Session | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, all in one batch, through the loop that users run."""
    rows = [prompt.tolist() for prompt in prompts]
    if session is None:
        cache = model.make_cache(left_padding=padding(rows))
    else:
        session.start(rows[0])
        cache = session.cache
    steps = token_steps(
        model,
        rows,
        cache=cache,
        sampler=Sampler(Sampling(), rows, model.config.vocabulary),
        max_tokens=count,
        prefill_chunk=chunk,
    )
    new = [step.tokens for step in steps if isinstance(step, TokenStep)]
    if session is not None:
        session.tokens += [token for (token,) in new]
    return [list(row) for row in zip(*new, strict=True)]


def greedy_misses(
    new: Sequence[int], expected: np.ndarray, margins: np.ndarray, allowed: float
) -> Any:
    """The first token that differs although its margin was clear, or None.

    Once a token differs within the allowed error, what follows is another text.
    """
    for i, (ours, theirs) in enumerate(zip(new, expected, strict=True)):
        if ours != theirs:
            return i if margins[i] > allowed else None
    return None
