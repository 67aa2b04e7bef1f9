"""The text part of multimodal checkpoints: wrapped by hand, it must be what it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxtx
from mlxtx.checkpoint.source import Checkpoint
from mlxtx.checkpoint.text_part import text_part
from mlxtx.decoder.config import AttentionConfig
from mlxtx.diagnostics.facts import read_facts
from mlxtx.errors import MlxtxError
from mlxtx.families import family_for
from tests.checkpoint.builders import LLAMA, QUANTIZED, SPELLINGS, wrap, write_llama
from tests.checkpoint.compare import equal, tensors

TOKENS = mx.array([[1, 5, 9, 70, 33, 2, 80, 41]])


def logits(folder: Path) -> np.ndarray:
    return np.array(mlxtx.load_model(folder)[0](TOKENS).astype(mx.float32))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_llama(folder, eos_token_id=2)
    return folder


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory) -> Path:
    """Packed in two ways, so that the table has paths in it."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    mlxtx.convert(plain, folder, bits=4, recipe={"*.1.*.down_proj": 8, "*o_proj": "none"})
    table = json.loads((folder / "config.json").read_text())["quantization"]
    assert table["model.layers.1.mlp.down_proj"]["bits"] == 8
    return folder


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_wrapped_model_is_the_model_itself(kind, spelling, request, tmp_path):
    source = request.getfixturevalue(kind)
    wrapped = wrap(source, tmp_path / "wrapped", spelling)
    assert np.array_equal(logits(wrapped), logits(source))
    inner, outer = Checkpoint(source), Checkpoint(wrapped)
    assert set(outer.tensors) == set(inner.tensors) and outer.nbytes == inner.nbytes
    for key in QUANTIZED:
        paths = inner.config.get(key, {}).items()
        assert paths <= outer.config.get(key, {}).items()
    assert read_facts(wrapped).weights == read_facts(source).weights


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_converting_writes_a_text_checkpoint(packed, spelling, tmp_path):
    wrapped = wrap(packed, tmp_path / "wrapped", spelling, eos_token_id=[2, 7])
    for out, options in (("same", {}), ("whole", {"dequantize": True})):
        mlxtx.convert(wrapped, tmp_path / out, **options)
        mlxtx.convert(packed, tmp_path / f"{out} unwrapped", **options)
        ours, theirs = tensors(tmp_path / out), tensors(tmp_path / f"{out} unwrapped")
        assert set(ours) == set(theirs) and all(equal(ours[n], theirs[n]) for n in ours)
        config = json.loads((tmp_path / out / "config.json").read_text())
        assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
        assert config["eos_token_id"] == [2, 7] and "vision_config" not in config
        assert np.array_equal(logits(tmp_path / out), logits(tmp_path / f"{out} unwrapped"))
        card = (tmp_path / out / "README.md").read_text()
        assert "`llama`, the text part of `looking_glass`" in card
        assert "text part" not in (tmp_path / f"{out} unwrapped" / "README.md").read_text()


@pytest.mark.parametrize(
    ("outer", "inner", "has_head", "tied"),
    [
        ({}, {}, True, None),
        ({}, {}, False, True),
        ({}, {"tie_word_embeddings": False}, False, True),
        ({"tie_word_embeddings": False}, {}, True, False),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, False, True),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True, True),
        ({"tie_word_embeddings": False}, {}, False, False),
    ],
)
def test_whether_the_head_is_tied(outer, inner, has_head, tied):
    names = ["model.language_model.embed_tokens.weight", *(["lm_head.weight"] * has_head)]
    text = {"model_type": "llama", **inner}
    config, _ = text_part({"model_type": "looking_glass", "text_config": text, **outer}, names)
    assert config.get("tie_word_embeddings") is tied


def test_a_head_that_the_config_ties_wrongly_is_kept(plain, tmp_path):
    wrapped = wrap(plain, tmp_path / "wrapped", "transformers 5", tie_word_embeddings=True)
    assert np.array_equal(logits(wrapped), logits(plain))


def read(text: dict[str, Any], **outer: Any) -> tuple[dict[str, Any], Any]:
    config = {"model_type": "looking_glass", "text_config": text, **outer}
    unwrapped, _ = text_part(config, ["language_model.lm_head.weight"])
    return unwrapped, family_for(unwrapped).decoder_config(unwrapped)


