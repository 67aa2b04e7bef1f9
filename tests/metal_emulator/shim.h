// The part of Metal's standard library that kernels use, for clang on a CPU.
//
// Address spaces are clang's own (1 device, 2 constant, 3 threadgroup), so the compiler checks them
// as Metal's does; the driver strips them from the intermediate code before it is optimised.
// Collective operations park the lane; the runtime runs them once for all lanes of the simdgroup.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <limits>
#include <type_traits>

#define device __attribute__((address_space(1)))
#ifdef METAL_EMULATOR_LINT  // read-only memory is const, as in Metal
#define constant const __attribute__((address_space(2)))
#else
#define constant __attribute__((address_space(2)))
#endif
#define threadgroup __attribute__((address_space(3)))
#define thread
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_PI_F 3.14159265358979323846f
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define METAL_FUNC inline __attribute__((__always_inline__))
#define SITE int line = __builtin_LINE(), int column = __builtin_COLUMN()
#define HERE (((uint64_t)(unsigned)line << 16) | (unsigned)column)

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

#define EMU_VECTORS(T)                                  \
  typedef T T##2 __attribute__((ext_vector_type(2)));   \
  typedef T T##3 __attribute__((ext_vector_type(3)));   \
  typedef T T##4 __attribute__((ext_vector_type(4)));
EMU_VECTORS(char) EMU_VECTORS(uchar) EMU_VECTORS(short) EMU_VECTORS(ushort)
EMU_VECTORS(int) EMU_VECTORS(uint) EMU_VECTORS(long) EMU_VECTORS(ulong)
EMU_VECTORS(half) EMU_VECTORS(bfloat) EMU_VECTORS(float)
typedef bool bool2 __attribute__((ext_vector_type(2)));
typedef bool bool4 __attribute__((ext_vector_type(4)));

extern "C" {
void* emu_threadgroup(int id, size_t size, size_t align);
void emu_barrier(int device_flag, int threadgroup_flag, uint64_t site);
void emu_simdgroup_barrier(int device_flag, int threadgroup_flag, uint64_t site);
void emu_collective(uint64_t site, void* io, void (*fn)(void**, uint32_t));
void emu_poison(uint64_t site);
uint32_t emu_lane();
void emu_atomic(void* address, void* value, size_t size, int write);
extern const uint32_t emu_lane_order[32];
}

// float4(a, b, c, d) and vec<T, N>(x): the driver spells them emu_make<type>(...).
template <typename V, typename A>
METAL_FUNC V emu_make(A a) {
  if constexpr (std::is_arithmetic_v<A> || std::is_same_v<A, half> || std::is_same_v<A, bfloat>) {
    V v;
    for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); i++) v[i] = a;
    return v;
  } else {
    return __builtin_convertvector(a, V);
  }
}
template <typename V, typename A, typename B, typename... R>
METAL_FUNC V emu_make(A a, B b, R... rest) {
  static_assert(sizeof...(R) + 2 == __builtin_vectorelements(V),
                "a vector takes one value for each component");
  return V{static_cast<std::remove_reference_t<decltype(V{}[0])>>(a),
           static_cast<std::remove_reference_t<decltype(V{}[0])>>(b),
           static_cast<std::remove_reference_t<decltype(V{}[0])>>(rest)...};
}

namespace metal {
template <int N> struct emu_components {
  static_assert(N <= 4, "a vector has 2, 3 or 4 components");
  static constexpr int count = N;
};
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(emu_components<N>::count)));
template <typename T, int N>
struct packed_vec { T x[N]; T operator[](int i) const { return x[i]; } };

