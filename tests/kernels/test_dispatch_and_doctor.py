"""Which path runs, what doctor finds and remembers, and what is compiled at load."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlxtx.metal_kernels import attention_decode, attention_prefill, dispatch, kv_quantize, rope
from mlxtx.metal_kernels import warm_up as warm_up_module
from mlxtx.metal_kernels.attention_reference import attention_reference
from mlxtx.metal_kernels.mlx_attention import fusable

from mlxtx.diagnostics import doctor
from mlxtx.errors import MlxtxWarning
from scripts import doctor as command

from .on_emulator import emulated, needs_emulator

# So that a hundred rows are attended in several parts.
SPLIT = {"single_pass_rows": 32, "simdgroups": 1}


@pytest.fixture
def findings_file(tmp_path, monkeypatch):
    path = tmp_path / "doctor.json"
    monkeypatch.setenv("MLXTX_DOCTOR_FILE", str(path))
    dispatch.remembered.cache_clear()
    yield path
    dispatch.remembered.cache_clear()


def test_off_metal_the_reference_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "on_metal", lambda: False)
    assert dispatch.choose("anything", supported=True, fused_by_mlx=True) == "reference"


def test_the_table(monkeypatch):
    monkeypatch.setattr(dispatch, "on_metal", lambda: True)
    found: dict[str, str] = {}
    monkeypatch.setattr(dispatch, "remembered", lambda: found)
    assert dispatch.choose("a", supported=True) == "kernel"
    assert dispatch.choose("a", supported=False) == "reference"
    assert dispatch.choose("a", supported=True, fused_by_mlx=True) == "fast"
    found["a"] = "kernel"  # doctor measured ours to be faster
    assert dispatch.choose("a", supported=True, fused_by_mlx=True) == "kernel"
    found["a"] = "off"  # doctor saw it fail
    assert dispatch.choose("a", supported=True) == "reference"
    assert dispatch.choose("a", supported=True, fused_by_mlx=True) == "fast"


@pytest.mark.parametrize("queries, window", [(1, None), (1, 9), (4, None), (12, None)])
def test_mlx_fused_path_gives_the_references_result(queries, window, monkeypatch):
    monkeypatch.setattr(dispatch, "on_metal", lambda: True)
    monkeypatch.setattr(dispatch, "remembered", dict)
    mx.random.seed(1)
    q = mx.random.normal((2, 4, queries, 64))
    k, v = mx.random.normal((2, 2, 2, 40, 64))
    arguments = {"lengths": [33, 33], "scale": 0.125, "window": window}
    module = attention_decode if queries <= 8 else attention_prefill
    run = module.attention_decode if queries <= 8 else module.attention_prefill
    # No kernel can launch here: a result proves that the fused path was taken.
    assert (
        mx.abs(run(q, k, v, **arguments) - attention_reference(q, k, v, **arguments)).max() < 1e-5
    )
    if queries > 8:  # a bounded dequantized copy, then the same fused kernel
        keys, values = (kv_quantize.kv_quantize_reference(x, bits=8, group_size=64) for x in (k, v))
        error = run(q, keys, values, **arguments) - attention_reference(
            q, keys, values, **arguments
        )
        assert mx.abs(error).max() < 1e-5


@pytest.mark.parametrize("heads, queries, fused", [(32, 1, True), (71, 1, False), (8, 5, False)])
def test_mlx_fuses_few_rows_of_a_key_head_only(heads, queries, fused):
    keys = mx.zeros((1, 1, 40, 64))
    q = mx.zeros((1, heads, queries, 64))
    assert fusable(q, keys, keys, {"lengths": [40], "scale": 1.0}) is fused


def test_references_work_inside_compile_and_grad():
    mx.random.seed(2)
    q, k, v = mx.random.normal((3, 1, 2, 5, 16))

    def loss(q, k, v):
        return (attention_reference(q, k, v, lengths=[5], scale=0.25) ** 2).sum()

    def plain(q, k, v):
        return (mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal") ** 2).sum()

    assert abs(mx.compile(loss)(q, k, v).item() - loss(q, k, v).item()) < 1e-4
    ours, theirs = (mx.grad(f, argnums=(0, 1, 2))(q, k, v) for f in (loss, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert mx.abs(a - b).max() < 1e-5


def test_doctor_on_linux_says_that_metal_was_not_exercised(capsys, findings_file):
    if mx.metal.is_available():
        pytest.skip("this machine has Metal")
    assert command.main([]) == 0
    assert "not exercised" in capsys.readouterr().out
    assert command.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metal_exercised"] is False and report["machine"]["mlx"] == mx.__version__
    assert report["machine"]["memory_gb"] > 0.1
    assert not findings_file.exists()


@needs_emulator
def test_doctor_finds_every_kernel_right(findings_file, monkeypatch):
    # The real command, on a part of its grid: the emulator is not a GPU.
    shrink(monkeypatch)
    with emulated("plain") as emulator:
        findings = list(doctor.examine(timed=False))
    assert [f.problem for f in findings] == [""] * 5
    assert {launch.name for launch in emulator.launches} == {
        "attention_decode", "attention_merge", "attention_prefill", "kv_quantize", "rope",
        "rope_quantize",
    }  # fmt: skip
    assert all(f.cases > 0 and f.choice == "kernel" for f in findings)
    doctor.remember(findings)
    # Nothing was timed, so which of two paths is faster stays open.
    rotary = ("kv_quantize", "rope", "rope_quantize")
    assert dispatch.remembered() == dict.fromkeys(rotary, "kernel")


def test_a_quick_look_keeps_what_was_timed(findings_file):
    decode, prefill = doctor.WITH_A_RIVAL
    doctor.remember(
        [
            doctor.Finding(decode, 3, "", 2.0, 1.0, "mx.fast"),
            doctor.Finding(prefill, 3, "differs by 0.2"),
        ]
    )
    assert dispatch.remembered() == {decode: "fast", prefill: "off"}
    doctor.remember([doctor.Finding(decode, 3, ""), doctor.Finding(prefill, 3, "")])
    assert dispatch.remembered() == {decode: "fast"}
    doctor.remember([doctor.Finding(decode, 3, "does not run: why")])
    assert dispatch.remembered() == {decode: "off"}


@needs_emulator
def test_doctor_switches_off_a_kernel_that_disagrees_or_does_not_run(findings_file, monkeypatch):
    shrink(monkeypatch)
    right = attention_decode.launch
    monkeypatch.setattr(attention_decode, "launch", lambda **a: right(**a) * 1.1)

    def fails(**arguments):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nline 2")

    monkeypatch.setattr(attention_prefill, "launch", fails)
    with emulated("plain"):
        findings = {f.operation: f for f in doctor.examine(timed=False)}
    assert "differs by 0.1" in findings["attention_decode"].problem
    assert "does not run: [metal::Device]" in findings["attention_prefill"].problem
    findings_file.write_text(json.dumps({"another machine": {"rope": "off"}}))
    doctor.remember(list(findings.values()))
    assert dispatch.remembered()["attention_decode"] == "off"
    assert dispatch.remembered()["rope"] == "kernel"
    assert json.loads(findings_file.read_text())["another machine"] == {"rope": "off"}
    assert "OFF on this machine" in command.describe(findings["attention_decode"])


@needs_emulator
def test_doctor_takes_fewer_simdgroups_where_the_device_allows_fewer_threads(
    findings_file, monkeypatch
):
    shrink(monkeypatch)
    right = attention_decode.launch

    def launch(**arguments):
        if dispatch.tuning().simdgroups > 4:
            raise RuntimeError("Threadgroup size (256) is greater than the maximum allowed (128)")
        return right(**arguments)

    monkeypatch.setattr(attention_decode, "launch", launch)
    with emulated("plain"):
        findings = [f for f in doctor.examine(timed=False) if f.operation == "attention_decode"]
    assert findings[0].problem == "" and findings[0].simdgroups == "4"
    doctor.remember(findings)
    assert dispatch.tuning().simdgroups == 4
    # The next time four are taken at once, and are found right: that is no reason to forget them.
    monkeypatch.setattr(doctor, "_examine", lambda name, *_: doctor.Finding(name, 3, ""))
    doctor.remember([doctor._examine_decode(None)])
    assert dispatch.tuning().simdgroups == 4


def test_both_paths_are_timed(monkeypatch):
    monkeypatch.setattr(doctor, "TIMED_ROWS", 32)
    monkeypatch.setattr(doctor, "REPEATS", 2)
    kernel, other = doctor._times(attention_reference, 1)
    assert kernel > 0 and other > 0


def test_a_faster_path_of_mlx_is_chosen():
    finding = doctor.Finding("attention_decode", 3, "", 2.0, 1.0, "mx.fast", bound_ms=0.5)
    assert finding.choice == "fast"
    assert "memory bound 0.50 ms: uses mx.fast" in command.describe(finding)
    assert doctor.Finding("attention_decode", 3, "", 1.0, 2.0, "mx.fast").choice == "kernel"


def test_findings_of_other_versions_do_not_count(findings_file):
    findings_file.write_text(json.dumps({"applegpu_g13s|mlx 0.1|abc": {"rope": "off"}}))
    assert dispatch.remembered() == {}
    findings_file.write_text("{half a file")
    dispatch.remembered.cache_clear()
    assert dispatch.remembered() == {}


@needs_emulator
@pytest.mark.parametrize("rotate", [False, True])
def test_warm_up_compiles_all_that_decoding_then_uses(rotate):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": mx.float16}
    group = {"group_size": 32, "rotate": rotate}
    bits = {"key_bits": 8, "value_bits": 4, **group}
    with emulated("plain", tuning={"single_pass_rows": 32}) as emulator:
        assert warm_up_module.warm_up(**shape, **bits) == 5
        compiled = set(emulator.sources)
        for rows in (5, 31, 64, 200):  # no length brings a new variant
            new = mx.zeros((1, 2, rows, 64), mx.float16)
            keys = kv_quantize.kv_quantize(new, bits=8, **group)
            values = kv_quantize.kv_quantize(new, bits=4, **group)
            for length in (1, rows):
                attention_decode.attention_decode(
                    mx.zeros((1, 4, 1, 64), mx.float16), keys, values, lengths=[length], scale=1.0
                )
        assert set(emulator.sources) == compiled


@needs_emulator
@pytest.mark.parametrize(
    ("layer", "kernels"),
    [
        ({}, {"rope"}),  # MLX's kernel does the rest
        ({"window": 8}, {"rope", "attention_prefill"}),
        ({"softcap": 30.0}, {"rope", "attention_decode", "attention_merge", "attention_prefill"}),
        ({"slopes": True}, {"rope", "attention_decode", "attention_merge", "attention_prefill"}),
        ({"masked": True}, {"rope", "attention_decode", "attention_merge"}),
        (
            {"key_bits": 8, "value_bits": 4, "group_size": 32},
            {"kv_quantize", "rope_quantize", "attention_decode", "attention_merge"}
            | {"attention_prefill"},  # for long prompts
        ),
    ],
)
def test_warm_up_tries_the_kernels_that_this_kind_of_layer_will_use(layer, kernels):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": mx.float16}
    with emulated("plain", tuning=SPLIT) as emulator:
        warm_up_module.warm_up(**shape, **layer)
        assert {launch.name for launch in emulator.launches} == kernels


@needs_emulator
def test_warm_up_compiles_the_variant_with_the_types_of_norms_and_sinks():
    """A kernel's variants differ by the types of all its inputs."""
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": mx.float16}
    layer = {"q_norm": True, "k_norm": True, "sinks": True, "softcap": 30.0}
    with emulated("plain", tuning=SPLIT) as emulator:
        warm_up_module.warm_up(**shape, **layer)
        compiled = set(emulator.sources)
        half = mx.ones((64,), dtype=mx.float16)
        rows = mx.zeros((1, 2, 100, 64), dtype=mx.float16)
        q = mx.zeros((1, 4, 1, 64), dtype=mx.float16)
        norm = (half, 1e-5, 1.0)
        turn = {"inverse_frequencies": mx.ones((32,)), "offsets": mx.array([3])}
        mx.eval(rope.rope(q, rows[:, :, :1], q_norm=norm, k_norm=norm, **turn))
        options = {"scale": 0.1, "sinks": mx.ones((4,), mx.float16), "softcap": 10.0}
        for attend, queries in (
            (attention_decode.attention_decode, q),
            (attention_prefill.attention_prefill, mx.zeros((1, 4, 32, 64), mx.float16)),
        ):
            for length in (20, 100):
                mx.eval(attend(queries, rows, rows, lengths=[length], **options))
        assert set(emulator.sources) == compiled


