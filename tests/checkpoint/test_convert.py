"""Conversions: there and back bit for bit, the same packing as MLX's own, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlxtx.scripts.convert import main, text_of

import mlxtx
from mlxtx.checkpoint import calibrate, streaming, units
from mlxtx.checkpoint import proof as proof_module
from mlxtx.checkpoint.proof import prove, rounding_error
from mlxtx.checkpoint.quantization import Quantization, QuantizationTable
from mlxtx.checkpoint.recipes import MIXED, Recipe, make_recipe, parse_bits
from mlxtx.checkpoint.shards import alone, split_shards
from mlxtx.checkpoint.source import INDEX, Checkpoint, read_config
from mlxtx.errors import MlxtxError
from mlxtx.events import Progress
from mlxtx.text.tokenizer import Tokenizer
from mlxtx.tiny_model import write_tiny_model
from tests.checkpoint.builders import LLAMA, bfloat16, save, shard, write_llama
from tests.checkpoint.compare import digest, equal, tensors
from tests.parity.recipe import Fixture


@pytest.mark.parametrize(
    "how",
    [Quantization(b, g) for b, g in ((2, 32), (3, 64), (4, 64), (5, 32), (6, 64), (8, 32))]
    + [Quantization.of(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")],
    ids=str,
)
def test_packing_and_unpacking_are_mlx_own(tmp_path, how):
    write_llama(tmp_path / "source", dtype="BF16")
    options = {"bits": how.bits, "group_size": how.group_size, "mode": how.mode}
    result = mlxtx.convert(tmp_path / "source", tmp_path / "packed", **options)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == how.to_json()
    packed, whole = tensors(tmp_path / "packed"), tensors(tmp_path / "source")
    mlxtx.convert(tmp_path / "packed", tmp_path / "back", dequantize=True)
    back = tensors(tmp_path / "back")
    assert set(back) == set(whole)
    assert "quantization" not in json.loads((tmp_path / "back" / "config.json").read_text())
    for name, weight in whole.items():
        if weight.ndim == 1:
            assert equal(packed[name], weight) and equal(back[name], weight)
            continue
        parts = mx.quantize(weight, **how.to_json())
        for part, ending in zip(parts, (".weight", ".scales", ".biases"), strict=False):
            assert equal(packed[name.removesuffix(".weight") + ending], part)
        assert mx.array_equal(back[name], mx.dequantize(*parts, **how.to_json()))
    assert result.bits_per_weight == pytest.approx(how.bits_per_weight(), rel=0.02)
    assert result.proof and 0 < result.proof.kl < 1


def test_pieces_of_rows_give_what_the_whole_gives(tmp_path, monkeypatch):
    write_llama(tmp_path / "source")
    mlxtx.convert(tmp_path / "source", tmp_path / "whole", bits=4, verify=False)
    monkeypatch.setattr(units, "PIECE_BYTES", 3 * 64 * 4)  # three rows at a time
    mlxtx.convert(tmp_path / "source", tmp_path / "pieces", bits=4, verify=False)
    assert digest(tmp_path / "whole") == digest(tmp_path / "pieces")


def test_types_and_what_stays_in_float32(tmp_path):
    """In a half-precision checkpoint, what is kept in float32 stays so."""
    weights = write_llama(tmp_path / "source", torch_dtype="bfloat16")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    stored = {n: ("BF16", bfloat16(w)) for n, w in weights.items()}
    stored["model.norm.weight"] = ("F32", weights["model.norm.weight"])
    save(tmp_path / "source" / "model.safetensors", stored)
    mlxtx.convert(tmp_path / "source", tmp_path / "half", dtype="float16")
    found = tensors(tmp_path / "half")
    assert found["model.norm.weight"].dtype == mx.float32
    assert found["lm_head.weight"].dtype == mx.float16
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float16"
    write_llama(tmp_path / "wide")
    mlxtx.convert(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16")
    assert {a.dtype for a in tensors(tmp_path / "narrow").values()} == {mx.bfloat16}


def test_packed_again_from_packed(tmp_path):
    write_llama(tmp_path / "source")
    packed = mlxtx.convert(tmp_path / "source", tmp_path / "eight", bits=8, group_size=32)
    mlxtx.convert(tmp_path / "eight", tmp_path / "four", bits=4)
    same = mlxtx.convert(tmp_path / "eight", tmp_path / "same")
    assert same.bits_per_weight == packed.bits_per_weight
    assert same.parameters == Checkpoint(tmp_path / "source").nbytes // 4
    assert (
        digest(tmp_path / "eight")["model.safetensors"]
        == digest(tmp_path / "same")["model.safetensors"]
    )
    eight, four = tensors(tmp_path / "eight"), tensors(tmp_path / "four")
    parts = [eight[f"lm_head.{part}"] for part in ("weight", "scales", "biases")]
    again = mx.quantize(mx.dequantize(*parts, 32, 8), 64, 4)
    assert equal(four["lm_head.weight"], again[0]) and equal(four["lm_head.scales"], again[1])


def test_fp8_becomes_plain_and_then_packed(tmp_path):
    weights = write_llama(tmp_path / "source", dtype="BF16")
    stored, rng = {}, np.random.default_rng(0)
    for name, weight in weights.items():
        if "proj" in name:
            codes = np.array(mx.to_fp8(mx.array(weight * 3)))
            blocks = [-(-length // 48) for length in weight.shape]
            stored[name] = ("F8_E4M3", codes)
            stored[name + "_scale_inv"] = ("F32", rng.uniform(0.3, 0.4, blocks).astype(np.float32))
        else:
            stored[name] = ("BF16", bfloat16(weight))
    save(tmp_path / "source" / "model.safetensors", stored)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [48, 48]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    mlxtx.convert(tmp_path / "source", tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = tensors(tmp_path / "plain")
    name = "model.layers.0.mlp.up_proj.weight"
    numbers = np.array(mx.from_fp8(mx.array(stored[name][1]), mx.float32))
    wide = (
        stored[name + "_scale_inv"][1]
        .repeat(48, 0)
        .repeat(48, 1)[: numbers.shape[0], : numbers.shape[1]]
    )
    assert equal(plain[name], mx.array(numbers * wide).astype(mx.bfloat16))
    result = mlxtx.convert(tmp_path / "source", tmp_path / "packed", bits=8)
    assert result.proof.layers and max(result.proof.layers) < 0.03


def test_mixtures_of_experts_pack_and_prove(tmp_path):
    Fixture.load("mixtral").write_checkpoint(tmp_path / "source", legacy=True)
    result = mlxtx.convert(tmp_path / "source", tmp_path / "packed", bits=8, group_size=32)
    found = tensors(tmp_path / "packed")
    stack = found["model.layers.0.block_sparse_moe.switch_mlp.gate_proj.weight"]
    assert stack.dtype == mx.uint32 and stack.shape[0] == 4
    # The router is never packed, nor is what a group does not divide.
    assert "model.layers.0.block_sparse_moe.gate.scales" not in found
    assert result.unpacked and all(path.endswith("down_proj") for path in result.unpacked)
    assert 0 < result.proof.kl < 0.01
    exact = mlxtx.convert(tmp_path / "source", tmp_path / "plain")
    assert exact.proof.exact and max(exact.proof.layers) == 0.0


def test_shards_and_their_index(tmp_path):
    write_llama(tmp_path / "source")
    mlxtx.convert(tmp_path / "source", tmp_path / "one", bits=4)
    mlxtx.convert(tmp_path / "source", tmp_path / "many", bits=4, max_shard_bytes=12_000)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert list(one) == list(many) and all(equal(one[n], many[n]) for n in one)
    files = Checkpoint(tmp_path / "many").files
    assert len(files) > 3
    for file in files:
        path = tmp_path / "many" / file
        held = mx.load(str(path))
        assert sum(a.nbytes for a in held.values()) <= 12_000 or len(held) == 1
        assert mx.load(str(path), return_metadata=True)[1] == {"format": "mlx"}
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in many.values())
    assert index["metadata"]["total_parameters"] == sum(
        math.prod(a.shape) for a in tensors(tmp_path / "source").values()
    )
    shard(tmp_path / "source", 3)  # the source's own shards change nothing
    mlxtx.convert(tmp_path / "source", tmp_path / "again", bits=4)
    again = tensors(tmp_path / "again")
    assert all(equal(one[n], again[n]) for n in one)


def test_a_tensor_beyond_the_limit_has_a_shard_of_its_own():
    layout = {name: ("U8", (size,)) for name, size in zip("abcd", (3, 9, 2, 2), strict=True)}
    assert split_shards(layout, 4) == [["a"], ["b"], ["c", "d"]]


# ------------------------------------------------------------------------------------- recipes


def test_rule_files_and_named_recipes(tmp_path):
    write_llama(tmp_path / "source", dtype="BF16")
    rules = tmp_path / "rules.txt"
    rules.write_text(
        "# what suffers most\nlm_head = 8\n*.0.*.down_proj = 6/32  # the first layer\n"
        "*.q_proj = none\n*.k_proj = mxfp8\n"
    )
    result = mlxtx.convert(tmp_path / "source", tmp_path / "ruled", bits=4, recipe=rules)
    table = json.loads((tmp_path / "ruled" / "config.json").read_text())["quantization"]
    assert table.pop("lm_head") == Quantization(8, 64).to_json()
    assert table.pop("model.layers.0.mlp.down_proj") == Quantization(6, 32).to_json()
    assert table.pop("model.layers.1.self_attn.k_proj") == Quantization.of("mxfp8").to_json()
    found = tensors(tmp_path / "ruled")
    assert "model.layers.0.self_attn.q_proj.scales" not in found
    assert found["model.layers.0.self_attn.k_proj.scales"].dtype == mx.uint8
    assert "lm_head: 8 bits" in result.recipe
    model, _ = mlxtx.load_model(tmp_path / "ruled")
    assert model(mx.array([[1, 2]])).shape == (1, 2, 96)
    for name, (low, high) in MIXED.items():
        recipe = make_recipe(name, bits=None, group_size=64, mode="affine", layers=16)
        assert recipe.default.bits == low and recipe("lm_head").bits == high
        assert recipe("model.layers.0.mlp.down_proj").bits == high
        assert recipe("model.layers.3.mlp.down_proj").bits == low
        assert recipe("model.layers.4.self_attn.v_proj").bits == high
        assert recipe("model.layers.4.self_attn.q_proj").bits == low


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lm_head 8\n", "line 1: expected 'pattern = bits'"),
        ("\n\nlm_head = 7\n", "line 3: affine quantization has"),
        ("lm_head = 0\n", "line 1: affine quantization has"),
        ("lm_head = 4/0\n", "line 1: affine quantization has"),
        ("lm_head = many\n", "'many' is no number of bits"),
        ("no_such_module = 4\n", "no module of this model fits the rule 'no_such_module'"),
    ],
)
def test_bad_rules_name_their_line(tmp_path, text, message):
    write_llama(tmp_path / "source")
    (tmp_path / "rules").write_text(text)
    with pytest.raises(MlxtxError, match=message):
        mlxtx.convert(tmp_path / "source", tmp_path / "out", recipe=tmp_path / "rules")
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "rules").write_bytes(b"\xff\xfe\0")
    with pytest.raises(MlxtxError, match="is not UTF-8 text"):
        mlxtx.convert(tmp_path / "source", tmp_path / "out", recipe=tmp_path / "rules")


def test_recipe_words():
    assert parse_bits("none") is None
    assert parse_bits("6") == Quantization(6, 64)
    assert parse_bits("6", 32) == Quantization(6, 32)
    assert parse_bits("6/128", 32) == Quantization(6, 128)
    with pytest.raises(MlxtxError, match="no recipe nothing"):
        make_recipe("nothing", bits=4, group_size=64, mode="affine", layers=2)
    with pytest.raises(MlxtxError, match="made of affine bits"):
        make_recipe("mixed_4_6", bits=None, group_size=64, mode="nvfp4", layers=2)
    first_wins = Recipe(Quantization(4, 64), [("a*", Quantization(8, 64)), ("ab", None)])
    assert first_wins("ab") == Quantization(8, 64)


# ------------------------------------------------------------------------------------ the proof


def test_the_proof_finds_a_wrong_tensor(tmp_path):
    write_llama(tmp_path / "source")
    result = mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4)
    assert all(e <= a for e, a in zip(result.proof.layers, result.proof.allowed, strict=True))
    path = tmp_path / "out" / "model.safetensors"
    good = path.read_bytes()
    name = "model.layers.1.mlp.down_proj.scales"
    info = Checkpoint(tmp_path / "out").tensors[name]
    path.write_bytes(good[: info.start] + bytes(info.nbytes) + good[info.end :])
    with pytest.raises(MlxtxError, match="layer 1 of the result differs by"):
        prove(tmp_path / "source", tmp_path / "out")
    nan = np.full(info.nbytes // 4, np.nan, np.float32).tobytes()
    path.write_bytes(good[: info.start] + nan + good[info.end :])
    with pytest.raises(MlxtxError, match="layer 1 hold numbers that are not finite"):
        prove(tmp_path / "source", tmp_path / "out")


def test_the_proof_measures_what_a_float64_model_of_it_says(tmp_path):
    """KL and errors of the logits against the plain definitions, from the loaded models."""
    write_llama(tmp_path / "source")
    result = mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=3, group_size=32)
    tokens = proof_module._arbitrary(LLAMA["vocab_size"])
    a, b = (
        np.array(mlxtx.load_model(tmp_path / name)[0](tokens)).astype(np.float64)
        for name in ("source", "out")
    )
    log_a, log_b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    assert result.proof.kl == pytest.approx(
        (np.exp(log_a) * (log_a - log_b)).sum(-1).mean(), rel=1e-3
    )
    assert result.proof.logits_max == pytest.approx(np.abs(a - b).max(), rel=1e-3)
    assert result.proof.logits_mean == pytest.approx(np.abs(a - b).mean(), rel=1e-3)
    assert result.proof.agree == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean())


def test_what_rounding_costs_is_about_what_is_allowed_for():
    weight = mx.random.normal((256, 512), key=mx.random.key(0))
    for how in [Quantization(b, 64) for b in (2, 3, 4, 5, 6, 8)] + [
        Quantization.of(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")
    ]:
        back = mx.dequantize(*how.pack(weight).values(), **how.to_json()).astype(mx.float32)
        error = (mx.linalg.norm(back - weight) / mx.linalg.norm(weight)).item()
        assert 0.5 < error / rounding_error(how) < 1.5, how


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(streaming, "ROWS_BYTES", 1 << 20)
    size = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
    peaks = []
    for layers in (2, 8):
        write_llama(tmp_path / f"{layers}", dtype="BF16", num_hidden_layers=layers, **size)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        result = mlxtx.convert(tmp_path / f"{layers}", tmp_path / f"{layers}-packed", bits=4)
        peaks.append(mx.get_peak_memory() - before)
    assert result.proof
    assert max(peaks) < 6 * units.PIECE_BYTES < Checkpoint(tmp_path / "8").nbytes / 2


# ------------------------------------------------------------------------- what comes along


def test_companions_come_along_unchanged_and_the_card_tells_the_story(tmp_path):
    source = tmp_path / "source"
    write_llama(source, dtype="BF16")
    companions = {
        "tokenizer.json": b'{"version": "1.0",  "odd": "spacing"}',
        "tokenizer_config.json": b"{}",
        "tokenizer.model": bytes(range(256)),
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
        "preprocessor_config.json": b"{}",
        "merges.txt": b"a b\n",
        "LICENSE": b"free",
    }
    for name, content in companions.items():
        (source / name).write_bytes(content)
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "._tokenizer.json").write_bytes(b"\0\5\x16\7")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: big/one\n---\n# Hi\n")
    before = digest(source)
    result = mlxtx.convert(source, tmp_path / "out", bits=4)
    assert digest(source) == before
    out = tmp_path / "out"
    written = {"config.json", "model.safetensors", INDEX, "README.md"}
    assert {p.name for p in out.iterdir()} == set(companions) | written
    for name, content in companions.items():
        assert (out / name).read_bytes() == content
    card = (out / "README.md").read_text()
    for line in ("license: apache-2.0", "base_model: big/one", "- mlx", "4 bits, groups of 64"):
        assert line in card
    assert f"KL divergence {result.proof.kl:.2e}" in card


@pytest.mark.parametrize(
    ("front", "lines"),
    [
        ("license:\n- mit\nbase_model:\n  - big/one", ["license: mit", "base_model: big/one"]),
        ("license:\n- mit\n- other\ntags:\n- x", ["license: [mit, other]"]),
        ("license: other\nlicense_link: >-\n  https://x.y", ["license: other"]),
    ],
)
def test_the_card_keeps_lists_and_leaves_out_long_texts(tmp_path, front, lines):
    write_llama(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(f"\ufeff---\n{front}\n---\n# Hi\n")
    mlxtx.convert(tmp_path / "source", tmp_path / "out", verify=False)
    head = (tmp_path / "out" / "README.md").read_text().split("---\n")[1].splitlines()
    assert sorted(head[4:]) == sorted(lines)


def test_the_card_of_the_bundled_model_names_no_repository(tmp_path):
    mlxtx.convert("bundled", tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: bundled" not in card and "Hub repository" not in card


# --------------------------------------------------------------------------------- bad input


def test_numbers_beyond_half_precision_are_refused(tmp_path):
    """Also in a row of the embeddings that no prompt of the proof reaches."""
    weights = write_llama(tmp_path / "source", dtype="BF16")
    weights["model.embed_tokens.weight"][90, 3] = 1e6
    stored = {name: ("BF16", bfloat16(array)) for name, array in weights.items()}
    save(tmp_path / "source" / "model.safetensors", stored)
    for more in ({}, {"bits": 4}):
        with pytest.raises(MlxtxError, match=r"model.embed_tokens.weight .*use bfloat16"):
            mlxtx.convert(tmp_path / "source", tmp_path / "out", dtype="float16", **more)


def test_where_a_result_may_not_go(tmp_path):
    source = tmp_path / "models" / "source"
    write_llama(source)
    for out in (source, source / "inside", tmp_path / "models"):
        with pytest.raises(MlxtxError, match="lie in each other"):
            mlxtx.convert(source, out, overwrite=True)
    out = tmp_path / "out"
    mlxtx.convert(source, out, bits=4)
    with pytest.raises(MlxtxError, match="exists; choose another folder or pass --overwrite"):
        mlxtx.convert(source, out, bits=8)
    mlxtx.convert(source, out, bits=8, overwrite=True)
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 8
    for length in (250, 300):
        with pytest.raises(MlxtxError, match=r"cannot write .*too long"):
            mlxtx.convert(source, tmp_path / ("x" * length))
    (tmp_path / "letters").mkdir()
    with pytest.raises(MlxtxError, match="is no model's folder, so it is not overwritten"):
        mlxtx.convert(source, tmp_path / "letters", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letters", "models", "out"]


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
def test_a_source_where_the_work_would_lie_is_left_alone(tmp_path, name):
    write_llama(tmp_path / name)
    write_llama(tmp_path / "out")
    before = digest(tmp_path / name)
    with pytest.raises(MlxtxError, match="choose another name"):
        mlxtx.convert(tmp_path / name, tmp_path / "out", bits=4, overwrite=True)
    assert digest(tmp_path / name) == before


def test_a_model_where_the_work_would_lie_is_left_alone(tmp_path):
    write_llama(tmp_path / "source")
    write_llama(tmp_path / "out.partial")
    before = digest(tmp_path / "out.partial")
    with pytest.raises(MlxtxError, match="choose another name"):
        mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4)
    assert digest(tmp_path / "out.partial") == before


def test_broken_sources_leave_nothing(tmp_path):
    source = tmp_path / "source"
    write_llama(source)
    shard(source, 2)
    second = source / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    for damage, message in (
        (content[:-5], "cut short"),
        (b"\xff" * 8 + content[8:], "header claims"),
        (content[:9] + b"x" + content[10:], "not a sound safetensors file"),
    ):
        second.write_bytes(damage)
        with pytest.raises(MlxtxError, match=message):
            mlxtx.convert(source, tmp_path / "out", bits=4)
    second.write_bytes(content)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(MlxtxError, match=r"missing model\.layers\.2"):
        mlxtx.convert(source, tmp_path / "out", bits=4)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    write_llama(tmp_path / "source")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(MlxtxError, match=r"0\.00 GB free and the result needs 0\.07 GB"):
        mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


FULL = """
import resource, signal, sys
from mlxtx.checkpoint.convert import convert
from mlxtx.errors import MlxtxError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    convert(sys.argv[1], sys.argv[2], bits=4, verify=False)
except MlxtxError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