using std::conditional_t; using std::enable_if; using std::enable_if_t; using std::is_same_v;
using std::is_same; using std::is_convertible_v; using std::is_convertible; using std::bool_constant;
using std::true_type; using std::false_type; using std::integral_constant; using std::is_integral;
using std::is_integral_v; using std::is_signed_v; using std::is_unsigned_v;
using std::is_unsigned; using std::is_signed; using std::declval; using std::decay_t;
using std::remove_cv_t; using std::remove_reference_t; using std::conjunction; using std::disjunction;
using std::negation; using std::make_unsigned_t; using std::make_signed_t;
template <typename T> struct is_floating_point : std::is_floating_point<T> {};
template <> struct is_floating_point<half> : true_type {};
template <> struct is_floating_point<bfloat> : true_type {};
template <typename T> constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <typename T> constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <typename T> struct remove_addrspace { typedef T type; };
template <typename T> struct remove_addrspace<T __attribute__((address_space(1)))> { typedef T type; };
template <typename T> struct remove_addrspace<T __attribute__((address_space(2)))> { typedef T type; };
template <typename T> struct remove_addrspace<T __attribute__((address_space(3)))> { typedef T type; };
template <typename T> using remove_addrspace_t = typename remove_addrspace<T>::type;

template <typename T> struct numeric_limits : std::numeric_limits<T> {};
template <> struct numeric_limits<half> {
  static constexpr half max() { return (half)65504.0f; }
  static constexpr half min() { return (half)6.103515625e-05f; }
  static constexpr half lowest() { return (half)-65504.0f; }
  static constexpr half infinity() { return (half)__builtin_inff(); }
  static constexpr half quiet_NaN() { return (half)__builtin_nanf(""); }
  static constexpr half epsilon() { return (half)9.765625e-4f; }
};
template <> struct numeric_limits<bfloat> {
  static constexpr bfloat max() { return (bfloat)3.3895313892515355e38f; }
  static constexpr bfloat min() { return (bfloat)1.1754943508222875e-38f; }
  static constexpr bfloat lowest() { return (bfloat)-3.3895313892515355e38f; }
  static constexpr bfloat infinity() { return (bfloat)__builtin_inff(); }
  static constexpr bfloat quiet_NaN() { return (bfloat)__builtin_nanf(""); }
  static constexpr bfloat epsilon() { return (bfloat)7.8125e-3f; }
};

template <typename To, typename From>
METAL_FUNC To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of the same size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// ---- scalar and vector arithmetic -----------------------------------------------------------
#define EMU_FLOAT_1(name, expression)                                        \
  METAL_FUNC float name(float x) { return expression; }                      \
  METAL_FUNC half name(half y) { float x = y; return (half)(expression); }   \
  METAL_FUNC bfloat name(bfloat y) { float x = y; return (bfloat)(expression); } \
  METAL_FUNC float2 name(float2 v) { return float2{name(v.x), name(v.y)}; }  \
  METAL_FUNC float4 name(float4 v) { return float4{name(v.x), name(v.y), name(v.z), name(v.w)}; }
#define EMU_MATH                                                             \
  EMU_FLOAT_1(exp, __builtin_expf(x)) EMU_FLOAT_1(exp2, __builtin_exp2f(x)) EMU_FLOAT_1(log, __builtin_logf(x)) \
  EMU_FLOAT_1(log2, __builtin_log2f(x)) EMU_FLOAT_1(sqrt, __builtin_sqrtf(x)) EMU_FLOAT_1(sin, __builtin_sinf(x)) \
  EMU_FLOAT_1(rsqrt, (float)((long double)1 / __builtin_sqrtl((long double)x))) EMU_FLOAT_1(cos, __builtin_cosf(x)) \
  EMU_FLOAT_1(tanh, __builtin_tanhf(x)) EMU_FLOAT_1(log10, __builtin_log10f(x)) EMU_FLOAT_1(tan, __builtin_tanf(x))
