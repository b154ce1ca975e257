// The compressor for few tokens: both projections, the token state, and the entries that these tokens complete.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "vectors.h"

namespace {

struct Stretch {  // tokens of one sequence: those before `start` in the state, the others of this call
  const float *k, *s;
  float* state;
  const int32_t* blocks;
  long start, per_block, width;

  float* stored(long position) const {
    return state + (blocks[position / per_block] * per_block + position % per_block) * 2 * width;
  }
  const float* values(long position) const { return position < start ? stored(position) : k + (position - start) * width; }
  const float* scores(long position) const {
    return position < start ? stored(position) + width : s + (position - start) * width;
  }
};

// Entry i [c]: softmax over its tokens, channel by channel; with overlap the block before it through the first c channels.
void pool(const Stretch& at, long i, long ratio, long c, float* out) {
  const bool overlap = at.width > c;
  std::vector<const float*> values, scores;
  for (long p = std::max(0L, (i - overlap) * ratio); p < (i + 1) * ratio; ++p) {
    const long offset = overlap && p >= i * ratio ? c : 0;
    values.push_back(at.values(p) + offset);
    scores.push_back(at.scores(p) + offset);
  }
  std::vector<float> top(scores[0], scores[0] + c), sum(c, 0.0f);
  for (const float* s : scores)
    for (long j = 0; j < c; ++j) top[j] = std::max(top[j], s[j]);
  std::fill(out, out + c, 0.0f);
  for (size_t r = 0; r < scores.size(); ++r) {
    long j = 0;
    for (; j + v4::kLanes <= c; j += v4::kLanes) {
      const v4::Lanes weight = v4::exponential(v4::load(scores[r] + j) - v4::load(top.data() + j));
      v4::store(sum.data() + j, v4::load(sum.data() + j) + weight);
      v4::store(out + j, v4::load(out + j) + weight * v4::load(values[r] + j));
    }
    for (; j < c; ++j) {
      const float weight = std::exp(scores[r][j] - top[j]);
      sum[j] += weight;
      out[j] += weight * values[r][j];
    }
  }
  for (long j = 0; j < c; ++j) out[j] /= sum[j];
}

void norm_rope(float* y, const float* weight, const float* cos, const float* sin, long c, long pairs, float eps) {
  const float factor = v4::inverse_rms(y, c, eps);
  for (long j = 0; j < c; ++j) y[j] *= factor * weight[j];
  float* tail = y + c - 2 * pairs;
  for (long j = 0; j < pairs; ++j) {
    const float a = tail[2 * j], b = tail[2 * j + 1];
    tail[2 * j] = a * cos[j] - b * sin[j];
    tail[2 * j + 1] = a * sin[j] + b * cos[j];
  }
}

}  // namespace

extern "C" {

// Projections kv, gate [W, D], ape [m, W]; state [., P, 2W] by state_table [B, blocks]. out [E, c], zeros behind the last entry.
// Returns 0, or -1 (nothing written) for a token that the table or the state does not have.
int v4_compress(const float* x, const float* wkv, const float* wgate, const float* ape, const float* norm_weight,
                const float* cos, const float* sin, float* state, const int32_t* table, const int32_t* cu, const int32_t* start,
                float* out, long batch, long d, long width, long c, long per_block, long table_width, long blocks, long entries,
                long pairs, long ratio, float eps, int threads) {
  const long tokens = cu[batch], overlap = width > c;
  for (long b = 0; b < batch; ++b) {
    const long first = std::max(0L, (start[b] / ratio - overlap) * ratio), end = start[b] + cu[b + 1] - cu[b];
    if (cu[b] < cu[b + 1] && !v4::held(table + b * table_width, end / ratio > start[b] / ratio ? first : start[b], end, per_block,
                                       table_width, blocks))
      return -1;
  }
  std::fill(out, out + entries * c, 0.0f);
  if (!tokens) return 0;
  std::vector<float> k(tokens * width), s(tokens * width);
  v4_linear(x, wkv, k.data(), tokens, 1, width, d, threads);
  v4_linear(x, wgate, s.data(), tokens, 1, width, d, threads);
  long made = 0;
  for (long b = 0; b < batch; ++b) {
    const Stretch at{
        k.data() + cu[b] * width, s.data() + cu[b] * width, state, table + b * table_width, start[b], per_block, width};
    for (long t = cu[b]; t < cu[b + 1]; ++t)
      v4::add_scaled(s.data() + t * width, ape + (start[b] + t - cu[b]) % ratio * width, 1.0f, width);
    const long end = start[b] + cu[b + 1] - cu[b];
    for (long i = start[b] / ratio; i < end / ratio; ++i, ++made) {
      pool(at, i, ratio, c, out + made * c);
      norm_rope(out + made * c, norm_weight, cos + made * pairs, sin + made * pairs, c, pairs, eps);
    }
    for (long p = start[b]; p < end; ++p)
      if (at.blocks[p / per_block]) {
        std::memcpy(at.stored(p), at.values(p), width * sizeof(float));
        std::memcpy(at.stored(p) + width, at.scores(p), width * sizeof(float));
      }
  }
  return 0;
}
}
