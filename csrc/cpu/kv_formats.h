// Quantised contents of a cache: floats to bytes and back. The formulae are those of
// vllm/v1/attention/ops/kv_formats.py, bit for bit. Loops are left to the compiler's vectors.
#pragma once

#include "vec.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

constexpr int64_t kFp4Group = 16;  // numbers that share a scale
constexpr float kLeastMagnitude = 1e-12f;
constexpr float kLargestE4M3 = 448.0f, kLargestE5M2 = 57344.0f;
constexpr float kNaN = __builtin_nanf("");

struct ByteTable {
  float values[256];
};

// `mantissa` bits behind the exponent, whose bias is `bias`; the other bits are exponent and sign.
constexpr ByteTable float8_table(int mantissa, int bias, bool has_infinity) {
  ByteTable table{};
  const int exponents = 1 << (7 - mantissa), steps = 1 << mantissa;
  for (int i = 0; i < 128; ++i) {
    const int exponent = i >> mantissa, rest = i & (steps - 1);
    float value = static_cast<float>(exponent ? steps + rest : rest);
    int power = (exponent ? exponent : 1) - bias - mantissa;
    for (; power > 0; --power) value *= 2;
    for (; power < 0; ++power) value /= 2;
    if (has_infinity && exponent == exponents - 1) value = rest ? kNaN : __builtin_inff();
    if (!has_infinity && i == 127) value = kNaN;
    table.values[i] = value;
    table.values[i + 128] = -value;
  }
  return table;
}

constexpr ByteTable kE4M3Values = float8_table(3, 7, false);
constexpr ByteTable kE5M2Values = float8_table(2, 15, true);
constexpr float kE2M1Values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// To the nearest number of a float8, ties to even; |x| is at most the largest. Below the smallest
// normal number, adding `magic` leaves the multiple of the smallest one in the last places.
template <int kMantissa, int kBias>
VLLM_INLINE uint8_t to_float8(float x) {
  constexpr int kShift = 23 - kMantissa;
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  if (magnitude < static_cast<uint32_t>(128 - kBias) << 23) {
    const uint32_t magic = static_cast<uint32_t>(128 - kBias + kShift) << 23;
    const float moved = bits_to_float(magnitude) + bits_to_float(magic);
    return static_cast<uint8_t>(sign | (float_to_bits(moved) - magic));
  }
  const uint32_t half = (1u << (kShift - 1)) - 1;
  const uint32_t rounded = magnitude + half + (magnitude >> kShift & 1u);
  return static_cast<uint8_t>(sign | ((rounded >> kShift) - ((127 - kBias) << kMantissa)));
}

VLLM_INLINE uint8_t to_e4m3(float x) { return to_float8<3, 7>(x); }
VLLM_INLINE uint8_t to_e5m2(float x) { return to_float8<2, 15>(x); }

// NaN where one of them is.
VLLM_INLINE float largest_magnitude(const float* x, int64_t size) {
  Vec most = zero(), poison = zero();
  for (int64_t i = 0; i < size; i += kLanes) {
    const int lanes = static_cast<int>(size - i < kLanes ? size - i : kLanes);
    const Vec v = load(x + i, lanes);
    most = max(max(v, sub(zero(), v)), most);
    poison = add(poison, mul(v, zero()));
  }
  const float sum = reduce_add(poison);
  return sum == sum ? reduce_max(most) : kNaN;
}

VLLM_INLINE float limited(float x, float most) { return x > most ? most : x < -most ? -most : x; }

VLLM_INLINE uint8_t to_e2m1(float x) {
  const float a = __builtin_fabsf(x);
  const int code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) +
                   (a >= 3.5f) + (a > 5.0f);
  return static_cast<uint8_t>(code | (float_to_bits(x) >> 31 << 3));
}

// How many bytes a side's data has.
VLLM_INLINE int64_t data_bytes(int format, int64_t size) {
  return format == kInt4PerHead || format == kNvfp4 ? size / 2 : size;
}

