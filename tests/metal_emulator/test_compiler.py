"""Which compiler builds the kernels, and what a machine without one is told."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest

from . import Kernel, compiler

SOURCE = """
#include <metal_stdlib>
using namespace metal;
[[kernel]] void sums(const device float* x [[buffer(0)]], device float* out [[buffer(1)]],
                     uint i [[thread_position_in_grid]]) {
  out[i] = simd_sum(x[i]);
}
"""


def test_without_clang_the_wheel_of_zig_compiles_the_plain_mode_alone(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = [object()]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[0])
    assert compiler.missing("plain") is None
    assert "apt-get install clang-19" in (compiler.missing("checked") or "")
    command = compiler.compiler(*compiler.OPTIMISE)
    assert command[1:4] == ["-m", "ziglang", "c++"] and "-march=x86_64_v3" in command
    found[0] = None
    assert "pip install ziglang" in (compiler.missing("plain") or "")


@pytest.mark.skipif(
    not importlib.util.find_spec("ziglang"),
    reason="the other compiler of the plain mode is not here: pip install ziglang",
)
def test_zig_builds_a_kernel_that_is_right(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "CLANG", "no such compiler")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    compiler.toolchain_hash.cache_clear()
    x = np.arange(64, dtype=np.float32)
    kernel = Kernel(SOURCE, "sums", "plain")
    launch = kernel.launch({0: x, 1: np.zeros_like(x)}, grid=(64, 1, 1), threadgroup=(64, 1, 1))
    compiler.toolchain_hash.cache_clear()
    expected = np.repeat([x[:32].sum(), x[32:].sum()], 32)
    assert (launch.outputs[1].view(np.float32) == expected).all()
