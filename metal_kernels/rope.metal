// rope: rotary positions for queries and keys in one launch, with the norm of each head folded in.
//
// Formula   y = x / sqrt(mean(x^2) + eps) (weight + offset) where a norm is given, else x; then each
//           pair (a, b) -> amplitude (a cos - b sin, a sin + b cos) of angle = position frequency.
// Inputs    q [B, H, T, D], k [B, K, T, D] T of any strides; q_weight, k_weight [D]; offsets [B] or
//           [B, T] int32; frequencies [ROTATED / 2] float32 (inverse); sizes, factors: rope_row.metal.
// Outputs   q_out [B, H, T, D], k_out [B, K, T, D] T.
// Grid      one simdgroup a row, four rows a threadgroup: the queries' rows, then the keys'.
// Bound     memory: reads and writes each row once, 4 D bytes a row at 16 bits.
// Source    Su et al. 2021 (arXiv:2104.09864); the norm: Zhang and Sennrich 2019 (arXiv:1910.07467).
// Falls back for other types than float16, bfloat16 and float32.

// ---- kernel body ----
threadgroup float shared_rows[4 * D];
const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const int heads = sizes[SIZE_HEADS], kv_heads = sizes[SIZE_KV_HEADS], count = sizes[SIZE_POSITIONS];
const long index = long(threadgroup_position_in_grid.y) * 4 + simd;
const int t = index % count, slot = index / count % (heads + kv_heads);
const int batch = index / count / (heads + kv_heads);
if (batch < sizes[SIZE_BATCH]) {
  threadgroup float* row = shared_rows + simd * D;
  const bool query = slot < heads;
  const int head = query ? slot : slot - heads;
  for (int i = lane; i < D; i += 32) {
    row[i] = float(query ? q[batch * q_strides[0] + head * q_strides[1] + t * q_strides[2] +
                             i * q_strides[3]]
                         : k[batch * k_strides[0] + head * k_strides[1] + t * k_strides[2] +
                             i * k_strides[3]]);
  }
  const int norm = sizes[query ? SIZE_Q_NORM : SIZE_K_NORM];
  if (norm && query) {
    normalise_row<D>(row, q_weight, int(q_weight_strides[0]), norm, factors[FACTOR_Q_EPS],
                     factors[FACTOR_Q_OFFSET], lane);
  } else if (norm) {
    normalise_row<D>(row, k_weight, int(k_weight_strides[0]), norm, factors[FACTOR_K_EPS],
                     factors[FACTOR_K_OFFSET], lane);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const int position = sizes[SIZE_EACH]
                           ? offsets[batch * offsets_strides[0] + t * offsets_strides[1]]
                           : offsets[batch * offsets_strides[0]] + t;
  turn_row<ROTATED, INTERLEAVED>(row, frequencies, int(frequencies_strides[0]), float(position),
                                 factors[FACTOR_AMPLITUDE], lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const long at = ((long(batch) * (query ? heads : kv_heads) + head) * count + t) * D;
  for (int i = lane; i < D; i += 32) {
    if (query) {
      q_out[at + i] = T(row[i]);
    } else {
      k_out[at + i] = T(row[i]);
    }
  }
}