EMU_MATH
EMU_FLOAT_1(floor, __builtin_floorf(x)) EMU_FLOAT_1(ceil, __builtin_ceilf(x)) EMU_FLOAT_1(round, __builtin_roundf(x))
EMU_FLOAT_1(rint, __builtin_rintf(x)) EMU_FLOAT_1(trunc, __builtin_truncf(x)) EMU_FLOAT_1(fabs, __builtin_fabsf(x))
EMU_FLOAT_1(sinh, __builtin_sinhf(x)) EMU_FLOAT_1(cosh, __builtin_coshf(x)) EMU_FLOAT_1(asin, __builtin_asinf(x))
EMU_FLOAT_1(acos, __builtin_acosf(x)) EMU_FLOAT_1(atan, __builtin_atanf(x)) EMU_FLOAT_1(asinh, __builtin_asinhf(x))
EMU_FLOAT_1(acosh, __builtin_acoshf(x)) EMU_FLOAT_1(atanh, __builtin_atanhf(x))
METAL_FUNC float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
METAL_FUNC float fmin(float a, float b) { return __builtin_fminf(a, b); }
METAL_FUNC float pow(float x, float y) { return __builtin_powf(x, y); }
METAL_FUNC float fmod(float x, float y) { return __builtin_fmodf(x, y); }
METAL_FUNC float atan2(float x, float y) { return __builtin_atan2f(x, y); }
METAL_FUNC float ldexp(float x, int n) { return __builtin_ldexpf(x, n); }
METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
METAL_FUNC float sincos(float x, float& c) { c = __builtin_cosf(x); return __builtin_sinf(x); }
METAL_FUNC bool isnan(float x) { return __builtin_isnan(x); }
METAL_FUNC bool isinf(float x) { return __builtin_isinf(x); }
METAL_FUNC bool isfinite(float x) { return __builtin_isfinite(x); }
METAL_FUNC int popcount(uint x) { return __builtin_popcount(x); }
METAL_FUNC uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
METAL_FUNC uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
namespace fast { EMU_MATH
METAL_FUNC float max(float a, float b) { return a > b ? a : b; }
METAL_FUNC float min(float a, float b) { return a < b ? a : b; }
}
namespace precise { EMU_MATH
METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
}
// Metal has no overload for mixed types: max(float, int) is ambiguous there, an error here.
template <typename T> METAL_FUNC T max(T a, T b) {
  if constexpr (is_integral_v<T>) return a > b ? a : b;
  else return a != a ? b : b != b ? a : a > b ? a : b;
}
template <typename T> METAL_FUNC T min(T a, T b) {
  if constexpr (is_integral_v<T>) return a < b ? a : b;
  else return a != a ? b : b != b ? a : a < b ? a : b;
}
METAL_FUNC float max(float a, bfloat b) { return max<float>(a, (float)b); }
METAL_FUNC float max(bfloat a, float b) { return max<float>((float)a, b); }
METAL_FUNC float max(float a, half b) { return max<float>(a, (float)b); }
METAL_FUNC float max(half a, float b) { return max<float>((float)a, b); }
METAL_FUNC float min(float a, bfloat b) { return min<float>(a, (float)b); }
METAL_FUNC float min(bfloat a, float b) { return min<float>((float)a, b); }
METAL_FUNC float min(float a, half b) { return min<float>(a, (float)b); }
METAL_FUNC float min(half a, float b) { return min<float>((float)a, b); }
template <typename T> METAL_FUNC T max3(T a, T b, T c) { return max(a, max(b, c)); }
template <typename T> METAL_FUNC T clamp(T x, T a, T b) { return min(max(x, a), b); }
template <typename T> METAL_FUNC T abs(T x) {
  if constexpr (std::is_unsigned_v<T>) return x; else return x < T(0) ? T(-x) : x;
}
template <typename T> METAL_FUNC T sign(T x) { return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0); }
template <typename T> METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
template <typename T> METAL_FUNC T mix(T a, T b, T t) { return a + (b - a) * t; }
METAL_FUNC float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }
METAL_FUNC float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// ---- barriers and collectives ----------------------------------------------------------------
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4,
                       mem_threadgroup_imageblock = 8 };
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((int)a | (int)b);
}
METAL_FUNC void threadgroup_barrier(mem_flags f, SITE) {
  emu_barrier((int)f & 1, ((int)f >> 1) & 1, HERE);
}
METAL_FUNC void simdgroup_barrier(mem_flags f, SITE) {
  emu_simdgroup_barrier((int)f & 1, ((int)f >> 1) & 1, HERE);
}

