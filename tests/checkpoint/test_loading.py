"""From a folder to a model: every way weights are stored gives the same logits."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxtx
from mlxtx.checkpoint import cpu_layers, loading, source
from mlxtx.checkpoint.cpu_layers import CpuQuantizedLinear
from mlxtx.checkpoint.loading import load_model
from mlxtx.checkpoint.quantization import Quantization
from mlxtx.checkpoint.source import INDEX
from mlxtx.errors import MlxtxError
from tests.checkpoint.builders import LLAMA, llama_shapes, save, shard, write_llama
from tests.parity.recipe import Fixture

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(path, dtype=None):
    model, _ = load_model(path, dtype)
    return np.array(model(TOKENS).astype(mx.float32))


def quantize(folder, out, quantization: Quantization, overrides=None, skip=()):
    """An MLX checkpoint of the one in ``folder``, packed by MLX itself."""
    out.mkdir()
    overrides = overrides or {}
    tensors = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        path = name.removesuffix(".weight")
        how = overrides.get(path, quantization)
        if array.ndim == 2 and path not in skip:
            tensors |= {path + ending: part for ending, part in how.pack(array).items()}
        else:
            tensors[name] = array
    mx.save_safetensors(str(out / "model.safetensors"), tensors)
    config = json.loads((folder / "config.json").read_text())
    table = quantization.to_json() | {path: how.to_json() for path, how in overrides.items()}
    config |= {"quantization": table, "quantization_config": table}
    (out / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_layer_with_thousands_of_digits_is_one_clear_line(tmp_path, family):
    fixture = Fixture.load(family)
    fixture.write_checkpoint(tmp_path)
    stored = {name: ("F32", array) for name, array in fixture.weights().items()}
    for i in range(20):
        stored[f"model.layers.{'9' * 5000}{i}.mlp.up_proj.weight"] = ("F32", np.zeros((2, 2), "f4"))
    save(tmp_path / "model.safetensors", stored)
    with pytest.raises(MlxtxError, match=r"unexpected model\.layers\.999"):
        load_model(tmp_path)


def test_names_without_the_outer_module(tmp_path):
    """As a model without a head is saved: the head is tied to the embeddings."""
    write_llama(tmp_path / "whole", tie_word_embeddings=True)
    write_llama(tmp_path / "bare", tie_word_embeddings=True)
    weights = mx.load(str(tmp_path / "bare" / "model.safetensors"))
    assert all(name.startswith("model.") for name in weights)
    mx.save_safetensors(
        str(tmp_path / "bare" / "model.safetensors"),
        {name.removeprefix("model."): array for name, array in weights.items()},
    )
    assert np.array_equal(logits(tmp_path / "bare"), logits(tmp_path / "whole"))


def dequantized(folder, out, quantization, overrides=None, skip=()):
    """The same weights after a trip through the packing, stored plainly."""
    out.mkdir()
    weights = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        path = name.removesuffix(".weight")
        how = (overrides or {}).get(path, quantization)
        if array.ndim == 2 and path not in skip:
            packed, *rest = how.pack(array).values()
            # In float32, so that the numbers are exactly scale * code + bias.
            rest = [part if part.dtype == mx.uint8 else part.astype(mx.float32) for part in rest]
            array = mx.dequantize(packed, *rest, **how.to_json(), dtype=mx.float32)
        weights[name] = ("F32", np.array(array.astype(mx.float32)))
    save(out / "model.safetensors", weights)
    (out / "config.json").write_text((folder / "config.json").read_text())


def test_load_model_is_public_and_fills_every_parameter(tmp_path):
    weights = write_llama(tmp_path)
    model, config = mlxtx.load_model(tmp_path)
    assert config["model_type"] == "llama"
    flat = dict(nn.utils.tree_flatten(model.parameters()))
    assert set(flat) == set(weights)
    for name, weight in weights.items():
        assert np.array_equal(np.array(flat[name]), weight)
    assert not model.training


def test_shards_and_half_types(tmp_path):
    write_llama(tmp_path / "one")
    write_llama(tmp_path / "many")
    shard(tmp_path / "many", 3)
    assert np.array_equal(logits(tmp_path / "one"), logits(tmp_path / "many"))
    write_llama(tmp_path / "half", dtype="BF16")
    model, _ = load_model(tmp_path / "half")
    assert model.model.norm.weight.dtype == mx.bfloat16
    wide, _ = load_model(tmp_path / "half", "float32")
    assert wide.model.norm.weight.dtype == wide.lm_head.weight.dtype == mx.float32
    difference = np.abs(logits(tmp_path / "half", "float32") - logits(tmp_path / "one"))
    assert 0 < difference.max() < 0.05
    with pytest.raises(MlxtxError, match="unknown dtype 'int8'"):
        load_model(tmp_path / "half", "int8")


@pytest.mark.parametrize(
    "quantization",
    [Quantization(b, g) for b, g in ((2, 32), (3, 64), (4, 64), (5, 32), (6, 64), (8, 32))]
    + [Quantization.of(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")],
    ids=str,
)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_every_packing_computes_what_its_weights_say(tmp_path, monkeypatch, quantization, packed):
    write_llama(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "packed", quantization)
    dequantized(tmp_path / "source", tmp_path / "plain", quantization)
    if packed:
        monkeypatch.setattr(loading, "SMALL_MODEL_BYTES", 0)
    model, _ = load_model(tmp_path / "packed")
    assert hasattr(model.lm_head, "scales") == packed
    expected = logits(tmp_path / "plain")
    assert np.abs(logits(tmp_path / "packed") - expected).max() < 2e-4 * expected.std()


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_packed_layers_are_those_that_mlx_makes(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(loading, "SMALL_MODEL_BYTES", 0)
    write_llama(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "packed", Quantization.of(mode))
    model, _ = load_model(tmp_path / "packed")
    layer = model.layers[0].self_attn.o_proj
    source, _ = load_model(tmp_path / "source")
    rows, columns = source.layers[0].self_attn.o_proj.weight.shape
    plain = nn.Linear(columns, rows, bias=False)
    made = plain.to_quantized(**Quantization.of(mode).to_json())
    assert isinstance(layer, nn.QuantizedLinear)
    for name in ("bits", "group_size", "mode"):
        assert getattr(layer, name) == getattr(made, name)
    assert layer.trainable_parameters() == made.trainable_parameters() == {}
    parameters = [dict(one.parameters()) for one in (layer, made)]
    shapes = [{k: v.shape for k, v in one.items() if v is not None} for one in parameters]
    assert shapes[0] == shapes[1]


def test_overrides_and_modules_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SMALL_MODEL_BYTES", 0)
    write_llama(tmp_path / "source", dtype="BF16")
    how = Quantization(4, 64)
    overrides = {
        "model.layers.0.mlp.down_proj": Quantization(8, 32),
        "lm_head": Quantization(6, 64),
        "model.layers.1.self_attn.q_proj": Quantization.of("mxfp8"),
    }
    skip = ("model.embed_tokens", "model.layers.1.self_attn.o_proj")
    for write, name in ((quantize, "packed"), (dequantized, "plain")):
        write(tmp_path / "source", tmp_path / name, how, overrides, skip)
    model, _ = load_model(tmp_path / "packed")
    layers = model.model.layers
    assert (layers[0].mlp.down_proj.bits, layers[0].mlp.down_proj.group_size) == (8, 32)
    assert layers[1].self_attn.q_proj.mode == "mxfp8"
    assert type(layers[1].self_attn.o_proj) is not CpuQuantizedLinear
    # On a CPU, scales and whatever is not packed are float32: eight times as fast there.
    assert layers[0].mlp.up_proj.scales.dtype == mx.float32
    assert layers[1].self_attn.o_proj.weight.dtype == mx.float32
    expected = logits(tmp_path / "plain")
    assert np.abs(logits(tmp_path / "packed") - expected).max() < 2e-4 * expected.std()
    # config.json may not know about a module that differs: the shapes do.
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        for path in overrides:
            del config[key][path]
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert np.abs(logits(tmp_path / "packed") - expected).max() < 2e-4 * expected.std()


def test_few_and_many_rows_through_the_cpu_layers_agree(monkeypatch):
    x = mx.random.normal((1, 40, 64), key=mx.random.key(0))
    plain = nn.Linear(64, 48)
    for half in (mx.float32, mx.bfloat16, mx.float16):
        for fast in (True, False):
            monkeypatch.setattr(cpu_layers, "blas_is_fast", lambda fast=fast: fast)
            model = nn.Sequential(nn.Linear(64, 48))
            model.layers[0].update(plain.parameters())
            model.set_dtype(half)
            expected = model(x.astype(half))
            cpu_layers.adapt_to_cpu(model.modules())
            y = model(x.astype(half))
            assert y.dtype == half and y.shape == (1, 40, 48)
            step = {mx.float32: 1e-5, mx.bfloat16: 4e-2, mx.float16: 6e-3}[half]
            assert mx.abs(y - expected).max().item() < step
    for module in (nn.QuantizedLinear.from_linear(plain), nn.Linear(64, 48)):
        model = nn.Sequential(module)
        cpu_layers.adapt_to_cpu(model.modules())
        whole = model(x)
        alone = mx.concatenate([model(x[:, i : i + 1]) for i in range(40)], axis=1)
        assert mx.abs(whole - alone).max().item() < 1e-5
    tied = nn.QuantizedEmbedding(96, 64)
    expected = tied.as_linear(x)
    model = nn.Sequential(tied)
    cpu_layers.adapt_to_cpu(model.modules())
    assert mx.abs(model.layers[0].as_linear(x) - expected).max().item() < 1e-4
    assert mx.array_equal(model(mx.array([5])), tied(mx.array([5])))


@pytest.mark.parametrize("fast", [True, False])
def test_a_large_weight_is_unpacked_a_piece_at_a_time(fast, monkeypatch):
    """Also where the last piece is smaller. Memory stays below that of the unpacked weight."""
    monkeypatch.setattr(cpu_layers, "blas_is_fast", lambda: fast)
    plain = nn.Linear(512, 1501)
    x = mx.random.normal((1, 40, 512), key=mx.random.key(0))
    packed = nn.QuantizedLinear.from_linear(plain, 64, 4)
    weight = mx.dequantize(packed.weight, packed.scales, packed.biases)
    expected = x @ weight.T + plain.bias
    model = nn.Sequential(packed)
    cpu_layers.adapt_to_cpu(model.modules())
    model.eval()
    mx.eval(model.parameters(), expected, x)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    y = model(x)
    mx.eval(y)
    assert mx.get_peak_memory() - before < 0.8 * weight.nbytes
    assert mx.abs(y - expected).max().item() < 1e-4


def test_gradients_flow_through_the_cpu_layers():
    """An adapter's gradient passes layers with packed weights, for few and many rows."""
    layer = nn.QuantizedLinear(64, 48, bias=False)
    model = nn.Sequential(layer)
    cpu_layers.adapt_to_cpu(model.modules())
    for rows in (1, 30):
        x = mx.random.normal((rows, 64), key=mx.random.key(1))
        weight = mx.dequantize(layer.weight, layer.scales, layer.biases)
        gradient = mx.grad(lambda x: (model(x) ** 2).sum())(x)
        expected = mx.grad(lambda x, w=weight: ((x @ w.T) ** 2).sum())(x)
        assert mx.abs(gradient - expected).max().item() < 1e-3 * mx.abs(expected).max().item()


