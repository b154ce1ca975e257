// Products of few tokens with weights: every row of weights is read once, in order, by one thread.
#include <algorithm>

#include "vectors.h"

namespace {

using v4::dots;

void row_times(const float* row, const float* x, long stride, long tokens, long k, float* out) {
  switch (tokens) {
    case 1: return dots<1>(row, x, stride, k, out);
    case 2: return dots<2>(row, x, stride, k, out);
    case 3: return dots<3>(row, x, stride, k, out);
    default: return dots<4>(row, x, stride, k, out);
  }
}

float swiglu(float gate, float up, float limit) {
  // written so that a NaN stays one
  const float g = gate > limit ? limit : gate, u = up > limit ? limit : (up < -limit ? -limit : up);
  return g / (1.0f + std::exp(-g)) * u;
}

float gate_score(float logit) { return std::sqrt(logit > 20.0f ? logit : std::log1p(std::exp(logit))); }

void score(const float* x, const float* w, float* scores, long experts, long d) {
  for (long e = 0; e < experts; ++e) scores[e] = gate_score(v4::dot(w + e * d, x, d));
}

void weigh(const float* scores, const int32_t* ids, float* weights, long k, float scale) {
  float sum = 0;
  for (long j = 0; j < k; ++j) sum += scores[ids[j]];
  for (long j = 0; j < k; ++j) weights[j] = scores[ids[j]] / sum * scale;
}

}  // namespace

extern "C" {

// y [T, G, N] = x [T, G, K] times w [G, N, K]; 1 <= T <= 4
void v4_linear(const float* x, const float* w, float* y, long tokens, long groups, long n, long k, int threads) {
  const long rows = groups * n;
#pragma omp parallel num_threads(v4::team(rows* k, threads))
  {
    const long id = omp_get_thread_num(), of = omp_get_num_threads();
    float out[4];
    for (long r = rows * id / of; r < rows * (id + 1) / of; ++r) {
      row_times(w + r * k, x + r / n * k, groups * k, tokens, k, out);
      for (long t = 0; t < tokens; ++t) y[t * rows + r] = out[t];
    }
  }
}

// y [T, D] = sum over the K chosen experts of w2[e] (swiglu(w13[e] x) * weight). Returns 0, or -1 for an expert that does not exist.
int v4_moe(const float* x, const int32_t* ids, const float* weights, const float* w13, const float* w2, float* y, long tokens,
           long topk, long experts, long d, long width, float limit, int threads) {
  for (long i = 0; i < tokens * topk; ++i)
    if (ids[i] < 0 || ids[i] >= experts) return -1;
  std::vector<float> hidden(topk * width);
  float* h = hidden.data();
#pragma omp parallel num_threads(threads)
  {
    const long id = omp_get_thread_num(), of = omp_get_num_threads();
    const long i0 = width * id / of, i1 = width * (id + 1) / of, d0 = d * id / of, d1 = d * (id + 1) / of;
    for (long t = 0; t < tokens; ++t) {
      for (long j = 0; j < topk; ++j) {
        const float* gate = w13 + ids[t * topk + j] * 2 * width * d;
        float* mine = h + j * width;
        // the gate rows first, then the up rows: one stream of memory at a time
        for (long i = i0; i < i1; ++i) mine[i] = v4::dot(gate + i * d, x + t * d, d);
        for (long i = i0; i < i1; ++i)
          mine[i] = swiglu(mine[i], v4::dot(gate + (width + i) * d, x + t * d, d), limit) * weights[t * topk + j];
      }
#pragma omp barrier
      for (long i = d0; i < d1; ++i) y[t * d + i] = 0;
      for (long j = 0; j < topk; ++j) {
        const float* down = w2 + ids[t * topk + j] * d * width;
        for (long i = d0; i < d1; ++i) y[t * d + i] += v4::dot(down + i * width, h + j * width, width);
      }
#pragma omp barrier
    }
  }
  return 0;
}

// h [T, I] = clamped swiglu of gate_up [T, 2I], times row_weight [T] where given
void v4_swiglu(const float* gate_up, const float* row_weight, float* h, long tokens, long width, float limit) {
  for (long t = 0; t < tokens; ++t)
    for (long i = 0; i < width; ++i) {
      const float value = swiglu(gate_up[2 * t * width + i], gate_up[(2 * t + 1) * width + i], limit);
      h[t * width + i] = row_weight ? value * row_weight[t] : value;
    }
}

// weights and ids [T, K]: the K largest of score + bias, of equal ones the lowest number; NaN counts as the largest
void v4_gate_topk(const float* x, const float* w, const float* bias, float* weights, int32_t* ids, long tokens, long experts, long d,
                  long topk, float scale) {
  std::vector<float> scores(experts), keys(experts);
  std::vector<int32_t> order(experts);
  for (long t = 0; t < tokens; ++t) {
    score(x + t * d, w, scores.data(), experts, d);
    for (long e = 0; e < experts; ++e) keys[e] = scores[e] + bias[e], order[e] = static_cast<int32_t>(e);
    std::partial_sort(order.begin(), order.begin() + topk, order.end(), [&](int32_t a, int32_t b) {
      const bool na = std::isnan(keys[a]), nb = std::isnan(keys[b]);
      if (na != nb) return na;
      return keys[a] > keys[b] || (!(keys[a] < keys[b]) && a < b);
    });
    std::copy(order.begin(), order.begin() + topk, ids + t * topk);
    weigh(scores.data(), ids + t * topk, weights + t * topk, topk, scale);
  }
}

// ids [T, K] = table[tokens] (int64 [V, K]). Returns 0, or -1 for a token or an expert that does not exist.
int v4_gate_hash(const float* x, const float* w, const int64_t* table, const int64_t* token_ids, float* weights, int32_t* ids, long tokens,
                 long vocabulary, long experts, long d, long topk, float scale) {
  std::vector<float> scores(experts);
  for (long t = 0; t < tokens; ++t) {
    if (token_ids[t] < 0 || token_ids[t] >= vocabulary) return -1;
    for (long j = 0; j < topk; ++j) {
      const int64_t e = table[token_ids[t] * topk + j];
      if (e < 0 || e >= experts) return -1;
      ids[t * topk + j] = static_cast<int32_t>(e);
    }
    score(x + t * d, w, scores.data(), experts, d);
    weigh(scores.data(), ids + t * topk, weights + t * topk, topk, scale);
  }
  return 0;
}
}
