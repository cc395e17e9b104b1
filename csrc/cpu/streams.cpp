// Several residual streams beside one branch (manifold-constrained hyper-connections): the weights
// with which a branch takes and gives, and the mix of the streams, which is brought near to a doubly
// stochastic matrix (Sinkhorn and Knopp). Sums are in float.
#include "pool.h"
#include "vec.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

constexpr int64_t kTokens = 4;  // that share a reading of `fn`
// Numbers below which a second thread does not pay.
constexpr int64_t kSerialNumbers = 32768;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename Body>
void for_tokens(int64_t items, int64_t numbers, const Body& body) {
  if (numbers < kSerialNumbers) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  parallel_for(items, body);
}

VLLM_INLINE float sigmoid(float x) { return 1.0f / (1.0f + __builtin_expf(-x)); }

// Divides rows (stride 1) or columns of a (count, count) matrix by their sums.
void divide_by_sums(float* mix, int64_t count, int64_t line, int64_t step, float eps) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = eps;
    for (int64_t j = 0; j < count; ++j) sum += mix[i * line + j * step];
    const float factor = 1.0f / sum;
    for (int64_t j = 0; j < count; ++j) mix[i * line + j * step] *= factor;
  }
}

void softmax(float* x, int64_t count) {
  float most = x[0], sum = 0;
  for (int64_t i = 1; i < count; ++i) most = x[i] > most ? x[i] : most;
  for (int64_t i = 0; i < count; ++i) sum += x[i] = __builtin_expf(x[i] - most);
  for (int64_t i = 0; i < count; ++i) x[i] /= sum;
}

// The products of `tokens` <= kTokens tokens with fn, each over its root mean square.
template <typename T>
void products(const StreamsArgs& a, int64_t first, int64_t tokens, float* wide, float* sums) {
  const int64_t width = a.count * a.size, rows = a.count * (2 + a.count);
  float factors[kTokens];
  for (int64_t t = 0; t < tokens; ++t) {
    Vec squares = zero();
    for (int64_t n = 0; n < a.count; ++n) {
      const T* from = static_cast<const T*>(a.streams) + (first + t) * a.token_stride +
                      n * a.stream_stride;
      float* to = wide + t * width + n * a.size;
      for (int64_t i = 0; i < a.size; i += kLanes) {
        const int lanes = static_cast<int>(smaller(kLanes, a.size - i));
        const Vec v = load(from + i, lanes);
        store(to + i, v, lanes);
        squares = fma(v, v, squares);
      }
    }
    const float mean = reduce_add(squares) / static_cast<float>(width);
    factors[t] = 1.0f / __builtin_sqrtf(mean + a.norm_eps);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* weight = a.fn + r * width;
    Vec total[kTokens];
    for (int64_t t = 0; t < kTokens; ++t) total[t] = zero();
    for (int64_t i = 0; i < width; i += kLanes) {
      const int lanes = static_cast<int>(smaller(kLanes, width - i));
      const Vec w = load(weight + i, lanes);
      for (int64_t t = 0; t < tokens; ++t) {
        total[t] = fma(w, load(wide + t * width + i, lanes), total[t]);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) sums[t * rows + r] = reduce_add(total[t]) * factors[t];
  }
}

template <typename T>
void finish_token(const StreamsArgs& a, int64_t token, const float* wide, float* sums) {
  const int64_t count = a.count;
  float *taken = sums, *given = a.given + token * count, *mix = a.mix + token * count * count;
  for (int64_t i = 0; i < count; ++i) {
    taken[i] = sigmoid(sums[i] * a.scale[0] + a.base[i]) + a.eps;
    given[i] = 2.0f * sigmoid(sums[count + i] * a.scale[1] + a.base[count + i]);
  }
  for (int64_t i = 0; i < count * count; ++i) {
    mix[i] = sums[2 * count + i] * a.scale[2] + a.base[2 * count + i];
  }
  for (int64_t i = 0; i < count; ++i) softmax(mix + i * count, count);
  for (int64_t i = 0; i < count * count; ++i) mix[i] += a.eps;
  divide_by_sums(mix, count, 1, count, a.eps);
  for (int64_t i = 1; i < a.iterations; ++i) {
    divide_by_sums(mix, count, count, 1, a.eps);
    divide_by_sums(mix, count, 1, count, a.eps);
  }
  T* branch = static_cast<T*>(a.branch) + token * a.size;
  for (int64_t i = 0; i < a.size; i += kLanes) {
    const int lanes = static_cast<int>(smaller(kLanes, a.size - i));
    Vec sum = zero();
    for (int64_t n = 0; n < count; ++n) {
      sum = fma(set1(taken[n]), load(wide + n * a.size + i, lanes), sum);
    }
    store(branch + i, sum, lanes);
  }
}

template <typename T>
void streams_of(const StreamsArgs& a) {
  const int64_t width = a.count * a.size, rows = a.count * (2 + a.count);
  const int64_t items = (a.num_tokens + kTokens - 1) / kTokens;
  for_tokens(items, a.num_tokens * width, [&](int64_t item) {
    const int64_t first = item * kTokens, tokens = smaller(kTokens, a.num_tokens - first);
    float* wide = static_cast<float*>(
        thread_scratch(sizeof(float) * static_cast<size_t>(kTokens * (width + rows))));
    float* sums = wide + kTokens * width;
    products<T>(a, first, tokens, wide, sums);
    for (int64_t t = 0; t < tokens; ++t) {
      finish_token<T>(a, first + t, wide + t * width, sums + t * rows);
    }
  });
}

void streams(const StreamsArgs& a) {
  switch (a.dtype) {
    case kFloat32:
      return streams_of<float>(a);
    case kFloat16:
      return streams_of<f16>(a);
    default:
      return streams_of<bf16>(a);
  }
}

// Weights are rounded to T, as the streams are that they multiply.
template <typename T>
void join_rows(const JoinArgs& a) {
  for_tokens(a.num_tokens, a.num_tokens * a.count * a.size, [&](int64_t token) {
    const T* branch = static_cast<const T*>(a.branch) + token * a.branch_stride;
    const T* from = static_cast<const T*>(a.streams) + token * a.token_stride;
    const float *given = a.given + token * a.count, *mix = a.mix + token * a.count * a.count;
    for (int64_t n = 0; n < a.count; ++n) {
      T* out = static_cast<T*>(a.out) + (token * a.count + n) * a.size;
      const Vec weight = set1(to_float(from_float<T>(given[n])));
      for (int64_t i = 0; i < a.size; i += kLanes) {
        const int lanes = static_cast<int>(smaller(kLanes, a.size - i));
        Vec sum = mul(weight, load(branch + i, lanes));
        for (int64_t m = 0; m < a.count; ++m) {
          const Vec part = set1(to_float(from_float<T>(mix[m * a.count + n])));
          sum = fma(part, load(from + m * a.stream_stride + i, lanes), sum);
        }
        store(out + i, sum, lanes);
      }
    }
  });
}

void join_streams(const JoinArgs& a) {
  switch (a.dtype) {
    case kFloat32:
      return join_rows<float>(a);
    case kFloat16:
      return join_rows<f16>(a);
    default:
      return join_rows<bf16>(a);
  }
}

}  // namespace

void fill_streams(Kernels& kernels) {
  kernels.streams = streams;
  kernels.join_streams = join_streams;
}

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
