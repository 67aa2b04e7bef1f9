"""Every family from the Hugging Face layout to MLX's and back, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mlxtx
from mlxtx.families import families
from tests.checkpoint.builders import bfloat16, save
from tests.checkpoint.compare import equal, tensors
from tests.parity.recipe import Fixture, fixture_names


def one_of_each_family():
    seen = {}
    for name in fixture_names():
        seen.setdefault(Fixture.load(name).model_type, name)
    return [name for kind, name in sorted(seen.items()) if kind in families()]


@pytest.mark.parametrize("name", one_of_each_family())
def test_there_and_back_is_bit_exact(tmp_path, name):
    """HF -> MLX -> HF, in bfloat16, for every family."""
    fixture = Fixture.load(name)
    fixture.write_checkpoint(tmp_path / "there", legacy=True)
    weights = {
        n: ("BF16", bfloat16(a)) if a.dtype == np.float32 else ("U8", a)
        for n, a in fixture.weights(legacy=True).items()
    }
    save(tmp_path / "there" / "model.safetensors", weights)
    mlxtx.convert(tmp_path / "there", tmp_path / "mlx", verify=False)
    mlxtx.convert(tmp_path / "mlx", tmp_path / "back", dequantize=True, verify=False)
    before, after = tensors(tmp_path / "there"), tensors(tmp_path / "back")
    family = families()[fixture.model_type]
    names = family.names(fixture.legacy_config)
    before = {names.canonical(n): a for n, a in before.items()}
    packed = [n for n in before if n.endswith("_blocks")]
    assert set(after) == set(before) - set(packed) - {
        n.removesuffix("_blocks") + "_scales" for n in packed
    } | {n.removesuffix("_blocks") for n in packed}
    for tensor in set(before) & set(after):
        assert equal(before[tensor], after[tensor]), tensor
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    original = {k: v for k, v in fixture.legacy_config.items() if k != "quantization_config"}
    assert config == original
