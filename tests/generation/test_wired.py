"""The wired limit on Metal, with the calls that need a Mac stood in for."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxtx.events import Delta
from tests.tiny_model import tiny_language_model


@pytest.fixture
def limits(monkeypatch) -> list[int]:
    """Every limit that is set, on a machine that says it has Metal and a working set of 1000."""
    seen = [7]

    def set_limit(limit: int) -> int:
        seen.append(limit)
        return seen[-2]

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    facts = {**mx.device_info(), "max_recommended_working_set_size": 1000}
    monkeypatch.setattr(mx, "device_info", lambda *device: facts)
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    return seen


def test_the_limit_is_put_back_however_generation_ends(limits):
    model = tiny_language_model()
    model.generate([5, 6], max_tokens=2)
    assert limits == [7, 1000, 7]
    for event in model.stream([5, 6], max_tokens=9):
        if isinstance(event, Delta):
            assert limits[-1] == 1000
            break
    del event
    assert limits == [7, 1000, 7, 1000, 7]
    model.model.lm_head.weight, kept = (
        model.model.lm_head.weight * float("nan"),
        model.model.lm_head.weight,
    )
    try:
        with pytest.raises(Exception, match="not numbers"):
            model.generate([5, 6], max_tokens=2)
    finally:
        model.model.lm_head.weight = kept
    assert limits[-1] == 7


def test_the_limit_holds_until_the_last_of_two_answers_ends(limits):
    model = tiny_language_model()
    first, second = (model.stream([5, token], max_tokens=4) for token in (6, 7))
    next(first), next(second)
    first.close()
    assert limits[-1] == 1000
    second.close()
    assert limits[-1] == 7


def test_without_metal_nothing_is_set(monkeypatch):
    if mx.metal.is_available():
        monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    called = []
    monkeypatch.setattr(mx, "set_wired_limit", called.append)
    tiny_language_model().generate([5, 6], max_tokens=2)
    assert called == []