def test_gemma_3_4b_as_transformers_reads_it():
    """All that the published file says of the text model; the numbers are those that transformers
    5.23 adds."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    config, decoder = read(
        text, architectures=["Gemma3ForConditionalGeneration"], eos_token_id=[1, 106],
        image_token_index=262144, mm_tokens_per_image=256, torch_dtype="bfloat16",
    )  # fmt: skip
    assert (decoder.vocabulary, decoder.width, decoder.context) == (262208, 2560, 131072)
    assert len(decoder.blocks) == 34 and decoder.head.tied and decoder.head.softcap is None
    for i, block in enumerate(decoder.blocks):
        attention = block.attention
        assert isinstance(attention, AttentionConfig)
        heads = (attention.heads, attention.kv_heads, attention.head_dim, attention.scale)
        assert heads == (8, 4, 256, 1 / 16) and block.feed_forward.width == 10240
        full = i % 6 == 5
        assert attention.window == (None if full else 1024)
        assert attention.rope.base == (1e6 if full else 1e4)
        assert (attention.rope.scaling.factor if full else attention.rope.scaling) == (
            8.0 if full else None
        )
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["eos_token_id"] == [1, 106] and config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        # LLaVA 1.5 and 1.6 say no more of their sizes than this.
        ({"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
         (32064, 4096, 4096, 32, 32, 32, 128, 11008)),
        ({"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8,
          "max_position_embeddings": 32768, "vocab_size": 32064, "sliding_window": None},
         (32064, 4096, 32768, 32, 32, 8, 128, 14336)),
        ({"model_type": "mistral"}, (32000, 4096, 131072, 32, 32, 8, 128, 14336)),
        ({"model_type": "ministral3"}, (131072, 4096, 262144, 34, 32, 8, 128, 14336)),
        ({"model_type": "qwen2"}, (151936, 4096, 32768, 32, 32, 32, 128, 22016)),
        ({"model_type": "qwen3"}, (151936, 4096, 32768, 32, 32, 32, 128, 22016)),
        ({"model_type": "cohere2"}, (256000, 8192, 8192, 40, 64, 64, 128, 22528)),
        ({"model_type": "granite"}, (32000, 4096, 2048, 32, 32, 32, 128, 11008)),
        ({"model_type": "gemma"}, (256000, 3072, 8192, 28, 16, 16, 256, 24576)),
        ({"model_type": "gemma2"}, (256000, 2304, 8192, 26, 8, 4, 256, 9216)),
        ({"model_type": "gemma3_text"}, (262208, 2304, 131072, 26, 8, 4, 256, 9216)),
        ({"model_type": "gemma4_text"}, (262144, 2304, 131072, 30, 8, 4, 256, 9216)),
        ({"model_type": "llama4_text"}, (202048, 5120, 131072, 48, 40, 8, 128, 8192)),
    ],
)  # fmt: skip
def test_sizes_left_out_are_those_of_the_text_models_class(text, sizes):
    """The numbers are those of the configuration classes of transformers 5.23."""
    _, decoder = read(text)
    attention, body = decoder.blocks[0].attention, decoder.blocks[0].feed_forward
    found = (decoder.vocabulary, decoder.width, decoder.context, len(decoder.blocks))
    found += (attention.heads, attention.kv_heads, attention.head_dim)
    assert (*found, getattr(body, "expert", body).width) == sizes


def test_keys_of_other_parts_inside_the_text_config():
    """SmolVLM's text_config, which says a resampler's settings too, and a key of Pixtral's."""
    text = {
        "_flash_attn_2_enabled": True, "architectures": ["VLlama3ForCausalLM"], "head_dim": 64,
        "hidden_size": 960, "intermediate_size": 2560, "is_llama_config": True,
        "max_position_embeddings": 8192, "model_type": "llama", "neftune_noise_alpha": 0.0,
        "num_attention_heads": 15, "num_key_value_heads": 5, "perceiver_config": {"depth": 6},
        "is_composition": True,
        "pixel_shuffle_factor": 4, "qk_layer_norms": False, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_theta": 100000, "use_resampler": False,
        "vocab_size": 49280,
    }  # fmt: skip
    config, decoder = read(text)
    assert len(decoder.blocks) == 32 and decoder.blocks[0].attention.kv_heads == 5
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "glass", "text_config": {"model_type": "crystal_text"}},
         "of 'glass' only the text part could run, but model_type 'crystal_text' is not supported"),
        # Neither says what the text model is, or it is more than its family.
        ({"model_type": "glass", "text_config": {"hidden_size": 4}}, "model_type 'glass' is not"),
        ({"model_type": "glass", "text_config": {"model_type": ["llama"]}}, "'glass' is not"),
        ({"model_type": "paligemma", "text_config": {"model_type": "gemma"}}, "'paligemma' is not"),
        ({"text_config": {"model_type": "llama"}}, "has no model_type"),
        # A family of ours is never unwrapped.
        ({"model_type": "llama", "text_config": {"model_type": "llama"}}, "does not know.*text_con"),
    ],
)  # fmt: skip
def test_what_is_not_unwrapped(config, error, plain, tmp_path):
    shutil.copyfile(plain / "model.safetensors", tmp_path / "model.safetensors")
    config = {**LLAMA, **config} if config.get("model_type") == "llama" else config
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MlxtxError, match=error):
        mlxtx.load_model(tmp_path)


def test_both_generations_at_once(plain):
    names = ["language_model.model.norm.weight", "model.language_model.norm.weight"]
    config = {"model_type": "looking_glass", "text_config": LLAMA}
    with pytest.raises(MlxtxError, match=r"holds model\.norm\.weight twice: language_model\.mod"):
        text_part(config, names)
