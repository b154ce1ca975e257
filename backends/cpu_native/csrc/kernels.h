// The kernels, as the binding calls them; what each does stands at its definition.
#pragma once
#include <cstdint>

extern "C" {
void v4_linear(const float* x, const float* w, float* y, long tokens, long groups, long n, long k, int threads);
int v4_moe(const float* x, const int32_t* ids, const float* weights, const float* w13, const float* w2, float* y, long tokens,
           long topk, long experts, long d, long width, float limit, int threads);
void v4_swiglu(const float* gate_up, const float* row_weight, float* h, long tokens, long width, float limit);
void v4_gate_topk(const float* x, const float* w, const float* bias, float* weights, int32_t* ids, long tokens, long experts,
                  long d, long topk, float scale, int threads);
int v4_gate_hash(const float* x, const float* w, const int64_t* table, const int64_t* token_ids, float* weights, int32_t* ids,
                 long tokens, long vocabulary, long experts, long d, long topk, float scale, int threads);
void v4_hc_pre(const float* streams, const float* fn, const float* scale, const float* base, float* x, float* post, float* comb,
               long tokens, long n, long d, float norm_eps, float hc_eps, long iters, int threads);
void v4_hc_head(const float* streams, const float* fn, const float* scale, const float* base, float* x, long tokens, long n,
                long d, float norm_eps, float hc_eps, int threads);
void v4_hc_post(const float* y, const float* streams, const float* post, const float* comb, float* out, long tokens, long n,
                long d);
void v4_rms_norm(const float* x, const float* weight, float* y, long rows, long d, float eps);
void v4_rope(const float* x, const float* cos, const float* sin, float* y, long tokens, long heads, long c, long pairs,
             float sign, int normalise, float eps);
int v4_insert(char* cache, const char* rows, const int64_t* slots, long count, long capacity, long bytes);
int v4_attention(const float* q, const float* window_cache, const int32_t* window_table, const float* sink, const int32_t* cu,
                 const int32_t* start, const float* entries, const int32_t* entry_table, const int32_t* index, float* out,
                 long batch, long heads, long c, long window_block, long window_width, long window_blocks, long entry_block,
                 long entry_width, long entry_blocks, long k, long window, long ratio, float scale, int threads);
int v4_index_topk(const float* q, const float* w, const float* keys, const int32_t* table, const int32_t* cu,
                  const int32_t* start, int32_t* index, long batch, long heads, long d, long per_block, long width, long blocks,
                  long ratio, long topk, int threads);
void v4_best(const float* scores, int32_t* index, long n, long k);
int v4_compress(const float* x, const float* wkv, const float* wgate, const float* ape, const float* norm_weight,
                const float* cos, const float* sin, float* state, const int32_t* table, const int32_t* cu, const int32_t* start,
                float* out, long batch, long d, long width, long c, long per_block, long table_width, long blocks, long entries,
                long pairs, long ratio, float eps, int threads);
}
