// V4HcHead on the host: definition, shape and type of its result, and tiling. Not compiled here: needs CANN's headers.
//
// The build generates aclnnV4HcHead from the definition: inputs, attributes, outputs, in the order in which they stand below. The torch half
// (torch_half/hc_head.cpp) passes them in that order and has checked every shape before.
#include "v4_hc_head_tiling.h"

#include "register/op_def_registry.h"
#include "tiling/platform/platform_ascendc.h"

namespace {
constexpr int64_t STREAMS = 4;
constexpr uint32_t LANES = 64;
// five accumulators, two working tiles, one of output, two rounds of four rows of weights and of one stream: 18 tiles of fp32, 144 KiB of
// the 192 KiB (A2, A3) that a vector core has
constexpr uint32_t WIDEST_TILE = 2048;
constexpr uint32_t WIDEST = 16384;

// A divisor, so that the kernel has no shorter last round.
uint32_t tile_of(uint32_t width)
{
    for (uint32_t tile = WIDEST_TILE; tile > LANES; tile -= LANES)
        if (width % tile == 0) return tile;
    return LANES;
}
} // namespace

namespace optiling {
static ge::graphStatus Tiling(gert::TilingContext *context)
{
    const gert::StorageShape *found = context->GetInputShape(0);
    const gert::RuntimeAttrs *attributes = context->GetAttrs();
    if (found == nullptr || attributes == nullptr) return ge::GRAPH_FAILED;
    const gert::Shape &streams = found->GetStorageShape();
    const float *norm_eps = attributes->GetFloat(0), *hc_eps = attributes->GetFloat(1);
    if (streams.GetDimNum() != 3 || streams.GetDim(0) <= 0 || streams.GetDim(0) > UINT32_MAX || streams.GetDim(1) != STREAMS ||
        streams.GetDim(2) <= 0 || streams.GetDim(2) % LANES != 0 || streams.GetDim(2) > WIDEST || norm_eps == nullptr || hc_eps == nullptr)
        return ge::GRAPH_FAILED;

    const uint32_t tokens = static_cast<uint32_t>(streams.GetDim(0)), width = static_cast<uint32_t>(streams.GetDim(2));
    const auto platform = platform_ascendc::PlatformAscendC(context->GetPlatformInfo());
    const uint32_t cores = platform.GetCoreNumAiv();
    if (cores == 0) return ge::GRAPH_FAILED;
    const uint32_t per_core = tokens / cores + (tokens % cores != 0);

    V4HcHeadTilingData tiling;
    tiling.set_tokens(tokens);
    tiling.set_width(width);
    tiling.set_tile(tile_of(width));
    tiling.set_tokens_per_core(per_core);
    tiling.set_norm_eps(*norm_eps);
    tiling.set_hc_eps(*hc_eps);
    context->SetBlockDim(tokens / per_core + (tokens % per_core != 0));
    if (tiling.GetDataSize() > context->GetRawTilingData()->GetCapacity()) return ge::GRAPH_FAILED;
    tiling.SaveToBuffer(context->GetRawTilingData()->GetData(), context->GetRawTilingData()->GetCapacity());
    context->GetRawTilingData()->SetDataSize(tiling.GetDataSize());
    context->GetWorkspaceSizes(1)[0] = platform.GetLibApiWorkSpaceSize();
    return ge::GRAPH_SUCCESS;
}
} // namespace optiling

namespace ge {
static graphStatus InferShape(gert::InferShapeContext *context)
{
    const gert::Shape *streams = context->GetInputShape(0);
    gert::Shape *out = context->GetOutputShape(0);
    if (streams == nullptr || out == nullptr || streams->GetDimNum() != 3) return GRAPH_FAILED;
    out->SetDimNum(2);
    out->SetDim(0, streams->GetDim(0));
    out->SetDim(1, streams->GetDim(2));
    return GRAPH_SUCCESS;
}

static graphStatus InferDataType(gert::InferDataTypeContext *context)
{
    return context->SetOutputDataType(0, context->GetInputDataType(0));
}
} // namespace ge

namespace ops {
class V4HcHead : public OpDef {
public:
    explicit V4HcHead(const char *name) : OpDef(name)
    {
        // one column for each type of the streams; the weights are fp32 in all of them
        const std::vector<ge::DataType> any{ge::DT_BF16, ge::DT_FLOAT16, ge::DT_FLOAT}, fp32(any.size(), ge::DT_FLOAT);
        const std::vector<ge::Format> plain(any.size(), ge::FORMAT_ND);
        this->Input("streams").ParamType(REQUIRED).DataType(any).Format(plain).UnknownShapeFormat(plain);
        this->Input("fn").ParamType(REQUIRED).DataType(fp32).Format(plain).UnknownShapeFormat(plain);
        this->Input("scale").ParamType(REQUIRED).DataType(fp32).Format(plain).UnknownShapeFormat(plain);
        this->Input("base").ParamType(REQUIRED).DataType(fp32).Format(plain).UnknownShapeFormat(plain);
        this->Output("out").ParamType(REQUIRED).DataType(any).Format(plain).UnknownShapeFormat(plain);
        this->Attr("norm_eps").AttrType(REQUIRED).Float();
        this->Attr("hc_eps").AttrType(REQUIRED).Float();
        this->SetInferShape(ge::InferShape).SetInferDataType(ge::InferDataType);
        this->AICore().SetTiling(optiling::Tiling);
        for (const char *chip : {"ascend910b", "ascend910_93", "ascend950"}) this->AICore().AddConfig(chip);
    }
};

OP_ADD(V4HcHead);
} // namespace ops
