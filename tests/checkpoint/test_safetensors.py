"""The safetensors reader against broken, hostile and random files, and the streaming writer."""

from __future__ import annotations

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxtx.checkpoint import safetensors
from mlxtx.checkpoint.safetensors import Reader, array_bytes, encode_header, read_header
from mlxtx.errors import MlxtxError
from tests.checkpoint.builders import raw_file, save

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def entry(**changes):
    return {"a": GOOD["a"] | changes}


def test_a_sound_file(tmp_path):
    path = raw_file(
        tmp_path / "x.safetensors", GOOD | {"__metadata__": {"format": "pt"}}, b"\0" * 8
    )
    header = read_header(path)
    start = path.stat().st_size - 8
    assert header.tensors["a"] == safetensors.TensorInfo("F32", (2,), start, start + 8)
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (GOOD, b"\0" * 7, "cut short"),
        (GOOD, b"\0" * 9, "left over"),
        (entry(data_offsets=[4, 12]), b"\0" * 12, "hole"),
        (entry(data_offsets=[8, 0]), b"\0" * 8, "8 bytes; its offsets hold -8"),
        (entry(data_offsets=[0, 4]), b"\0" * 8, "offsets hold 4"),
        (entry(data_offsets=[0]), b"\0" * 8, "data_offsets"),
        (entry(data_offsets=[0.0, 8.0]), b"\0" * 8, "data_offsets"),
        (entry(data_offsets=[-8, 0]), b"\0" * 8, "data_offsets"),
        (entry(shape=[-2]), b"\0" * 8, "shape"),
        (entry(shape=[True, 2]), b"\0" * 8, "shape"),
        (entry(shape=[2**62, 2**62]), b"\0" * 8, "bytes; its offsets"),
        (entry(shape=[0, 2**31], data_offsets=[0, 0]), b"", "MLX counts to 2**31"),
        (entry(shape=[10**30]), b"\0" * 8, "shape"),
        (entry(shape=[1] * 33 + [2]), b"\0" * 8, "shape"),
        (entry(shape="2"), b"\0" * 8, "shape"),
        (entry(dtype="F7"), b"\0" * 8, "unknown type 'F7'"),
        (entry(dtype=["F32"]), b"\0" * 8, "dtype"),
        (entry(dtype="F4", shape=[3]), b"\0" * 8, "no whole number of bytes"),
        (entry(extra=1), b"\0" * 8, "nothing else"),
        ({"a": [1]}, b"", "needs dtype"),
        ({"a\x1b[2J": GOOD["a"]}, b"\0" * 8, "control characters"),
        ([], b"", "not a JSON object"),
        (b"{", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a":1,"a":2}', b"", "comes twice"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        (
            GOOD | {"b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}},
            b"\0" * 12,
            "tensor 'b' overlaps",
        ),
        (
            GOOD | {"b": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}},
            b"\0" * 8,
            "overlaps",
        ),
    ],
)
def test_a_broken_header_is_one_clear_line(tmp_path, header, data, message):
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(MlxtxError, match="not a sound safetensors file") as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 9])
def test_an_absurd_header_length_reads_nothing(tmp_path, length):
    path = raw_file(tmp_path / "x.safetensors", b"{}", length=length)
    with pytest.raises(MlxtxError, match="header claims"):
        read_header(path)


def test_files_too_short_for_a_header(tmp_path):
    for content in (b"", b"\0" * 7):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(MlxtxError, match=f"{len(content)} bytes"):
            read_header(tmp_path / "x")
    with pytest.raises(MlxtxError, match="cannot read"):
        read_header(tmp_path / "absent")


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@FUZZ
@given(content=st.binary(max_size=64))
def test_random_bytes_never_crash_the_reader(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    check_sound_or_refused(path)


@FUZZ
@given(
    header=st.dictionaries(
        st.text(max_size=6),
        json_values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "BF16", "F8_E4M3", "F4", "X"]),
                "shape": st.lists(st.integers(-1, 5), max_size=3),
                "data_offsets": st.lists(st.integers(-2, 40), min_size=2, max_size=2),
            }
        ),
        max_size=4,
    ),
    data=st.binary(max_size=40),
)
def test_random_headers_are_sound_or_refused(tmp_path, header, data):
    check_sound_or_refused(raw_file(tmp_path / "x.safetensors", header, data))


@FUZZ
@given(data=st.data())
def test_a_damaged_byte_is_seen_or_harmless(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save(path, {"a": ("F32", np.arange(6, dtype=np.float32)), "b": ("U8", np.zeros(3, np.uint8))})
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    check_sound_or_refused(path)


def check_sound_or_refused(path):
    try:
        header = read_header(path)
    except MlxtxError:
        return
    size = path.stat().st_size
    position = size - sum(info.nbytes for info in header.tensors.values())
    assert position >= 8
    for info in header.tensors.values():
        assert info.start == position and info.end <= size
        assert info.nbytes == safetensors.tensor_bytes(info.dtype, info.shape)
        position = info.end


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"], include_characters="._"), min_size=1),
        st.tuples(
            st.sampled_from(
                ["float32", "float16", "bfloat16", "uint8", "uint32", "int64", "bool_"]
            ),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_written_is_what_mlx_and_the_reader_read(tmp_path, entries):
    arrays = {
        name: (mx.arange(int(np.prod(shape))).reshape(shape) % 2).astype(getattr(mx, dtype))
        for name, (dtype, shape) in entries.items()
    }
    path = tmp_path / "x.safetensors"
    forms = {n: (safetensors.dtype_name(a), tuple(a.shape)) for n, a in arrays.items()}
    with open(path, "wb") as file:
        file.write(encode_header(forms, {"format": "mlx"}))
        for array in arrays.values():
            assert file.write(array_bytes(array)) == array.nbytes
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0
    reader = Reader(path)
    assert reader.metadata == {"format": "mlx"}
    for name, array in arrays.items():
        for _ in range(2):  # a second reading is as good as the first
            again = reader.read(name)
            assert again.dtype == array.dtype and mx.array_equal(again, array)
    if all(a.size for a in arrays.values()):
        assert set(mx.load(str(path))) == set(arrays)


def test_views_are_written_in_the_order_of_their_elements():
    array = mx.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[1:]
    written = np.frombuffer(array_bytes(array), np.int32).reshape(3, 2, 3)
    assert np.array_equal(written, np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[1:])


def test_types_that_mlx_has_not(tmp_path):
    doubles = np.array([1.5, -2.25, 1e30])
    fp8 = np.arange(256, dtype=np.uint8)
    save(tmp_path / "x", {"d": ("F64", doubles), "e": ("F8_E5M2", fp8), "f": ("F4", fp8)})
    text = (tmp_path / "x").read_bytes().replace(b'"shape":[256]}', b'"shape":[256]}')
    header = json.loads(text[8 : 8 + struct.unpack("<Q", text[:8])[0]])
    header["f"]["shape"] = [512]
    raw_file(tmp_path / "x", header, text[8 + struct.unpack("<Q", text[:8])[0] :])
    reader = Reader(tmp_path / "x")
    assert np.array_equal(np.array(reader.read("d")), doubles.astype(np.float32))
    wide = (fp8.astype(np.uint16) << 8).view(np.float16)
    assert np.array_equal(np.array(reader.read("e")), wide, equal_nan=True)
    with pytest.raises(MlxtxError, match="F4 tensors"):
        reader.read("f")
