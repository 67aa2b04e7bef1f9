// Stands in for MLX's header, whose constructors differ by address space only.
#pragma once
template <typename T>
struct complex_t {
  T real;
  T imag;
  complex_t() = default;
  complex_t(T r, T i) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