template <typename T> struct emu_io { T in; T out; uint32_t index; bool poison; };
template <typename T, typename Op>
void emu_reduce(void** io, uint32_t mask) {
  T value = Op::template first<T>();
  for (int i = 0; i < 32; i++) {
    int lane = emu_lane_order[i];
    if (mask >> lane & 1) value = Op::apply(value, ((emu_io<T>*)io[lane])->in);
  }
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) ((emu_io<T>*)io[lane])->out = value;
}
#define EMU_REDUCTION(name, start, expression)                                              \
  struct emu_op_##name {                                                                    \
    template <typename T> static T first() { return (T)(start); }                           \
    template <typename T> static T apply(T a, T b) { return (T)(expression); }              \
  };                                                                                        \
  template <typename T> METAL_FUNC T name(T x, SITE) {                                      \
    static_assert(sizeof(T) <= 4, "simdgroup reductions take up to 32 bits");               \
    emu_io<T> io = {x, x, 0, false};                                                        \
    emu_collective(HERE, &io, emu_reduce<T, emu_op_##name>);                                \
    return io.out;                                                                          \
  }
EMU_REDUCTION(simd_sum, 0, a + b)
EMU_REDUCTION(simd_product, 1, a * b)
// The largest of nothing but minus infinities is minus infinity.
EMU_REDUCTION(simd_max, is_integral_v<T> ? numeric_limits<T>::lowest() : T(-INFINITY), max(a, b))
EMU_REDUCTION(simd_min, is_integral_v<T> ? numeric_limits<T>::max() : T(INFINITY), min(a, b))
EMU_REDUCTION(simd_or, 0, a | b)
EMU_REDUCTION(simd_and, -1, a & b)
EMU_REDUCTION(simd_xor, 0, a ^ b)

enum { emu_up, emu_down, emu_xor, emu_to };
template <typename T, int kind>
void emu_exchange(void** io, uint32_t mask) {
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    auto* mine = (emu_io<T>*)io[lane];
    int n = (int)mine->index;
    int from = kind == emu_up     ? lane - n
               : kind == emu_down ? lane + n
               : kind == emu_xor  ? (lane ^ n)
                                  : n;
    bool inside = from >= 0 && from < 32 && (mask >> from & 1);
    // Metal leaves the value undefined; up and down keep the lane's own at the edge.
    mine->poison = !inside && (kind == emu_xor || kind == emu_to);
    mine->out = inside ? ((emu_io<T>*)io[from])->in : mine->in;
  }
}
template <typename T, int kind>
METAL_FUNC T emu_shuffle(T x, uint32_t n, uint64_t site) {
  emu_io<T> io = {x, x, n, false};
  emu_collective(site, &io, emu_exchange<T, kind>);
  if (io.poison) emu_poison(site);
  return io.out;
}
template <typename T> METAL_FUNC T simd_shuffle(T x, ushort n, SITE) { return emu_shuffle<T, emu_to>(x, n, HERE); }
template <typename T> METAL_FUNC T simd_broadcast(T x, ushort n, SITE) { return emu_shuffle<T, emu_to>(x, n, HERE); }
template <typename T> METAL_FUNC T simd_shuffle_xor(T x, ushort n, SITE) { return emu_shuffle<T, emu_xor>(x, n, HERE); }
template <typename T> METAL_FUNC T simd_shuffle_up(T x, ushort n, SITE) { return emu_shuffle<T, emu_up>(x, n, HERE); }
template <typename T> METAL_FUNC T simd_shuffle_down(T x, ushort n, SITE) { return emu_shuffle<T, emu_down>(x, n, HERE); }
template <typename T> METAL_FUNC T simd_broadcast_first(T x, SITE) { return emu_shuffle<T, emu_to>(x, 0, HERE); }
template <typename T> METAL_FUNC T simd_shuffle_and_fill_up(T x, T fill, ushort n, SITE) {
  T moved = emu_shuffle<T, emu_up>(x, n, HERE);
  return emu_lane() < n ? fill : moved;
}
template <typename T> METAL_FUNC T simd_shuffle_and_fill_down(T x, T fill, ushort n, SITE) {
  T moved = emu_shuffle<T, emu_down>(x, n, HERE);
  return emu_lane() + n > 31 ? fill : moved;
}
template <typename T, bool exclusive>
void emu_prefix(void** io, uint32_t mask) {
  T sum = 0;
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    auto* mine = (emu_io<T>*)io[lane];
    T before = sum;
    sum = (T)(sum + mine->in);
    mine->out = exclusive ? before : sum;
  }
}
template <typename T> METAL_FUNC T simd_prefix_inclusive_sum(T x, SITE) {
  emu_io<T> io = {x, x, 0, false};
  emu_collective(HERE, &io, emu_prefix<T, false>);
  return io.out;
}
template <typename T> METAL_FUNC T simd_prefix_exclusive_sum(T x, SITE) {
  emu_io<T> io = {x, x, 0, false};
  emu_collective(HERE, &io, emu_prefix<T, true>);
  return io.out;
}
template <typename T> METAL_FUNC T quad_sum(T x, SITE) {
  x += emu_shuffle<T, emu_xor>(x, 1, HERE);
  return x + emu_shuffle<T, emu_xor>(x, 2, HERE);
}
METAL_FUNC bool simd_any(bool x, SITE) { return simd_or((uint)x, line, column) != 0; }
METAL_FUNC bool simd_all(bool x, SITE) { return simd_and((uint)x, line, column) != 0; }

