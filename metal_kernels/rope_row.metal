// Helpers shared by rope and rope_quantize: one simdgroup holds one row in threadgroup memory.

enum {
  SIZE_BATCH, SIZE_HEADS, SIZE_KV_HEADS, SIZE_POSITIONS, SIZE_EACH, SIZE_Q_NORM, SIZE_K_NORM
};
// A norm: 0 none, 1 without a weight, 2 with one.
enum { FACTOR_AMPLITUDE, FACTOR_Q_EPS, FACTOR_Q_OFFSET, FACTOR_K_EPS, FACTOR_K_OFFSET };

// RMSNorm of the DIM values this simdgroup's lanes loaded (lane i holds i, i + 32, ...).
template <int DIM, typename W>
void normalise_row(threadgroup float* row, W weight, int weight_stride, int norm, float eps,
                   float offset, int lane) {
  float squares = 0;
  for (int i = lane; i < DIM; i += 32) squares += row[i] * row[i];
  const float factor = precise::rsqrt(simd_sum(squares) / DIM + eps);
  for (int i = lane; i < DIM; i += 32) {
    row[i] = row[i] * factor * (norm == 2 ? float(weight[i * weight_stride]) + offset : 1.0f);
  }
}

// Turn the first ROTATED values, pair by pair; a pair belongs to one lane.
template <int ROTATED, bool INTERLEAVED, typename F>
void turn_row(threadgroup float* row, F frequencies, int stride, float position, float amplitude,
              int lane) {
  for (int i = lane; i < ROTATED / 2; i += 32) {
    const float angle = position * frequencies[i * stride];
    const float c = precise::cos(angle) * amplitude, s = precise::sin(angle) * amplitude;
    const int first = INTERLEAVED ? 2 * i : i;
    const int second = INTERLEAVED ? 2 * i + 1 : i + ROTATED / 2;
    const float a = row[first], b = row[second];
    row[first] = a * c - b * s;
    row[second] = a * s + b * c;
  }
}
