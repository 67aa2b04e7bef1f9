// attention_prefill: many query rows over a whole cache buffer, plain or quantized, by 8 x 8 matrices.
//
// Formula   as attention_decode; scores of BQ query rows and BK cache rows at a time, with the running
//           maximum and sum of each row, so that no T x S matrix exists.
// Inputs    as attention_decode. Outputs: out [B, H, T, DV] OutT.
// Grid      x: 32 QS DS threads; y: (batch, kv head, tile of BQ = 8 QS query rows). The rows of all
//           H / K heads of a group follow each other, so small T still fills the tiles.
//           QS DS simdgroups: simdgroup (r, d) owns 8 query rows and 1 / DS of the channels, both of
//           the dot products (partial scores are added up in threadgroup memory) and of the output.
// Memory    one tile of keys, then of values [BK, .], as T, and the queries [BQ, D] where both fit
//           32 KB (SHARED_QUERIES); otherwise queries are read from device memory for each tile.
// Bound     compute for long T: 2 T H S (D + DV) FLOPs; the cache is read ceil(T H / K / BQ) times,
//           less what causality and the window leave out, at the bits it has.
// Source    FlashAttention (Dao et al. 2022, arXiv:2205.14135); lane layout of an 8 x 8 matrix as in
//           MLX's steel kernels (BaseMMAFrag::get_coord).
// Falls back when D or DV is not a multiple of 8 or above 576.

// Row and first column of the two elements this lane holds of an 8 x 8 matrix.
short2 matrix_place(int lane) {
  return short2{short(((lane / 4) & 4) + (lane / 2) % 4), short(((lane / 4) & 2) * 2 + lane % 2 * 2)};
}

// sums += a b of 8 x 8 matrices, each as the two elements this lane holds. thread_elements() is a
// vector of 64 of which only the first two are the lane's, so nothing else is done with it whole.
void multiply_add(float2 a, float2 b, thread float2& sums) {
  simdgroup_matrix<float, 8, 8> left, right, before, after;
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(before.thread_elements()) = sums;
  simdgroup_multiply_accumulate(after, left, right, before);
  sums = reinterpret_cast<thread float2&>(after.thread_elements());
}

// Load BK rows of the cache, as T, to threadgroup memory; rows at or beyond `high` are zeros.
template <typename T, typename P, int BITS, int GROUP, int DIM, int STRIDE, int BK>
void load_tile(const device P* rows, RowPlace place, int base, int low, int high,
               threadgroup T* tile, int thread_, int threads) {
  constexpr int CHUNK = BITS == 0 ? 4 : 8, CHUNKS = DIM / CHUNK;
  for (int i = thread_; i < BK * CHUNKS; i += threads) {
    const int j = base + i / CHUNKS, chunk = i % CHUNKS;
    float x[CHUNK];
    if (j < low || j >= high) {
      for (int c = 0; c < CHUNK; c++) x[c] = 0;
    } else {
      load_row<T, P, BITS, GROUP, DIM, CHUNKS, 1, CHUNK>(rows, place, j, chunk, x);
    }
    for (int c = 0; c < CHUNK; c++) tile[i / CHUNKS * STRIDE + chunk * CHUNK + c] = T(x[c]);
  }
}

// ---- kernel body ----
constexpr int BQ = 8 * QS, THREADS = 32 * QS * DS, KEYS = BK / 8;
constexpr int PAD = 16 / sizeof(T);  // keeps the rows of a tile in different banks
constexpr int WIDEST = D > DV ? D : DV;
constexpr int OWN_D = D / DS, OWN_DV = (DV / 8 + DS - 1) / DS * 8;
threadgroup QueryT query_tile[SHARED_QUERIES ? BQ * (D + PAD) : 1];
threadgroup T cache_tile[BK * (WIDEST + PAD)];
threadgroup float score_tile[DS > 1 ? DS * BQ * BK : 1];

