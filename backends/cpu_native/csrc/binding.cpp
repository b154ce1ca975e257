// The Python module: every function takes (look, the op's arguments in order). With look True it says whether they fit, which is
// the op's shape rule; otherwise it computes, and returns None when numbers among the arguments (ids, slots, blocks) reach
// outside.
#include "binding.h"

#include <vector>

#include "kernels.h"

namespace {

using namespace v4;  // NOLINT

PyObject* linear(Args a) {
  const bool look = a.flag();
  const Tensor &x = a.tensor(), &w = a.tensor();
  V4_FITS(a.fp32_or_none() && few(x, 2) && fp32({&w}) && packed({&w}) && w.dim() == 2 && x.size(1) == w.size(1));
  const Tensor in = x.contiguous(), y = made({x.size(0), w.size(0)});
  {
    const Released free;
    v4_linear(data(in), data(w), out(y), x.size(0), 1, w.size(0), w.size(1), team());
  }
  return wrap(y);
}

PyObject* grouped_linear(Args a) {
  const bool look = a.flag();
  const Tensor &x = a.tensor(), &w = a.tensor();
  V4_FITS(few(x, 3) && fp32({&w}) && packed({&w}) && w.dim() == 3 && x.size(1) == w.size(0) && x.size(2) == w.size(2));
  const Tensor in = x.contiguous(), y = made({x.size(0), w.size(0), w.size(1)});
  {
    const Released free;
    v4_linear(data(in), data(w), out(y), x.size(0), w.size(0), w.size(1), w.size(2), team());
  }
  return wrap(y);
}

PyObject* moe_mlp(Args a) {
  const bool look = a.flag();
  const Tensor &x = a.tensor(), &ids = a.tensor(), &weights = a.tensor(), &w13 = a.tensor(), &w2 = a.tensor();
  V4_FITS(few(x, 2) && ids.is_cpu() && weights.is_cpu() && ids.dim() == 2 && ids.size(0) == x.size(0) && ids.size(1) > 0 &&
          weights.sizes() == ids.sizes() && fp32({&w13, &w2}) && packed({&w13, &w2}) && w2.dim() == 3 &&
          w2.size(1) == x.size(1) && shaped(w13, {w2.size(0), 2 * w2.size(2), x.size(1)}));
  const Tensor in = x.contiguous(), chosen = ids.to(at::kInt).contiguous(), factors = weights.to(at::kFloat).contiguous();
  const Tensor y = made(x.sizes());
  const float limit = a.real();
  int failed;
  {
    const Released free;
    failed = v4_moe(data(in), ints(chosen), data(factors), data(w13), data(w2), out(y), x.size(0), ids.size(1), w2.size(0),
                    x.size(1), w2.size(2), limit, team());
  }
  if (failed) Py_RETURN_NONE;
  return wrap(y);
}

PyObject* clamped_swiglu(Args a) {
  const bool look = a.flag();
  const Tensor& x = a.tensor();
  const float limit = a.real();
  const Tensor* row_weight = a.maybe();
  V4_FITS(few(x, 2) && (!row_weight || (row_weight->is_cpu() && shaped(*row_weight, {x.size(0)}))));
  const Tensor in = x.contiguous(), y = made({x.size(0), x.size(1) / 2});
  const Tensor factor = row_weight ? row_weight->to(at::kFloat).contiguous() : Tensor();
  v4_swiglu(data(in), row_weight ? data(factor) : nullptr, out(y), x.size(0), x.size(1) / 2, limit);
  return wrap(y);
}

PyObject* gate_topk(Args a) {
  const bool look = a.flag();
  const Tensor &x = a.tensor(), &w = a.tensor(), &bias = a.tensor();
  const long topk = a.integer();
  V4_FITS(few(x, 2) && fp32({&w, &bias}) && w.dim() == 2 && x.size(1) == w.size(1) && shaped(bias, {w.size(0)}) && topk > 0 &&
          topk <= w.size(0));
  const Tensor in = x.contiguous(), rows = w.contiguous(), shift = bias.contiguous();
  const Tensor weights = made({x.size(0), topk}), ids = made({x.size(0), topk}, at::kInt);
  v4_gate_topk(data(in), data(rows), data(shift), out(weights), static_cast<int32_t*>(ids.mutable_data_ptr()), x.size(0),
               w.size(0), w.size(1), topk, a.real(), team());
  return Py_BuildValue("(NN)", wrap(weights), wrap(ids));
}

PyObject* gate_hash(Args a) {
  const bool look = a.flag();
  const Tensor &x = a.tensor(), &w = a.tensor(), &table = a.tensor(), &tokens = a.tensor();
  V4_FITS(few(x, 2) && fp32({&w}) && w.dim() == 2 && x.size(1) == w.size(1) && typed(table, at::kLong) && packed({&table}) &&
          table.dim() == 2 && tokens.is_cpu() && shaped(tokens, {x.size(0)}));
  const Tensor in = x.contiguous(), rows = w.contiguous(), numbers = tokens.to(at::kLong).contiguous();
  const Tensor weights = made({x.size(0), table.size(1)}), ids = made({x.size(0), table.size(1)}, at::kInt);
  if (v4_gate_hash(data(in), data(rows), longs(table), longs(numbers), out(weights),
                   static_cast<int32_t*>(ids.mutable_data_ptr()), x.size(0), table.size(0), w.size(0), w.size(1), table.size(1),
                   a.real(), team()))
    Py_RETURN_NONE;
  return Py_BuildValue("(NN)", wrap(weights), wrap(ids));
}

bool streams_fit(const Tensor& s, long rows, long scales, const Tensor& fn, const Tensor& scale, const Tensor& base) {
  return shaped(fn, {rows, s.size(1) * s.size(2)}) && shaped(scale, {scales}) && shaped(base, {rows}) &&
         fp32({&fn, &scale, &base}) && packed({&fn, &scale, &base});
}

PyObject* hc_pre(Args a) {
  const bool look = a.flag();
  const Tensor &s = a.tensor(), &fn = a.tensor(), &scale = a.tensor(), &base = a.tensor();
  V4_FITS(few(s, 3) && streams_fit(s, (2 + s.size(1)) * s.size(1), 3, fn, scale, base));
  const long t = s.size(0), n = s.size(1), d = s.size(2);
  const float norm_eps = a.real(), hc_eps = a.real();
  const Tensor in = s.contiguous(), x = made({t, d}), post = made({t, n}), comb = made({t, n, n});
  v4_hc_pre(data(in), data(fn), data(scale), data(base), out(x), out(post), out(comb), t, n, d, norm_eps, hc_eps, a.integer(),
            team());
  return Py_BuildValue("(NNN)", wrap(x), wrap(post), wrap(comb));
}

PyObject* hc_head(Args a) {
  const bool look = a.flag();
  const Tensor &s = a.tensor(), &fn = a.tensor(), &scale = a.tensor(), &base = a.tensor();
  V4_FITS(few(s, 3) && streams_fit(s, s.size(1), 1, fn, scale, base));
  const float norm_eps = a.real(), hc_eps = a.real();
  const Tensor in = s.contiguous(), x = made({s.size(0), s.size(2)});
  v4_hc_head(data(in), data(fn), data(scale), data(base), out(x), s.size(0), s.size(1), s.size(2), norm_eps, hc_eps, team());
  return wrap(x);
}

PyObject* hc_post(Args a) {
  const bool look = a.flag();
  const Tensor &y = a.tensor(), &s = a.tensor(), &post = a.tensor(), &comb = a.tensor();
  V4_FITS(few(s, 3) && fp32({&y, &post, &comb}) && shaped(y, {s.size(0), s.size(2)}) && shaped(post, {s.size(0), s.size(1)}) &&
          shaped(comb, {s.size(0), s.size(1), s.size(1)}));
  const Tensor in = y.contiguous(), old = s.contiguous(), p = post.contiguous(), c = comb.contiguous(), made_ = made(s.sizes());
  v4_hc_post(data(in), data(old), data(p), data(c), out(made_), s.size(0), s.size(1), s.size(2));
  return wrap(made_);
}

bool small(const Tensor& x) { return fp32({&x}) && x.dim() > 0 && 0 < x.numel() && x.numel() <= kSmall; }

PyObject* rms_norm(Args a) {  // weight None: unit_rms_norm
  const bool look = a.flag();
  const Tensor& x = a.tensor();
  const Tensor* weight = a.maybe();
  V4_FITS(small(x) && fp32({weight}) && (!weight || shaped(*weight, {x.size(-1)})));
  const Tensor in = x.contiguous(), y = made(x.sizes()), factor = weight ? weight->contiguous() : Tensor();
  v4_rms_norm(data(in), weight ? data(factor) : nullptr, out(y), x.numel() / x.size(-1), x.size(-1), a.real());
  return wrap(y);
}

PyObject* rope(Args a) {  // (x, cos, sin, sign, whether to normalise first, eps)
  const bool look = a.flag();
  const Tensor &x = a.tensor(), &cos = a.tensor(), &sin = a.tensor();
  V4_FITS(small(x) && (x.dim() == 2 || x.dim() == 3) && fp32({&cos, &sin}) && cos.dim() == 2 && cos.size(0) == x.size(0) &&
          cos.sizes() == sin.sizes() && 2 * cos.size(1) <= x.size(-1));
  const float sign = a.real();
  const bool normalise = a.flag();
  const Tensor in = x.contiguous(), c = cos.contiguous(), s = sin.contiguous(), y = made(x.sizes());
  v4_rope(data(in), data(c), data(s), out(y), x.size(0), x.dim() == 3 ? x.size(1) : 1, x.size(-1), c.size(1), sign, normalise,
          a.real());
  return wrap(y);
}

PyObject* cache_insert(Args a) {
  const bool look = a.flag();
  const Tensor &cache = a.tensor(), &rows = a.tensor(), &slots = a.tensor();
  V4_FITS(cache.is_cpu() && rows.is_cpu() && cache.dim() == 3 && rows.dim() == 2 && slots.dim() == 1 && typed(slots, at::kLong) &&
          shaped(rows, {slots.size(0), cache.size(2)}) && cache.scalar_type() == rows.scalar_type() && cache.is_contiguous() &&
          rows.size(0) <= 64);
  const Tensor in = rows.contiguous(), to = slots.contiguous();
  if (v4_insert(static_cast<char*>(cache.mutable_data_ptr()), static_cast<const char*>(in.const_data_ptr()), longs(to),
                rows.size(0), cache.size(0) * cache.size(1), cache.size(2) * cache.element_size()))
    Py_RETURN_NONE;
  Py_RETURN_TRUE;
}

// Tokens of a call agree with its offsets, and all tables are plain.
bool batch_fits(long tokens, const Tensor& cu, const Tensor& start, std::initializer_list<const Tensor*> tables) {
  if (!(0 < tokens && tokens <= kFew && cu.dim() == 1 && start.dim() == 1 && cu.size(0) == start.size(0) + 1)) return false;
  for (const Tensor* t : {&cu, &start})
    if (!typed(*t, at::kInt) || !t->is_contiguous()) return false;
  for (const Tensor* t : tables)
    if (t && (!typed(*t, at::kInt) || !t->is_contiguous() || t->dim() != 2)) return false;
  return true;
}

PyObject* sparse_attention(Args a) {
  const bool look = a.flag();
  const Tensor &q = a.tensor(), &near = a.tensor(), &near_table = a.tensor(), &sink = a.tensor(), &cu = a.tensor(),
               &start = a.tensor();
  const Tensor *far = a.maybe(), *far_table = a.maybe(), *index = a.maybe();
  V4_FITS(few(q, 3) && fp32({&near, far}) && packed({&q, &near, far}) && near.dim() == 3 && near.size(2) == q.size(2) &&
          (!far || (far->dim() == 3 && far->size(2) == q.size(2) && far_table)) && sink.is_cpu() && shaped(sink, {q.size(1)}) &&
          (!index || index->size(0) == q.size(0)) && batch_fits(q.size(0), cu, start, {&near_table, far_table, index}));
  const float scale = a.real();
  const long window = a.integer(), ratio = a.integer();
  const Tensor y = made(q.sizes()), level = sink.to(at::kFloat).contiguous();
  int failed;
  {
    const Released free;
    failed = v4_attention(data(q), data(near), ints(near_table), data(level), ints(cu), ints(start), far ? data(*far) : nullptr,
                          far_table ? ints(*far_table) : nullptr, index ? ints(*index) : nullptr, out(y), start.size(0),
                          q.size(1), q.size(2), near.size(1), near_table.size(1), near.size(0), far ? far->size(1) : 1,
                          far_table ? far_table->size(1) : 0, far ? far->size(0) : 0, index ? index->size(1) : 0, window, ratio,
                          scale, team());
  }
  if (failed) Py_RETURN_NONE;
  return wrap(y);
}

PyObject* compress(Args a) {
  const bool look = a.flag();
  const Tensor &x = a.tensor(), &wkv = a.tensor(), &wgate = a.tensor(), &ape = a.tensor(), &norm = a.tensor();
  const Tensor &cos = a.tensor(), &sin = a.tensor(), &state = a.tensor(), &table = a.tensor(), &cu = a.tensor(),
               &start = a.tensor();
  const long ratio = a.integer();
  V4_FITS(few(x, 2) && fp32({&wkv, &wgate, &ape, &norm, &cos, &sin, &state}) &&
          packed({&x, &wkv, &wgate, &ape, &norm, &cos, &sin, &state}) && wkv.dim() == 2 && norm.dim() == 1 && cos.dim() == 2 &&
          state.dim() == 3 && wgate.sizes() == wkv.sizes() && x.size(1) == wkv.size(1) && shaped(ape, {ratio, wkv.size(0)}) &&
          (wkv.size(0) == norm.size(0) || wkv.size(0) == 2 * norm.size(0)) && state.size(2) == 2 * wkv.size(0) &&
          cos.sizes() == sin.sizes() && 2 * cos.size(1) <= norm.size(0) && batch_fits(x.size(0), cu, start, {&table}));
  const float eps = a.real();
  const Tensor y = made({cos.size(0), norm.size(0)});
  int failed;
  {
    const Released free;
    failed = v4_compress(data(x), data(wkv), data(wgate), data(ape), data(norm), data(cos), data(sin), out(state), ints(table),
                         ints(cu), ints(start), out(y), start.size(0), x.size(1), wkv.size(0), norm.size(0), state.size(1),
                         table.size(1), state.size(0), cos.size(0), cos.size(1), ratio, eps, team());
  }
  if (failed) Py_RETURN_NONE;
  return wrap(y);
}

PyObject* index_topk(Args a) {
  const bool look = a.flag();
  const Tensor &q = a.tensor(), &w = a.tensor(), &keys = a.tensor(), &table = a.tensor(), &cu = a.tensor(), &start = a.tensor();
  const long ratio = a.integer(), topk = a.integer();
  V4_FITS(few(q, 3) && fp32({&w, &keys}) && packed({&q, &w, &keys}) && shaped(w, {q.size(0), q.size(1)}) && keys.dim() == 3 &&
          keys.size(2) == q.size(2) && q.size(1) % 16 == 0 && topk > 0 && ratio > 0 &&
          batch_fits(q.size(0), cu, start, {&table}));
  const Tensor index = made({q.size(0), topk}, at::kInt);
  int failed;
  {
    const Released free;
    failed = v4_index_topk(data(q), data(w), data(keys), ints(table), ints(cu), ints(start),
                           static_cast<int32_t*>(index.mutable_data_ptr()), start.size(0), q.size(1), q.size(2), keys.size(1),
                           table.size(1), keys.size(0), ratio, topk, team());
  }
  if (failed) Py_RETURN_NONE;
  return wrap(index);
}

PyObject* best(Args a) {  // for tests: the choice alone, index int32 [k] of scores [n]
  a.flag();
  const Tensor& scores = a.tensor();
  const Tensor index = made({a.integer()}, at::kInt);
  v4_best(data(scores), static_cast<int32_t*>(index.mutable_data_ptr()), scores.numel(), index.numel());
  return wrap(index);
}

#define V4_ENTRY(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&entry<name>)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    V4_ENTRY(linear),
    V4_ENTRY(grouped_linear),
    V4_ENTRY(moe_mlp),
    V4_ENTRY(clamped_swiglu),
    V4_ENTRY(gate_topk),
    V4_ENTRY(gate_hash),
    V4_ENTRY(hc_pre),
    V4_ENTRY(hc_head),
    V4_ENTRY(hc_post),
    V4_ENTRY(rms_norm),
    V4_ENTRY(rope),
    V4_ENTRY(cache_insert),
    V4_ENTRY(compress),
    V4_ENTRY(sparse_attention),
    V4_ENTRY(index_topk),
    V4_ENTRY(best),
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "v4_cpu_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_v4_cpu_native() { return PyModule_Create(&module); }
