// Sixteen fp32 lanes as a compiler vector (lowered to whatever the machine has) and the sums every kernel uses.
// Compiled without -ffast-math: linking with it would switch off denormals for the whole process.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace v4 {

constexpr long kLanes = 16;
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));

inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline void store(float* p, Lanes v) { *reinterpret_cast<Lanes*>(p) = v; }

inline float total(Lanes v) {
  float part[8];
  for (int i = 0; i < 8; ++i) part[i] = v[i] + v[i + 8];
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

constexpr int kPage = 4096;

// Dot products of one row with T vectors that lie `stride` floats apart: the row is read from memory once. kAhead: bytes that are
// asked for in advance, since what lies behind the row is wanted next and the processor's own reading ahead stops at every page.
template <int T, int kAhead = 0>
inline void dots(const float* row, const float* x, long stride, long n, float* out) {
  constexpr int kSums = T == 1 ? 8 : T == 2 ? 4 : 2;  // in flight: enough for the latency of multiply-adds and of memory
  Lanes sum[T][kSums];
  for (auto& mine : sum)
    for (Lanes& s : mine) s = Lanes{};
  long i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes)
    for (int u = 0; u < kSums; ++u) {
      if constexpr (kAhead > 0) __builtin_prefetch(reinterpret_cast<const char*>(row + i + u * kLanes) + kAhead, 0, 2);
      const Lanes w = load(row + i + u * kLanes);
      for (int t = 0; t < T; ++t) sum[t][u] += w * load(x + t * stride + i + u * kLanes);
    }
  for (; i + kLanes <= n; i += kLanes)
    for (int t = 0; t < T; ++t) sum[t][0] += load(row + i) * load(x + t * stride + i);
  float rest[T] = {};
  for (; i < n; ++i)
    for (int t = 0; t < T; ++t) rest[t] += row[i] * x[t * stride + i];
  for (int t = 0; t < T; ++t) {
    for (int half = kSums / 2; half; half /= 2)
      for (int u = 0; u < half; ++u) sum[t][u] += sum[t][u + half];
    out[t] = total(sum[t][0]) + rest[t];
  }
}

// Dot products of R rows that lie one behind the other with one vector. Eight rows at once are eight streams for the memory, and
// while they are multiplied the next eight are asked for. A row's sum does not depend on R.
template <int R>
inline void row_dots(const float* rows, const float* x, long n, float* out) {
  constexpr int kSums = 2;
  const long ahead = R * n;
  Lanes sum[R][kSums];
  for (auto& mine : sum)
    for (Lanes& s : mine) s = Lanes{};
  long i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes)
    for (int u = 0; u < kSums; ++u) {
      const Lanes these = load(x + i + u * kLanes);
      for (int r = 0; r < R; ++r) {
        const float* w = rows + r * n + i + u * kLanes;
        __builtin_prefetch(w + ahead, 0, 2);
        sum[r][u] += load(w) * these;
      }
    }
  for (; i + kLanes <= n; i += kLanes)
    for (int r = 0; r < R; ++r) sum[r][0] += load(rows + r * n + i) * load(x + i);
  float rest[R] = {};
  for (; i < n; ++i)
    for (int r = 0; r < R; ++r) rest[r] += rows[r * n + i] * x[i];
  for (int r = 0; r < R; ++r) out[r] = total(sum[r][0] + sum[r][1]) + rest[r];
}

// out [count] = the products of `count` rows of weights, one behind the other, with x
inline void product(const float* rows, const float* x, long n, long count, float* out) {
  long r = 0;
  for (; r + 8 <= count; r += 8) row_dots<8>(rows + r * n, x, n, out + r);
  for (; r + 4 <= count; r += 4) row_dots<4>(rows + r * n, x, n, out + r);
  for (; r < count; ++r) row_dots<1>(rows + r * n, x, n, out + r);
}

inline float dot(const float* a, const float* b, long n) {
  float out;
  dots<1>(a, b, 0, n, &out);
  return out;
}

// exp of values up to 88, lane by lane; 0 below -87
inline Lanes exponential(Lanes x) {
  typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
  const auto gone = x < -87.0f;
  x = gone ? Lanes{} : x;
  const Lanes shift = Lanes{} + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const Lanes n = (x * 1.44269504088896341f + shift) - shift;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = Lanes{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return gone ? Lanes{} : p * reinterpret_cast<const Lanes&>(power);
}

// Products of R rows with the heads of q, whose heads lie side by side: q [c, H], V vectors of heads from `first` on.
template <int R, int V>
inline void head_products(const float* const* rows, const float* q, long heads, long first, long c, Lanes (&acc)[R][V]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = Lanes{};
  for (long i = 0; i < c; ++i)
    for (int v = 0; v < V; ++v) {
      const Lanes these = load(q + i * heads + first + v * kLanes);
      for (int r = 0; r < R; ++r) acc[r][v] += these * rows[r][i];
    }
}

inline void transpose(const float* q, float* out, long heads, long c) {
  for (long h = 0; h < heads; ++h)
    for (long i = 0; i < c; ++i) out[i * heads + h] = q[h * c + i];
}

// y += factor * x
inline void add_scaled(float* y, const float* x, float factor, long n) {
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + load(x + i) * factor);
  for (; i < n; ++i) y[i] += factor * x[i];
}

inline float inverse_rms(const float* x, long n, float eps) {
  return 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + eps);
}

// Rows of a paged cache. Shifts where a block's rows are a power of two: a division per row costs as much as the row's products.
struct Paged {
  const float* base;
  const int32_t* table;
  long per_block, width, blocks, c;
  int shift;

  Paged(const float* base, const int32_t* table, long per_block, long width, long blocks, long c)
      : base(base),
        table(table),
        per_block(per_block),
        width(width),
        blocks(blocks),
        c(c),
        shift(per_block & (per_block - 1) ? -1 : __builtin_ctzl(per_block)) {}

  const float* row(long r) const {  // null for a row that the table or the cache does not have
    const long b = shift < 0 ? r / per_block : r >> shift;
    if (b < 0 || b >= width || table[b] < 0 || table[b] >= blocks) return nullptr;
    return base + (table[b] * per_block + r - b * per_block) * c;
  }
};

// Whether the rows first..end-1 of a sequence lie in blocks that its table and the cache have.
inline bool held(const int32_t* table, long first, long end, long per_block, long width, long blocks) {
  if (first >= end) return true;
  if (first < 0 || (end - 1) / per_block >= width) return false;
  for (long i = first / per_block; i <= (end - 1) / per_block; ++i)
    if (table[i] < 0 || table[i] >= blocks) return false;
  return true;
}

}  // namespace v4
