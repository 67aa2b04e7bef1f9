// kv_quantize: rows of a cache to codes, scales and biases.
//
// Formula   scale = +-(max - min) / (2^BITS - 1) by groups, code = round((x - bias) / scale), with the
//           sign, the edge and the layout of mx.quantize; bit-identical to it in float32. ROTATE turns
//           each row by a block-diagonal Hadamard matrix first.
// Inputs    rows [N, DIM] T, row contiguous; sizes int32: N.
// Outputs   words [N, .] uint32: a row's PADDED BITS / 32 words of codes, then scale and bias T of each
//           group, where PADDED is DIM rounded up to whole groups (the rest counts as zeros).
// Grid      one simdgroup a row, four rows a threadgroup.
// Bound     memory: 2 DIM bytes in, DIM BITS / 8 + 4 DIM / GROUP out at 16 bits.
// Source    the affine format of MLX (mlx.core.quantize); Hadamard rotation: QuaRot (Ashkboos et al.
//           2024, arXiv:2404.00456).
// Falls back for other types than float16, bfloat16 and float32.

// ---- kernel body ----
threadgroup float shared_rows[4 * PADDED];
threadgroup uchar shared_codes[4 * PADDED];
const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const long index = long(threadgroup_position_in_grid.y) * 4 + simd;
if (index < sizes[0]) {
  threadgroup float* row = shared_rows + simd * PADDED;
  for (int i = lane; i < PADDED; i += 32) row[i] = i < DIM ? float(rows[index * DIM + i]) : 0.0f;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (ROTATE) {
    rotate_row<BLOCK, DIM>(row, lane);
    for (int i = lane; i < DIM; i += 32) row[i] = float(T(row[i]));
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  quantize_row<T, BITS, GROUP, PADDED>(row, shared_codes + simd * PADDED, words, index, lane);
}
