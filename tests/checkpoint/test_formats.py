"""Packed formats against small numpy models of them, and the quantization table."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtx.checkpoint.formats import read_tensors, unpacked
from mlxtx.checkpoint.quantization import MODES, Quantization, QuantizationTable, infer
from mlxtx.checkpoint.source import Checkpoint
from mlxtx.errors import MlxtxError
from tests.checkpoint.builders import bfloat16, save

FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FLOAT4 = np.concatenate([FLOAT4, -FLOAT4])  # sign, two bits of exponent, one of mantissa


def float8(byte: int) -> float:
    """E4M3: sign, four bits of exponent (bias 7), three of mantissa, no infinities."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return np.nan
    return sign * (
        mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


FLOAT8 = np.array([float8(b) for b in range(256)])


def checkpoint(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float64 rounded to the nearest bfloat16, by way of float32, as float32."""
    return np.array(mx.array(values.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32))


@pytest.mark.parametrize(
    ("shape", "block"), [((6, 10), (4, 4)), ((8, 8), (4, 8)), ((3, 5, 7), (2, 3)), ((5, 4), None)]
)
def test_fp8_blocks_equal_the_formats_definition(tmp_path, shape, block):
    rng = np.random.default_rng(0)
    codes = rng.choice([b for b in range(256) if b & 127 != 127], shape).astype(np.uint8)
    settings_ = {"quant_method": "fp8"}
    if block:
        settings_["weight_block_size"] = block
        rows, columns = -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
        scales = rng.uniform(0.01, 3, (*shape[:-2], rows, columns)).astype(np.float32)
        wide = scales.repeat(block[0], -2).repeat(block[1], -1)[..., : shape[-2], : shape[-1]]
    else:
        scales = np.array(0.37, np.float32)
        wide = np.broadcast_to(scales, shape)
    stored = {
        "l.weight": ("F8_E4M3", codes),
        "l.weight_scale_inv": ("F32", scales),
        "l.input_scale": ("F32", np.ones(1, np.float32)),
        "norm.weight": ("F32", np.ones(3, np.float32)),
    }
    for dtype in ("float32", "bfloat16"):
        tensors = read_tensors(
            checkpoint(tmp_path, stored, quantization_config=settings_, torch_dtype=dtype)
        )
        assert list(tensors) == ["l.weight", "norm.weight"]
        weight = tensors["l.weight"]
        assert weight.shape == shape and weight.nbytes == codes.size + scales.size * 4
        expected = (FLOAT8[codes].astype(np.float32) * wide).astype(np.float32)
        if dtype == "bfloat16":
            expected = to_bfloat16(expected)
        read = weight.read()
        assert read.dtype == weight.dtype == getattr(mx, dtype)
        assert np.array_equal(np.array(read.astype(mx.float32)), expected)
        if weight.rows:
            step = weight.row_step
            some = weight.rows(step, min(2 * step, shape[0])).astype(mx.float32)
            assert np.array_equal(np.array(some), expected[step : 2 * step])


def test_all_fp8_codes_and_exponent_scales(tmp_path):
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    powers = np.array([[0], [130]], np.uint8)  # 2**-127, 2**3
    stored = {"w": ("F8_E4M3", codes), "w_scale_inv": ("F8_E8M0", powers)}
    tensors = read_tensors(
        checkpoint(
            tmp_path,
            stored,
            torch_dtype="float32",
            quantization_config={"quant_method": "fp8", "weight_block_size": [1, 128]},
        )
    )
    expected = FLOAT8[codes] * 2.0 ** (powers.astype(int) - 127)
    read = np.array(tensors["w"].read())
    assert np.array_equal(read[1], expected[1].astype(np.float32), equal_nan=True)
    finite = ~np.isnan(expected[0])
    assert np.abs(read[0] - expected[0])[finite].max() < 2**-126  # subnormal products may be 0


def test_one_fp8_scale_of_any_shape_is_for_the_whole_tensor(tmp_path):
    codes = np.arange(20, dtype=np.uint8).reshape(5, 4)
    for shape in ((), (1,), (1, 1)):
        stored = {"w": ("F8_E4M3", codes), "w_scale": ("F32", np.full(shape, 0.5, np.float32))}
        tensors = read_tensors(
            checkpoint(
                tmp_path, stored, torch_dtype="float32", quantization_config={"quant_method": "fp8"}
            )
        )
        assert np.array_equal(np.array(tensors["w"].read()), FLOAT8[codes].astype("f4") / 2)


def test_broken_fp8_checkpoints(tmp_path):
    codes = ("F8_E4M3", np.zeros((4, 4), np.uint8))
    fp8 = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    with pytest.raises(MlxtxError, match=r"w_scale_inv is not there"):
        read_tensors(checkpoint(tmp_path, {"w": codes}, quantization_config=fp8))
    scales = ("F32", np.ones((2, 3), np.float32))
    with pytest.raises(MlxtxError, match=r"needs scales \[2, 2\], and there are \[2, 3\]"):
        read_tensors(
            checkpoint(tmp_path, {"w": codes, "w_scale_inv": scales}, quantization_config=fp8)
        )
    for size in ("x", [0, 0], [2], [2.0, 2], [-1, 2], 2, {"a": 2}):
        settings_ = fp8 | {"weight_block_size": size}
        with pytest.raises(MlxtxError, match="unreadable weight_block_size"):
            read_tensors(
                checkpoint(
                    tmp_path, {"w": codes, "w_scale_inv": scales}, quantization_config=settings_
                )
            )
    flat = {"w": ("F8_E4M3", np.zeros(4, np.uint8)), "w_scale_inv": ("F32", np.ones(2, "f4"))}
    with pytest.raises(MlxtxError, match="has no blocks"):
        read_tensors(checkpoint(tmp_path, flat, quantization_config=fp8))
    with pytest.raises(MlxtxError, match="quantized by bitsandbytes are not supported"):
        read_tensors(
            checkpoint(tmp_path, {"w": codes}, quantization_config={"quant_method": "bitsandbytes"})
        )


def test_mxfp4_blocks_equal_the_formats_definition(tmp_path):
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (2, 6, 3, 16)).astype(np.uint8)
    scales = rng.integers(100, 140, (2, 6, 3)).astype(np.uint8)
    name = "experts.gate_up_proj"
    stored = {f"{name}_blocks": ("U8", blocks), f"{name}_scales": ("U8", scales)}
    tensors = read_tensors(
        checkpoint(tmp_path, stored, quantization_config={"quant_method": "mxfp4"})
    )
    nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(2, 6, 3, 32)
    expected = (FLOAT4[nibbles] * 2.0 ** (scales.astype(int) - 127)[..., None]).reshape(2, 6, 96)
    packed = tensors[f"{name}_blocks"]
    assert packed.shape == (2, 6, 3, 16)
    words = packed.read().view(mx.uint32).flatten(-2)
    whole = Quantization.of("mxfp4").unpack(
        words, tensors[f"{name}_scales"].read(), dtype=mx.float32
    )
    assert np.array_equal(np.array(whole), expected)
    plain = unpacked(tensors, [f"{name}_blocks"])
    assert list(plain) == [name] and plain[name].shape == (2, 96, 6)
    read = plain[name].read().astype(mx.float32)
    assert np.array_equal(np.array(read), expected.swapaxes(1, 2))


def mlx_checkpoint(folder, quantization: Quantization, config):
    weight = mx.random.normal((8, 128), key=mx.random.key(3)).astype(mx.bfloat16)
    folder.mkdir(exist_ok=True)
    parts = {"l" + ending: array for ending, array in quantization.pack(weight).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), parts)
    (folder / "config.json").write_text(json.dumps({"quantization": config}))
    return weight, Checkpoint(folder)


@pytest.mark.parametrize(
    "quantization",
    [Quantization(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
    + [Quantization.of(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")],
    ids=str,
)
def test_mlx_packing_reads_back(tmp_path, quantization):
    weight, stored = mlx_checkpoint(tmp_path, quantization, quantization.to_json())
    tensors = read_tensors(stored)
    packing = tensors["l.weight"].packing
    assert packing.plain.shape == (8, 128)
    plain = unpacked(tensors, ["l.weight"])
    assert list(plain) == ["l.weight"]
    read = plain["l.weight"].read()
    args = quantization.to_json()
    assert mx.array_equal(read, mx.dequantize(*mx.quantize(weight, **args), **args))
    assert read.dtype == plain["l.weight"].dtype == mx.bfloat16
    assert mx.array_equal(plain["l.weight"].rows(3, 7), read[3:7])
    shapes = tensors["l.weight"].shape, tensors["l.scales"].shape
    assert infer(*shapes, tensors["l.scales"].dtype, 128) == quantization
    assert quantization.columns(shapes[0][-1]) == 128 and quantization.matches(*shapes)


def test_a_packing_that_config_json_does_not_name_is_found_or_refused(tmp_path):
    # 5 bits where the table says 4: only one packing with groups of 64 fits.
    _, stored = mlx_checkpoint(tmp_path / "a", Quantization(5, 64), {"bits": 4, "group_size": 64})
    assert read_tensors(stored)["l.weight"].packing.plain.shape == (8, 128)
    config = {"bits": 4, "group_size": 64, "l": {"bits": 8, "group_size": 32}, "k": False}
    _, stored = mlx_checkpoint(tmp_path / "b", Quantization(8, 32), config)
    assert read_tensors(stored)["l.weight"].packing.plain.shape == (8, 128)
    table = QuantizationTable.from_config({"quantization": config})
    assert table("k") is None and table("other") == Quantization(4, 64)
    assert table.to_json() == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "l": {"group_size": 32, "bits": 8, "mode": "affine"},
        "k": False,
    }


@pytest.mark.parametrize(
    "value",
    [
        {"bits": 7, "group_size": 64},
        {"bits": 4, "group_size": 48},
        {"bits": 4, "group_size": 64, "mode": "mxfp4"},
        {"bits": 4, "group_size": 64, "mode": "secret"},
        {"bits": "many", "group_size": 64},
        {"group_size": 64},
        {"bits": 4, "group_size": 64, "l": {"bits": 1}},
        [4],
    ],
)
def test_impossible_quantizations_are_one_clear_line(value):
    with pytest.raises(MlxtxError, match=r"quantization"):
        QuantizationTable.from_config({"quantization": value})


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["bits", "group_size", "mode", "a.b", "c"]),
        st.none()
        | st.booleans()
        | st.integers(-4, 200)
        | st.text(max_size=5)
        | st.sampled_from(list(MODES))
        | st.dictionaries(st.sampled_from(["bits", "group_size", "mode"]), st.integers(0, 128)),
    )
)
def test_the_table_reader_takes_anything(value):
    try:
        table = QuantizationTable.from_config({"quantization": value})
    except MlxtxError:
        return
    if value:
        assert table.default is not None
        again = QuantizationTable.from_config({"quantization": table.to_json()})
        assert again == table


def test_bits_per_weight():
    assert Quantization(4, 64).bits_per_weight() == 4.5
    assert Quantization(4, 64).bits_per_weight(32) == 5.0
    assert Quantization.of("mxfp4").bits_per_weight() == 4.25
    assert not Quantization(4, 64).fits((8, 96)) and not Quantization(4, 64).fits((64,))
    assert bfloat16(np.ones(2, np.float32)).tolist() == [0x3F80, 0x3F80]