const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const int simd_row = simd / DS, simd_part = simd % DS;
const int thread_ = thread_index_in_threadgroup;
const int heads = sizes[SIZE_HEADS], kv_heads = sizes[SIZE_KV_HEADS];
const int queries = sizes[SIZE_QUERIES], capacity = sizes[SIZE_CAPACITY];
const int window = sizes[SIZE_WINDOW], flags = sizes[SIZE_FLAGS], tiles = sizes[SIZE_TILES];
const int tile = threadgroup_position_in_grid.y % tiles;
const int kv_head = threadgroup_position_in_grid.y / tiles % kv_heads;
const int batch = threadgroup_position_in_grid.y / tiles / kv_heads;
const int group = heads / kv_heads;
const int row_count = group * queries;
const int first_row = tile * BQ;
const int last_row = min(first_row + BQ, row_count) - 1;
const long query_base = (long(batch) * heads + long(kv_head) * group) * queries;
const RowPlace key_place = {batch * keys_strides[0] + kv_head * keys_strides[1], keys_strides[2]};
const RowPlace value_place = {
    batch * values_strides[0] + kv_head * values_strides[1], values_strides[2]};
const float scale = factors[0], softcap = factors[1];

// The cache rows that some query of this tile can see.
const bool one_head = first_row / queries == last_row / queries;
const int t_first = one_head ? first_row % queries : 0;
const int t_last = one_head ? last_row % queries : queries - 1;
const int length = min(int(lengths[batch * lengths_strides[0]]), capacity);
const int high = min(length, length - queries + t_last + 1);
const int low = max(max(int(starts[batch * starts_strides[0]]), 0),
                    window > 0 ? length - queries + t_first - window + 1 : 0);

for (int i = thread_; SHARED_QUERIES && i < BQ * D; i += THREADS) {
  const int r = min(first_row + i / D, row_count - 1);  // a row too many repeats the last
  query_tile[i / D * (D + PAD) + i % D] =
      q[batch * q_strides[0] + (kv_head * group + r / queries) * q_strides[1] +
        r % queries * q_strides[2] + i % D * q_strides[3]];
}

const short2 place = matrix_place(lane);
const int row = min(first_row + simd_row * 8 + place.x, row_count - 1);  // this lane's query row
const int t = row % queries, head = kv_head * group + row / queries;
const int position = length - queries + t;
float2 sums[OWN_DV / 8];  // this lane's two elements of each 8 x 8 matrix
for (int i = 0; i < OWN_DV / 8; i++) sums[i] = float2{0.0f, 0.0f};
float maximum = -INFINITY, total = 0;