def test_a_tied_models_own_head(tmp_path, monkeypatch):
    """As in transformers 5: a copy of the embeddings is left out, a head without them is both, and
    one that differs stays, whatever the config says."""
    monkeypatch.setattr(source, "ROWS_BYTES", 700)  # they are compared two rows at a time
    weights = write_llama(tmp_path, tie_word_embeddings=True)
    file, head = tmp_path / "model.safetensors", "lm_head.weight"
    stored = {name: ("F32", w) for name, w in weights.items()}
    embeddings = stored["model.embed_tokens.weight"]
    expected = logits(tmp_path)

    for same in (embeddings, ("F64", embeddings[1].astype(np.float64))):
        save(file, stored | {head: same})
        model, config = load_model(tmp_path)
        assert config["tie_word_embeddings"] and "lm_head" not in model
        assert np.array_equal(logits(tmp_path), expected)
    save(file, {head if "embed" in name else name: value for name, value in stored.items()})
    assert np.array_equal(logits(tmp_path), expected)

    other = embeddings[1].copy()
    other[-1, -1] += 1  # the last number of the last row
    save(file, stored | {head: ("F32", other)})
    model, config = load_model(tmp_path)
    states = model.hidden(TOKENS)
    assert np.allclose(model(TOKENS), np.array(states) @ other.T, rtol=1e-4, atol=1e-5)
    assert not config["tie_word_embeddings"]
    mlxtx.convert(tmp_path, tmp_path.parent / "converted")
    assert np.array_equal(logits(tmp_path.parent / "converted"), logits(tmp_path))

    save(file, stored | {"lm_head.bias": ("F32", np.zeros(96, np.float32))})
    with pytest.raises(MlxtxError, match=r"unexpected lm_head.bias \[96\]"):
        load_model(tmp_path)


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    weights = write_llama(tmp_path)
    stored = {name: ("F32", w) for name, w in weights.items()}
    del stored["model.norm.weight"]
    stored["model.layers.1.mlp.up_proj.weight"] = ("F32", np.zeros((8, 64), np.float32))
    stored["visual.proj.weight"] = ("F32", np.zeros((3, 2), np.float32))
    save(tmp_path / "model.safetensors", stored)
    with pytest.raises(MlxtxError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert "missing model.norm.weight [64]" in message
    assert "model.layers.1.mlp.up_proj.weight is [8, 64], not [128, 64]" in message
    assert "unexpected visual.proj.weight [3, 2]" in message
    assert "\n" not in message


def test_a_wrong_configuration_names_what_lacks_by_layers(tmp_path):
    write_llama(tmp_path)
    config = LLAMA | {"num_hidden_layers": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MlxtxError) as caught:
        load_model(tmp_path)
    problems = str(caught.value).partition(": ")[2].split("; ")
    third = {n: s for n, s in llama_shapes(config).items() if n.startswith("model.layers.2.")}
    expected = {f"missing {n.replace('.2.', '.{2-8}.')} {list(s)}" for n, s in third.items()}
    assert set(problems) == expected and len(problems) == 9

    stored = {name: ("F32", w) for name, w in write_llama(tmp_path).items()}
    odd = {f"x.{n}.y.{n}": ("F32", np.zeros(1, np.float32)) for n in (*range(300), 999)}
    save(tmp_path / "model.safetensors", stored | odd)
    with pytest.raises(MlxtxError, match=r"unexpected x.0.y.0 \[1\]; .*; and 101 more$"):
        load_model(tmp_path)
    odd = {f"x.{n}.y": ("F32", np.zeros(1, np.float32)) for n in (*range(300), 999)}
    save(tmp_path / "model.safetensors", stored | odd)
    with pytest.raises(MlxtxError, match=r"config.json: unexpected x.\{0-299,999\}.y \[1\]$"):
        load_model(tmp_path)


def test_packed_shapes_that_fit_nothing_are_refused(tmp_path):
    write_llama(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "packed", Quantization(4, 64))
    path = tmp_path / "packed" / "model.safetensors"
    tensors = mx.load(str(path))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :7]
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(MlxtxError, match=r"lm_head.*packed.*does not fit"):
        load_model(tmp_path / "packed")


