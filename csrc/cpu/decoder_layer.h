#pragma once

#include "types.h"

namespace vllm_cpu {

// Runs `count` layers, one after another.
void decoder_layers(const DecoderLayer* layers, int64_t count, const DecoderStep& step);

}  // namespace vllm_cpu