def test_a_disk_that_fills_up(tmp_path):
    """A limit on the size of files stands for the full disk: writing fails in the middle."""
    write_llama(tmp_path / "source")
    command = [sys.executable, "-c", FULL, str(tmp_path / "source"), str(tmp_path / "out"), "20000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "cannot write" in run.stdout or "disk is full" in run.stdout, run.stderr
    assert not run.stderr and not (tmp_path / "out").exists()
    mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4)  # once there is room, it goes on
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "2, 3, 4, 5, 6 or 8 bits"),
        ({"bits": 0}, "2, 3, 4, 5, 6 or 8 bits"),
        ({"bits": 4.0}, "2, 3, 4, 5, 6 or 8 bits"),
        ({"bits": 4, "group_size": 48}, "groups of 32, 64 or 128"),
        ({"bits": 4, "group_size": 0}, "groups of 32, 64 or 128"),
        ({"group_size": 32}, "--group-size alone packs nothing"),
        ({"mode": "mxfp5"}, "unknown quantization mode 'mxfp5'"),
        ({"bits": 4, "dequantize": True}, "either --dequantize or a quantization"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"calibrate": "text.txt"}, "belong together"),
        ({"mode": "mxfp4", "group_size": 128}, "mxfp4 quantization has 4 bits and groups of 32"),
        ({"bits": 5, "mode": "mxfp4"}, "mxfp4 quantization has 4 bits"),
    ],
)
def test_impossible_wishes_are_one_clear_line(tmp_path, options, message):
    write_llama(tmp_path / "source")
    with pytest.raises(MlxtxError, match=message):
        mlxtx.convert(tmp_path / "source", tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_columns_that_no_group_divides_stay_and_are_told(tmp_path, capsys):
    write_llama(tmp_path / "source", intermediate_size=80, dtype="BF16")
    out = tmp_path / "out"
    assert main([str(tmp_path / "source"), "--out", str(out), "--bits", "4"]) == 0
    printed = capsys.readouterr()
    assert "not packed, as the group does not divide their columns" in printed.out
    assert "model.layers.0.mlp.down_proj" in printed.out and printed.err == ""
    assert tensors(out)["model.layers.0.mlp.down_proj.weight"].dtype == mx.bfloat16
    assert "`model.layers.1.mlp.down_proj`" in (out / "README.md").read_text()
    with pytest.raises(MlxtxError, match="name one model"):
        main(["--out", str(out)])


def test_progress_reads_well():
    event = Progress(stage="convert", done=1e9, total=4e9, unit="bytes", seconds=5)
    assert text_of(event) == "convert 1.00 of 4.00 GB, 15 s left"
    event = Progress(stage="verify", done=0, total=16, unit="layers")
    assert text_of(event) == "verify 0 of 16 layers"


# ------------------------------------------------------------------------------- calibration


def test_bits_go_where_they_take_away_most_error():
    """The choice is within the budget and no worse than what trying all choices finds."""
    rng = np.random.default_rng(2)
    levels = [Quantization(bits, 64) for bits in calibrate.BITS]
    found = []
    for index, size in enumerate((64, 64, 128, 256)):
        weight = 10 ** rng.uniform(-3, 0)
        errors = {how: weight * 4.0**-how.bits for how in levels}
        found.append(calibrate.Sensitivity(f"m{index}", size, errors))
    total = sum(module.size for module in found)
    for target in (2.5, 3.4, 4.5, 5.7, 8.5):
        recipe = calibrate.choose(found, target, 64)
        chosen = [recipe(module.path) for module in found]
        spent = sum(h.bits_per_weight() * m.size for h, m in zip(chosen, found, strict=True))
        assert spent <= target * total + 1e-9
        error = sum(m.errors[h] for h, m in zip(chosen, found, strict=True))
        best = min(
            sum(m.errors[h] for h, m in zip(combination, found, strict=True))
            for combination in itertools.product(levels, repeat=len(found))
            if sum(h.bits_per_weight() * m.size for h, m in zip(combination, found, strict=True))
            <= target * total + 1e-9
        )
        assert error <= 2.5 * best, target
    with pytest.raises(MlxtxError, match=r"out of reach.*2\.5 to 8\.5"):
        calibrate.choose(found, 1.5, 64)


def test_calibrating_on_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "LENGTH", 24)
    write_tiny_model(tmp_path / "source", torch_dtype="bfloat16")
    text = tmp_path / "text.txt"
    text.write_text("The window is open and the lamp is warm, but the rain falls on. " * 30)
    events = []
    result = mlxtx.convert(
        tmp_path / "source",
        tmp_path / "out",
        calibrate=text,
        target_bpw=3.9,
        group_size=32,
        on_event=events.append,
    )
    assert 3.6 < result.bits_per_weight < 4.05
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert len({json.dumps(v) for v in table.values() if isinstance(v, dict)}) > 1
    source, uniform, chosen = result.calibration.figures.values()
    assert source.kl == 0.0 and source.perplexity > 1
    # 3.9 bits with scales: 2 bits everywhere is the largest uniform packing that is no larger.
    assert chosen.kl < 0.7 * uniform.kl
    assert {e.stage for e in events} == {"calibrate", "convert", "verify"}
    assert result.calibration.lines()[2] in (tmp_path / "out" / "README.md").read_text()
    text.write_text("short")
    with pytest.raises(MlxtxError, match="calibration needs at least 24"):
        mlxtx.convert(tmp_path / "source", tmp_path / "no", calibrate=text, target_bpw=4)