VLLM_INLINE void quantise_fp4(const float* x, int64_t size, float shared, uint8_t* data,
                              uint8_t* scales) {
  for (int64_t g = 0; g < size / kFp4Group; ++g) {
    const float* from = x + g * kFp4Group;
    scales[g] = to_e4m3(limited(largest_magnitude(from, kFp4Group) / 6.0f / shared, kLargestE4M3));
    const float step = kE4M3Values.values[scales[g]] * shared;
    for (int64_t j = 0; j < kFp4Group / 2; ++j) {
      const float low = step > 0 ? from[2 * j] / step : 0.0f;
      const float high = step > 0 ? from[2 * j + 1] / step : 0.0f;
      data[g * kFp4Group / 2 + j] = static_cast<uint8_t>(to_e2m1(low) | to_e2m1(high) << 4);
    }
  }
}

// One side of a (head, token): `size` floats to its data, and its scales where it has them, which
// are behind the data but for kNvfp4. `shared` is the layer's scale.
VLLM_INLINE void quantise_side(int format, const float* x, int64_t size, float shared,
                               uint8_t* data, uint8_t* scales) {
  switch (format) {
    case kE4M3:
      for (int64_t i = 0; i < size; ++i) data[i] = to_e4m3(limited(x[i] / shared, kLargestE4M3));
      return;
    case kE5M2:
      for (int64_t i = 0; i < size; ++i) data[i] = to_e5m2(limited(x[i] / shared, kLargestE5M2));
      return;
    case kNvfp4:
      return quantise_fp4(x, size, shared, data, scales);
    default:
      break;
  }
  const float largest = format == kInt8PerHead ? 127.0f : format == kInt4PerHead ? 7.0f : 448.0f;
  const float magnitude = largest_magnitude(x, size);
  const float own = (magnitude < kLeastMagnitude ? kLeastMagnitude : magnitude) / largest;
  memcpy(data + data_bytes(format, size), &own, sizeof(own));
  if (own != own) return memset(data, 0, data_bytes(format, size)), void();
  if (format == kInt8PerHead) {
    for (int64_t i = 0; i < size; ++i) {
      data[i] = static_cast<uint8_t>(static_cast<int8_t>(__builtin_floorf(x[i] / own + 0.5f)));
    }
  } else if (format == kInt4PerHead) {
    for (int64_t i = 0; i < size / 2; ++i) {
      const int low = static_cast<int>(__builtin_floorf(x[2 * i] / own + 0.5f)) + 8;
      const int high = static_cast<int>(__builtin_floorf(x[2 * i + 1] / own + 0.5f)) + 8;
      data[i] = static_cast<uint8_t>(low | high << 4);
    }
  } else {
    for (int64_t i = 0; i < size; ++i) data[i] = to_e4m3(x[i] / own);
  }
}

// The way back; `to` has room for `size` floats.
VLLM_INLINE void widen_side(int format, const uint8_t* data, const uint8_t* scales, int64_t size,
                            float shared, float* to) {
  float own = shared;
  if (format == kInt8PerHead || format == kE4M3PerHead || format == kInt4PerHead) {
    memcpy(&own, data + data_bytes(format, size), sizeof(own));
  }
  switch (format) {
    case kE5M2:
      for (int64_t i = 0; i < size; ++i) to[i] = kE5M2Values.values[data[i]] * own;
      return;
    case kInt8PerHead:
      for (int64_t i = 0; i < size; ++i) {
        to[i] = static_cast<float>(static_cast<int8_t>(data[i])) * own;
      }
      return;
    case kInt4PerHead:
      for (int64_t i = 0; i < size / 2; ++i) {
        to[2 * i] = static_cast<float>((data[i] & 15) - 8) * own;
        to[2 * i + 1] = static_cast<float>((data[i] >> 4) - 8) * own;
      }
      return;
    case kNvfp4:
      for (int64_t g = 0; g < size / kFp4Group; ++g) {
        const float step = kE4M3Values.values[scales[g]] * shared;
        for (int64_t i = g * kFp4Group / 2; i < (g + 1) * kFp4Group / 2; ++i) {
          to[2 * i] = kE2M1Values[data[i] & 15] * step;
          to[2 * i + 1] = kE2M1Values[data[i] >> 4] * step;
        }
      }
      return;
    default:
      for (int64_t i = 0; i < size; ++i) to[i] = kE4M3Values.values[data[i]] * own;
  }
}

}  // namespace
}  // namespace VLLM_ISA
}  // namespace vllm_cpu
