// Row-wise operators around the products: RMSNorm, gates of MLPs, argmax, RoPE with the store of keys
// and values. Small inputs are done by the calling thread: waking another costs more.
#include "gates.h"
#include "kv_formats.h"
#include "pool.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

// Elements below which a second thread does not pay (about 10 us of work).
constexpr int64_t kSerialElements = 32768;

template <typename Body>
void for_rows(int64_t rows, int64_t elements_per_row, const Body& body) {
  if (rows * elements_per_row < kSerialElements) {
    for (int64_t i = 0; i < rows; ++i) body(i);
    return;
  }
  const int64_t block = 1 + 8192 / (elements_per_row + 1);
  parallel_for((rows + block - 1) / block, [&](int64_t item) {
    const int64_t last = (item + 1) * block < rows ? (item + 1) * block : rows;
    for (int64_t i = item * block; i < last; ++i) body(i);
  });
}

// Calls body(offset, lanes) over [0, size).
template <typename Body>
VLLM_INLINE void for_lanes(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, static_cast<int>(size - i));
}

template <typename T, typename W>
void norm_row(const T* x, T* out, T* residual, const W* weight, int64_t size, float eps) {
  Vec sums[2] = {zero(), zero()};
  for_lanes(size, [&](int64_t i, int lanes) {
    Vec v = load(x + i, lanes);
    if (residual) {
      // The sum is rounded to T before it is used, as the residual stream that is kept is.
      store(residual + i, add(v, load(residual + i, lanes)), lanes);
      v = load(residual + i, lanes);
    }
    Vec& sum = sums[i / kLanes % 2];
    sum = fma(v, v, sum);
  });
  const float mean = reduce_add(add(sums[0], sums[1])) / static_cast<float>(size);
  const Vec factor = set1(1.0f / __builtin_sqrtf(mean + eps));
  const T* from = residual ? residual : x;
  for_lanes(size, [&](int64_t i, int lanes) {
    const Vec v = mul(load(from + i, lanes), factor);
    store(out + i, mul(v, load(weight + i, lanes)), lanes);
  });
}

template <typename T, typename W>
void norm_rows_by(const NormArgs& a) {
  for_rows(a.outer * a.inner, a.size, [&](int64_t row) {
    const int64_t o = row / a.inner, i = row % a.inner;
    T* residual = static_cast<T*>(a.residual);
    norm_row(static_cast<const T*>(a.x) + o * a.x_outer_stride + i * a.x_inner_stride,
             static_cast<T*>(a.out) + o * a.out_outer_stride + i * a.out_inner_stride,
             residual ? residual + o * a.residual_stride : nullptr,
             static_cast<const W*>(a.weight), a.size, a.eps);
  });
}

template <typename T>
void norm_rows(const NormArgs& a) {
  return a.float_weight ? norm_rows_by<T, float>(a) : norm_rows_by<T, T>(a);
}

void rms_norm(const NormArgs& a) {
  switch (a.dtype) {
    case kFloat32:
      return norm_rows<float>(a);
    case kFloat16:
      return norm_rows<f16>(a);
    default:
      return norm_rows<bf16>(a);
  }
}

// The sum with the residual is rounded to T first, as a tensor of its own would be.
template <typename T>
void layer_norm_rows(const LayerNormArgs& a) {
  for_rows(a.rows, a.size, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
    T* out = static_cast<T*>(a.out) + row * a.size;
    Vec total = zero(), squares = zero();
    for_lanes(a.size, [&](int64_t i, int lanes) {
      Vec v = load(x + i, lanes);
      if (a.residual) v = add(v, load(residual + i, lanes));
      store(out + i, v, lanes);
      total = add(total, load(out + i, lanes));
    });
    const float size = static_cast<float>(a.size);
    const Vec mean = set1(reduce_add(total) / size);
    for_lanes(a.size, [&](int64_t i, int lanes) {
      const Vec off = first_lanes(sub(load(out + i, lanes), mean), zero(), lanes);
      squares = fma(off, off, squares);
    });
    const Vec factor = set1(1.0f / __builtin_sqrtf(reduce_add(squares) / size + a.eps));
    for_lanes(a.size, [&](int64_t i, int lanes) {
      const Vec v = mul(sub(load(out + i, lanes), mean), factor);
      store(out + i, fma(v, load(weight + i, lanes), load(bias + i, lanes)), lanes);
    });
  });
}

