"""A whole decoder with a cache, its attention and rotary steps on the emulated kernels."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import pytest

from mlxtx.cache import kernels as cache_kernels
from mlxtx.decoder import model as decoder_model
from mlxtx.families import family_for

from .on_emulator import emulated, needs_emulator

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 50,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
KINDS = {
    "norms": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "window": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8,
    },
}  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("cache", ["plain", "quantized"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_references(kind, cache):
    from mlxtx.cache import KVSettings

    mx.random.seed(0)
    family = family_for(CONFIG | KINDS[kind])
    model = decoder_model.DecoderModel(family.decoder_config(CONFIG | KINDS[kind]))
    settings = KVSettings(key_bits=8, value_bits=4, group_size=32) if cache != "plain" else None
    tokens = mx.random.randint(0, 50, (2, 14))

    def run() -> list[mx.array]:
        rows = model.make_cache(settings, left_padding=[0, 3])
        steps = [model(tokens[:, :11], cache=rows, left_padding=[0, 3])]
        steps += [model(tokens[:, i : i + 1], cache=rows) for i in range(11, 14)]
        mx.eval(steps)
        return steps

    expected = run()
    with (
        emulated("checked", tuning={"single_pass_rows": 8}) as emulator,
        mock.patch.object(cache_kernels, "on_metal", lambda: True),
    ):
        found = run()
    names = {launch.name for launch in emulator.launches}
    assert {"rope" if cache == "plain" else "rope_quantize", "attention_decode"} <= names
    assert "kv_quantize" not in names  # one launch rotates the queries and makes the codes
    if kind == "norms" or cache == "plain":
        assert "attention_prefill" in names
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        visible = slice(3, None) if step == 0 else slice(None)
        assert mx.abs(a[:, visible] - b[:, visible]).max() < 2e-4 * mx.abs(b).max()
