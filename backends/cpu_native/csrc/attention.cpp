// Attention of few queries over window rows and compressed entries, read where they lie in the paged caches.
#include <algorithm>

#include "vectors.h"

namespace {

constexpr long kHeads = 4;  // heads that share one reading of a row

// One query's heads h0..h1-1 over the rows: scores, softmax with the sink, weighted sum.
void attend(const float* q, const float* sink, const std::vector<const float*>& rows, float* out, float* scores, long h0, long h1, long c,
            float scale) {
  const long n = static_cast<long>(rows.size());
  for (long h = h0; h < h1; h += kHeads) {
    const long some = std::min(kHeads, h1 - h);
    float part[kHeads];
    for (long r = 0; r < n; ++r) {
      if (some == kHeads)
        v4::dots<kHeads>(rows[r], q + h * c, c, c, part);
      else
        for (long j = 0; j < some; ++j) part[j] = v4::dot(rows[r], q + (h + j) * c, c);
      for (long j = 0; j < some; ++j) scores[j * n + r] = part[j] * scale;
    }
    for (long j = 0; j < some; ++j) {
      float* mine = scores + j * n;
      const float top = std::max(sink[h + j], *std::max_element(mine, mine + n));
      float sum = std::exp(sink[h + j] - top);
      for (long r = 0; r < n; ++r) sum += mine[r] = std::exp(mine[r] - top);
      for (long r = 0; r < n; ++r) mine[r] /= sum;
    }
    std::fill(out + h * c, out + (h + some) * c, 0.0f);
    for (long r = 0; r < n; ++r)
      for (long j = 0; j < some; ++j) v4::add_scaled(out + (h + j) * c, rows[r], scores[j * n + r], c);
  }
}

const float* at(const float* cache, const int32_t* table, long row, long per_block, long c) {
  return cache + (table[row / per_block] * per_block + row % per_block) * c;
}

}  // namespace

extern "C" {

// out [T, H, C]. window [., PW, C] by window_table [B, BW]; entries [., PE, C] by entry_table [B, BE], or null;
// index [T, K] names the entries of each token (-1: none), null: all visible ones; ratio tokens make an entry.
void v4_attention(const float* q, const float* window_cache, const int32_t* window_table, const float* sink, const int32_t* cu,
                  const int32_t* start, const float* entries, const int32_t* entry_table, const int32_t* index, float* out, long batch,
                  long heads, long c, long window_block, long window_width, long entry_block, long entry_width, long k, long window,
                  long ratio, float scale, int threads) {
  std::vector<const float*> rows;
  std::vector<float> scratch;
  for (long b = 0; b < batch; ++b)
    for (long t = cu[b]; t < cu[b + 1]; ++t) {
      const long position = start[b] + t - cu[b];
      rows.clear();
      if (entries && index) {
        for (long j = 0; j < k; ++j)
          if (index[t * k + j] >= 0) rows.push_back(at(entries, entry_table + b * entry_width, index[t * k + j], entry_block, c));
      } else if (entries) {
        for (long e = 0; e < (position + 1) / ratio; ++e) rows.push_back(at(entries, entry_table + b * entry_width, e, entry_block, c));
      }
      for (long p = std::max(0L, position - window + 1); p <= position; ++p)
        rows.push_back(at(window_cache, window_table + b * window_width, p, window_block, c));
      const long n = static_cast<long>(rows.size()), groups = (heads + kHeads - 1) / kHeads;
      const int team = v4::team(n * heads, threads);
      scratch.resize(team * kHeads * n);
#pragma omp parallel num_threads(team)
      {
        const long id = omp_get_thread_num(), of = omp_get_num_threads();
        const long h0 = std::min(heads, groups * id / of * kHeads), h1 = std::min(heads, groups * (id + 1) / of * kHeads);
        attend(q + t * heads * c, sink, rows, out + t * heads * c, scratch.data() + id * kHeads * n, h0, h1, c, scale);
      }
    }
}
}
