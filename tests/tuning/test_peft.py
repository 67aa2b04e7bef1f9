"""PEFT's files both ways, and names of families that fuse or transpose what we keep apart."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.decoder.model import DecoderModel
from mlxtx.errors import MlxtxError
from mlxtx.families import family_for
from mlxtx.tuning.adapters import adapter_of, load_adapter, save_adapter
from mlxtx.tuning.layouts import in_layout, parts_of, ties, to_ours, to_theirs
from mlxtx.tuning.lora import LowRank, dense_weight
from mlxtx.tuning.peft import write_peft
from mlxtx.tuning.targets import adapters_in, add_adapters, choose, remove_adapters

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
PHI3 = {**LLAMA, "model_type": "phi3", "pad_token_id": 0}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {c["model_type"]: c for c in (LLAMA, PHI3, GPT2, MIXTRAL)}
TOKENS = mx.array(np.random.default_rng(4).integers(0, 61, (2, 17)))


def made(config, targets="all", how=None):
    mx.random.seed(3)
    net = DecoderModel(family_for(config).decoder_config(config))
    net.freeze()
    if how is not None:
        add_adapters(net, dict.fromkeys(choose(net, targets), how), seed=2)
        for n, adapter in enumerate(adapters_in(net).values()):
            adapter.lora_b = mx.random.normal(adapter.lora_b.shape, key=mx.random.key(n)) * 0.1
            if "m" in adapter:
                adapter.m = adapter.m * 1.1
    net.eval()
    return net


@pytest.mark.parametrize(
    ("peft", "prefix"),
    [(True, "base_model.model.model.language_model."),
     (True, "base_model.model.language_model.model."),
     (False, "language_model.model.")],
)  # fmt: skip
def test_adapters_of_multimodal_models_fit_their_text_part(tmp_path, peft, prefix):
    net = made(LLAMA, ["q_proj", "down_proj"], LowRank(rank=2, scale=1.5))
    adapter, wanted = adapter_of(net), np.array(net(TOKENS))
    remove_adapters(net)
    if peft:
        write_peft(adapter, tmp_path, net, LLAMA)
    else:
        save_adapter(adapter, tmp_path, 2)
    path = tmp_path / ("adapter_model.safetensors" if peft else "adapters.safetensors")
    names = {n: prefix + n[n.index("layers.") :] for n in mx.load(str(path))}
    mx.save_safetensors(str(path), {names[n]: a for n, a in mx.load(str(path)).items()})
    assert np.abs(np.array(net(TOKENS)) - wanted).max() > 1e-2
    load_adapter(net, tmp_path, LLAMA)
    assert np.abs(np.array(net(TOKENS)) - wanted).max() < 1e-5


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_written_for_peft_and_read_again_it_computes_the_same(tmp_path, name, dora):
    config = FAMILIES[name]
    net = made(config, how=LowRank(rank=2, scale=1.5, dora=dora))
    wanted = np.array(net(TOKENS))
    adapter = adapter_of(net)
    remove_adapters(net)
    write_peft(adapter, tmp_path, net, config)
    fresh = made(config)
    assert np.abs(np.array(fresh(TOKENS)) - wanted).max() > 1e-2
    load_adapter(fresh, tmp_path, config)
    np.testing.assert_allclose(np.array(fresh(TOKENS)), wanted, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_their_adapter_is_their_weight_and_ours_is_ours(name):
    """scale B A of their modules, moved as their weights move, is the sum of ours, in float64."""
    config = FAMILIES[name]
    net = made(config, how=LowRank(rank=2, scale=1.5))
    adapter = adapter_of(net)
    deltas = {
        p: np.array(a.fused_weight() - dense_weight(a.base)) for p, a in adapters_in(net).items()
    }
    remove_adapters(net)
    parts = parts_of(net, adapter.layers, adapter.weights)
    for tie in ties(net, config, "hf"):
        own = {p: parts[p] for p in tie.ours if p in parts}
        if not own:
            continue
        theirs = to_theirs(tie, own, {p: deltas[p].shape[-2] for p in own})
        names = family_for(config).names(config)
        shapes = {f"{p}.weight": deltas[p].shape for p in tie.ours}
        group = names.plan_save(shapes, "hf").groups[0]
        wanted = group.apply([mx.array(deltas[p]) for p in tie.ours])
        for path, want in zip(tie.theirs, wanted, strict=True):
            part = theirs[path]
            got = np.array(part.how.scale * part.b @ part.a)
            # Conv1D weights lie the other way round; PEFT's matrices do not.
            got = got.T if name == "gpt2" else got
            np.testing.assert_allclose(got, np.array(want), atol=1e-5, err_msg=path)
        for path, part in to_ours(tie, [theirs[p] for p in tie.theirs]).items():
            got = np.array(part.how.scale * part.b @ part.a)
            np.testing.assert_allclose(got, deltas[path], atol=1e-5, err_msg=path)


def test_files_have_pefts_names_and_settings(tmp_path):
    net = made(PHI3, ["q_proj", "v_proj", "down_proj"], LowRank(rank=2, scale=4.0))
    adapter = adapter_of(net)
    remove_adapters(net)
    write_peft(adapter, tmp_path, net, PHI3, base_model="owner/model")
    weights = mx.load(str(tmp_path / "adapter_model.safetensors"))
    fused = "base_model.model.model.layers.0.self_attn.qkv_proj"
    assert weights[f"{fused}.lora_A.weight"].shape == (4, 32)
    assert weights[f"{fused}.lora_B.weight"].shape == (64, 4)
    assert not np.array(weights[f"{fused}.lora_B.weight"])[32:48].any()  # no adapter on k
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    down = config["rank_pattern"].get("model.layers.0.mlp.down_proj", config["r"])
    assert (down, config["base_model_name_or_path"]) == (2, "owner/model")
    scales = {
        n: config["alpha_pattern"].get(n, config["lora_alpha"])
        / config["rank_pattern"].get(n, config["r"])
        for n in config["target_modules"]
    }
    assert set(scales.values()) == {4.0}


def peft_file(folder, tensors, **config):
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / 2**0.5)])
def test_hub_adapters_are_read_with_their_scale(tmp_path, rslora, scale):
    path = "model.layers.1.self_attn.o_proj"
    a, b = mx.random.normal((2, 32)), mx.random.normal((32, 2))
    prefix = f"base_model.model.{path}"
    peft_file(
        tmp_path, {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, use_rslora=rslora
    )
    net = made(LLAMA)
    weight = dict(net.named_modules())[path].weight
    load_adapter(net, tmp_path, LLAMA)
    fused = adapters_in(net)[path].fused_weight()
    np.testing.assert_allclose(fused, weight + scale * (b @ a), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("model.layers.7.self_attn.q_proj", {}, r"this model has no layer model.layers.7"),
        ("model.layers.0.self_attn.q_proj", {"peft_type": "IA3"}, "type IA3, not LORA"),
        ("model.layers.0.self_attn.q_proj", {"lora_bias": True}, "uses lora_bias"),
        ("model.layers.0.self_attn.q_proj", {"bias": "all"}, "uses bias"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path, name, config, message):
    tensors = {
        f"base_model.model.{name}.lora_A.weight": mx.zeros((2, 32)),
        f"base_model.model.{name}.lora_B.weight": mx.zeros((32, 2)),
    }
    peft_file(tmp_path, tensors, **config)
    with pytest.raises(MlxtxError, match=message):
        load_adapter(made(LLAMA), tmp_path, LLAMA)


@pytest.mark.parametrize("name", FAMILIES)
def test_mlx_lms_files_have_its_names_and_one_rank(tmp_path, name):
    config = FAMILIES[name]
    net = made(config, how=LowRank(rank=2, scale=1.5))
    wanted = np.array(net(TOKENS))
    written = in_layout(adapter_of(net), net, config, "mlx")
    save_adapter(written, tmp_path, 2)
    weights = mx.load(str(tmp_path / "adapters.safetensors"))
    rank = json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]["rank"]
    assert rank == {"llama": 2, "mixtral": 2}.get(name, 6)
    assert {how.rank for how in written.layers.values()} == {rank}
    if name == "phi3":
        assert weights["model.layers.1.self_attn.qkv_proj.lora_b"].shape == (6, 64)
    fresh = made(config)
    load_adapter(fresh, tmp_path, config)
    np.testing.assert_allclose(np.array(fresh(TOKENS)), wanted, atol=2e-5)


def test_scales_that_differ_survive_a_file_that_holds_one(tmp_path):
    net = made(LLAMA)
    scales = {"model.layers.0.self_attn.q_proj": 1.0, "model.layers.1.mlp.down_proj": 6.0}
    add_adapters(net, {path: LowRank(rank=3, scale=s) for path, s in scales.items()})
    for n, adapter in enumerate(adapters_in(net).values()):
        adapter.lora_b = mx.random.normal(adapter.lora_b.shape, key=mx.random.key(n)) * 0.3
    wanted, adapter = np.array(net(TOKENS)), adapter_of(net)
    remove_adapters(net)
    write_peft(adapter, tmp_path / "peft", net, LLAMA)
    load_adapter(net, tmp_path / "peft", LLAMA)
    save_adapter(adapter_of(net), tmp_path / "mlx", 2)
    remove_adapters(net)
    load_adapter(net, tmp_path / "mlx", LLAMA)
    assert np.abs(np.array(net(TOKENS)) - wanted).max() < 1e-4


def test_adapters_of_embeddings_are_as_peft_has_them(tmp_path):
    how = LowRank(rank=3, scale=1.5)
    net = made(LLAMA, ["embed_tokens"], how)
    adapter = adapters_in(net)["model.embed_tokens"]
    wanted, delta = np.array(net(TOKENS)), np.array(adapter.lora_a @ adapter.lora_b)
    write_peft(adapter_of(net), tmp_path, net, LLAMA)
    stored = mx.load(str(tmp_path / "adapter_model.safetensors"))
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    a, b = np.array(stored[name + "A"]), np.array(stored[name + "B"])
    assert a.shape == (3, 61) and np.allclose((b @ a).T, delta, atol=1e-5)
    remove_adapters(net)
    # PEFT keeps the embeddings themselves beside it.
    beside = name.replace("lora_embedding_", "base_layer.weight")
    mx.save_safetensors(
        str(tmp_path / "adapter_model.safetensors"),
        {**stored, beside: net.model.embed_tokens.weight},
    )
    load_adapter(net, tmp_path, LLAMA)
    assert np.abs(np.array(net(TOKENS)) - wanted).max() < 1e-4


def test_peft_adapters_of_tied_embeddings_alone_are_refused(tmp_path):
    tied = {**LLAMA, "tie_word_embeddings": True}
    net = made(tied, ["embed_tokens"], LowRank(rank=3))
    write_peft(adapter_of(net), tmp_path, net, tied)
    remove_adapters(net)
    load_adapter(net, tmp_path, tied)
    remove_adapters(net)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "ensure_weight_tying": False})
    )
    with pytest.raises(MlxtxError, match="which are one in this model"):
        load_adapter(net, tmp_path, tied)


def test_experts_of_different_ranks_and_scales_are_stacked(tmp_path):
    """As PEFT's rank_pattern and alpha_pattern make them."""
    net = made(MIXTRAL)
    plain = np.array(net(TOKENS))
    name = "model.layers.0.block_sparse_moe.experts.{}.w1"
    ranks, alphas, keys = (2, 3, 5, 2), (4.0, 3.0, 20.0, 1.0), mx.random.split(mx.random.key(5), 8)
    tensors, deltas = {}, []
    for e, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        a = mx.random.normal((rank, 32), key=keys[2 * e])
        b = mx.random.normal((64, rank), key=keys[2 * e + 1])
        tensors[f"base_model.model.{name.format(e)}.lora_A.weight"] = a
        tensors[f"base_model.model.{name.format(e)}.lora_B.weight"] = b
        deltas.append(alpha / rank * (b @ a))
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4.0,
        "rank_pattern": {name.format(e): rank for e, rank in enumerate(ranks)},
        "alpha_pattern": {name.format(e): alpha for e, alpha in enumerate(alphas)},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), tensors)
    load_adapter(net, tmp_path, MIXTRAL)
    found = np.array(net(TOKENS))
    remove_adapters(net)
    layer = net.model.layers[0].mlp.switch_mlp.gate_proj
    layer.weight = layer.weight + mx.stack(deltas)
    wanted = np.array(net(TOKENS))
    assert np.abs(found - wanted).max() < 1e-3 < np.abs(wanted - plain).max()