@needs_emulator
def test_warm_up_passes_over_rotated_rows_that_attention_cannot_split():
    shape = {"heads": 4, "kv_heads": 1, "head_dim": 256, "value_dim": 192, "latent": True}
    bits = {"key_bits": 8, "value_bits": 8, "rotate": True}
    with emulated("plain") as emulator:
        assert warm_up_module.warm_up(**shape, **bits, dtype=mx.float16) == 0
        assert {launch.name for launch in emulator.launches} == {"kv_quantize"}


@needs_emulator
def test_a_kernel_that_fails_at_load_is_left_out_from_then_on(monkeypatch):
    monkeypatch.setattr(dispatch, "_failed", set())

    def fails(*arguments, **options):
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    monkeypatch.setattr(attention_decode, "launch", fails)
    monkeypatch.setattr(kv_quantize, "launch", fails)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": mx.float32}
    bits = {"key_bits": 8, "value_bits": 4, "group_size": 32}
    with emulated("plain", tuning={"single_pass_rows": 32}) as emulator:
        with pytest.warns(MlxtxWarning) as warned:
            assert warm_up_module.warm_up(**shape, **bits) == 4  # a longer cache goes another way
        told = [str(warning.message).split()[3] for warning in warned]
        assert sorted(told) == ["attention_decode", "kv_quantize"]
        names = {launch.name for launch in emulator.launches}
        assert names == {"attention_prefill", "rope_quantize"}
        assert dispatch.choose("attention_decode", supported=True) == "reference"
        assert dispatch.choose("attention_decode", supported=True, fused_by_mlx=True) == "fast"
        assert dispatch.choose("rope_quantize", supported=True) == "kernel"
        rows = mx.random.normal((1, 2, 9, 64))
        keys = kv_quantize.kv_quantize(rows, bits=8, group_size=32)
        q = mx.random.normal((1, 4, 1, 64))
        arguments = {"lengths": [9], "scale": 0.125}
        found = attention_decode.attention_decode(q, keys, keys, **arguments)
        assert mx.array_equal(found, attention_reference(q, keys, keys, **arguments))


def test_warm_up_does_nothing_off_metal(monkeypatch):
    monkeypatch.setattr(dispatch, "on_metal", lambda: False)
    assert warm_up_module.warm_up(heads=1, kv_heads=1, head_dim=64, dtype=mx.float16) == 0


def test_threadgroups_of_every_shape_fit_the_device():
    for dim in range(8, 577, 8):
        for size in (2, 4):
            groups, rows, shared = attention_prefill.tile_shape(dim, dim, size, size)
            cache = rows * (dim + 16 // size) * size
            queries = 8 * groups * (dim + 16 // size) * size if shared else size
            assert cache + queries + 4 * 32 * rows <= 32768, (dim, size)
            assert dim // 8 % (attention_prefill.SIMDGROUPS // groups) == 0
        simdgroups = attention_decode.simdgroup_count(dim)
        assert simdgroups * (dim * 4 + 8 * 2 * 4) <= 32768
    assert np.all([attention_decode.query_tile(n, 128) <= 8 for n in range(1, 200)])


def shrink(monkeypatch):
    """A part of doctor's grid, for the emulator's pace."""
    monkeypatch.setattr(doctor, "TOLERANCE", {mx.float16: doctor.TOLERANCE[mx.float16]})