void layer_norm(const LayerNormArgs& a) {
  switch (a.dtype) {
    case kFloat32:
      return layer_norm_rows<float>(a);
    case kFloat16:
      return layer_norm_rows<f16>(a);
    default:
      return layer_norm_rows<bf16>(a);
  }
}

template <typename T, typename Body>
void gated_rows(const SiluMulArgs& a, const Body& body) {
  for_rows(a.rows, a.size * 2, [&](int64_t row) {
    const T* gate = static_cast<const T*>(a.x) + row * a.x_stride;
    T* out = static_cast<T*>(a.out) + row * a.size;
    for_lanes(a.size, [&](int64_t i, int lanes) {
      store(out + i, body(load(gate + i, lanes), load(gate + a.size + i, lanes)), lanes);
    });
  });
}

template <typename T>
void silu_mul_rows(const SiluMulArgs& a) {
  with_gate(a.gate, a.alpha, a.limit, [&](const auto& gate) { gated_rows<T>(a, gate); });
}

void silu_mul(const SiluMulArgs& a) {
  switch (a.dtype) {
    case kFloat32:
      return silu_mul_rows<float>(a);
    case kFloat16:
      return silu_mul_rows<f16>(a);
    default:
      return silu_mul_rows<bf16>(a);
  }
}

// The first index of the largest value, a NaN counting as the largest; -1 where that is not finite.
template <typename T>
int64_t argmax_row(const T* x, int64_t size) {
  constexpr int64_t kRun = 1024;
  float best = -__builtin_inff();
  int64_t where = 0;
  for (int64_t first = 0; first < size; first += kRun) {
    const int64_t count = size - first < kRun ? size - first : kRun;
    Vec most = set1(-__builtin_inff());
    Vec total = zero();
    for_lanes(count, [&](int64_t i, int lanes) {
      const Vec low = set1(-__builtin_inff());
      const Vec v = first_lanes(load(x + first + i, lanes), low, lanes);
      most = max(most, v);
      total = add(total, mul(load(x + first + i, lanes), zero()));
    });
    // Infinity times zero is NaN as well, so a run with either is looked through one by one.
    const float sum = reduce_add(total);
    const float top = reduce_max(most);
    if (sum == sum && top <= best) continue;
    for (int64_t i = 0; i < count; ++i) {
      const float v = to_float(x[first + i]);
      if (v != v) return -1;
      if (v > best) {
        best = v;
        where = first + i;
      }
    }
  }
  return best - best == 0 ? where : -1;
}

void argmax(const ArgmaxArgs& a) {
  const auto row = [&](int64_t i) {
    switch (a.dtype) {
      case kFloat32:
        a.out[i] = argmax_row(static_cast<const float*>(a.x) + i * a.x_stride, a.size);
        break;
      case kFloat16:
        a.out[i] = argmax_row(static_cast<const f16*>(a.x) + i * a.x_stride, a.size);
        break;
      default:
        a.out[i] = argmax_row(static_cast<const bf16*>(a.x) + i * a.x_stride, a.size);
    }
  };
  for_rows(a.rows, a.size, row);
}

// `cos` and `sin` are floats by now. `to` may be `from`, or of another type.
template <typename T, typename To>
void rotate_head(const T* from, To* to, const float* cos, const float* sin, int64_t rotary_dim,
                 bool is_neox) {
  const int64_t half = rotary_dim / 2;
  if (is_neox) {
    for_lanes(half, [&](int64_t i, int lanes) {
      const Vec x = load(from + i, lanes), y = load(from + half + i, lanes);
      const Vec c = load(cos + i, lanes), s = load(sin + i, lanes);
      store(to + i, sub(mul(x, c), mul(y, s)), lanes);
      store(to + half + i, fma(y, c, mul(x, s)), lanes);
    });
    return;
  }
  for (int64_t i = 0; i < half; ++i) {
    const float x = to_float(from[2 * i]), y = to_float(from[2 * i + 1]);
    to[2 * i] = from_float<To>(x * cos[i] - y * sin[i]);
    to[2 * i + 1] = from_float<To>(y * cos[i] + x * sin[i]);
  }
}

template <typename T, typename To>
void copy_head(const T* from, To* to, int64_t size) {
  for_lanes(size, [&](int64_t i, int lanes) { store(to + i, load(from + i, lanes), lanes); });
}

