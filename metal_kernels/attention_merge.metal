// attention_merge: the second pass of attention_decode, which adds up the blocks of each query row.
//
// Formula   out = sum_b partial[b] exp(m_b - M) / (sum_b l_b exp(m_b - M) + exp(sink - M)),
//           M = max_b m_b; 0 where no block saw a row.
// Inputs    partial [N, blocks, DV] float32, stats [N, blocks, 2] float32 (m, l), N = B H T;
//           sinks [H]; sizes int32: heads, queries, blocks, flags.
// Outputs   out [N, DV] T.
// Grid      x: 32 lanes times DV / 32 channels rounded up; y: N query rows.
// Bound     memory: N blocks (DV + 2) floats, a few percent of the cache.
// Source    Flash-Decoding (Dao et al. 2023).

// ---- kernel body ----
const int channel = thread_position_in_grid.x;
const long row = thread_position_in_grid.y;
const int heads = sizes[0], queries = sizes[1], blocks = sizes[2], flags = sizes[3];
float top = -INFINITY;
for (int b = 0; b < blocks; b++) top = max(top, stats[(row * blocks + b) * 2]);
float whole = 0, sum = 0;
for (int b = 0; b < blocks; b++) {
  const float m = stats[(row * blocks + b) * 2];
  if (m == -INFINITY) continue;
  const float factor = exp(m - top);
  whole += stats[(row * blocks + b) * 2 + 1] * factor;
  if (channel < DV) sum += partial[(row * blocks + b) * DV + channel] * factor;
}
float divisor = whole;
if (flags & 1) divisor += exp(float(sinks[row / queries % heads]) - top);
if (channel < DV) out[row * DV + channel] = T(whole > 0 ? sum / divisor : 0.0f);