def test_bad_folders_are_one_clear_line(tmp_path):
    with pytest.raises(MlxtxError, match="no folder"):
        load_model(tmp_path / "absent")
    write_llama(tmp_path, model_type="lama")
    with pytest.raises(MlxtxError, match=r"'lama' is not supported; the nearest supported: llama"):
        load_model(tmp_path)
    with pytest.raises(MlxtxError, match="is a file"):
        load_model(tmp_path / "config.json")
    write_llama(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(MlxtxError, match="not a weight file in its own folder"):
        load_model(tmp_path)


def test_progress_ends_with_all_bytes(tmp_path):
    weights = write_llama(tmp_path)
    events = []
    load_model(tmp_path, on_event=events.append)
    total = sum(w.nbytes for w in weights.values())
    assert events[-1].stage == "load" and events[-1].done == events[-1].total == total


def test_memory_peaks_near_the_weights(tmp_path):
    weights = write_llama(
        tmp_path, dtype="BF16", hidden_size=256, intermediate_size=1024, num_hidden_layers=12
    )
    size = sum(w.nbytes for w in weights.values()) // 2
    assert size > loading.CAST_BYTES
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model, _ = load_model(tmp_path)
    assert mx.get_peak_memory() - before < 1.05 * size
    del model
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model, _ = load_model(tmp_path, "float32")
    assert mx.get_peak_memory() - before < 2 * size + 3 * loading.CAST_BYTES
    del model
