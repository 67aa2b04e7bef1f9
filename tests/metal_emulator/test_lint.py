"""The lint rejects what Metal would, and accepts every kernel of the project and MLX's own."""

from __future__ import annotations

import pytest

from tests.kernels.cases import DECODE, PREFILL, QUANTIZE, ROPE, whole
from tests.kernels.checks import check_decode, check_prefill, check_quantize, check_rope

from . import missing
from .lint import lint
from .stand_in import PRELUDE, entry_of

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "")

FRAME = """
#include <metal_stdlib>
using namespace metal;
{outside}
kernel void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
              const constant int& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {{
  {inside}
  y[i] = x[i];
}}
"""
# What stands outside the kernel, what inside, and a word of the complaint.
REJECTED = {
    "bare pointer parameter": ("float f(float* p) { return *p; }", "", "address space"),
    "bare reference parameter": ("void f(float& p) { p = 1; }", "", "address space"),
    "bare pointer to the element type": (
        "template <typename T> T f(const T* p) { return p[0]; }", "", "address space"),
    "device pointer to a bare one": ("", "float* p = y; p[0] = 1;", ""),
    "device pointer to threadgroup": ("", "threadgroup float* p = y; p[0] = 1;", "cannot initialize"),
    "threadgroup pointer to device": (
        "", "threadgroup float s[4]; device float* p = s; p[0] = 1;", "cannot initialize"),
    "address of a local as device": ("", "float a = 1; device float* p = &a; p[0] = 2;", ""),
    "cast from device to threadgroup": (
        "", "threadgroup float* p = reinterpret_cast<threadgroup float*>(y); p[0] = 1;", ""),
    "double": ("", "double a = x[i]; y[i] = a;", "double"),
    "mutable global": ("int counter = 0;", "counter++;", "global"),
    "global without constant": ("const float half_pi = 1.5;", "y[i] = half_pi;", "constant"),
    "static local": ("", "static int a = 0; a++;", "static"),
    "recursion": ("int f(int a) { return a < 2 ? 1 : f(a - 1); }", "y[i] = f(3);", "calls itself"),
    "mutual recursion": (
        "int g(int a); int f(int a) { return a < 2 ? 1 : g(a - 1); }"
        "int g(int a) { return f(a - 1); }", "y[i] = f(3);", "calls itself"),
    "function pointer": ("int f(int a) { return a; }", "int (*h)(int) = f; y[i] = h(1);", "pointer"),
    "goto": ("", "goto end; end: ;", "goto"),
    "exception": ("", "if (i) throw 1;", "exceptions"),
    "new": ("", "float a = *(new float(1)); y[i] = a;", "new"),
    "virtual function": ("struct S { virtual int f() { return 1; } };", "S s; y[i] = s.f();", ""),
    "standard library": ("", "y[i] = std::max(1.0f, x[i]);", ""),
    "C library": ("", 'printf("%f", x[i]);', "C library"),
    "thread_local": ("thread_local int a;", "", "thread_local"),
    "variable length array": ("", "float a[n]; a[0] = 1; y[i] = a[0];", ""),
    "write to an input": ("", "x[i] = 1;", ""),
    "write to a constant": ("", "n = 1;", ""),
    "mixed max": ("", "y[i] = max(x[i], 1);", ""),
    "wrong number of components": ("", "float4 a = float4(1.0f, 2.0f); y[i] = a.x;", ""),
    "float to bfloat": ("", "bfloat a = x[i]; y[i] = float(a);", "bf16"),
    "simd_sum of 64 bits": ("", "y[i] = simd_sum(long(1));", ""),
    "threadgroup variable in a helper": (
        "float f() { threadgroup float s[4]; return s[0]; }", "y[i] = f();", "kernel function"),
    "threadgroup initialiser": ("", "threadgroup float s[2] = {0, 1};", "initialiser"),
    "auto pointer": ("", "auto* p = y; p[0] = 1;", "auto"),
    "two elements for a whole matrix": (
        "", "simdgroup_float8x8 m; m.thread_elements() = float2(1.0f, 2.0f);", "assigning"),
    "vector of eight": (
        "template <typename T, int N> T f(const device T* p) { return ((const device vec<T, N>*)p)[0][0]; }",
        "y[i] = f<float, 8>(x);", "2, 3 or 4"),
    "uninitialised local": ("", "float a; y[i] = a;", "uninitialized"),
    "no return value": ("float f(float a) { a += 1; }", "y[i] = f(1);", "return a value"),
    "run-time type information": ("", "y[i] = typeid(float) == typeid(int);", ""),
}  # fmt: skip
ACCEPTED = {
    "plain": ("", ""),
    "helper with address spaces": (
        "template <typename T> T f(const device T* p, thread T& s) { s += p[0]; return s; }",
        "float s = 0; y[i] = f(x, s);"),
    "constant table": ("constant float table[2] = {1.0f, 2.0f};", "y[i] = table[i % 2];"),
    "threadgroup memory": (
        "", "threadgroup float s[4]; s[i % 4] = 1; threadgroup_barrier(mem_flags::mem_threadgroup);"
            "y[i] = s[0];"),
    "static constexpr local": ("", "static constexpr int a = 3; y[i] = a;"),
    "products": ("", "int a = n, b = n; y[i] = max(a * b, b & a);"),
}  # fmt: skip


@pytest.mark.parametrize("what", REJECTED)
def test_rejects(what):
    outside, inside, word = REJECTED[what]
    found = lint(FRAME.format(outside=outside, inside=inside), "k")
    assert any(word in line for line in found), found


@pytest.mark.parametrize("what", ACCEPTED)
def test_accepts(what):
    outside, inside = ACCEPTED[what]
    assert lint(FRAME.format(outside=outside, inside=inside), "k") == []


def test_rejects_what_the_signature_shows():
    many = ", ".join(f"const device float* a{i} [[buffer({i})]]" for i in range(32))
    text = f"#include <metal_stdlib>\nkernel void k({many}) {{}}\n"
    assert any("32 buffers" in line for line in lint(text, "k"))
    twice = "const device float* a [[buffer(1)]], device float* b [[buffer(1)]]"
    text = f"#include <metal_stdlib>\nkernel void k({twice}) {{ b[0] = a[0]; }}\n"
    assert any("same buffer" in line for line in lint(text, "k"))
    text = "#include <metal_stdlib>\nkernel void k(float i [[thread_position_in_grid]]) {}\n"
    assert lint(text, "k")


@pytest.mark.parametrize("header", ["sdpa_vector.h", "softmax.h"])
def test_accepts_kernels_of_mlx(header):
    entries = {
        "sdpa_vector.h": "sdpa_vector<half, 64, 64>",
        "softmax.h": "softmax_single_row<half>",
    }
    text = f'{PRELUDE}#include "mlx/backend/metal/kernels/{header}"\n'
    assert lint(text, entries[header]) == []


@pytest.mark.parametrize(
    "axes, check",
    [(DECODE, check_decode), (PREFILL, check_prefill), (QUANTIZE, check_quantize),
     (ROPE, check_rope)],
    ids=["decode", "prefill", "quantize", "rope"],
)  # fmt: skip
def test_accepts_the_projects_kernels(axes, check):
    crossed = [name for name in ("dtype", "quantized") if name in axes]
    seen = set()
    for case in whole(axes, crossed):
        if axes is DECODE:
            case = case | {"split": True, "lengths": (65,), "queries": 1}
        for text in check(case, "checked").sources:
            name = entry_of(text).split("<")[0]
            seen.add(name)
            assert lint(PRELUDE + text, entry_of(text)) == []
    assert seen
