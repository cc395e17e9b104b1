// Vectors of floats in the widest form that the translation unit is compiled for.
//
// Each source that includes this is compiled once per instruction set, with VLLM_ISA naming the
// namespace, so that the copies do not meet at link time. Nothing here may be an inline function of
// another namespace for the same reason: no standard containers, no <algorithm>.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define VLLM_AVX512 1
#if defined(__AVX512BF16__)
#define VLLM_DOT_BF16 1
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VLLM_AVX2 1
#endif

#if defined(VLLM_AVX512) || defined(VLLM_AVX2)
#include <immintrin.h>
#endif

namespace vllm_cpu {
namespace VLLM_ISA {

#define VLLM_INLINE static inline __attribute__((always_inline))

// ---- scalars ---------------------------------------------------------------------------------

VLLM_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

VLLM_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

VLLM_INLINE float to_float(float x) { return x; }
VLLM_INLINE float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

VLLM_INLINE float to_float(f16 x) {
#if defined(VLLM_AVX512) || defined(VLLM_AVX2)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
#else
  // The product turns a subnormal half into a normal float; infinities and NaN are put right after.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float magnitude = bits_to_float(rest) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : 0;
  return bits_to_float(sign | (special ? special : float_to_bits(magnitude)));
#endif
}

template <typename T>
VLLM_INLINE T from_float(float x);

template <>
inline __attribute__((always_inline)) float from_float<float>(float x) {
  return x;
}

template <>
inline __attribute__((always_inline)) bf16 from_float<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline __attribute__((always_inline)) f16 from_float<f16>(float x) {
#if defined(VLLM_AVX512) || defined(VLLM_AVX2)
  return f16{static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), 0)))};
#else
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Adding 0.5 puts the subnormal half's unit in the last place of the float.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
  return f16{static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

// ---- vectors ---------------------------------------------------------------------------------
// kLanes floats; `lanes` arguments of the partial forms are 0 .. kLanes.

#if defined(VLLM_AVX512)

constexpr int kLanes = 16;
using Vec = __m512;

VLLM_INLINE __mmask16 lane_mask(int lanes) {
  return static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(lanes)));
}

VLLM_INLINE Vec zero() { return _mm512_setzero_ps(); }
VLLM_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
VLLM_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
VLLM_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
VLLM_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
VLLM_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
VLLM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
VLLM_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
VLLM_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
VLLM_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
VLLM_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
VLLM_INLINE Vec round_to_int(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
VLLM_INLINE Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
// The first `lanes` lanes of a, the others of b.
VLLM_INLINE Vec first_lanes(Vec a, Vec b, int lanes) {
  return _mm512_mask_blend_ps(lane_mask(lanes), b, a);
}
VLLM_INLINE Vec iota() {
  return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

VLLM_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
VLLM_INLINE Vec load(const bf16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
VLLM_INLINE Vec load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
VLLM_INLINE Vec load(const float* p, int lanes) {
  return _mm512_maskz_loadu_ps(lane_mask(lanes), p);
}
VLLM_INLINE Vec load(const bf16* p, int lanes) {
  const __m256i x = _mm256_maskz_loadu_epi16(lane_mask(lanes), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
VLLM_INLINE Vec load(const f16* p, int lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(lanes), p));
}

VLLM_INLINE __m256i narrow_bf16(Vec a) {
#if defined(VLLM_DOT_BF16)
  return (__m256i)_mm512_cvtneps_pbh(a);
#else
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
VLLM_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
VLLM_INLINE void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a));
}
VLLM_INLINE void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, 0));
}
VLLM_INLINE void store(float* p, Vec a, int lanes) {
  _mm512_mask_storeu_ps(p, lane_mask(lanes), a);
}
VLLM_INLINE void store(bf16* p, Vec a, int lanes) {
  _mm256_mask_storeu_epi16(p, lane_mask(lanes), narrow_bf16(a));
}
VLLM_INLINE void store(f16* p, Vec a, int lanes) {
  _mm256_mask_storeu_epi16(p, lane_mask(lanes), _mm512_cvtps_ph(a, 0));
}

