"""Fusing: what is written computes what was measured, small adapters are not lost in silence."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlxtx.scripts import evaluate as evaluate_command
from mlxtx.scripts import fuse as fuse_command

import mlxtx
from mlxtx.checkpoint import load_model
from mlxtx.errors import MlxtxError
from mlxtx.tiny_model import write_tiny_model
from mlxtx.tuning.evaluate import (
    evaluate_choices,
    evaluate_samples,
    held_out,
    log_probabilities,
    read_choices,
)
from mlxtx.tuning.fuse import fuse
from mlxtx.tuning.model_files import quantization_of, save_model
from mlxtx.tuning.samples import sample
from tests.tuning.tiny import model, samples

RECORDS = [
    {"prompt": f"what is {n} plus {n}", "completion": f"The lamp says {2 * n}."} for n in range(16)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, the same in 4 bits, and a strong and a faint adapter for each."""
    folder = tmp_path_factory.mktemp("fuse")
    write_tiny_model(folder / "plain", num_hidden_layers=2, hidden_size=64)
    net, config = load_model(folder / "plain")
    # No embeddings: their rows are looked up, so only layers with adapters are packed.
    nn.quantize(net, group_size=32, bits=4, class_predicate=lambda p, m: p.endswith("_proj"))
    save_model(net, config, folder / "packed", folder / "plain")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    for base in ("plain", "packed"):
        for name, iters, rate in (("strong", 40, 1e-2), ("faint", 20, 3e-4)):
            mlxtx.tune(
                folder / base,
                folder / "data.jsonl",
                folder / f"{base}-{name}",
                iters=iters,
                learning_rate=rate,
                schedule="constant",
            )
    return folder