// ---- 8 x 8 matrices, two elements a lane, in the layout MLX's own kernels rely on ------------
// As in Apple's header the elements are a vector of 64, of which the first two are the lane's own:
// a vector of two does not go into it, and no multiplication looks at the rest.
template <typename T, int R = 8, int C = 8>
struct simdgroup_matrix {
  typedef T storage_type __attribute__((ext_vector_type(R * C)));
  storage_type elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T x) { elements[0] = elements[1] = x; }
  storage_type& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;
template <typename T, typename A, typename B, typename C>
struct emu_mma_io { vec<A, 2> a; vec<B, 2> b; vec<C, 2> c; vec<T, 2> d; };
METAL_FUNC int emu_matrix_row(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
METAL_FUNC int emu_matrix_column(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }
template <typename T, typename A, typename B, typename C>
void emu_mma(void** io, uint32_t) {
  float a[8][8], b[8][8], c[8][8];
  for (int lane = 0; lane < 32; lane++) {
    auto* x = (emu_mma_io<T, A, B, C>*)io[lane];
    int r = emu_matrix_row(lane), n = emu_matrix_column(lane);
    for (int j = 0; j < 2; j++) {
      a[r][n + j] = (float)x->a[j]; b[r][n + j] = (float)x->b[j]; c[r][n + j] = (float)x->c[j];
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    auto* x = (emu_mma_io<T, A, B, C>*)io[lane];
    int r = emu_matrix_row(lane), n = emu_matrix_column(lane);
    for (int j = 0; j < 2; j++) {
      float s = c[r][n + j];
      for (int k = 0; k < 8; k++) s = __builtin_fmaf(a[r][k], b[k][n + j], s);
      x->d[j] = (T)s;
    }
  }
}
template <typename T, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<T>& d, simdgroup_matrix<A>& a,
                                              simdgroup_matrix<B>& b, simdgroup_matrix<C>& c, SITE) {
  emu_mma_io<T, A, B, C> io = {{a.elements[0], a.elements[1]}, {b.elements[0], b.elements[1]},
                               {c.elements[0], c.elements[1]}, {}};
  emu_collective(HERE, &io, emu_mma<T, A, B, C>);
  for (int j = 0; j < 2; j++) d.elements[j] = io.d[j];
}
template <typename T, typename A, typename B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<T>& d, simdgroup_matrix<A>& a,
                                   simdgroup_matrix<B>& b, SITE) {
  simdgroup_matrix<float> zero(0.0f);
  simdgroup_multiply_accumulate(d, a, b, zero, line, column);
}
#define EMU_MATRIX_MEMORY(space)                                                              \
  template <typename T, typename U>                                                           \
  METAL_FUNC void simdgroup_load(simdgroup_matrix<T>& m, const space U* p, ulong stride = 8,   \
                                 ulong2 origin = ulong2{0, 0}, bool transpose = false) {       \
    static_assert(is_same_v<T, U>, "simdgroup_load keeps the type");                          \
    int lane = emu_lane(), r = emu_matrix_row(lane), c = emu_matrix_column(lane);             \
    for (int j = 0; j < 2; j++)                                                               \
      m.elements[j] = transpose ? p[(origin.y + c + j) * stride + origin.x + r]               \
                                : p[(origin.y + r) * stride + origin.x + c + j];              \
  }                                                                                           \
  template <typename T, typename U>                                                           \
  METAL_FUNC void simdgroup_store(simdgroup_matrix<T> m, space U* p, ulong stride = 8,         \
                                  ulong2 origin = ulong2{0, 0}, bool transpose = false) {      \
    static_assert(is_same_v<T, U>, "simdgroup_store keeps the type");                         \
    int lane = emu_lane(), r = emu_matrix_row(lane), c = emu_matrix_column(lane);             \
    for (int j = 0; j < 2; j++)                                                               \
      (transpose ? p[(origin.y + c + j) * stride + origin.x + r]                              \
                 : p[(origin.y + r) * stride + origin.x + c + j]) = m.elements[j];            \
  }