for (int base = low & ~(BK - 1); base < high; base += BK) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_tile<T, KeyT, KEY_BITS, KEY_GROUP, D, WIDEST + PAD, BK>(
      keys, key_place, base, low, high, cache_tile, thread_, THREADS);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Two chains of sums, every second matrix of channels each: shorter ones round less.
  float2 scores[KEYS], others[KEYS];
  for (int k = 0; k < KEYS; k++) scores[k] = others[k] = float2{0.0f, 0.0f};
  for (int d = simd_part * OWN_D; d < (simd_part + 1) * OWN_D; d += 8) {
    float2 a;
    if (SHARED_QUERIES) {
      const threadgroup QueryT* qp =
          query_tile + (simd_row * 8 + place.x) * (D + PAD) + d + place.y;
      a = float2{float(qp[0]), float(qp[1])};
    } else {
      const device QueryT* qp = q + batch * q_strides[0] + head * q_strides[1] +
                                t * q_strides[2] + (d + place.y) * q_strides[3];
      a = float2{float(qp[0]), float(qp[q_strides[3]])};
    }
    for (int k = 0; k < KEYS; k++) {
      // The transpose of the keys: row = channel, column = cache row.
      const threadgroup T* kp = cache_tile + (k * 8 + place.y) * (WIDEST + PAD) + d + place.x;
      const float2 b = float2{float(kp[0]), float(kp[WIDEST + PAD])};
      if (d / 8 % 2 == 0) {
        multiply_add(a, b, scores[k]);
      } else {
        multiply_add(a, b, others[k]);
      }
    }
  }
  for (int k = 0; k < KEYS; k++) scores[k] += others[k];
  if (DS > 1) {
    const int at = (simd_row * 8 + place.x) * BK + place.y;
    for (int k = 0; k < KEYS; k++) {
      score_tile[simd_part * BQ * BK + at + k * 8] = scores[k][0];
      score_tile[simd_part * BQ * BK + at + k * 8 + 1] = scores[k][1];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < KEYS; k++) {
      for (int e = 0; e < 2; e++) {
        float sum = 0;
        for (int p = 0; p < DS; p++) sum += score_tile[p * BQ * BK + at + k * 8 + e];
        scores[k][e] = sum;
      }
    }
  }

  float higher = maximum;
  bool seen[KEYS][2];
  for (int k = 0; k < KEYS; k++) {
    for (int e = 0; e < 2; e++) {
      const int j = base + k * 8 + place.y + e;
      bool visible = j >= low && j < high && j <= position &&
                     (window <= 0 || position - j < window);
      if (visible && (flags & HAS_MASK)) {
        visible = mask[batch * sizes[SIZE_MASK_BATCH] * mask_strides[0] +
                       head * sizes[SIZE_MASK_HEAD] * mask_strides[1] +
                       t * sizes[SIZE_MASK_QUERY] * mask_strides[2] +
                       j * sizes[SIZE_MASK_ROW] * mask_strides[3]];
      }
      float x = scores[k][e] * scale;
      if (flags & HAS_SOFTCAP) x = softcap * precise::tanh(x / softcap);
      if (flags & HAS_SLOPES) x += float(slopes[head * slopes_strides[0]]) * float(j - position);
      scores[k][e] = x;
      seen[k][e] = visible;
      if (visible) higher = max(higher, x);
    }
  }
  // The lanes of a row differ in bits 0 and 3.
  higher = max(higher, simd_shuffle_xor(higher, ushort(1)));
  higher = max(higher, simd_shuffle_xor(higher, ushort(8)));
  const float kept = higher == -INFINITY ? 1.0f : exp(maximum - higher);
  float added = 0;
  for (int k = 0; k < KEYS; k++) {
    for (int e = 0; e < 2; e++) {
      const float w = seen[k][e] ? exp(scores[k][e] - higher) : 0.0f;
      scores[k][e] = w;
      added += w;
    }
  }
  maximum = higher;
  total = total * kept + added;  // this lane's part of the row
  for (int i = 0; i < OWN_DV / 8; i++) sums[i] *= kept;

  if (!LATENT) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_tile<T, ValueT, VALUE_BITS, VALUE_GROUP, DV, WIDEST + PAD, BK>(
        values, value_place, base, low, high, cache_tile, thread_, THREADS);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int i = 0; i < OWN_DV / 8; i++) {
    const int channel = simd_part * OWN_DV + i * 8;
    if (channel < DV) {
      for (int k = 0; k < KEYS; k++) {
        const threadgroup T* vp =
            cache_tile + (k * 8 + place.x) * (WIDEST + PAD) + channel + place.y;
        multiply_add(scores[k], float2{float(vp[0]), float(vp[1])}, sums[i]);
      }
    }
  }
}

total += simd_shuffle_xor(total, ushort(1));
total += simd_shuffle_xor(total, ushort(8));
float divisor = total;
if (flags & HAS_SINKS) divisor += exp(float(sinks[head * sinks_strides[0]]) - maximum);
if (first_row + simd_row * 8 + place.x < row_count) {
  for (int i = 0; i < OWN_DV / 8; i++) {
    const int channel = simd_part * OWN_DV + i * 8 + place.y;
    if (channel < DV) {
      for (int e = 0; e < 2; e++) {
        out[(query_base + row) * DV + channel + e] =
            OutT(total > 0 ? sums[i][e] / divisor : 0.0f);
      }
    }
  }
}
