// attention_decode: one to eight query rows over a whole cache buffer, plain or quantized.
//
// Formula   out[t] = sum_j w[t, j] v[j] / (sum_j w[t, j] + exp(sink)), w = exp(s[t, j]),
//           s[t, j] = cap(scale q[t] . k[j]) + slope (j - p), cap(x) = softcap tanh(x / softcap),
//           over the rows j that query t at position p = length - T + t sees (attention_reference.py).
// Inputs    q [B, H, T, D] T; keys, values [B, K, S, .]: rows of T, or words uint32 as kv_quantize makes
//           them (codes, then scale and bias of each group); lengths, starts [B] int32;
//           sinks, slopes [H]; mask bool [b, h, t, s], each b, h, t, s full or 1. Any strides, but the
//           channels of a cache row follow each other: slices of a buffer are read in place.
//           sizes int32: SIZE_ of cache_rows.metal; factors float32: scale, softcap.
// Outputs   one block: out [B, H, T, DV] T. More (SPLIT): sums [B, H, T, blocks, DV] float32, which
//           attention_merge combines by stats [B, H, T, blocks, 2] float32 (maximum, sum).
// Grid      x: 32 SIMDS threads; y: (batch, kv head, tile of ROWS query rows); z: blocks of rows.
//           Each simdgroup takes 32 cache rows at a time; LANES lanes share a row, CHUNK channels
//           each, so that a simdgroup's load is contiguous. A row is read once for ROWS query rows:
//           the H / K heads of its group and all T positions.
// Bound     memory: reads S (D + DV) bits / 8 bytes a kv head, ceil(T H / K / ROWS) times; FLOPs are
//           2 T H S (D + DV), under 16 a byte at 16 bits and 8 rows.
// Source    online softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867); splitting the length:
//           Flash-Decoding (Dao et al. 2023); one read for the heads of a group: Ainslie et al. 2023
//           (arXiv:2305.13245). Dequantization in registers; scores of 32 rows before each softmax.
// Falls back when D or DV is not a multiple of 4 (8 if quantized) or above 576, or T > 8.

// ---- kernel body ----
constexpr int KEY_CHUNK = chunk_of<KEY_BITS, ROWS>();
constexpr int KEY_LANES = lanes_of((D + KEY_CHUNK - 1) / KEY_CHUNK);
constexpr int KEY_CHUNKS = (D + KEY_CHUNK * KEY_LANES - 1) / (KEY_CHUNK * KEY_LANES);
constexpr int KEY_ROWS = 32 / KEY_LANES;  // cache rows a simdgroup loads at a time
constexpr int KEY_WIDTH = KEY_CHUNKS * KEY_CHUNK;
constexpr int VALUE_CHUNK = chunk_of<VALUE_BITS, ROWS>();
constexpr int VALUE_LANES = LATENT ? KEY_LANES : lanes_of((DV + VALUE_CHUNK - 1) / VALUE_CHUNK);
constexpr int VALUE_CHUNKS = (DV + VALUE_CHUNK * VALUE_LANES - 1) / (VALUE_CHUNK * VALUE_LANES);
constexpr int VALUE_ROWS = 32 / VALUE_LANES;
constexpr int VALUE_WIDTH = VALUE_CHUNKS * VALUE_CHUNK;
// Loads in flight before their sums are taken: as many as the registers of ROWS rows leave room for.
constexpr int AHEAD = ROWS >= 8 || LATENT ? 2 : 4;

threadgroup float shared_sums[SIMDS * DV];
threadgroup float shared_stats[SIMDS * ROWS * 2];

const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int heads = sizes[SIZE_HEADS], kv_heads = sizes[SIZE_KV_HEADS];
const int queries = sizes[SIZE_QUERIES], capacity = sizes[SIZE_CAPACITY];
const int window = sizes[SIZE_WINDOW], flags = sizes[SIZE_FLAGS], tiles = sizes[SIZE_TILES];
const int tile = threadgroup_position_in_grid.y % tiles;
const int kv_head = threadgroup_position_in_grid.y / tiles % kv_heads;
const int batch = threadgroup_position_in_grid.y / tiles / kv_heads;
const int blocks = threadgroups_per_grid.z, block = threadgroup_position_in_grid.z;
const int group = heads / kv_heads;
const int row_count = group * queries;  // query rows that share this kv head
const int first_row = tile * ROWS;
const long query_base = (long(batch) * heads + long(kv_head) * group) * queries;
const float scale = factors[0], softcap = factors[1];

