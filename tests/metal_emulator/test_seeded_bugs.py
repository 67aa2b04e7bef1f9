"""Bugs put in on purpose: the checked mode must name each, and stay silent on the sound kernel."""

from __future__ import annotations

import numpy as np
import pytest

from . import EmulatorError, Kernel, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "")

THREADS = 256

# The sum of each row of `rows`, over 8 simdgroups, by threadgroup memory.
ROW_SUM = """
#include <metal_stdlib>
using namespace metal;
kernel void row_sum(
    const device float* rows [[buffer(0)]],
    device float* sums [[buffer(1)]],
    const constant int& width [[buffer(2)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint lid [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]]) {
  threadgroup float partial[8];
  const device float* row = rows + group.x * width;
  float total = 0;
  for (int i = lid; i < width; i += 256) total += row[i];
  total = simd_sum(total);
  if (lane == 0) partial[simd] = total;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lid == 0) {
    float all = 0;
    for (int i = 0; i < 8; i++) all += partial[i];
    sums[group.x] = all;
  }
}
"""
# Each lane hands its value to the next lane of its simdgroup through threadgroup memory.
EXCHANGE = """
#include <metal_stdlib>
using namespace metal;
kernel void row_sum(
    const device float* rows [[buffer(0)]],
    device float* sums [[buffer(1)]],
    const constant int& width [[buffer(2)]],
    uint lid [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]]) {
  threadgroup float shared[256];
  shared[lid] = rows[lid];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  sums[lid] = shared[simd * 32 + (lane + 1) % 32];
}
"""


def run(source: str, *, rows: int = 3, width: int = 1000, sums: int = 3, seed: int = 0):
    data = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    kernel = Kernel(source, "row_sum", "checked")
    launch = kernel.launch(
        {0: data, 1: np.zeros(sums, np.float32), 2: np.array([width], np.int32)},
        grid=(THREADS * rows, 1, 1),
        threadgroup=(THREADS, 1, 1),
        seed=seed,
    )
    return data, launch.outputs[1].view(np.float32)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_sound_kernels_pass(seed):
    data, sums = run(ROW_SUM, seed=seed)
    assert np.abs(sums - data.astype(np.float64).sum(1)).max() < 2e-4
    data, moved = run(EXCHANGE, rows=1, width=256, sums=256, seed=seed)
    assert (moved.reshape(8, 32) == np.roll(data.reshape(8, 32), -1, axis=1)).all()


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
BUGS = {
    "barrier removed": (ROW_SUM, BARRIER, "", "RACE", True),
    "barrier for no memory": (ROW_SUM, "mem_threadgroup", "mem_none", "RACE", True),
    "barrier for device memory only": (ROW_SUM, "mem_threadgroup", "mem_device", "RACE", True),
    "barrier of the simdgroup only": (
        ROW_SUM, "threadgroup_barrier", "simdgroup_barrier", "RACE", True,
    ),
    "read past the end": (ROW_SUM, "i < width", "i <= width", "OOB read", True),
    "read before the start": (ROW_SUM, "row[i]", "row[i - 1]", "OOB read", True),
    "written past the end": (ROW_SUM, "sums[group.x]", "sums[group.x + 1]", "OOB write", True),
    "threadgroup array too small": (ROW_SUM, "partial[8]", "partial[7]", "OOB-TG", True),
    "barrier inside a branch": (
        ROW_SUM, BARRIER, f"if (lid < 128) {BARRIER}", "BARRIER", False,
    ),
    "return before a barrier": (
        ROW_SUM, "float total = 0;", "float total = 0; if (lid > 200) return;", "DIVERGENT", False,
    ),
    "collective inside a branch": (
        ROW_SUM, "total = simd_sum(total);", "if (lane % 2) total = simd_sum(total);",
        "DIVERGENT", False,
    ),
    "two threads write one element": (ROW_SUM, "if (lid == 0)", "if (lid < 2)", "RACE-DEV", True),
    "threadgroups write one element": (
        ROW_SUM, "sums[group.x]", "sums[0]", "RACE-DEV", True,
    ),
    "write to an input": (
        ROW_SUM, "if (lane == 0) partial", "((device float*)rows)[lid] = 0; if (lane == 0) partial",
        "WRITE to an input", True,
    ),
    "uninitialised threadgroup memory": (
        ROW_SUM, "if (lane == 0)", "if (lane == 0 && simd < 7)", "UNINIT", True,
    ),
    "an output left unwritten": (ROW_SUM, "sums[group.x]", "if (group.x) sums[group.x]",
                                 "UNWRITTEN", False),
    "too much threadgroup memory": (ROW_SUM, "partial[8]", "partial[9000]", "TGMEM", False),
    "wide load at an odd place": (
        ROW_SUM, "total += row[i]", "total += ((const device float4*)(row + 1))[0].x",
        "MISALIGNED", True,
    ),
    "shuffle from nowhere": (
        ROW_SUM, "total = simd_sum(total);", "total = simd_shuffle(total, 40);", "SHUFFLE", False,
    ),
    "exchange without a barrier": (EXCHANGE, SIMD_BARRIER, "", "RACE", True),
    "exchange with a barrier for no memory": (
        EXCHANGE, "mem_threadgroup", "mem_none", "RACE", True,
    ),
    "exchange over simdgroups by a simdgroup barrier": (
        EXCHANGE, "simd * 32 + (lane + 1) % 32", "(lid + 1) % 256", "RACE", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_caught(bug):
    source, sound, broken, kind, has_place = BUGS[bug]
    assert sound in source
    with pytest.raises(EmulatorError) as caught:
        if source is ROW_SUM:
            run(source.replace(sound, broken))
        else:
            run(source.replace(sound, broken), rows=1, width=256, sums=256)
    found = [r for r in caught.value.reports if r.startswith(kind)]
    assert found, caught.value.reports
    if has_place:  # the report points at a line of the kernel's text
        assert all(":" in r.rsplit(" ", 1)[-1] for r in found), found


@pytest.mark.parametrize("name, value", [("simd_max", -np.inf), ("simd_min", np.inf)])
def test_reductions_start_from_infinity(name, value):
    source = EXCHANGE.replace("shared[lid] = rows[lid]", f"shared[lid] = {name}(rows[lid])")
    kernel = Kernel(source, "row_sum", "checked")
    data = np.full(256, value, np.float32)
    data[40] = 3
    launch = kernel.launch(
        {0: data, 1: np.zeros(256, np.float32), 2: np.array([256], np.int32)},
        grid=(THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
    )
    found = launch.outputs[1].view(np.float32).reshape(8, 32)
    assert (found[1] == 3).all() and (np.delete(found, 1, 0) == value).all()


def test_more_than_1024_threads():
    kernel = Kernel(ROW_SUM, "row_sum", "plain")
    with pytest.raises(EmulatorError, match="THREADS"):
        kernel.launch({}, grid=(2048, 1, 1), threadgroup=(2048, 1, 1))
