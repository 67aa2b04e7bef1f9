"""Adapters: gradients, what an adapter is as one weight, targets, files, switching."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxtx.errors import MlxtxError
from mlxtx.tuning.adapters import Adapters, adapter_of, load_adapter, save_adapter
from mlxtx.tuning.lora import LowRank, dense_weight, plain_layer
from mlxtx.tuning.objective import NextToken, loss_and_gradients
from mlxtx.tuning.packing import make_batch
from mlxtx.tuning.targets import adapters_in, add_adapters, choose, remove_adapters
from tests.tuning import numpy_decoder
from tests.tuning.finite_differences import check_directions
from tests.tuning.tiny import block, model, samples

TOKENS = mx.array(np.random.default_rng(4).integers(0, 61, (2, 17)))


def adapted(*blocks, targets="all", how=None, quantize=None, seed=1, **more):
    """A frozen tiny model with adapters whose weights are all random."""
    net = model(*(blocks or (block(), block())), seed=seed, **more)
    if quantize:
        nn.quantize(net, group_size=32, bits=quantize)
    net.freeze()
    how = how or LowRank(rank=3, scale=1.5)
    add_adapters(net, dict.fromkeys(choose(net, targets), how), seed=seed)
    for n, adapter in enumerate(adapters_in(net).values()):
        adapter.lora_b = mx.random.normal(adapter.lora_b.shape, key=mx.random.key(n)) * 0.1
        if "m" in adapter:
            adapter.m = adapter.m * 1.1
    return net


def effective(path, adapter, own):
    """The layer's weight in float64 from the adapter's formula."""
    w = np.array(dense_weight(adapter.base), np.float64)
    a, b = own[f"{path}.lora_a"], own[f"{path}.lora_b"]
    if hasattr(adapter, "embedding"):
        return w + adapter.how.scale * a @ b
    w = w + adapter.how.scale * (b @ a if a.ndim == 3 else (a @ b).T)
    if f"{path}.m" not in own:
        return w
    return own[f"{path}.m"][..., None] * w / np.linalg.norm(w, axis=-1, keepdims=True)


METHODS = {
    "lora": {},
    "qlora 4 bits": {"quantize": 4},
    "qlora 8 bits": {"quantize": 8},
    "experts": {"blocks": (block(experts=True),)},
    "quantized experts": {"blocks": (block(experts=True),), "quantize": 4},
    "embedding": {"targets": ["all", "embed_tokens"]},
    "head": {"targets": ["q_proj", "lm_head"], "tied": False},
    "dora": {"how": LowRank(rank=3, scale=1.5, dora=True)},
    "qdora": {"how": LowRank(rank=3, scale=1.5, dora=True), "quantize": 4},
    "dora experts": {
        "how": LowRank(rank=3, scale=1.5, dora=True),
        "blocks": (block(experts=True),),
    },
    "qdora experts": {
        "how": LowRank(rank=3, scale=1.5, dora=True),
        "blocks": (block(experts=True),),
        "quantize": 4,
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_gradients_against_finite_differences(name):
    settings = dict(METHODS[name])
    net = adapted(*settings.pop("blocks", ()), **settings)
    rows = samples((17, 9, 17))
    loss, gradients = loss_and_gradients(net, make_batch(rows), NextToken())
    adapters = adapters_in(net)
    base = {}
    for path, module in net.named_modules():
        inner = path.endswith((".linear", ".embedding"))
        if "weight" in module and not inner:
            base[f"{path}.weight"] = np.array(dense_weight(module), np.float64)
    own = {
        f"{p}.{n}": np.array(w, np.float64)
        for p, a in adapters.items()
        for n, w in a.trained().items()
    }
    assert gradients.keys() == own.keys()
    # DoRA holds the norm constant in the backward pass (section 4.3), so it is constant here too.
    norms = {
        p: np.linalg.norm(
            effective(p, a, {k: v for k, v in own.items() if not k.endswith(".m")}), axis=-1
        )
        for p, a in adapters.items()
    }

    def weight(path, adapter, values):
        if not adapter.how.dora:
            return effective(path, adapter, values)
        plain = {k: v for k, v in values.items() if not k.endswith(".m")}
        w = effective(path, adapter, plain)
        return values[f"{path}.m"][..., None] * w / norms[path][..., None]

    def reference(changed):
        values = {**own, **changed}
        fused = {f"{p}.weight": weight(p, a, values) for p, a in adapters.items()}
        return numpy_decoder.loss({**base, **fused}, net.config, rows)

    assert loss.mean == pytest.approx(reference({}), rel=3e-6)
    check_directions(own, gradients, reference)


@pytest.mark.parametrize("name", METHODS)
def test_the_fused_weight_computes_the_same(name):
    settings = dict(METHODS[name])
    net = adapted(*settings.pop("blocks", ()), **settings)
    net.eval()
    wanted = np.array(net(TOKENS))
    adapters = adapters_in(net)
    bases = [np.array(dense_weight(a.base)) for a in adapters.values()]
    remove_adapters(net)
    assert not adapters_in(net)
    assert np.abs(np.array(net(TOKENS)) - wanted).max() > 1e-2
    for (path, adapter), base in zip(adapters.items(), bases, strict=True):
        fused = adapter.fused_weight()
        assert np.abs(np.array(fused) - base).max() > 1e-3
        net.update_modules(tree_unflatten([(path, plain_layer(adapter.base, fused))]))
    np.testing.assert_allclose(np.array(net(TOKENS)), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("blocks", [(), (block(experts=True),)], ids=["linear", "experts"])
def test_dora_leaves_rows_of_zeros_as_they_are(blocks):
    net = model(*blocks)
    mlp = net.model.layers[0].mlp
    layer = mlp.switch_mlp.up_proj if blocks else mlp.up_proj
    layer.weight = layer.weight * (mx.arange(layer.weight.shape[-2]) > 3)[:, None]
    wanted = np.array(net(TOKENS))
    net.freeze()
    add_adapters(net, dict.fromkeys(choose(net, "up_proj"), LowRank(dora=True)))
    np.testing.assert_allclose(np.array(net(TOKENS)), wanted, rtol=1e-4, atol=1e-4)
    loss, gradients = loss_and_gradients(net, make_batch(samples([9, 5])), NextToken())
    assert np.isfinite(loss.mean) and all(mx.isfinite(g).all() for g in gradients.values())
    assert all(mx.isfinite(a.fused_weight()).all() for a in adapters_in(net).values())


def test_dora_of_an_embedding_is_refused():
    with pytest.raises(MlxtxError, match="DoRA is not for embeddings"):
        adapted(targets=["embed_tokens"], how=LowRank(dora=True))


def test_a_new_adapter_changes_nothing():
    net = model(block(), block(experts=True))
    before = np.array(net(TOKENS))
    for how in (LowRank(), LowRank(dora=True)):
        add_adapters(net, dict.fromkeys(choose(net, "all"), how))
        np.testing.assert_allclose(np.array(net(TOKENS)), before, rtol=1e-5, atol=1e-5)
        remove_adapters(net)


def test_targets_by_name_pattern_and_layer():
    net = model(block(), block(experts=True), block())
    assert choose(net, "q_proj", 1) == ["model.layers.2.self_attn.q_proj"]
    assert choose(net, ["model.layers.0.mlp.*", "embed_tokens"]) == [
        "model.embed_tokens",
        *(f"model.layers.0.mlp.{n}_proj" for n in ("down", "gate", "up")),
    ]
    assert "model.layers.1.mlp.switch_mlp.up_proj" in choose(net, "all")
    assert "model.embed_tokens" not in choose(net, "all")
    assert len(choose(net, "*_proj")) == 3 * 7
    with pytest.raises(MlxtxError, match="no layer is called 'wq'; there are: down_proj, embed"):
        choose(net, "wq")


def test_files_are_mlx_lms_and_come_back(tmp_path):
    net = adapted(block(), block(experts=True), targets=["q_proj", "up_proj", "embed_tokens"])
    wanted = net(TOKENS)
    save_adapter(adapter_of(net), tmp_path, 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 2
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (3, 1.5)
    assert set(parameters["keys"]) == {
        "model.embed_tokens",
        "self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.switch_mlp.up_proj",
    }
    fresh = model(block(), block(experts=True))
    load_adapter(fresh, tmp_path)
    assert mx.array_equal(fresh(TOKENS), wanted)


def test_switching_adapters_and_back_to_the_base(tmp_path):
    net = model()
    base = net(TOKENS)
    for name, how in (("one", LowRank(rank=2)), ("two", LowRank(rank=4, dora=True))):
        save_adapter(adapter_of(adapted(how=how)), tmp_path / name, 2)
    adapters = Adapters(net)
    adapters.load(tmp_path / "one")
    adapters.load(tmp_path / "two", "second")
    outputs = {}
    for name in ("one", "second", None, "one", None, "second"):
        adapters.use(name)
        got = net(TOKENS)
        assert mx.array_equal(outputs.setdefault(name, got), got)
    assert mx.array_equal(outputs[None], base)
    assert not mx.array_equal(outputs["one"], outputs["second"])
    with pytest.raises(MlxtxError, match="no adapter 'third' is loaded"):
        adapters.use("third")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    net = adapted()
    save_adapter(adapter_of(net), tmp_path, 2)
    with pytest.raises(MlxtxError, match="another shape"):
        load_adapter(model(block(), block(), block()), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["mlxtx"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MlxtxError, match=r"no layer model.layers.1"):
        load_adapter(model(block()), tmp_path)
    with pytest.raises(MlxtxError, match=r"o_proj.lora_a must be \(64, 3\), not \(32, 3\)"):
        load_adapter(model(block(heads=8), block(heads=8)), tmp_path)
    with pytest.raises(MlxtxError, match="is missing"):
        load_adapter(net, tmp_path / "nowhere")


def test_a_quantized_base_is_trained_without_being_unpacked():
    net = adapted(quantize=4)
    kinds = {type(a.base).__name__ for a in adapters_in(net).values()}
    assert kinds == {"QuantizedLinear"}
    names = [name for name, _ in tree_flatten(net.trainable_parameters())]
    assert names and all(name.rsplit(".", 1)[1] in ("lora_a", "lora_b") for name in names)
