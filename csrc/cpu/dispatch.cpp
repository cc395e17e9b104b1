// Which instruction set the kernels of this process use: the widest that the processor has.
#include "dispatch.h"

#include <cstring>

namespace vllm_cpu {

#define VLLM_DECLARE(isa)            \
  namespace isa {                    \
  void fill_gemm(Kernels&);          \
  void fill_moe(Kernels&);           \
  void fill_streams(Kernels&);       \
  void fill_elementwise(Kernels&);   \
  void fill_attention(Kernels&);     \
  void fill_state(Kernels&);         \
  void fill_linear_attention(Kernels&); \
  }
VLLM_DECLARE(generic)
#if defined(__x86_64__)
VLLM_DECLARE(avx2)
VLLM_DECLARE(avx512)
VLLM_DECLARE(avx512bf16)
#endif
#undef VLLM_DECLARE

namespace {

#define VLLM_TABLE(isa)             \
  [] {                              \
    Kernels k{};                    \
    k.name = #isa;                  \
    isa::fill_gemm(k);              \
    isa::fill_moe(k);               \
    isa::fill_streams(k);           \
    isa::fill_elementwise(k);       \
    isa::fill_attention(k);         \
    isa::fill_state(k);             \
    isa::fill_linear_attention(k);  \
    return k;                       \
  }()

struct Candidates {
  Kernels tables[4];
  int count = 0;

  Candidates() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq");
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) {
      tables[count++] = VLLM_TABLE(avx512bf16);
    }
    if (has_avx512) tables[count++] = VLLM_TABLE(avx512);
    if (has_avx2) tables[count++] = VLLM_TABLE(avx2);
#endif
    tables[count++] = VLLM_TABLE(generic);
  }
};
#undef VLLM_TABLE

const Candidates& candidates() {
  static const Candidates all;
  return all;
}

const Kernels* chosen = nullptr;

}  // namespace

const Kernels& kernels() { return chosen ? *chosen : candidates().tables[0]; }

bool use_isa(const char* name) {
  for (int i = 0; i < candidates().count; ++i) {
    if (std::strcmp(candidates().tables[i].name, name) == 0) {
      chosen = &candidates().tables[i];
      return true;
    }
  }
  return false;
}

int num_isas() { return candidates().count; }

const char* isa_name(int index) { return candidates().tables[index].name; }

}  // namespace vllm_cpu