template <typename T, typename C>
void rope_store_tokens(const RopeStoreArgs& a) {
  // Rotary dims are at most a head, and heads at most 256 in the attention kernels; RoPE alone
  // takes larger ones through the same buffer.
  constexpr int64_t kMaxRotary = 1024;
  const int64_t half = a.rotary_dim / 2;
  const int64_t per_token = (a.num_heads + 2 * a.num_kv_heads) * a.head_size;
  for_rows(a.num_tokens, per_token, [&](int64_t t) {
    float table[kMaxRotary];
    if (a.positions) {
      const int64_t at = a.positions[t] * a.cos_sin_stride;
      for_lanes(a.rotary_dim, [&](int64_t i, int lanes) {
        Vec v;
        if (a.cos_sin_dtype == kFloat32) {
          v = load(static_cast<const float*>(a.cos_sin) + at + i, lanes);
        } else if (a.cos_sin_dtype == kBFloat16) {
          v = load(static_cast<const bf16*>(a.cos_sin) + at + i, lanes);
        } else {
          v = load(static_cast<const f16*>(a.cos_sin) + at + i, lanes);
        }
        store(table + i, v, lanes);
      });
      for (int64_t h = 0; h < a.num_heads; ++h) {
        T* q = static_cast<T*>(a.query) + t * a.query_token_stride + h * a.query_head_stride;
        rotate_head(q, q, table, table + half, a.rotary_dim, a.is_neox);
      }
    }
    const int64_t slot = a.cache && t < a.num_slots ? a.slots[t] : -1;
    if (a.cache && slot < 0) return;
    for (int64_t h = 0; h < a.num_kv_heads; ++h) {
      T* key = static_cast<T*>(a.key) + t * a.key_token_stride + h * a.key_head_stride;
      if (!a.cache) {
        rotate_head(key, key, table, table + half, a.rotary_dim, a.is_neox);
        continue;
      }
      const T* value =
          static_cast<const T*>(a.value) + t * a.value_token_stride + h * a.value_head_stride;
      C* to = static_cast<C*>(a.cache) + slot / a.block_size * a.cache_block_stride +
              h * a.cache_head_stride + slot % a.block_size * a.cache_token_stride;
      const auto rotated_to = [&](auto* out) {
        if (a.positions) {
          rotate_head(key, out, table, table + half, a.rotary_dim, a.is_neox);
          copy_head(key + a.rotary_dim, out + a.rotary_dim, a.head_size - a.rotary_dim);
        } else {
          copy_head(key, out, a.head_size);
        }
      };
      if constexpr (sizeof(C) == 1) {
        float wide[kMaxRotary];
        const QuantisedCache& q = a.quantised;
        uint8_t* const scales = static_cast<uint8_t*>(a.cache) +
                                slot / a.block_size * a.cache_block_stride + q.scale_offset +
                                h * q.scale_head_stride +
                                slot % a.block_size * q.scale_token_stride;
        rotated_to(wide);
        quantise_side(q.format, wide, a.head_size, q.k_scale, to, scales);
        copy_head(value, wide, a.head_size);
        quantise_side(q.format, wide, a.head_size, q.v_scale, to + q.value_offset,
                      scales + q.value_offset);
      } else {
        rotated_to(to);
        copy_head(value, to + a.head_size, a.head_size);
      }
    }
  });
}

template <typename T>
void rope_store_to(const RopeStoreArgs& a) {
  if (a.quantised.format != kPlainCache) return rope_store_tokens<T, uint8_t>(a);
  switch (a.cache_dtype) {
    case kFloat32:
      return rope_store_tokens<T, float>(a);
    case kFloat16:
      return rope_store_tokens<T, f16>(a);
    default:
      return rope_store_tokens<T, bf16>(a);
  }
}

void rope_store(const RopeStoreArgs& a) {
  switch (a.dtype) {
    case kFloat32:
      return rope_store_to<float>(a);
    case kFloat16:
      return rope_store_to<f16>(a);
    default:
      return rope_store_to<bf16>(a);
  }
}

}  // namespace

void fill_elementwise(Kernels& kernels) {
  kernels.rms_norm = rms_norm;
  kernels.silu_mul = silu_mul;
  kernels.layer_norm = layer_norm;
  kernels.argmax = argmax;
  kernels.rope_store = rope_store;
}

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
