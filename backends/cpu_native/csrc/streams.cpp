// Hyper-connections, norms, rotations and cache writes of few tokens: small enough for one thread, but for hc's projection.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace {

float sigmoid(float v) { return 1.0f / (1.0f + std::exp(-v)); }

void sinkhorn(float* p, long n, float eps, long iters) {
  for (long i = 0; i < n; ++i) {
    float* row = p + i * n;
    const float top = *std::max_element(row, row + n);
    float sum = 0;
    for (long j = 0; j < n; ++j) sum += row[j] = std::exp(row[j] - top);
    for (long j = 0; j < n; ++j) row[j] = row[j] / sum + eps;
  }
  for (long step = 0; step < iters; ++step) {
    for (long i = 0; step && i < n; ++i) {
      float sum = eps;
      for (long j = 0; j < n; ++j) sum += p[i * n + j];
      for (long j = 0; j < n; ++j) p[i * n + j] /= sum;
    }
    for (long j = 0; j < n; ++j) {
      float sum = eps;
      for (long i = 0; i < n; ++i) sum += p[i * n + j];
      for (long i = 0; i < n; ++i) p[i * n + j] /= sum;
    }
  }
}

// out [D] = sum over streams of (sigmoid(u s + b) + eps) * stream
void collapse(const float* streams, const float* u, float scale, const float* base, float* out, long n, long d, float eps) {
  std::fill(out, out + d, 0.0f);
  for (long j = 0; j < n; ++j) v4::add_scaled(out, streams + j * d, sigmoid(u[j] * scale + base[j]) + eps, d);
}

// u [T, rows] = fn times the normalised streams
void project(const float* streams, const float* fn, float* u, long tokens, long rows, long width, float eps, int threads) {
  std::vector<float> factor(tokens);
  for (long t = 0; t < tokens; ++t) factor[t] = v4::inverse_rms(streams + t * width, width, eps);
  v4::spread_rows(threads, rows, width, [&](long first, long end) {
    for (long r = first; r < end; ++r)
      for (long t = 0; t < tokens; ++t) {
        float product;
        v4::dots<1, v4::kPage>(fn + r * width, streams + t * width, 0, width, &product);
        u[t * rows + r] = product * factor[t];
      }
  });
}

void turn(float* pairs, const float* cos, const float* sin, long count, float sign) {
  for (long i = 0; i < count; ++i) {
    const float a = pairs[2 * i], b = pairs[2 * i + 1], s = sign * sin[i];
    pairs[2 * i] = a * cos[i] - b * s;
    pairs[2 * i + 1] = a * s + b * cos[i];
  }
}

}  // namespace

extern "C" {

// x [T, D], post [T, n], comb [T, n, n] of streams [T, n, D]; fn [(2+n)n, nD], scale [3], base [(2+n)n]
void v4_hc_pre(const float* streams, const float* fn, const float* scale, const float* base, float* x, float* post, float* comb,
               long tokens, long n, long d, float norm_eps, float hc_eps, long iters, int threads) {
  const long rows = (2 + n) * n;
  std::vector<float> u(tokens * rows);
  project(streams, fn, u.data(), tokens, rows, n * d, norm_eps, threads);
  for (long t = 0; t < tokens; ++t) {
    const float* mine = u.data() + t * rows;
    collapse(streams + t * n * d, mine, scale[0], base, x + t * d, n, d, hc_eps);
    for (long j = 0; j < n; ++j) post[t * n + j] = 2 * sigmoid(mine[n + j] * scale[1] + base[n + j]);
    for (long j = 0; j < n * n; ++j) comb[t * n * n + j] = mine[2 * n + j] * scale[2] + base[2 * n + j];
    sinkhorn(comb + t * n * n, n, hc_eps, iters);
  }
}

// x [T, D] of streams [T, n, D]; fn [n, nD], scale [1], base [n]
void v4_hc_head(const float* streams, const float* fn, const float* scale, const float* base, float* x, long tokens, long n,
                long d, float norm_eps, float hc_eps, int threads) {
  std::vector<float> u(tokens * n);
  project(streams, fn, u.data(), tokens, n, n * d, norm_eps, threads);
  for (long t = 0; t < tokens; ++t) collapse(streams + t * n * d, u.data() + t * n, scale[0], base, x + t * d, n, d, hc_eps);
}

// out [T, n, D]: stream j = sum over i of comb[i, j] * stream i, plus post[j] * y
void v4_hc_post(const float* y, const float* streams, const float* post, const float* comb, float* out, long tokens, long n,
                long d) {
  for (long t = 0; t < tokens; ++t)
    for (long j = 0; j < n; ++j) {
      float* target = out + (t * n + j) * d;
      const float* mix = comb + t * n * n;
      for (long i = 0; i < d; ++i) target[i] = post[t * n + j] * y[t * d + i];
      for (long i = 0; i < n; ++i) v4::add_scaled(target, streams + (t * n + i) * d, mix[i * n + j], d);
    }
}

// y = x / rms(x) * weight, row by row; weight may be null
void v4_rms_norm(const float* x, const float* weight, float* y, long rows, long d, float eps) {
  for (long r = 0; r < rows; ++r) {
    const float factor = v4::inverse_rms(x + r * d, d, eps);
    if (weight)
      for (long i = 0; i < d; ++i) y[r * d + i] = x[r * d + i] * factor * weight[i];
    else
      for (long i = 0; i < d; ++i) y[r * d + i] = x[r * d + i] * factor;
  }
}

// y [T, H, C]: x with its last 2*pairs channels turned by cos, sin [T, pairs] (sign -1: back); normalise: unit RMS first
void v4_rope(const float* x, const float* cos, const float* sin, float* y, long tokens, long heads, long c, long pairs,
             float sign, int normalise, float eps) {
  for (long r = 0; r < tokens * heads; ++r) {
    const long t = r / heads;
    if (normalise)
      v4_rms_norm(x + r * c, nullptr, y + r * c, 1, c, eps);
    else
      std::memcpy(y + r * c, x + r * c, c * sizeof(float));
    turn(y + (r + 1) * c - 2 * pairs, cos + t * pairs, sin + t * pairs, pairs, sign);
  }
}

// Rows of `bytes` bytes to slots of the cache; -1 is skipped. Returns 0, or -1 (nothing written) for a slot outside.
int v4_insert(char* cache, const char* rows, const int64_t* slots, long count, long capacity, long bytes) {
  for (long r = 0; r < count; ++r)
    if (slots[r] < -1 || slots[r] >= capacity) return -1;
  for (long r = 0; r < count; ++r)
    if (slots[r] >= 0) std::memcpy(cache + slots[r] * bytes, rows + r * bytes, bytes);
  return 0;
}
}
