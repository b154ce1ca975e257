// As much of Ascend C as csrc/op_kernel uses, in plain C++ on the host: written from the meaning of each call, to find slips in a kernel's
// indices and arithmetic. It has no pipes, no alignment and no limits of memory, so it shows nothing about the kernel on a chip.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#define __aicore__
#define __gm__
#define __global__
using GM_ADDR = uint8_t *;
using event_t = int;

struct V4HcHeadTilingData {
    uint32_t tokens, width, tile, tokens_per_core;
    float norm_eps, hc_eps;
};
#define GET_TILING_DATA(name, memory) const V4HcHeadTilingData name = *reinterpret_cast<const V4HcHeadTilingData *>(memory)

inline uint32_t this_core = 0;

namespace AscendC {
enum class HardEvent { V_S, S_V };
enum class RoundMode { CAST_NONE, CAST_RINT };
enum class QuePosition { VECIN, VECOUT };
enum class TPosition { VECCALC };
template <class A, class B> using IsSameType = std::is_same<A, B>;

template <class T> struct LocalTensor {
    T *at = nullptr;
    LocalTensor operator[](uint32_t i) const { return {at + i}; }
    T GetValue(uint32_t i) const { return at[i]; }
    void SetValue(uint32_t i, T v) const { at[i] = v; }
};
template <class T> struct GlobalTensor {
    T *at = nullptr;
    void SetGlobalBuffer(T *p) { at = p; }
    GlobalTensor operator[](uint64_t i) const { return {at + i}; }
    T GetValue(uint64_t i) const { return at[i]; }
};
// fresh memory is NaN in every type of float
struct Memory {
    std::vector<uint8_t> bytes;
    template <class T> LocalTensor<T> Get() { return {reinterpret_cast<T *>(bytes.data())}; }
};
template <QuePosition, int> struct TQue : Memory {
    template <class T> LocalTensor<T> AllocTensor() { std::memset(bytes.data(), 0xFF, bytes.size()); return Get<T>(); }
    template <class T> void EnQue(const LocalTensor<T> &) {}
    template <class T> LocalTensor<T> DeQue() { return Get<T>(); }
    template <class T> void FreeTensor(const LocalTensor<T> &) { std::memset(bytes.data(), 0xFF, bytes.size()); }
};
template <TPosition> struct TBuf : Memory {};
struct TPipe {
    template <class B> void InitBuffer(B &b, uint32_t n) { b.bytes.assign(n, 0xFF); }
    template <class B> void InitBuffer(B &b, int, uint32_t n) { b.bytes.assign(n, 0xFF); }
    int FetchEventID(HardEvent) { return 0; }
};
inline TPipe *GetTPipePtr() { static TPipe pipe; return &pipe; }
template <HardEvent> void SetFlag(event_t) {}
template <HardEvent> void WaitFlag(event_t) {}
inline uint32_t GetBlockIdx() { return this_core; }

struct DataCopyParams { uint16_t blockCount, blockLen, srcStride, dstStride; };
template <class T> void DataCopy(const LocalTensor<T> &to, const GlobalTensor<T> &from, uint32_t n) { std::memcpy(to.at, from.at, n * sizeof(T)); }
template <class T> void DataCopy(const GlobalTensor<T> &to, const LocalTensor<T> &from, uint32_t n) { std::memcpy(to.at, from.at, n * sizeof(T)); }
template <class T> void DataCopy(const LocalTensor<T> &to, const GlobalTensor<T> &from, const DataCopyParams &p)
{
    auto *t = reinterpret_cast<uint8_t *>(to.at);
    auto *f = reinterpret_cast<const uint8_t *>(from.at);
    for (int i = 0; i < p.blockCount; ++i, t += (p.blockLen + p.dstStride) * 32, f += (p.blockLen + p.srcStride) * 32) std::memcpy(t, f, p.blockLen * 32);
}

using L = LocalTensor<float>;
template <class F> void each(uint32_t n, F f) { for (uint32_t i = 0; i < n; ++i) f(i); }
template <class A, class B> void Cast(const LocalTensor<A> &y, const LocalTensor<B> &x, RoundMode, uint32_t n) { each(n, [&](uint32_t i) { y.at[i] = static_cast<A>(x.at[i]); }); }
inline void Mul(L y, L a, L b, uint32_t n) { each(n, [&](uint32_t i) { y.at[i] = a.at[i] * b.at[i]; }); }
inline void Add(L y, L a, L b, uint32_t n) { each(n, [&](uint32_t i) { y.at[i] = a.at[i] + b.at[i]; }); }
inline void Div(L y, L a, L b, uint32_t n) { each(n, [&](uint32_t i) { y.at[i] = a.at[i] / b.at[i]; }); }
inline void Muls(L y, L a, float s, uint32_t n) { each(n, [&](uint32_t i) { y.at[i] = a.at[i] * s; }); }
inline void Adds(L y, L a, float s, uint32_t n) { each(n, [&](uint32_t i) { y.at[i] = a.at[i] + s; }); }
inline void Exp(L y, L a, uint32_t n) { each(n, [&](uint32_t i) { y.at[i] = std::exp(a.at[i]); }); }
inline void Sqrt(L y, L a, uint32_t n) { each(n, [&](uint32_t i) { y.at[i] = std::sqrt(a.at[i]); }); }
inline void Duplicate(L y, float s, uint32_t n) { each(n, [&](uint32_t i) { y.at[i] = s; }); }
// pairs first, as the vector unit does, and its work space is spoiled
template <class T> void ReduceSum(L y, L x, L work, uint32_t n)
{
    std::vector<float> v(x.at, x.at + n);
    for (; v.size() > 1; v.resize((v.size() + 1) / 2)) {
        if (v.size() % 2) v.push_back(0);
        for (size_t i = 0; i < v.size() / 2; ++i) v[i] = v[2 * i] + v[2 * i + 1];
    }
    std::memset(work.at, 0xFF, n * sizeof(float));
    y.at[0] = v[0];
}
} // namespace AscendC

extern "C" void run_on_core(uint32_t core, GM_ADDR a, GM_ADDR b, GM_ADDR c, GM_ADDR d, GM_ADDR e, GM_ADDR f, GM_ADDR t);
