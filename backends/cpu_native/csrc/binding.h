// Arguments and results of the functions that Python calls: positional, the first one saying whether only to look if they fit.
#pragma once
#include <Python.h>
// torch's headers behind Python's
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <initializer_list>
#include <stdexcept>

namespace v4 {

using at::Tensor;

constexpr long kFew = 4;          // tokens: one reading of the weights serves them all
constexpr long kSmall = 1 << 16;  // elements up to which one thread is at least as fast as torch

class Args {
 public:
  Args(PyObject* const* values, Py_ssize_t count) : next_(values), end_(values + count) {}

  PyObject* object() {
    if (next_ == end_) throw std::invalid_argument("cpu_native: too few arguments");
    return *next_++;
  }
  const Tensor& tensor() {
    PyObject* o = object();
    if (!THPVariable_Check(o)) throw std::invalid_argument("cpu_native: found an argument that is no tensor");
    return THPVariable_Unpack(o);
  }
  const Tensor* maybe() {  // null for None
    if (next_ != end_ && *next_ == Py_None) return ++next_, nullptr;
    return &tensor();
  }
  bool flag() { return object() == Py_True; }
  long integer() { return checked(PyLong_AsLong(object())); }
  float real() { return static_cast<float>(checked(PyFloat_AsDouble(object()))); }
  bool fp32_or_none() {
    PyObject* o = object();
    return o == Py_None || (THPDtype_Check(o) && reinterpret_cast<THPDtype*>(o)->scalar_type == at::kFloat);
  }

 private:
  template <class Number>
  Number checked(Number value) {
    if (PyErr_Occurred()) {
      PyErr_Clear();
      throw std::invalid_argument("cpu_native: found an argument that is no number");
    }
    return value;
  }
  PyObject *const *next_, *const *end_;
};

inline bool typed(const Tensor& t, at::ScalarType type) { return t.is_cpu() && t.scalar_type() == type; }
inline bool fp32(std::initializer_list<const Tensor*> all) {
  for (const Tensor* t : all)
    if (t && !typed(*t, at::kFloat)) return false;
  return true;
}
inline bool packed(std::initializer_list<const Tensor*> all) {
  for (const Tensor* t : all)
    if (t && !t->is_contiguous()) return false;
  return true;
}
inline bool shaped(const Tensor& t, at::IntArrayRef shape) { return t.sizes() == shape; }
inline bool few(const Tensor& t, long dims) {
  return t.dim() == dims && 0 < t.size(0) && t.size(0) <= kFew && typed(t, at::kFloat);
}

inline const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* out(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }
inline const int64_t* longs(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

inline Tensor made(at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  return at::empty(shape, at::TensorOptions().dtype(type));
}
inline PyObject* wrap(Tensor t) { return THPVariable_Wrap(std::move(t)); }
inline int team() { return at::get_num_threads(); }

// Other Python threads run while a kernel reads its weights.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* state_;
};

// Ends the function: False when only looking, ValueError otherwise.
inline PyObject* unfit(bool look) {
  if (look) Py_RETURN_FALSE;
  throw std::invalid_argument("cpu_native: called with shapes or types that its shape rule refuses");
}

template <PyObject* (*fn)(Args)>
PyObject* entry(PyObject*, PyObject* const* values, Py_ssize_t count) {
  try {
    return fn(Args(values, count));
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace v4

#define V4_FITS(...)                      \
  if (!(__VA_ARGS__)) return unfit(look); \
  if (look) Py_RETURN_TRUE