// The cache rows any of these queries can see, and this block's part of them, in steps of 32.
const int length = min(int(lengths[batch * lengths_strides[0]]), capacity);
const int start = starts[batch * starts_strides[0]];
const int low = max(max(start, 0), window > 0 ? length - queries - window + 1 : 0);
const int aligned_low = low & ~31;
const int steps = (max(length - aligned_low, 0) + 31) / 32;
const int steps_a_block = (steps + blocks - 1) / blocks;
const int step_begin = min(block * steps_a_block, steps);
const int step_end = min(step_begin + steps_a_block, steps);

const RowPlace key_place = {batch * keys_strides[0] + kv_head * keys_strides[1], keys_strides[2]};
const RowPlace value_place = {
    batch * values_strides[0] + kv_head * values_strides[1], values_strides[2]};
const int key_lane = lane % KEY_LANES, key_part = lane / KEY_LANES;
const int value_lane = lane % VALUE_LANES, value_part = lane / VALUE_LANES;

QueryT query[ROWS][KEY_WIDTH];
for (int r = 0; r < ROWS; r++) {
  const int row = min(first_row + r, row_count - 1);  // a row too many repeats the last
  const long at = batch * q_strides[0] + (kv_head * group + row / queries) * q_strides[1] +
                  row % queries * q_strides[2];
  for (int i = 0; i < KEY_CHUNKS; i++) {
    const int channel = (key_lane + KEY_LANES * i) * KEY_CHUNK;
    for (int c = 0; c < KEY_CHUNK; c++) {
      query[r][i * KEY_CHUNK + c] =
          channel < D ? QueryT(q[at + (channel + c) * q_strides[3]]) : QueryT(0);
    }
  }
}

float sums[ROWS][VALUE_WIDTH];
float maximum[ROWS], total[ROWS];
for (int r = 0; r < ROWS; r++) {
  maximum[r] = -INFINITY;
  total[r] = 0;
  for (int i = 0; i < VALUE_WIDTH; i++) sums[r][i] = 0;
}

for (int step = step_begin + simd; step < step_end; step += SIMDS) {
  const int base = aligned_low + step * 32;
  // A latent row is its own value: keep AHEAD of them in registers. Otherwise score 32 rows first.
  constexpr int TILE_LOADS = LATENT ? AHEAD : KEY_LANES;
  for (int part = 0; part < KEY_LANES; part += TILE_LOADS) {
    float rows[AHEAD][KEY_WIDTH];
    float score[ROWS];  // of the one cache row this lane owns
    for (int r = 0; r < ROWS; r++) score[r] = -INFINITY;
    for (int load = part; load < part + TILE_LOADS; load += AHEAD) {
      for (int a = 0; a < AHEAD; a++) {
        const int j = base + (load + a) * KEY_ROWS + key_part;
        if (j >= low && j < length) {
          load_row<T, KeyT, KEY_BITS, KEY_GROUP, D, KEY_LANES, KEY_CHUNKS, KEY_CHUNK>(
              keys, key_place, j, key_lane, rows[a]);
        } else {
          for (int i = 0; i < KEY_WIDTH; i++) rows[a][i] = 0;
        }
      }
      for (int a = 0; a < AHEAD; a++) {
        for (int r = 0; r < ROWS; r++) {
          float dot = 0;
          for (int i = 0; i < KEY_WIDTH; i++) dot = fma(float(query[r][i]), rows[a][i], dot);
          for (int o = KEY_LANES / 2; o > 0; o /= 2) dot += simd_shuffle_xor(dot, ushort(o));
          if (load + a == key_lane) score[r] = dot;
        }
      }
    }

    // This lane's row: key_lane * KEY_ROWS + key_part of the 32.
    const int j = base + key_lane * KEY_ROWS + key_part;
    const bool owned = key_lane >= part && key_lane < part + TILE_LOADS && j >= low && j < length;
    float weight[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const int row = min(first_row + r, row_count - 1);
      const int position = length - queries + row % queries;
      const int head = kv_head * group + row / queries;
      bool seen = owned && j <= position && (window <= 0 || position - j < window);
      if (seen && (flags & HAS_MASK)) {
        seen = mask[batch * sizes[SIZE_MASK_BATCH] * mask_strides[0] +
                    head * sizes[SIZE_MASK_HEAD] * mask_strides[1] +
                    row % queries * sizes[SIZE_MASK_QUERY] * mask_strides[2] +
                    j * sizes[SIZE_MASK_ROW] * mask_strides[3]];
      }
      float x = score[r] * scale;
      if (flags & HAS_SOFTCAP) x = softcap * precise::tanh(x / softcap);
      if (flags & HAS_SLOPES) x += float(slopes[head * slopes_strides[0]]) * float(j - position);
      x = seen ? x : -INFINITY;
      const float higher = max(maximum[r], simd_max(x));
      const bool none = higher == -INFINITY;
      const float kept = none ? 1.0f : exp(maximum[r] - higher);
      weight[r] = seen ? exp(x - higher) : 0.0f;
      total[r] = total[r] * kept + weight[r];  // this lane's part of the sum
      maximum[r] = higher;
      for (int i = 0; i < VALUE_WIDTH; i++) sums[r][i] *= kept;
    }

    if (LATENT) {
      for (int a = 0; a < AHEAD; a++) {
        for (int r = 0; r < ROWS; r++) {
          const float w = simd_shuffle(weight[r], ushort(key_part * KEY_LANES + part + a));
          for (int i = 0; i < VALUE_WIDTH; i++) sums[r][i] = fma(w, rows[a][i], sums[r][i]);
        }
      }
    } else {
      for (int load = 0; load < VALUE_LANES; load += AHEAD) {
        float values_ahead[AHEAD][VALUE_WIDTH];
        for (int a = 0; a < AHEAD; a++) {
          const int k = base + (load + a) * VALUE_ROWS + value_part;
          if (k >= low && k < length) {
            load_row<T, ValueT, VALUE_BITS, VALUE_GROUP, DV, VALUE_LANES, VALUE_CHUNKS,
                     VALUE_CHUNK>(
                values, value_place, k, value_lane, values_ahead[a]);
          } else {
            for (int i = 0; i < VALUE_WIDTH; i++) values_ahead[a][i] = 0;
          }
        }
        for (int a = 0; a < AHEAD; a++) {
          const int in_tile = (load + a) * VALUE_ROWS + value_part;
          const int owner = in_tile % KEY_ROWS * KEY_LANES + in_tile / KEY_ROWS;
          for (int r = 0; r < ROWS; r++) {
            const float w = simd_shuffle(weight[r], ushort(owner));
            for (int i = 0; i < VALUE_WIDTH; i++) sums[r][i] = fma(w, values_ahead[a][i], sums[r][i]);
          }
        }
      }
    }
  }
}

