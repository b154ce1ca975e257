// V4HcHead on the vector cores. Not compiled here, never run: needs CANN's compiler.
//
// out[t] = sum_j (sigmoid(u_j * scale + base_j) + hc_eps) * streams[t, j]; u = fn . flat(streams[t]) / sqrt(mean(square) + norm_eps).
// A core takes whole tokens. For each it reads the four streams twice, tile after tile: once for four products with fn and the sum of squares,
// kept as vectors of fp32 and added up at the end, once for the weighted sum. Everything is fp32 on the vector unit (the cube unit would
// multiply in HF32 or bf16), rounded to nearest even once.
#include "kernel_operator.h"

using namespace AscendC;

namespace {
constexpr uint32_t STREAMS = 4;
constexpr uint32_t BLOCK = 32;                       // bytes that a copy moves at least
constexpr uint32_t SMALL = BLOCK / sizeof(float);    // floats of the smallest tensor
constexpr int32_t TWO = 2;                           // rounds in flight

template <typename T> class HcHead {
public:
    __aicore__ inline void Init(GM_ADDR streams, GM_ADDR fn, GM_ADDR scale, GM_ADDR base, GM_ADDR out, const V4HcHeadTilingData &t)
    {
        width_ = t.width;
        tile_ = t.tile;
        norm_eps_ = t.norm_eps;
        hc_eps_ = t.hc_eps;
        first_ = GetBlockIdx() * t.tokens_per_core;
        const uint32_t behind = first_ + t.tokens_per_core;
        last_ = behind < t.tokens ? behind : t.tokens;
        streams_.SetGlobalBuffer((__gm__ T *)streams);
        fn_.SetGlobalBuffer((__gm__ float *)fn);
        scale_.SetGlobalBuffer((__gm__ float *)scale);
        base_.SetGlobalBuffer((__gm__ float *)base);
        out_.SetGlobalBuffer((__gm__ T *)out);
        pipe_.InitBuffer(streamQueue_, TWO, tile_ * sizeof(T));
        pipe_.InitBuffer(weightQueue_, TWO, STREAMS * tile_ * sizeof(float));
        pipe_.InitBuffer(outQueue_, 1, tile_ * sizeof(T));
        pipe_.InitBuffer(sums_, (STREAMS + 1) * tile_ * sizeof(float));
        pipe_.InitBuffer(wide_, tile_ * sizeof(float));
        pipe_.InitBuffer(product_, tile_ * sizeof(float));
        pipe_.InitBuffer(small_, 3 * BLOCK);
    }

    __aicore__ inline void Process()
    {
        for (uint32_t token = first_; token < last_; ++token) {
            float weight[STREAMS];
            Coefficients(token, weight);
            Collapse(token, weight);
        }
    }

private:
    // element index: tokens * streams * width may pass 32 bits
    __aicore__ inline uint64_t At(uint32_t token, uint32_t stream, uint32_t channel) const
    {
        return (static_cast<uint64_t>(token) * STREAMS + stream) * width_ + channel;
    }

    // One tile of one stream in fp32.
    __aicore__ inline LocalTensor<float> Load(uint64_t where)
    {
        LocalTensor<T> came = streamQueue_.template AllocTensor<T>();
        DataCopy(came, streams_[where], tile_);
        streamQueue_.EnQue(came);
        came = streamQueue_.template DeQue<T>();
        LocalTensor<float> wide = wide_.template Get<float>();
        if constexpr (IsSameType<T, float>::value) {
            Adds(wide, came, 0.0f, tile_);
        } else {
            Cast(wide, came, RoundMode::CAST_NONE, tile_);
        }
        streamQueue_.FreeTensor(came);
        return wide;
    }

    // The same channels of the four rows of fn.
    __aicore__ inline LocalTensor<float> LoadWeights(uint32_t stream, uint32_t channel)
    {
        LocalTensor<float> came = weightQueue_.template AllocTensor<float>();
        const uint32_t row = STREAMS * width_;
        DataCopyParams rows;
        rows.blockCount = STREAMS;
        rows.blockLen = tile_ * sizeof(float) / BLOCK;
        rows.srcStride = (row - tile_) * sizeof(float) / BLOCK;
        rows.dstStride = 0;
        DataCopy(came, fn_[stream * width_ + channel], rows);
        weightQueue_.EnQue(came);
        return weightQueue_.template DeQue<float>();
    }

    __aicore__ inline void VectorToScalar()
    {
        const event_t done = static_cast<event_t>(GetTPipePtr()->FetchEventID(HardEvent::V_S));
        SetFlag<HardEvent::V_S>(done);
        WaitFlag<HardEvent::V_S>(done);
    }

    __aicore__ inline void ScalarToVector()
    {
        const event_t done = static_cast<event_t>(GetTPipePtr()->FetchEventID(HardEvent::S_V));
        SetFlag<HardEvent::S_V>(done);
        WaitFlag<HardEvent::S_V>(done);
    }

    __aicore__ inline void Coefficients(uint32_t token, float (&weight)[STREAMS])
    {
        LocalTensor<float> sums = sums_.template Get<float>(), product = product_.template Get<float>();
        Duplicate(sums, 0.0f, (STREAMS + 1) * tile_);
        for (uint32_t stream = 0; stream < STREAMS; ++stream) {
            for (uint32_t channel = 0; channel < width_; channel += tile_) {
                LocalTensor<float> rows = LoadWeights(stream, channel);
                LocalTensor<float> x = Load(At(token, stream, channel));
                for (uint32_t row = 0; row < STREAMS; ++row) {
                    Mul(product, x, rows[row * tile_], tile_);
                    Add(sums[row * tile_], sums[row * tile_], product, tile_);
                }
                Mul(product, x, x, tile_);
                Add(sums[STREAMS * tile_], sums[STREAMS * tile_], product, tile_);
                weightQueue_.FreeTensor(rows);
            }
        }

        float total[STREAMS + 1];
        LocalTensor<float> small = small_.template Get<float>();
        for (uint32_t row = 0; row <= STREAMS; ++row) {
            // the work space of the reduction is not read afterwards
            ReduceSum<float>(small, sums[row * tile_], product, tile_);
            VectorToScalar();
            total[row] = small.GetValue(0);
            ScalarToVector(); // `small` is written again
        }

        LocalTensor<float> logit = small[0], root = small[SMALL], one = small[2 * SMALL];
        for (uint32_t lane = 0; lane < SMALL; ++lane) logit.SetValue(lane, lane < STREAMS ? total[lane] : 0.0f);
        ScalarToVector();
        // Div and Sqrt, not Rsqrt and Reciprocal, which approximate
        Duplicate(root, total[STREAMS] / static_cast<float>(STREAMS * width_) + norm_eps_, SMALL);
        Sqrt(root, root, SMALL);
        Div(logit, logit, root, SMALL);
        Muls(logit, logit, scale_.GetValue(0), SMALL);
        VectorToScalar(); // `root` has been read
        for (uint32_t lane = 0; lane < SMALL; ++lane) root.SetValue(lane, lane < STREAMS ? base_.GetValue(lane) : 0.0f);
        ScalarToVector();
        Add(logit, logit, root, SMALL);
        Muls(logit, logit, -1.0f, SMALL);
        Exp(logit, logit, SMALL);
        Adds(logit, logit, 1.0f, SMALL);
        Duplicate(one, 1.0f, SMALL);
        Div(logit, one, logit, SMALL);
        Adds(logit, logit, hc_eps_, SMALL);
        VectorToScalar();
        for (uint32_t stream = 0; stream < STREAMS; ++stream) weight[stream] = logit.GetValue(stream);
        ScalarToVector();
    }

    __aicore__ inline void Collapse(uint32_t token, const float (&weight)[STREAMS])
    {
        LocalTensor<float> sum = sums_.template Get<float>(), product = product_.template Get<float>();
        for (uint32_t channel = 0; channel < width_; channel += tile_) {
            Duplicate(sum, 0.0f, tile_);
            for (uint32_t stream = 0; stream < STREAMS; ++stream) {
                LocalTensor<float> x = Load(At(token, stream, channel));
                Muls(product, x, weight[stream], tile_);
                Add(sum, sum, product, tile_);
            }
            LocalTensor<T> rounded = outQueue_.template AllocTensor<T>();
            if constexpr (IsSameType<T, float>::value) {
                Adds(rounded, sum, 0.0f, tile_);
            } else {
                Cast(rounded, sum, RoundMode::CAST_RINT, tile_);
            }
            outQueue_.EnQue(rounded);
            rounded = outQueue_.template DeQue<T>();
            DataCopy(out_[static_cast<uint64_t>(token) * width_ + channel], rounded, tile_);
            outQueue_.FreeTensor(rounded);
        }
    }

    TPipe pipe_;
    TQue<QuePosition::VECIN, TWO> streamQueue_, weightQueue_;
    TQue<QuePosition::VECOUT, 1> outQueue_;
    TBuf<TPosition::VECCALC> sums_, wide_, product_, small_;
    GlobalTensor<T> streams_, out_;
    GlobalTensor<float> fn_, scale_, base_;
    uint32_t width_, tile_, first_, last_;
    float norm_eps_, hc_eps_;
};
} // namespace

extern "C" __global__ __aicore__ void v4_hc_head(GM_ADDR streams, GM_ADDR fn, GM_ADDR scale, GM_ADDR base, GM_ADDR out, GM_ADDR workspace,
                                                 GM_ADDR tiling)
{
    GET_TILING_DATA(data, tiling);
    HcHead<DTYPE_STREAMS> op;
    op.Init(streams, fn, scale, base, out, data);
    op.Process();
}