def test_the_packed_checkpoint_is_one(made):
    config = json.loads((made / "packed" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    net, _ = load_model(made / "packed", unpack=False)
    assert len(quantization_of(net)) == 14


def test_an_unpacked_base_keeps_everything(made, tmp_path):
    report = fuse(made / "plain", made / "plain-strong", tmp_path, data=made / "data.jsonl")
    assert report.written and report.kept == pytest.approx(1, abs=1e-4)
    assert report.logit_difference < 1e-3 and report.bits is None
    wanted = mlxtx.load(made / "plain", adapter=made / "plain-strong")
    fused = mlxtx.load(tmp_path)
    tokens = mx.array([fused.tokenizer.encode("what is 3 plus 3")])
    np.testing.assert_allclose(fused.model(tokens), wanted.model(tokens), atol=1e-3)


def test_bits_for_an_unpacked_base_are_refused(made, tmp_path):
    with pytest.raises(MlxtxError, match="is not packed, so --bits has no effect"):
        fuse(made / "plain", made / "plain-strong", tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()


def test_a_strong_adapter_survives_four_bits(made, tmp_path):
    report = fuse(made / "packed", made / "packed-strong", tmp_path, data=made / "data.jsonl")
    assert report.written and report.kept >= 0.95 and report.bits == 4
    again = mlxtx.load(tmp_path)
    found = evaluate_samples(again.model, held_out(again, made / "data.jsonl"))
    # What was measured is what was written.
    assert found.loss == pytest.approx(report.fused_loss, rel=1e-4)
    assert found.loss < report.base_loss - 0.9 * (report.base_loss - report.adapter_loss)


def test_a_faint_adapter_is_refused_and_more_bits_keep_it(made, tmp_path):
    faint, data = made / "packed-faint", made / "data.jsonl"
    with pytest.raises(MlxtxError, match=r"would keep .* below 95%, so nothing was written"):
        fuse(made / "packed", faint, tmp_path / "four", data=data)
    assert not (tmp_path / "four").exists()
    report = fuse(made / "packed", faint, tmp_path / "plain", data=data, dequantize=True)
    assert report.written and report.kept == pytest.approx(1, abs=0.02)
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    forced = fuse(made / "packed", faint, tmp_path / "forced", data=data, force=True)
    assert forced.written and forced.kept < 0.95
    net = mlxtx.load(tmp_path / "forced")
    loss = evaluate_samples(net.model, held_out(net, data)).loss
    assert loss == pytest.approx(forced.fused_loss, rel=1e-4)


def test_more_bits_are_found_by_themselves(made, tmp_path):
    adapter, data = made / "packed-faint", made / "data.jsonl"
    report = fuse(made / "packed", adapter, tmp_path, data=data, bits="auto")
    assert report.written and report.kept >= 0.95 and report.bits > 4
    net, _ = load_model(tmp_path, unpack=False)
    assert {q.bits for q in quantization_of(net).values()} == {report.bits}
    again = mlxtx.load(tmp_path)
    found = evaluate_samples(again.model, held_out(again, data))
    assert found.loss == pytest.approx(report.fused_loss, rel=1e-4)


def test_without_text_the_probabilities_are_compared(made, tmp_path):
    report = fuse(made / "plain", made / "plain-strong", tmp_path)
    assert report.written and report.kept > 0.999


def test_the_commands(made, tmp_path, capsys):
    arguments = ["--model", str(made / "plain"), "--adapter", str(made / "plain-strong")]
    data = ["--data", str(made / "data.jsonl")]
    assert fuse_command.main([*arguments, "--out", str(tmp_path / "out"), *data]) == 0
    assert "kept 100.0%" in capsys.readouterr().out
    evaluate_command.main(["--model", str(tmp_path / "out"), *data, "--json"])
    figures = json.loads(capsys.readouterr().out)
    evaluate_command.main([*arguments, *data, "--json"])
    assert figures["loss"] == pytest.approx(json.loads(capsys.readouterr().out)["loss"], rel=1e-4)
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
    with pytest.raises(MlxtxError, match="choose another folder"):
        fuse(made / "plain", made / "plain-strong", made / "plain")


def test_text_is_evaluated_once_a_token(made, tmp_path):
    (tmp_path / "a.txt").write_text("The rain falls on the roof of the old house. " * 20)
    net = mlxtx.load(made / "plain")
    tokens = net.tokenizer.encode((tmp_path / "a.txt").read_text())
    rows = held_out(net, tmp_path / "a.txt", max_length=50)
    assert sum(r.targets for r in rows) == len(tokens) - 1
    whole = [t for r in rows for t in r.tokens[1:].tolist()]
    assert whole == tokens[1:]


def test_log_probabilities_are_those_of_the_logits():
    net, rows = model(), samples((9, 30, 4, 9))
    for row, found in zip(rows, log_probabilities(net, rows), strict=True):
        logits = np.array(net(mx.array(row.tokens[None, :-1]))[0], np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        each = logits[np.arange(len(row) - 1), row.tokens[1:]]
        np.testing.assert_allclose(found, each[row.in_loss[1:]], atol=1e-5)


def test_choices(made, tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [
        {"question": "what is 3 plus 3", "choices": ["The lamp says 6.", "blue"], "answer": "A"},
        {"question": "what is 4 plus 4", "choices": ["green", "The lamp says 8."], "answer": 1},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    net = mlxtx.load(made / "plain", adapter=made / "plain-strong")
    found = evaluate_choices(net, read_choices(path), chat=True)
    assert found.questions == 2 and found.accuracy_by_mean == 1.0
    path.write_text('{"question": "a", "choices": ["b"], "answer": 3}')
    with pytest.raises(MlxtxError, match=r"q.jsonl:1: the answer is none of the 1 choices"):
        read_choices(path)
    path.write_text('{"question": "a", "choices": ["b", ""], "answer": 0}')
    with pytest.raises(MlxtxError, match=r"q.jsonl:1: a choice is empty"):
        read_choices(path)
    long = [{"question": "lamp " * 3000, "choices": ["a", "b"], "answer": 0}]
    with pytest.raises(
        MlxtxError, match=r"question 1 comes to .* than the model's context of 2048"
    ):
        evaluate_choices(net, long)
    with pytest.raises(MlxtxError, match="question 1 comes to no token"):
        evaluate_choices(net, [{"question": "", "choices": ["a", "b"], "answer": 0}])
    assert sample([1, 2]).targets == 1


def test_an_older_model_in_the_folder_is_not_what_loads(made, tmp_path):
    mlxtx.convert(made / "plain", tmp_path / "out", max_shard_bytes=100_000, verify=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    fuse(made / "plain", made / "plain-strong", tmp_path / "out")
    tokens = mx.array([[1, 2, 3, 4, 5]])
    found, _ = load_model(tmp_path / "out")
    wanted = mlxtx.load(made / "plain", adapter=made / "plain-strong").model(tokens)
    assert mx.abs(found(tokens) - wanted).max() < 1e-3


@pytest.mark.parametrize("bits", ["7", "1", "0"])
def test_bits_that_no_packing_has_are_refused_at_once(made, tmp_path, bits):
    with pytest.raises(MlxtxError, match="bits and groups of"):
        fuse(made / "nowhere", made / "plain-strong", tmp_path / "out", bits=bits)


def test_questions_in_any_encoding_and_with_any_line_end_inside(tmp_path):
    line = json.dumps(
        {"question": "a\u2028b\x85", "choices": ["x"], "answer": 0}, ensure_ascii=False
    )
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n")
    assert read_choices(tmp_path / "q.jsonl")[0]["question"] == "a\u2028b\x85"
    (tmp_path / "q.jsonl").write_bytes(b'{"question": "\xe9", "choices": ["x"], "answer": "A"}')
    assert read_choices(tmp_path / "q.jsonl")[0]["answer"] == 0


@pytest.mark.parametrize("option", [("--max-length", "1"), ("--batch-size", "0")])
def test_sizes_that_are_none_are_refused(made, tmp_path, option):
    (tmp_path / "text.txt").write_text("The lamp on the table is warm.")
    arguments = ["--model", str(made / "plain"), "--data", str(tmp_path / "text.txt")]
    with pytest.raises(MlxtxError, match="must be"):
        evaluate_command.main([*arguments, *option])


def test_what_a_half_precision_base_keeps_in_float32_stays_so(made, tmp_path):
    shutil.copytree(made / "plain", tmp_path / "half")
    file = str(tmp_path / "half" / "model.safetensors")
    weights = {n: a if "norm" in n else a.astype(mx.bfloat16) for n, a in mx.load(file).items()}
    name = "model.norm.weight"
    weights[name] = weights[name] + 1 / 3
    mx.eval(weights)
    mx.save_safetensors(file, weights)
    fuse(tmp_path / "half", made / "plain-strong", tmp_path / "out", force=True)
    out = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert mx.array_equal(out[name], weights[name]) and out[name].dtype == mx.float32
    assert out["model.layers.0.mlp.up_proj.weight"].dtype == mx.bfloat16


@pytest.mark.parametrize("keep", [95, -0.1, float("nan")])
def test_a_part_to_keep_is_told_apart_from_percent(made, tmp_path, keep):
    with pytest.raises(MlxtxError, match="keep must be a part from 0 to 1"):
        fuse(made / "plain", made / "plain-faint", tmp_path / "out", keep=keep)


def test_an_adapter_that_is_no_number_is_not_fused(made, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(made / "plain-faint", broken)
    weights = dict(mx.load(str(broken / "adapters.safetensors")))
    name = next(name for name in weights if name.endswith("lora_b"))
    weights[name] = mx.full(weights[name].shape, float("nan"))
    mx.save_safetensors(str(broken / "adapters.safetensors"), weights)
    with pytest.raises(MlxtxError, match="nothing was written"):
        fuse(made / "plain", broken, tmp_path / "out", data=made / "data.jsonl")
    assert not (tmp_path / "out").exists()