// The low and the high bf16 of each 32-bit pair.
VLLM_INLINE void load_pairs(const bf16* p, Vec& low, Vec& high) {
  const __m512i x = _mm512_loadu_si512(p);
  low = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  high = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000)));
}

// rows[i] lane j -> rows[j] lane i.
VLLM_INLINE void transpose(Vec (&rows)[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_castps_si512(rows[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    rows[i + 4] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    rows[i + 8] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    rows[i + 12] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
  }
}

#elif defined(VLLM_AVX2)

constexpr int kLanes = 8;
using Vec = __m256;

VLLM_INLINE Vec zero() { return _mm256_setzero_ps(); }
VLLM_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
VLLM_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
VLLM_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
VLLM_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
VLLM_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
VLLM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
VLLM_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
VLLM_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
VLLM_INLINE float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
VLLM_INLINE float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
VLLM_INLINE Vec round_to_int(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
VLLM_INLINE Vec scale_by_power(Vec a, Vec n) {
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
VLLM_INLINE Vec iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
VLLM_INLINE Vec first_lanes(Vec a, Vec b, int lanes) {
  const Vec keep = _mm256_cmp_ps(iota(), set1(static_cast<float>(lanes)), _CMP_LT_OQ);
  return _mm256_blendv_ps(b, a, keep);
}

VLLM_INLINE Vec widen_bf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
VLLM_INLINE __m128i narrow_bf16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_packus_epi32(high, high);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
VLLM_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
VLLM_INLINE Vec load(const bf16* p) {
  return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
VLLM_INLINE Vec load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
VLLM_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
VLLM_INLINE void store(bf16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a));
}
VLLM_INLINE void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, 0));
}
VLLM_INLINE void load_pairs(const bf16* p, Vec& low, Vec& high) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  low = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  high = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff0000)));
}
VLLM_INLINE void transpose(Vec (&r)[8]) {
  Vec a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

#else

// Four floats in the compiler's own vectors: SSE2, NEON, or whatever there is.
constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));

VLLM_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
VLLM_INLINE Vec zero() { return set1(0.0f); }
VLLM_INLINE Vec add(Vec a, Vec b) { return a + b; }
VLLM_INLINE Vec sub(Vec a, Vec b) { return a - b; }
VLLM_INLINE Vec mul(Vec a, Vec b) { return a * b; }
VLLM_INLINE Vec div(Vec a, Vec b) { return a / b; }
VLLM_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
VLLM_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
VLLM_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
VLLM_INLINE float reduce_add(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
VLLM_INLINE float reduce_max(Vec a) {
  const float x = a[0] > a[1] ? a[0] : a[1];
  const float y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
// For |a| < 2^22: adding and taking away 1.5 * 2^23 leaves the nearest whole number.
VLLM_INLINE Vec round_to_int(Vec a) {
  const Vec magic = set1(12582912.0f);
  return (a + magic) - magic;
}
VLLM_INLINE Vec scale_by_power(Vec a, Vec n) {
  Vec power;
  for (int i = 0; i < 4; ++i) {
    power[i] = bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n[i]) + 127) << 23);
  }
  return a * power;
}
VLLM_INLINE Vec iota() { return Vec{0, 1, 2, 3}; }
VLLM_INLINE Vec first_lanes(Vec a, Vec b, int lanes) {
  for (int i = 0; i < 4; ++i) {
    if (i >= lanes) a[i] = b[i];
  }
  return a;
}
template <typename T>
VLLM_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <typename T>
VLLM_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = from_float<T>(a[i]);
}
VLLM_INLINE void load_pairs(const bf16* p, Vec& low, Vec& high) {
  for (int i = 0; i < 4; ++i) {
    low[i] = to_float(p[2 * i]);
    high[i] = to_float(p[2 * i + 1]);
  }
}
VLLM_INLINE void transpose(Vec (&r)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
  }
}

#endif

