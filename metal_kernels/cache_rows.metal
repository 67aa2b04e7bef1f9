// Helpers shared by the attention kernels: what a launch passes, and loads from a cache.

enum {
  SIZE_HEADS, SIZE_KV_HEADS, SIZE_QUERIES, SIZE_CAPACITY, SIZE_WINDOW, SIZE_FLAGS,
  SIZE_MASK_BATCH, SIZE_MASK_HEAD, SIZE_MASK_QUERY, SIZE_MASK_ROW, SIZE_TILES
};
enum { HAS_SINKS = 1, HAS_SLOPES = 2, HAS_MASK = 4, HAS_SOFTCAP = 8 };

// Channels a lane takes at a time: whole bytes of codes, aligned loads of rows, and few enough that
// the registers of many query rows fit.
template <int BITS, int ROWS>
constexpr int chunk_of() {
  return BITS == 3 || BITS == 5 || ((BITS == 2 || BITS == 4) && ROWS <= 4) ? 8 : 4;
}

// Lanes that share a row: a power of two of at most 32 that covers the chunks of a row.
constexpr int lanes_of(int chunks) {
  return chunks > 16 ? 32 : chunks > 8 ? 16 : 8;
}

// CHUNK channels of a row of T, by fours: Metal has no wider vectors.
template <typename T, int CHUNK>
void load_plain(const device T* row, int chunk, thread float* out) {
  for (int first = 0; first < CHUNK; first += 4) {
    const vec<T, 4> x = ((const device vec<T, 4>*)row)[(chunk * CHUNK + first) / 4];
    for (int i = 0; i < 4; i++) out[first + i] = float(x[i]);
  }
}

// CHUNK channels of a row of codes, least significant bits first, as scale * code + bias.
template <typename T, int BITS, int CHUNK>
void load_codes(const device uint32_t* row, int chunk, float scale, float bias, thread float* out) {
  constexpr int WIDTH = BITS * CHUNK;  // bits
  if (WIDTH == 32 || WIDTH == 16 || WIDTH == 8) {
    const uint word = WIDTH == 32   ? row[chunk]
                      : WIDTH == 16 ? uint(((const device ushort*)row)[chunk])
                                    : uint(((const device uchar*)row)[chunk]);
    for (int i = 0; i < CHUNK; i++) {
      out[i] = scale * float((word >> (BITS * i)) & ((1 << BITS) - 1)) + bias;
    }
  } else {
    constexpr int BYTES = WIDTH / 8;
    const device uchar* bytes = (const device uchar*)row + chunk * BYTES;
    ulong word = 0;
    for (int i = 0; i < BYTES; i++) word |= ulong(bytes[i]) << (8 * i);
    for (int i = 0; i < CHUNK; i++) {
      out[i] = scale * float(uint(word >> (BITS * i)) & ((1 << BITS) - 1)) + bias;
    }
  }
}

// The scale and the bias of a group, which lie side by side behind the codes of a row.
template <typename T>
float2 load_pair(const device uint32_t* words, int group) {
  if (sizeof(T) == 2) {
    const vec<T, 2> pair = ((const device vec<T, 2>*)words)[group];
    return float2(float(pair[0]), float(pair[1]));
  }
  const device T* pair = (const device T*)words + 2 * group;  // aligned to 4 bytes only
  return float2(float(pair[0]), float(pair[1]));
}

// Where the rows of one kv head begin and how far apart they are, in elements.
struct RowPlace {
  long first, step;
};

// The chunks of one cache row that this lane owns: chunk `lane + LANES i`. BITS 0: a plain row.
template <typename T, typename P, int BITS, int GROUP, int DIM, int LANES, int CHUNKS, int CHUNK>
void load_row(const device P* rows, RowPlace place, int row, int lane, thread float* out) {
  constexpr int CODE_WORDS = (DIM + GROUP - 1) / GROUP * GROUP * BITS / 32;
  const device P* words = rows + place.first + row * place.step;
  for (int i = 0; i < CHUNKS; i++) {
    const int chunk = lane + LANES * i;
    if (chunk * CHUNK >= DIM) {
      for (int c = 0; c < CHUNK; c++) out[i * CHUNK + c] = 0;
    } else if (BITS == 0) {
      load_plain<T, CHUNK>((const device T*)words, chunk, out + i * CHUNK);
    } else {
      const device uint32_t* codes = (const device uint32_t*)words;
      const float2 pair = load_pair<T>(codes + CODE_WORDS, chunk * CHUNK / GROUP);
      load_codes<T, BITS == 0 ? 8 : BITS, CHUNK>(codes, chunk, pair[0], pair[1], out + i * CHUNK);
    }
  }
}
