// The innermost product, shared by the linear layers and by attention:
//   C (rows x kTileCols) = A (rows x k) * B (k x kTileCols), rows <= a dozen or so, in registers.
//
// A is read a number at a time and broadcast, rows at a fixed distance known when compiling. B is
// read a vector at a time. Three forms of B:
//   Plain<float>, Plain<f16>  one row of B after another, widened to float; A is float
//   Pairs                     bf16, two rows of B interleaved, widened to float; A is float
//   Dots                      the same bytes, multiplied as bf16 pairs with sums in float; A is bf16
#pragma once

#include "vec.h"

namespace vllm_cpu {
namespace VLLM_ISA {

// Columns of a tile: two vectors.
constexpr int kTileCols = 2 * kLanes;

// Rows of a tile: as many as leave registers for B (32 vectors with AVX-512, else 16).
#if defined(VLLM_AVX512)
constexpr int kTileRows = 14;
constexpr int kTileRowsPairs = 12;
#elif defined(VLLM_AVX2)
constexpr int kTileRows = 6;
constexpr int kTileRowsPairs = 5;
#else
constexpr int kTileRows = 4;
constexpr int kTileRowsPairs = 4;
#endif

template <typename T>
struct Plain {
  using A = float;
  using B = T;
  static constexpr int kStep = 1;  // values of k per row of B
  static constexpr int kRows = kTileRows;
  template <int MR>
  VLLM_INLINE void step(Vec (&acc)[MR][2], const A* a, int64_t lda, const B* b) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Vec x = set1(a[r * lda]);
      acc[r][0] = fma(x, b0, acc[r][0]);
      acc[r][1] = fma(x, b1, acc[r][1]);
    }
  }
};

struct Pairs {
  using A = float;
  using B = bf16;
  static constexpr int kStep = 2;
  static constexpr int kRows = kTileRowsPairs;
  template <int MR>
  VLLM_INLINE void step(Vec (&acc)[MR][2], const A* a, int64_t lda, const B* b) {
    Vec b00, b01, b10, b11;
    load_pairs(b, b00, b10);
    load_pairs(b + 2 * kLanes, b01, b11);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Vec x = set1(a[r * lda]), y = set1(a[r * lda + 1]);
      acc[r][0] = fma(x, b00, acc[r][0]);
      acc[r][1] = fma(x, b01, acc[r][1]);
      acc[r][0] = fma(y, b10, acc[r][0]);
      acc[r][1] = fma(y, b11, acc[r][1]);
    }
  }
};

#if defined(VLLM_DOT_BF16)
struct Dots {
  using A = bf16;
  using B = bf16;
  static constexpr int kStep = 2;
  static constexpr int kRows = kTileRows;
  template <int MR>
  VLLM_INLINE void step(Vec (&acc)[MR][2], const A* a, int64_t lda, const B* b) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + 2 * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      int32_t pair;
      memcpy(&pair, a + r * lda, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, b0);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, b1);
    }
  }
};
#endif

// acc += A * B for `steps` rows of B (each of Form::kStep values of k), ldb elements apart.
// kPrefetch: fetch `ahead` bytes further on, as each row of B is read.
template <typename Form, int MR, int64_t LDA, bool kPrefetch>
VLLM_INLINE void multiply(Vec (&acc)[MR][2], const typename Form::A* a, const typename Form::B* b,
                          int64_t ldb, int64_t steps, int64_t ahead) {
  for (int64_t s = 0; s < steps; ++s) {
    if (kPrefetch) {
      const char* far = reinterpret_cast<const char*>(b) + ahead;
      prefetch_l2(far);
      if (sizeof(typename Form::B) * kTileCols * Form::kStep > 64) prefetch_l2(far + 64);
    }
    Form::template step<MR>(acc, a, LDA, b);
    a += Form::kStep;
    b += ldb;
  }
}

// Calls body(Rows<n>) for n = `rows`, 1 <= rows <= kMax.
template <int N>
struct Rows {
  static constexpr int value = N;
};

template <int kMax, typename Body>
VLLM_INLINE void with_rows(int rows, const Body& body) {
  if constexpr (kMax >= 1) {
    if (rows == kMax) {
      body(Rows<kMax>{});
    } else {
      with_rows<kMax - 1>(rows, body);
    }
  }
}

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