#if !defined(VLLM_AVX512)
template <typename T>
VLLM_INLINE Vec load(const T* p, int lanes) {
  if (lanes >= kLanes) return load(p);
  T buffer[kLanes];
  memset(buffer, 0, sizeof(buffer));
  for (int i = 0; i < lanes; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <typename T>
VLLM_INLINE void store(T* p, Vec a, int lanes) {
  if (lanes >= kLanes) return store(p, a);
  T buffer[kLanes];
  store(buffer, a);
  for (int i = 0; i < lanes; ++i) p[i] = buffer[i];
}
#endif

// ---- functions -------------------------------------------------------------------------------

// e^x to about 1e-7 relative; x is taken as at least -87.3 and at most 88. NaN stays NaN: the
// processor's min and max answer their second operand then.
VLLM_INLINE Vec exp(Vec x) {
  const Vec clamped = min(set1(88.0f), max(set1(-87.3f), x));
  const Vec n = round_to_int(mul(clamped, set1(1.44269504088896341f)));
  // ln 2 in two parts, so that the remainder keeps its last bits.
  Vec r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  // Taylor's coefficients; |r| <= ln(2) / 2, so the first one left out is below 6e-9.
  Vec p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

// 2^x to about 4e-5 relative, for results that are rounded to 16 bits; x is at most 127.
VLLM_INLINE Vec exp2_16bit(Vec x) {
  const Vec limited = max(set1(-126.0f), x);
  const Vec n = round_to_int(limited);
  const Vec r = sub(limited, n);
  // ln(2)^k / k!
  Vec p = set1(9.6181291e-3f);
  p = fma(p, r, set1(5.5504109e-2f));
  p = fma(p, r, set1(2.4022651e-1f));
  p = fma(p, r, set1(6.9314718e-1f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

// log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x| in (0, 1], and log(1 + u) = 2 atanh(s) with
// s = u / (2 + u) <= 1 / 3: nine terms of its series leave less than 1e-9.
VLLM_INLINE Vec softplus(Vec x) {
  const Vec u = exp(min(x, sub(zero(), x)));
  const Vec s = div(u, add(u, set1(2.0f)));
  const Vec q = mul(s, s);
  Vec p = set1(1.0f / 17.0f);
  p = fma(p, q, set1(1.0f / 15.0f));
  p = fma(p, q, set1(1.0f / 13.0f));
  p = fma(p, q, set1(1.0f / 11.0f));
  p = fma(p, q, set1(1.0f / 9.0f));
  p = fma(p, q, set1(1.0f / 7.0f));
  p = fma(p, q, set1(1.0f / 5.0f));
  p = fma(p, q, set1(1.0f / 3.0f));
  p = fma(p, q, set1(1.0f));
  return fma(add(s, s), p, max(x, zero()));
}

VLLM_INLINE Vec silu(Vec x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// 1 - 2 / (e^2x + 1); near 0 the difference loses digits, so a series takes over below 0.25.
VLLM_INLINE Vec tanh(Vec x) {
  const Vec limited = min(max(x, set1(-20.0f)), set1(20.0f));
  const Vec e = exp(add(limited, limited));
  const Vec far = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
  const Vec s = mul(x, x);
  Vec p = set1(-1382.0f / 155925.0f);
  p = fma(p, s, set1(62.0f / 2835.0f));
  p = fma(p, s, set1(-17.0f / 315.0f));
  p = fma(p, s, set1(2.0f / 15.0f));
  p = fma(p, s, set1(-1.0f / 3.0f));
  p = fma(p, s, set1(1.0f));
  const Vec near = mul(p, x);
#if defined(VLLM_AVX512)
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(s, set1(0.0625f), _CMP_LT_OQ), far, near);
#elif defined(VLLM_AVX2)
  return _mm256_blendv_ps(far, near, _mm256_cmp_ps(s, set1(0.0625f), _CMP_LT_OQ));
#else
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = s[i] < 0.0625f ? near[i] : far[i];
  return result;
#endif
}

VLLM_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