def test_what_is_written_as_one_is_calibrated_as_one(tmp_path, monkeypatch):
    """Phi-3 has one projection for queries, keys and values: their figures are of one packing."""
    rows = [[(7 * i + 3 * row) % 60 for i in range(16)] for row in range(4)]
    monkeypatch.setattr(calibrate, "_tokens", lambda folder, text: rows)
    Fixture.load("phi3").write_checkpoint(tmp_path / "source")
    options = {"calibrate": "text", "target_bpw": 5.0, "group_size": 32, "dtype": "bfloat16"}
    result = mlxtx.convert(tmp_path / "source", tmp_path / "out", **options)
    written = QuantizationTable.from_config(read_config(tmp_path / "out"))
    chosen, seen = result.calibration.recipe, set()
    for i in range(4):
        parts = {
            "qkv": ["self_attn.q", "self_attn.k", "self_attn.v"],
            "gate_up": ["mlp.gate", "mlp.up"],
        }
        for fused, names in parts.items():
            where = names[0].split(".")[0]
            how = written(f"model.layers.{i}.{where}.{fused}_proj")
            assert {chosen(f"model.layers.{i}.{name}_proj") for name in names} == {how}
            seen.add(how)
    assert len(seen) > 1


def test_what_was_not_measured_stays_within_the_bits():
    found = [calibrate.Sensitivity("m", 64, {Quantization(b, 64): 4.0**-b for b in calibrate.BITS})]
    for target, bits in ((2.7, 2), (3.9, 3), (4.5, 4), (8.5, 8)):
        assert calibrate.choose(found, target, 64)("elsewhere") == Quantization(bits, 64)