EMU_MATRIX_MEMORY(device)
EMU_MATRIX_MEMORY(threadgroup)

// ---- atomics: lanes run one at a time, so plain operations do; the runtime exempts them ------
enum memory_order { memory_order_relaxed };
template <typename T> struct atomic { T value; };
typedef atomic<uint> atomic_uint;
typedef atomic<int> atomic_int;
#define EMU_ATOMICS(space)                                                                    \
  template <typename T, typename U>                                                           \
  METAL_FUNC T atomic_fetch_add_explicit(space atomic<T>* p, U x, memory_order) {             \
    T old; emu_atomic((void*)p, &old, sizeof(T), 0);                                          \
    T sum = old + (T)x; emu_atomic((void*)p, &sum, sizeof(T), 1);                             \
    return old;                                                                               \
  }                                                                                           \
  template <typename T, typename U>                                                           \
  METAL_FUNC void atomic_store_explicit(space atomic<T>* p, U x, memory_order) {              \
    T value = (T)x; emu_atomic((void*)p, &value, sizeof(T), 1);                               \
  }                                                                                           \
  template <typename T>                                                                       \
  METAL_FUNC T atomic_load_explicit(space atomic<T>* p, memory_order) {                       \
    T value; emu_atomic((void*)p, &value, sizeof(T), 0); return value;                        \
  }
EMU_ATOMICS(device)
EMU_ATOMICS(threadgroup)
#undef EMU_ATOMICS
struct os_log {
  template <typename... A> constexpr os_log(A...) {}
  template <typename... A> void log_debug(A...) const {}
};
}  // namespace metal
using metal::mem_flags;

// ---- how the generated entry hands arguments over --------------------------------------------
struct EmuIds { uint v[13][3]; };
struct EmuPointer {
  void* p;
  template <typename P> METAL_FUNC operator P() const { return (P)p; }
};
struct EmuReference {
  void* p;
  template <typename T> METAL_FUNC operator __attribute__((address_space(2))) T&() const {
    return *(__attribute__((address_space(2))) T*)p;
  }
};
struct EmuId {
  const uint* v;
  METAL_FUNC operator uint() const { return v[0]; }
  METAL_FUNC operator ushort() const { return (ushort)v[0]; }
  METAL_FUNC operator uint2() const { return uint2{v[0], v[1]}; }
  METAL_FUNC operator uint3() const { return uint3{v[0], v[1], v[2]}; }
  METAL_FUNC operator ushort3() const { return ushort3{(ushort)v[0], (ushort)v[1], (ushort)v[2]}; }
};
