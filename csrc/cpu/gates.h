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

// x * (1 + erf(x / sqrt(2))) / 2, erf by Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most.
VLLM_INLINE Vec gelu(Vec x) {
  const Vec u = mul(x, set1(0.70710678118654752f));
  const Vec size = max(u, sub(zero(), u));
  const Vec t = div(set1(1.0f), fma(size, set1(0.3275911f), set1(1.0f)));
  Vec p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  // 1 - |erf|, which is all that is left of x far below zero.
  const Vec rest = mul(mul(p, t), exp(sub(zero(), mul(u, u))));
  // x > 0: x - x * rest / 2, else x * rest / 2; both are max(x, 0) - |x| * rest / 2.
  const Vec half = mul(mul(max(x, sub(zero(), x)), rest), set1(0.5f));
  return sub(max(x, zero()), half);
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
