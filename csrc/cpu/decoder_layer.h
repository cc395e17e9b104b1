#pragma once

#include "types.h"

namespace vllm_cpu {

void decoder_layer(const DecoderLayerArgs& args);

}  // namespace vllm_cpu