def test_what_is_never_packed_is_not_rounded_for_the_figures(tmp_path):
    Fixture.load("qwen2_moe").write_checkpoint(tmp_path / "model")
    gates = Recipe(Quantization(2, 32), [("*shared_expert_gate", Quantization(2, 32)), ("*", None)])
    _, figures = calibrate.quality(tmp_path / "model", mx.array([[5, 9, 2, 7]]), [None, gates])
    assert figures.kl == 0.0


def test_the_rows_that_judge_are_others_than_those_that_choose(tmp_path):
    write_tiny_model(tmp_path / "source")
    text = tmp_path / "text.txt"
    for length in (220, 230, 500):  # one row of tokens, and more
        text.write_text("".join(chr(0x100 + i) for i in range(length // 2)))
        rows = calibrate._tokens(tmp_path / "source", text)
        assert len(rows) > 1
        joined = Tokenizer.load(tmp_path / "source").encode(text.read_text())
        starts = [next(i for i in range(len(joined)) if joined[i : i + len(r)] == r) for r in rows]
        assert all(b - a >= len(rows[0]) for a, b in itertools.pairwise(starts))


def test_bits_out_of_reach_are_told_before_anything_is_measured(tmp_path):
    write_llama(tmp_path / "source")
    with pytest.raises(MlxtxError, match="out of reach"):
        mlxtx.convert(tmp_path / "source", tmp_path / "out", calibrate="no such", target_bpw=12)


def test_measured_sensitivity_is_the_change_of_the_stream(tmp_path):
    """One module's figure against the model itself with that module rounded."""
    write_llama(tmp_path / "a")
    tokens = mx.array([[5, 9, 2, 7, 1, 3]])
    found = {s.path: s for s in calibrate.measure(tmp_path / "a", tokens, 32)}
    path, how = "model.layers.1.mlp.down_proj", Quantization(3, 32)
    model, _ = mlxtx.load_model(tmp_path / "a")
    states = []
    model.model.norm = lambda x: states.append(x) or x
    model(tokens)
    layer = model.layers[1].mlp.down_proj
    layer.weight = mx.dequantize(*how.pack(layer.weight).values(), 32, 3)
    model(tokens)
    exact, rounded = states
    expected = (mx.square(rounded - exact).sum() / mx.square(exact).sum()).item()
    assert found[path].errors[how] == pytest.approx(expected, rel=1e-3)
    assert found[path].size == 64 * 128
    assert {"model.embed_tokens", "lm_head"} <= set(found) and len(found) == 16


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_may_be_packed_anew_in_the_same_bits(tmp_path, bits):
    write_llama(tmp_path / "source", dtype="BF16")
    mlxtx.convert(tmp_path / "source", tmp_path / "packed", bits=bits)
    result = mlxtx.convert(tmp_path / "packed", tmp_path / "again", bits=bits)
    assert result.proof and result.proof.layers
    kept = mlxtx.convert(tmp_path / "packed", tmp_path / "kept")
    assert kept.proof and kept.proof.exact


def test_calibration_and_other_ways_to_choose_bits_exclude_each_other(tmp_path):
    write_llama(tmp_path / "source")
    for more in ({"bits": 4}, {"recipe": "mixed_4_6"}, {"mode": "mxfp4"}):
        options = {"calibrate": "text.txt", "target_bpw": 4.5, **more}
        with pytest.raises(MlxtxError, match="--calibrate chooses the bits"):
            mlxtx.convert(tmp_path / "source", tmp_path / "out", **options)


def test_a_folder_is_written_by_one_conversion_at_a_time(tmp_path):
    write_llama(tmp_path / "source")
    with alone(tmp_path / "out.partial"), pytest.raises(MlxtxError, match="another conversion"):
        mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4)
    mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4)


def test_what_an_ended_conversion_left_beside_does_not_stop_the_next(tmp_path):
    write_llama(tmp_path / "source")
    mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=4)
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "config.json").write_text("{}")
    mlxtx.convert(tmp_path / "source", tmp_path / "out", bits=8, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_an_upload_that_can_not_begin_costs_no_conversion(tmp_path, monkeypatch):
    write_llama(tmp_path / "source")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    arguments = [str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--bits", "4"]
    for repo, why in (("mine", "it is owner/name"), ("owner/mine", "hf auth login")):
        with pytest.raises(MlxtxError, match=why):
            main([*arguments, "--upload", repo])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
