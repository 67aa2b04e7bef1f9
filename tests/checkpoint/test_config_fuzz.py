"""A ``config.json`` may hold anything: it is read, or refused in one line, and never more."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtx.checkpoint.weights import check_kinds, empty_model
from mlxtx.decoder.config import DecoderConfig
from mlxtx.errors import MlxtxError
from mlxtx.families import families, family_for
from tests.parity.recipe import Fixture, fixture_names

CONFIGS = [
    config
    for fixture in map(Fixture.load, fixture_names())
    if fixture.model_type in families()
    for config in (fixture.config, fixture.legacy_config)
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 3, 10**9, 2**70, -2.5, 1e30, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "default", "full_attention", "sliding_attention"]),
    st.sampled_from([[], [1], [None] * 4, ["full_attention"], [[]], {}, {"a": 1}]),
    st.sampled_from(
        [{"rope_type": "yarn"}, {"rope_type": "llama3", "factor": "x"}, {"full_attention": 3}]
    ),
)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_changed_config_is_read_or_refused(data):
    config = dict(data.draw(st.sampled_from(CONFIGS)))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(config)))
        if data.draw(st.booleans()):
            config[key] = data.draw(VALUES)
        else:
            del config[key]
    try:
        family = family_for(config)
        decoder = family.decoder_config(config)
        family.names(config)
    except MlxtxError as error:
        assert str(error).strip() and "\n" not in str(error)
        return
    assert isinstance(decoder, DecoderConfig)
    try:
        check_kinds(decoder)
        model = empty_model(decoder)
    except MlxtxError as error:
        assert "no possible decoder" in str(error) and "\n" not in str(error)
    else:
        assert len(model.layers) == len(decoder.blocks)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8), VALUES, max_size=5), st.sampled_from(sorted(families()))
)
def test_a_config_of_noise_is_refused(noise, kind):
    with pytest.raises(MlxtxError):
        family_for(noise | {"model_type": kind}).decoder_config(noise | {"model_type": kind})


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads"])
def test_a_number_that_would_fill_the_memory_is_refused(key):
    config = Fixture.load("llama").config | {key: 10**12}
    with pytest.raises(MlxtxError, match=f"{key} must be a whole number"):
        family_for(config).decoder_config(config)
