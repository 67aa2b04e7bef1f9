// Helpers shared by kernels that quantize: one simdgroup holds one row in threadgroup memory.

// Turn each run of BLOCK values by an orthonormal Hadamard matrix (its own inverse), in place.
template <int BLOCK, int DIM>
void rotate_row(threadgroup float* row, int lane) {
  for (int half_block = 1; half_block < BLOCK; half_block *= 2) {
    for (int pair = lane; pair < DIM / 2; pair += 32) {
      const int i = pair / half_block * half_block * 2 + pair % half_block;
      const float a = row[i], b = row[i + half_block];
      row[i] = a + b;
      row[i + half_block] = a - b;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  const float scale = precise::rsqrt(float(BLOCK));
  for (int i = lane; i < DIM; i += 32) row[i] *= scale;
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Affine quantization of PADDED values by groups of GROUP, laid out as mx.quantize does: the scale
// is signed so that the edge of larger magnitude is a whole number of steps and zero is exact; codes
// follow each other in a stream of bits, least significant first, and scale and bias of each group
// follow the codes. Codes are taken with the scale and bias as they are stored, rounded to T.
template <typename T, int BITS, int GROUP, int PADDED>
void quantize_row(const threadgroup float* row, threadgroup uchar* codes, device uint32_t* rows,
                  long index, int lane) {
  constexpr int CODE_WORDS = PADDED * BITS / 32;
  constexpr int ROW_WORDS = CODE_WORDS + PADDED / GROUP * 2 * int(sizeof(T)) / 4;
  device uint32_t* out_codes = rows + index * ROW_WORDS;
  device T* out_pairs = (device T*)(out_codes + CODE_WORDS);
  constexpr float top = (1 << BITS) - 1;
  constexpr int OWN = GROUP / 32;  // values of a group a lane holds
  for (int group = 0; group < PADDED / GROUP; group++) {
    float own[OWN];
    float low = INFINITY, high = -INFINITY;
    for (int i = 0; i < OWN; i++) {
      own[i] = row[group * GROUP + lane * OWN + i];
      low = min(low, own[i]);
      high = max(high, own[i]);
    }
    low = simd_min(low);
    high = simd_max(high);
    float scale = max((high - low) / top, 1e-7f);
    const bool from_low = abs(low) > abs(high);
    scale = from_low ? scale : -scale;
    const float edge = from_low ? low : high;
    const float steps = round(edge / scale);
    const bool at_zero = steps == 0.0f;
    scale = float(T(at_zero ? scale : edge / steps));
    const float bias = float(T(at_zero ? 0.0f : edge));
    for (int i = 0; i < OWN; i++) {
      const float code = scale == 0.0f ? 0.0f : round((own[i] - bias) / scale);
      codes[group * GROUP + lane * OWN + i] = uchar(clamp(code, 0.0f, top));
    }
    if (lane == 0) {
      out_pairs[2 * group] = T(scale);
      out_pairs[2 * group + 1] = T(bias);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int word = lane; word < CODE_WORDS; word += 32) {
    uint bits = 0;
    for (int i = word * 32 / BITS; i * BITS < word * 32 + 32; i++) {
      const int shift = i * BITS - word * 32;
      bits |= shift >= 0 ? uint(codes[i]) << shift : uint(codes[i]) >> -shift;
    }
    out_codes[word] = bits;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
