"""Stages of the training of the small guide that need no training to be tried."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np

from scripts import train_bundled
from training.bundled.packing import load_weights


def test_a_mean_of_runs_has_their_mean_weights_and_every_command(tmp_path, monkeypatch):
    shapes = {"layers.0.mlp.down_proj.weight": (8, 64), "norm.weight": (64,)}
    ends = []
    for seed, name in enumerate(("left", "right", "third")):
        rng = np.random.default_rng(seed)
        weights = {key: mx.array(rng.standard_normal(shape)) for key, shape in shapes.items()}
        train_bundled.write_weights(weights, tmp_path / name)
        (tmp_path / name / "model" / "tokenizer.model").write_bytes(b"pieces")
        (tmp_path / name / "history.txt").write_text(f"first\n{name}\n")
        ends.append({key: np.array(value, np.float64) for key, value in weights.items()})
    runs = [str(tmp_path / name) for name in ("left", "right", "third")]
    command = ["train_bundled.py", "--out", str(tmp_path / "mean"), "--mean", *runs]
    monkeypatch.setattr(sys, "argv", command)
    assert train_bundled.main(command[1:]) == 0

    found = load_weights(tmp_path / "mean" / "model")
    assert found.keys() == shapes.keys()
    for key in shapes:
        wanted = sum(end[key] for end in ends) / 3
        np.testing.assert_allclose(np.array(found[key]), wanted, rtol=1e-6, atol=1e-7)
    assert (tmp_path / "mean" / "model" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "mean" / "data" / "held_out.jsonl").stat().st_size > 0
    assert train_bundled.history(tmp_path / "mean") == [
        "first",
        "left",
        "right",
        "third",
        "python scripts/train_bundled.py --out mean --mean left right third",
    ]
