// What the host tells every core of V4HcHead. Not compiled here: needs CANN's headers.
#pragma once
#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(V4HcHeadTilingData)
TILING_DATA_FIELD_DEF(uint32_t, tokens);
TILING_DATA_FIELD_DEF(uint32_t, width);          // D, channels of one stream
TILING_DATA_FIELD_DEF(uint32_t, tile);           // channels in one round, a divisor of width and a multiple of 64
TILING_DATA_FIELD_DEF(uint32_t, tokens_per_core);
TILING_DATA_FIELD_DEF(float, norm_eps);
TILING_DATA_FIELD_DEF(float, hc_eps);
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(V4HcHead, V4HcHeadTilingData)
} // namespace optiling