PHI = {**LLAMA, "model_type": "phi", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5}
PHI = {k: v for k, v in PHI.items() if k != "rms_norm_eps"}


def test_a_bias_trained_whole_is_kept(tmp_path):
    net = made(PHI, ["o_proj"], LowRank(rank=2))
    net.lm_head.unfreeze()
    net.lm_head.bias = mx.arange(61) / 10
    wanted, adapter = np.array(net(TOKENS)), adapter_of(net)
    save_adapter(in_layout(adapter, net, PHI, "mlx"), tmp_path / "mlx", 2)
    write_peft(adapter, tmp_path / "peft", net, PHI)
    for folder in ("mlx", "peft"):
        again = made(PHI)
        load_adapter(again, tmp_path / folder, PHI)
        assert np.abs(np.array(again(TOKENS)) - wanted).max() < 1e-4
    net.model.norm.unfreeze()
    with pytest.raises(MlxtxError, match=r"model\.norm\.\w+ was trained as it is"):
        write_peft(adapter_of(net), tmp_path / "no", net, PHI)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_parameters": 3},
        {"lora_parameters": {"scale": "x"}},
        {"mlxtx": 3},
        {"peft_type": "LORA", "lora_alpha": None},
        {"peft_type": "LORA", "alpha_pattern": {"(": 3}},
        {"peft_type": "LORA", "lora_dropout": "x"},
    ],
)
def test_values_that_make_no_sense_are_told_in_one_line(tmp_path, config):
    net = made(LLAMA, ["q_proj"], LowRank(rank=2))
    adapter = adapter_of(net)
    save_adapter(adapter, tmp_path, 2)
    write_peft(adapter, tmp_path, net, LLAMA)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    remove_adapters(net)
    with pytest.raises(MlxtxError, match=r"adapter_config\.json holds what makes no sense"):
        load_adapter(net, tmp_path, LLAMA)
