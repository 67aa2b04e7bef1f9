// rope_quantize: projections to rotated queries and quantized cache rows, in one launch.
//
// Formula   rope (rope.metal) for q and k, then kv_quantize (kv_quantize.metal) for k and v; k is
//           rounded to T before it is quantized. ROTATE turns k and v by a Hadamard matrix first.
// Inputs    as rope, and v [B, K, T, DV] T of any strides.
// Outputs   q_out [B, H, T, D] T; key_words, value_words [B, K, T, .] uint32 as kv_quantize.
// Grid      one simdgroup a row, four rows a threadgroup: the rows of q, of k, of v.
// Bound     memory: each row is read once and written once, the cache rows at their bits.
// Source    as rope and kv_quantize. One launch in place of two norms, two rotations and two
//           quantizations.
// Falls back for other types than float16, bfloat16 and float32.

// ---- kernel body ----
constexpr int WIDEST = D > KEY_PADDED ? (D > VALUE_PADDED ? D : VALUE_PADDED)
                                      : (KEY_PADDED > VALUE_PADDED ? KEY_PADDED : VALUE_PADDED);
threadgroup float shared_rows[4 * WIDEST];
threadgroup uchar shared_codes[4 * WIDEST];
const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const int heads = sizes[SIZE_HEADS], kv_heads = sizes[SIZE_KV_HEADS], count = sizes[SIZE_POSITIONS];
const int slots = heads + 2 * kv_heads;
const long index = long(threadgroup_position_in_grid.y) * 4 + simd;
const int t = index % count, slot = index / count % slots, batch = index / count / slots;
if (batch < sizes[SIZE_BATCH]) {
  threadgroup float* row = shared_rows + simd * WIDEST;
  threadgroup uchar* codes = shared_codes + simd * WIDEST;
  const bool query = slot < heads, value = slot >= heads + kv_heads;
  const int head = query ? slot : value ? slot - heads - kv_heads : slot - heads;
  const long kv_row = (long(batch) * kv_heads + head) * count + t;
  for (int i = lane; i < WIDEST; i += 32) {
    const bool inside = i < (value ? DV : D);
    row[i] = !inside ? 0.0f
             : query ? float(q[batch * q_strides[0] + head * q_strides[1] + t * q_strides[2] +
                               i * q_strides[3]])
             : value ? float(v[batch * v_strides[0] + head * v_strides[1] + t * v_strides[2] +
                               i * v_strides[3]])
                     : float(k[batch * k_strides[0] + head * k_strides[1] + t * k_strides[2] +
                               i * k_strides[3]]);
  }
  if (!value) {
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
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (query) {
    const long at = ((long(batch) * heads + head) * count + t) * D;
    for (int i = lane; i < D; i += 32) q_out[at + i] = T(row[i]);
  } else {
    for (int i = lane; i < WIDEST; i += 32) row[i] = float(T(row[i]));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (ROTATE) {
      if (value) {
        rotate_row<VALUE_BLOCK, DV>(row, lane);
      } else {
        rotate_row<KEY_BLOCK, D>(row, lane);
      }
      for (int i = lane; i < WIDEST; i += 32) row[i] = float(T(row[i]));
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (value) {
      quantize_row<T, VALUE_BITS, GROUP, VALUE_PADDED>(row, codes, value_words, kv_row, lane);
    } else {
      quantize_row<T, KEY_BITS, GROUP, KEY_PADDED>(row, codes, key_words, kv_row, lane);
    }
  }
}
