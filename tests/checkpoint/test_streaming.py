"""A checkpoint that runs from the disk says what the loaded model says."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlxtx
from mlxtx.cache import Step
from mlxtx.checkpoint.streaming import StreamedModel
from mlxtx.decoder.model import uncached
from tests.parity.recipe import Fixture


def streamed_logits(folder, tokens):
    model, step = StreamedModel(folder), Step(tokens.shape[1], 0)
    x, caches = model.embed(tokens, step), uncached(model.config.blocks)
    for i in range(len(caches)):
        (x,) = model.block(i, [(x, caches[i], model.own(i))], step)
    return model.logits(x)


@pytest.mark.parametrize(
    "name",
    [
        "gemma4_text",  # inputs of their own for every layer
        "gemma4_text_shared_kv",
        "gemma4_text_experts",
        "deepseek_v3",
        "gpt_oss_mxfp4",
        "opt_post_norm_projected",
        "phi3",
    ],
)
def test_streamed_logits_are_those_of_the_loaded_model(tmp_path, name):
    Fixture.load(name).write_checkpoint(tmp_path / "model")
    tokens = mx.array([[5, 9, 2, 7, 1, 3, 11, 4], [3, 3, 8, 1, 6, 2, 9, 10]])
    model, _ = mlxtx.load_model(tmp_path / "model", dtype="float32")
    expected = model(tokens)
    error = mx.abs(streamed_logits(tmp_path / "model", tokens) - expected).max().item()
    assert error < 1e-4 * mx.abs(expected).max().item()
