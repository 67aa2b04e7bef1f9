"""Every family against transformers: logits and greedy tokens, in every way of feeding a prompt.

The standard: no logit is further from transformers' (float32, eager) than 3e-4 of the logits'
standard deviation, and greedy tokens are equal wherever the margin is above that.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import running
from recipe import FIXTURES, Fixture, fixture_names

from mlxtx import load_model
from mlxtx.families import families, family_for
from mlxtx.generation.beam import beam_search
from mlxtx.generation.session import Session

TOLERANCE = 3e-4  # of the logits' standard deviation
NEW = 16  # tokens behind a prompt

NAMES = fixture_names()
DEFAULTS = json.loads((FIXTURES / "defaults.json").read_text())


@cache
def fixture_of(name: str) -> Fixture:
    return Fixture.load(name)


def allowed(fixture: Fixture) -> float:
    return TOLERANCE * float(fixture.arrays["logits_long"].std())


def assert_close(fixture: Fixture, got: np.ndarray, expected: str) -> None:
    error = np.abs(got - fixture.arrays[expected]).max()
    assert error <= allowed(fixture), f"{error:.2g} off, {allowed(fixture):.2g} allowed"


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    fixture = fixture_of(name)
    model, _ = load_model(fixture.write_checkpoint(tmp_path), "float32")
    long, short = fixture.arrays["tokens_long"], fixture.arrays["tokens_short"]
    steps = "logits_steps" if "logits_steps" in fixture.arrays else "logits_long"

    assert_close(fixture, running.whole(model, long), "logits_long")
    assert_close(fixture, running.whole(model, short), "logits_short")
    assert_close(fixture, running.in_pieces(model, long, [1] * len(long)), steps)
    chunks = running.in_pieces(model, long, running.CHUNKS, length=len(long))
    assert_close(fixture, chunks, "logits_long")
    padded_long, padded_short = running.left_padded(model, [long, short])
    assert_close(fixture, padded_long, "logits_long")
    assert_close(fixture, padded_short, "logits_short")

    for prompt, tag in ((long, "long"), (short, "short")):
        (new,) = running.greedy(model, [prompt], NEW)
        assert_tokens(fixture, new, tag)


def assert_tokens(fixture: Fixture, new: list[int], tag: str) -> None:
    expected, margins = fixture.arrays[f"greedy_{tag}"], fixture.arrays[f"margin_{tag}"]
    miss = running.greedy_misses(new, expected, margins, allowed(fixture))
    assert miss is None, f"token {miss}: {new} instead of {expected.tolist()}"


@pytest.mark.parametrize("name", [n for n in NAMES if "beam_short" in fixture_of(n).arrays])
def test_texts_that_grow_past_a_switch_of_rope_are_those_of_transformers(
    name: str, tmp_path: Path
) -> None:
    """The short prompt's answer crosses the length where frequencies change: in a batch, in beams
    and behind a kept cache it is the answer of transformers' ``generate`` all the same."""
    fixture = fixture_of(name)
    model, _ = load_model(fixture.write_checkpoint(tmp_path), "float32")
    long, short = fixture.arrays["tokens_long"], fixture.arrays["tokens_short"]

    for tag, new in zip(
        ("short", "long"), running.greedy(model, [short, long], NEW, chunk=5), strict=True
    ):
        assert_tokens(fixture, new, tag)

    best, *_ = beam_search(model, short.tolist(), beams=3, max_tokens=NEW, prefill_chunk=5)
    scores = fixture.arrays["beam_scores"]
    assert abs(best.score - scores[0]) <= allowed(fixture)
    assert scores[0] - scores[1] > allowed(fixture)  # else another answer would do as well
    assert list(best.tokens) == fixture.arrays["beam_short"].tolist()

    session = Session(model)
    running.greedy(model, [short[:5]], 2, session=session)
    assert session.cache.offset > 0
    for prompt, tag in ((short, "short"), (short, "short"), (long, "long"), (short, "short")):
        (new,) = running.greedy(model, [prompt], NEW, chunk=5, session=session)
        assert_tokens(fixture, new, tag)


@pytest.mark.parametrize("name", [n for n in NAMES if "logits_ahead" in fixture_of(n).arrays])
def test_prediction_head_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """From each token's state and the token after it: whole, and token by token."""
    fixture = fixture_of(name)
    model, _ = load_model(fixture.write_checkpoint(tmp_path), "float32")
    tokens = mx.array(fixture.arrays["tokens_long"])[None]
    hidden = model.hidden(tokens)[:, :-1]
    logits, _ = model.predict_ahead(hidden, tokens[:, 1:])
    assert_close(fixture, np.array(logits)[0], "logits_ahead")
    cache = model.make_cache(ahead=True)
    steps = [
        model.predict_ahead(hidden[:, i : i + 1], tokens[:, i + 1 : i + 2], cache)[0]
        for i in range(hidden.shape[1])
    ]
    assert_close(fixture, np.array(mx.concatenate(steps, axis=1))[0], "logits_ahead")


@pytest.mark.parametrize("name", NAMES)
def test_both_generations_of_config_describe_the_same_decoder(name: str) -> None:
    fixture = fixture_of(name)
    new = family_for(fixture.config).decoder_config(fixture.config)
    old = family_for(fixture.legacy_config).decoder_config(fixture.legacy_config)
    assert old == new


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_absent_keys_mean_what_transformers_takes_for_granted(model_type: str) -> None:
    """A config with sizes alone describes the same decoder as the one transformers fills in."""
    told = DEFAULTS[model_type]
    family = families()[model_type]
    given = family.decoder_config({"model_type": model_type, **told["given"]})
    assert given == family.decoder_config(told["full"])


@pytest.mark.parametrize("name", NAMES)
def test_names_go_there_and_back(name: str) -> None:
    """Our tensors, saved under the family's names, are the checkpoint's bits; older spellings of
    the names load as the same tensors."""
    fixture = fixture_of(name)
    theirs = {n: w for n, w in fixture.weights().items() if n not in running.dropped(fixture)}
    ours = running.ours(fixture)
    again = running.theirs(fixture, ours)
    assert sorted(again) == sorted(theirs)
    for tensor, values in theirs.items():
        assert np.array_equal(np.array(again[tensor]), values), tensor
    if fixture.hub_renames:
        old = running.ours(fixture, legacy=True)
        assert sorted(old) == sorted(ours)
        assert all(mx.array_equal(old[tensor], ours[tensor]) for tensor in ours)