// Lanes that hold the same channels, then simdgroups, are added up.
for (int r = 0; r < ROWS; r++) {
  total[r] = simd_sum(total[r]);
  for (int o = VALUE_LANES; o < 32; o *= 2) {
    for (int i = 0; i < VALUE_WIDTH; i++) sums[r][i] += simd_shuffle_xor(sums[r][i], ushort(o));
  }
  if (lane == 0) {
    shared_stats[(simd * ROWS + r) * 2] = maximum[r];
    shared_stats[(simd * ROWS + r) * 2 + 1] = total[r];
  }
}
for (int r = 0; r < ROWS; r++) {
  if (value_part == 0) {
    for (int i = 0; i < VALUE_WIDTH; i++) {
      const int channel =
          (value_lane + VALUE_LANES * (i / VALUE_CHUNK)) * VALUE_CHUNK + i % VALUE_CHUNK;
      if (channel < DV) shared_sums[simd * DV + channel] = sums[r][i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int row = first_row + r;
  if (row < row_count) {
    float top = -INFINITY;
    for (int s = 0; s < SIMDS; s++) top = max(top, shared_stats[(s * ROWS + r) * 2]);
    float whole = 0;
    for (int s = 0; s < SIMDS; s++) {
      const float m = shared_stats[(s * ROWS + r) * 2];
      if (m != -INFINITY) whole += shared_stats[(s * ROWS + r) * 2 + 1] * exp(m - top);
    }
    const long at = query_base + row;
    float divisor = whole;
    if (!SPLIT && (flags & HAS_SINKS)) {
      divisor += exp(float(sinks[(kv_head * group + row / queries) * sinks_strides[0]]) - top);
    }
    for (int channel = thread_index_in_threadgroup; channel < DV; channel += 32 * SIMDS) {
      float sum = 0;
      for (int s = 0; s < SIMDS; s++) {
        const float m = shared_stats[(s * ROWS + r) * 2];
        if (m != -INFINITY) sum += shared_sums[s * DV + channel] * exp(m - top);
      }
      out[(at * (SPLIT ? blocks : 1) + (SPLIT ? block : 0)) * DV + channel] =
          OutT(SPLIT ? sum : whole > 0 ? sum / divisor : 0.0f);
    }
    if (thread_index_in_threadgroup == 0) {
      stats[(at * blocks + block) * 2] = top;
      stats[(at * blocks + block) * 2 + 1] = whole;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
