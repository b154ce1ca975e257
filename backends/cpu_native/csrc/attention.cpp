// Attention of few queries over window rows and compressed entries, read where they lie in the paged caches.
#include <algorithm>

#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace {

using v4::kLanes;
using v4::Lanes;
typedef std::vector<const float*> Rows;

constexpr int kRows = 4;     // rows that share one reading of the queries
constexpr long kChunk = 64;  // channels of the result held in registers, for 4 heads

// scores [n, H] of rows low..high-1, already scaled; padded heads (q 0) score 0
void score(const float* q, const Rows& rows, float* scores, long low, long high, long heads, long c, float scale) {
  for (long r = low; r < high; r += kRows) {
    const float* some[kRows];
    for (int j = 0; j < kRows; ++j) some[j] = rows[std::min(r + j, high - 1)];
    for (long h = 0; h < heads; h += kLanes) {
      Lanes acc[kRows][1];
      v4::head_products<kRows, 1>(some, q, heads, h, c, acc);
      for (int j = 0; j < kRows && r + j < high; ++j) v4::store(scores + (r + j) * heads + h, acc[j][0] * scale);
    }
  }
}

// exp(score - top) in place for 16 heads; returns 1 / (their sum + the sink's share)
Lanes weigh(float* scores, Lanes sink, long n, long heads) {
  Lanes top = sink;
  for (long r = 0; r < n; ++r) {
    const Lanes s = v4::load(scores + r * heads);
    top = s > top ? s : top;
  }
  Lanes sum = v4::exponential(sink - top);
  for (long r = 0; r < n; ++r) {
    const Lanes p = v4::exponential(v4::load(scores + r * heads) - top);
    v4::store(scores + r * heads, p);
    sum += p;
  }
  return 1.0f / sum;
}

// out [4, c] of heads h..h+3: sum over rows of weight * row
void gather(const float* weights, const Rows& rows, const float* inverse, float* out, long heads, long c, long valid) {
  const long n = static_cast<long>(rows.size());
  long i = 0;
  for (; i + kChunk <= c; i += kChunk) {
    Lanes acc[4][4];
    for (auto& head : acc)
      for (Lanes& part : head) part = Lanes{};
    for (long r = 0; r < n; ++r) {
      const float *row = rows[r] + i, *p = weights + r * heads;
      for (int v = 0; v < 4; ++v) {
        const Lanes x = v4::load(row + v * kLanes);
        for (int j = 0; j < 4; ++j) acc[j][v] += x * p[j];
      }
    }
    for (long j = 0; j < valid; ++j)
      for (int v = 0; v < 4; ++v) v4::store(out + j * c + i + v * kLanes, acc[j][v] * inverse[j]);
  }
  for (long j = 0; j < valid; ++j)
    for (long rest = i; rest < c; ++rest) {
      float sum = 0;
      for (long r = 0; r < n; ++r) sum += weights[r * heads + j] * rows[r][rest];
      out[j * c + rest] = sum * inverse[j];
    }
}

// One query [H, C] over the rows: scores by shares of rows, softmax with the sink and weighted sums by shares of heads.
void attend(const float* q, const float* sink, const Rows& rows, float* out, long heads, long c, float scale, int threads) {
  const long n = static_cast<long>(rows.size()), vectors = (heads + kLanes - 1) / kLanes, padded = vectors * kLanes;
  std::vector<float> wide(padded * c), turned(padded * c), scores(n * padded), inverse(padded), sinks(padded);
  std::copy(q, q + heads * c, wide.begin());
  std::copy(sink, sink + heads, sinks.begin());
  v4::transpose(wide.data(), turned.data(), padded, c);
  v4::spread_rows(threads, n, c,
                  [&](long first, long end) { score(turned.data(), rows, scores.data(), first, end, padded, c, scale); });
  v4::spread(threads, vectors, [&](long v) {
    v4::store(inverse.data() + v * kLanes, weigh(scores.data() + v * kLanes, v4::load(sinks.data() + v * kLanes), n, padded));
  });
  v4::spread(threads, (heads + 3) / 4, [&](long i) {
    const long h = 4 * i;
    gather(scores.data() + h, rows, inverse.data() + h, out + h * c, padded, c, std::min(4L, heads - h));
  });
}

