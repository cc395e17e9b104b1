// Gates of MLPs: vectors of gate and up -> their product.
#pragma once

#include "types.h"
#include "vec.h"

namespace vllm_cpu {
namespace VLLM_ISA {

VLLM_INLINE Vec sigmoid_times(Vec x, Vec factor) {
  return div(factor, add(set1(1.0f), exp(sub(zero(), x))));
}

// 0.5 * x * (1 + tanh(u)) is x * sigmoid(2 * u), with u = sqrt(2 / pi) * (x + 0.044715 * x^3).
VLLM_INLINE Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(mul(mul(x, x), set1(0.044715f)), x, x);
  return sigmoid_times(mul(set1(1.5957691216057308f), cubic), x);
}

// Calls body(f) with the function that `gate`, one of enum Gate, stands for.
template <typename Body>
VLLM_INLINE void with_gate(int gate, float alpha, float limit, const Body& body) {
  const Vec most = set1(limit), least = set1(-limit);
  switch (gate) {
    case kGeluTanh:
      return body([](Vec x, Vec up) { return mul(gelu_tanh(x), up); });
    case kSwigluOai: {
      const Vec steep = set1(alpha);
      return body([&](Vec x, Vec up) {
        x = min(x, most);
        up = add(max(min(up, most), least), set1(1.0f));
        return sigmoid_times(mul(steep, x), mul(up, x));
      });
    }
    case kClampedSilu:
      return body([&](Vec x, Vec up) {
        return mul(silu(min(x, most)), max(min(up, most), least));
      });
    default:
      return body([](Vec x, Vec up) { return mul(silu(x), up); });
  }
}

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
