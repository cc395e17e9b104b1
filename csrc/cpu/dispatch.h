#pragma once

#include "types.h"

namespace vllm_cpu {

// The kernels in use.
const Kernels& kernels();

// Use the kernels called `name` from now on; false if this processor cannot run them.
bool use_isa(const char* name);

// Those that this processor can run, widest first.
int num_isas();
const char* isa_name(int index);

}  // namespace vllm_cpu