// scores [n]: sum over heads of w [H] * relu(q [H, d] . key) for the first n entries of one sequence; H a multiple of 16.
void index_scores(const float* q, const float* w, const v4::Paged& keys, float* scores, long n, long heads, long d, int threads) {
  std::vector<float> turned(heads * d);
  v4::transpose(q, turned.data(), heads, d);
  v4::spread_rows(threads, (n + kRows - 1) / kRows, kRows * d, [&](long first, long end) {
    for (long e = first * kRows; e < std::min(n, end * kRows); e += kRows) {
      const float* some[kRows];
      for (int j = 0; j < kRows; ++j) some[j] = keys.row(std::min(e + j, n - 1));
      Lanes sum[kRows];
      for (Lanes& s : sum) s = Lanes{};
      long h = 0;
      const auto add = [&](auto& acc, int vectors) {
        for (int j = 0; j < kRows; ++j)
          for (int v = 0; v < vectors; ++v) {
            const Lanes x = acc[j][v];
            sum[j] += (x < 0.0f ? Lanes{} : x) * v4::load(w + h + v * kLanes);
          }
      };
      for (; h + 2 * kLanes <= heads; h += 2 * kLanes) {
        Lanes acc[kRows][2];
        v4::head_products<kRows, 2>(some, turned.data(), heads, h, d, acc);
        add(acc, 2);
      }
      for (; h < heads; h += kLanes) {
        Lanes acc[kRows][1];
        v4::head_products<kRows, 1>(some, turned.data(), heads, h, d, acc);
        add(acc, 1);
      }
      for (int j = 0; j < kRows && e + j < n; ++j) scores[e + j] = v4::total(sum[j]);
    }
  });
}

}  // namespace

extern "C" {

// out [T, H, C]. window [., PW, C] by window_table [B, BW]; entries [., PE, C] by entry_table [B, BE], or null;
// index [T, K] names the entries of each token (-1: none), null: all visible ones; ratio tokens make an entry.
// Returns 0, or -1 for a row that the tables or caches do not have.
int v4_attention(const float* q, const float* window_cache, const int32_t* window_table, const float* sink, const int32_t* cu,
                 const int32_t* start, const float* entries, const int32_t* entry_table, const int32_t* index, float* out,
                 long batch, long heads, long c, long window_block, long window_width, long window_blocks, long entry_block,
                 long entry_width, long entry_blocks, long k, long window, long ratio, float scale, int threads) {
  Rows rows;
  for (long b = 0; b < batch; ++b) {
    const v4::Paged near(window_cache, window_table + b * window_width, window_block, window_width, window_blocks, c);
    const v4::Paged far(entries, entry_table + b * entry_width, entry_block, entry_width, entry_blocks, c);
    for (long t = cu[b]; t < cu[b + 1]; ++t) {
      const long position = start[b] + t - cu[b], first = std::max(0L, position - window + 1);
      rows.clear();
      const auto take = [&](const v4::Paged& from, long row) {
        rows.push_back(from.row(row));
        return rows.back() != nullptr;
      };
      if (entries && index) {
        for (long j = 0; j < k; ++j)
          if (const long e = index[t * k + j]; e >= 0 && !take(far, e)) return -1;
      } else if (entries) {
        for (long e = 0; e < (position + 1) / ratio; ++e)
          if (!take(far, e)) return -1;
      }
      for (long p = first; p <= position; ++p)
        if (!take(near, p)) return -1;
      attend(q + t * heads * c, sink, rows, out + t * heads * c, heads, c, scale, threads);
    }
  }
  return 0;
}

// index [k] = the k < n best of scores, ascending; of equal ones the lowest; NaN counts as the largest
void v4_best(const float* scores, int32_t* index, long n, long k) {
  std::vector<float> keys(scores, scores + n);
  for (float& key : keys)
    if (std::isnan(key)) key = INFINITY;
  std::vector<float> ordered(keys);
  std::nth_element(ordered.begin(), ordered.begin() + k - 1, ordered.end(), [](float a, float b) { return a > b; });
  const float last = ordered[k - 1];
  long equal = k;
  for (long i = 0; i < n; ++i) equal -= keys[i] > last;
  for (long i = 0, made = 0; made < k; ++i)
    if (keys[i] > last || (keys[i] == last && equal-- > 0)) index[made++] = static_cast<int32_t>(i);
}

// index [T, K]: the K best visible entries of each token, ascending, -1 behind them where fewer are visible; keys [., P, d] by
// table [B, width]. Returns 0, or -1 for an entry that the table or the cache does not have.
int v4_index_topk(const float* q, const float* w, const float* keys, const int32_t* table, const int32_t* cu,
                  const int32_t* start, int32_t* index, long batch, long heads, long d, long per_block, long width, long blocks,
                  long ratio, long topk, int threads) {
  std::vector<float> scores;
  for (long b = 0; b < batch; ++b)
    for (long t = cu[b]; t < cu[b + 1]; ++t) {
      const long visible = (start[b] + t - cu[b] + 1) / ratio;
      int32_t* mine = index + t * topk;
      if (visible <= topk) {
        for (long j = 0; j < topk; ++j) mine[j] = j < visible ? static_cast<int32_t>(j) : -1;
        continue;
      }
      if (!v4::held(table + b * width, 0, visible, per_block, width, blocks)) return -1;
      scores.resize(visible);
      index_scores(q + t * heads * d, w + t * heads, v4::Paged(keys, table + b * width, per_block, width, blocks, d),
                   scores.data(), visible, heads, d, threads);
      v4_best(scores.data(), mine, visible, topk);
    }
  return 0;
}
}
