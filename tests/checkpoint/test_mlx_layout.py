"""What is written for MLX is what mlx-lm writes, tensor by tensor (recorded from mlx-lm)."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import mlx.core as mx
import pytest

import mlxtx
from mlxtx.checkpoint.safetensors import array_bytes
from mlxtx.families import families
from tests.checkpoint.compare import tensors
from tests.parity.recipe import Fixture

RECORDED = json.loads(
    gzip.decompress((Path(__file__).parent / "mlx_lm_layouts.json.gz").read_bytes())
)
# mlx-lm leaves out ERNIE's correction of the router's choice, without which experts differ.
DROPPED_THERE = "moe_statics.e_score_correction_bias"
# mlx-lm packs some modules of these in its own way: gpt-oss's experts stay as they are stored,
# Granite's outputs get eight bits.
OWN_CHOICE = ("gpt_oss_mxfp4", "granite", "granitemoe")
# mlx-lm packs these too; here a router and its like keep all their bits.
KEPT = ("gate", "router", "shared_expert_gate", "router.layer", "router.proj", "gate.wg", "wpe")


def layout(folder):
    return {
        name: [str(a.dtype).rpartition(".")[2], list(a.shape), zlib.crc32(bytes(array_bytes(a)))]
        for name, a in tensors(folder).items()
    }


@pytest.mark.parametrize("name", RECORDED)
def test_the_layout_is_mlx_lms(tmp_path, name):
    fixture = Fixture.load(name)
    if fixture.model_type not in families():
        pytest.skip(f"{fixture.model_type} is not supported")
    fixture.write_checkpoint(tmp_path / "source", legacy=True)
    mlxtx.convert(tmp_path / "source", tmp_path / "plain", verify=False)
    plain = layout(tmp_path / "plain")
    plain = {n: entry for n, entry in plain.items() if not n.endswith(DROPPED_THERE)}
    assert plain == RECORDED[name]["plain"]
    if name in OWN_CHOICE:
        return
    mlxtx.convert(tmp_path / "source", tmp_path / "packed", bits=4, group_size=32, verify=False)
    ours, theirs = layout(tmp_path / "packed"), dict(RECORDED[name]["packed"])
    ours = {n: entry for n, entry in ours.items() if not n.endswith(DROPPED_THERE)}
    kept = {
        tensor.removesuffix(".weight")
        for tensor, (kind, *_) in ours.items()
        if kind != "uint32" and tensor in theirs and theirs[tensor][0] == "uint32"
    }
    assert all(path.endswith(KEPT) for path in kept), kept
    for path in kept:
        for ending in (".weight", ".scales", ".biases"):
            theirs.pop(path + ending)
        ours.pop(path + ".weight")
    if mx.default_device() != mx.Device(mx.cpu):  # a GPU may round the last bit another way
        ours, theirs = ({n: v[:2] for n, v in each.items()} for each in (ours, theirs))
    assert ours == theirs
