// Products of few tokens with weights: every row of weights is read once, in order, by one thread.
#include <algorithm>

#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace {

using v4::dots;
using v4::kPage;

// 2 <= tokens <= 4
void row_times(const float* row, const float* x, long stride, long tokens, long k, float* out) {
  switch (tokens) {
    case 2:
      return dots<2, kPage>(row, x, stride, k, out);
    case 3:
      return dots<3, kPage>(row, x, stride, k, out);
    default:
      return dots<4, kPage>(row, x, stride, k, out);
  }
}

// body(r, last) for the parts of first..end-1 between multiples of `length`
template <class Body>
void in_parts(long first, long end, long length, const Body& body) {
  for (long r = first; r < end;) {
    const long last = std::min(end, (r / length + 1) * length);
    body(r, last);
    r = last;
  }
}

float swiglu(float gate, float up, float limit) {
  // written so that a NaN stays one
  const float g = gate > limit ? limit : gate, u = up > limit ? limit : (up < -limit ? -limit : up);
  return g / (1.0f + std::exp(-g)) * u;
}

// h [n] = clamped swiglu of gate and up [n], times factor
void swiglu_row(const float* gate, const float* up, float* h, long n, float limit, float factor) {
  long i = 0;
  for (; i + v4::kLanes <= n; i += v4::kLanes) {
    const v4::Lanes most = v4::Lanes{} + limit;
    v4::Lanes g = v4::load(gate + i), u = v4::load(up + i);
    g = g > most ? most : g;
    u = u > most ? most : (u < -most ? -most : u);
    const v4::Lanes power = -g > 88.0f ? v4::Lanes{} + INFINITY : v4::exponential(-g);
    v4::store(h + i, g / (power + 1.0f) * u * factor);
  }
  for (; i < n; ++i) h[i] = swiglu(gate[i], up[i], limit) * factor;
}

float gate_score(float logit) { return std::sqrt(logit > 20.0f ? logit : std::log1p(std::exp(logit))); }

void score(const float* x, const float* w, float* scores, long experts, long d, int threads) {
  v4::spread_rows(threads, experts, d, [&](long first, long end) {
    v4::product(w + first * d, x, d, end - first, scores + first);
    for (long e = first; e < end; ++e) scores[e] = gate_score(scores[e]);
  });
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
  v4::spread_rows(threads, rows, k, [&](long first, long end) {
    if (tokens == 1) {
      in_parts(first, end, n, [&](long r, long last) { v4::product(w + r * k, x + r / n * k, k, last - r, y + r); });
      return;
    }
    float out[4];
    for (long r = first; r < end; ++r) {
      row_times(w + r * k, x + r / n * k, groups * k, tokens, k, out);
      for (long t = 0; t < tokens; ++t) y[t * rows + r] = out[t];
    }
  });
}

// y [T, D] = sum over the K chosen experts of w2[e] (swiglu(w13[e] x) * weight). Returns 0, or -1 for an expert that does not
// exist.
int v4_moe(const float* x, const int32_t* ids, const float* weights, const float* w13, const float* w2, float* y, long tokens,
           long topk, long experts, long d, long width, float limit, int threads) {
  for (long i = 0; i < tokens * topk; ++i)
    if (ids[i] < 0 || ids[i] >= experts) return -1;
  // row r of all tokens' choices: its products with the token, gate rows first, then up rows, then the choice's share of the
  // output
  const long choices = tokens * topk;
  std::vector<float> hidden(choices * 2 * width), part(choices * d);
  v4::spread_rows(threads, choices * 2 * width, d, [&](long first, long end) {
    in_parts(first, end, 2 * width, [&](long r, long last) {
      const long j = r / (2 * width), row = r % (2 * width);
      v4::product(w13 + (ids[j] * 2 * width + row) * d, x + j / topk * d, d, last - r, hidden.data() + r);
    });
  });
  for (long j = 0; j < choices; ++j) {
    float* mine = hidden.data() + j * 2 * width;
    swiglu_row(mine, mine + width, mine, width, limit, weights[j]);
  }
  v4::spread_rows(threads, choices * d, width, [&](long first, long end) {
    in_parts(first, end, d, [&](long r, long last) {
      const long j = r / d;
      v4::product(w2 + (ids[j] * d + r % d) * width, hidden.data() + j * 2 * width, width, last - r, part.data() + r);
    });
  });
  for (long t = 0; t < tokens; ++t) {
    std::copy(part.data() + t * topk * d, part.data() + (t * topk + 1) * d, y + t * d);
    for (long j = t * topk + 1; j < (t + 1) * topk; ++j) v4::add_scaled(y + t * d, part.data() + j * d, 1.0f, d);
  }
  return 0;
}

// h [T, I] = clamped swiglu of gate_up [T, 2I], times row_weight [T] where given
void v4_swiglu(const float* gate_up, const float* row_weight, float* h, long tokens, long width, float limit) {
  for (long t = 0; t < tokens; ++t) {
    const float* gate = gate_up + 2 * t * width;
    swiglu_row(gate, gate + width, h + t * width, width, limit, row_weight ? row_weight[t] : 1.0f);
  }
}

// weights and ids [T, K]: the K largest of score + bias, of equal ones the lowest number; NaN counts as the largest
void v4_gate_topk(const float* x, const float* w, const float* bias, float* weights, int32_t* ids, long tokens, long experts,
                  long d, long topk, float scale, int threads) {
  std::vector<float> scores(experts), keys(experts);
  std::vector<int32_t> order(experts);
  for (long t = 0; t < tokens; ++t) {
    score(x + t * d, w, scores.data(), experts, d, threads);
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
int v4_gate_hash(const float* x, const float* w, const int64_t* table, const int64_t* token_ids, float* weights, int32_t* ids,
                 long tokens, long vocabulary, long experts, long d, long topk, float scale, int threads) {
  std::vector<float> scores(experts);
  for (long t = 0; t < tokens; ++t) {
    if (token_ids[t] < 0 || token_ids[t] >= vocabulary) return -1;
    for (long j = 0; j < topk; ++j) {
      const int64_t e = table[token_ids[t] * topk + j];
      if (e < 0 || e >= experts) return -1;
      ids[t * topk + j] = static_cast<int32_t>(e);
    }
    score(x + t * d, w, scores.data(), experts, d, threads);
    weigh(scores.data(), ids + t * topk, weights + t * topk, topk, scale);
  }
  return 0;
}
}
