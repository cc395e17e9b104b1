// Operators on states that lie in blocks of a cache: the causal convolution, the scans of Mamba 1
// and 2, and the gated norm behind the latter. Sums are in float; every address comes from strides.
//
// A request's tokens lie together and are cut into segments; the state after each is kept in a
// block. A thread takes one request and a range of its channels or heads from the first token to
// the last, so nothing but the caller's inputs is shared.
#include "pool.h"
#include "vec.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

constexpr int64_t kMaxSteps = 15;  // rows that a convolution looks back
constexpr int64_t kTile = 64;      // channels of a convolution that a thread takes at once
constexpr int64_t kRun = 32;       // tokens whose inputs are widened at once
constexpr int64_t kMaxStates = 256;

// Work below which a second thread does not pay, in multiplications.
constexpr int64_t kSerialWork = 65536;

template <typename Body>
void for_items(int64_t items, int64_t work, const Body& body) {
  if (work < kSerialWork) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  parallel_for(items, body);
}

template <typename T>
VLLM_INLINE void widen(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)),
                       static_cast<int>(count - i));
}

template <typename T>
VLLM_INLINE void narrow(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)),
                       static_cast<int>(count - i));
}

// ---- convolution -----------------------------------------------------------------------------

// Rows of the state as floats, past[step * kTile + channel].
template <typename S>
void read_past(const ConvArgs& a, int64_t block, int64_t first, int64_t count, float* past) {
  const int64_t steps = a.kernel - 1;
  if (block < 0) {
    memset(past, 0, sizeof(float) * static_cast<size_t>(steps * kTile));
    return;
  }
  const S* state = static_cast<const S*>(a.state) + block * a.state_block_stride +
                   first * a.state_channel_stride;
  for (int64_t s = 0; s < steps; ++s) {
    const S* row = state + s * a.state_step_stride;
    if (a.state_channel_stride == 1) {
      widen(row, past + s * kTile, count);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        past[s * kTile + i] = to_float(row[i * a.state_channel_stride]);
      }
    }
  }
}

template <typename T, typename S>
void conv_items(const ConvArgs& a) {
  const int64_t tiles = (a.channels + kTile - 1) / kTile, steps = a.kernel - 1;
  for_items(a.num_requests * tiles, a.num_tokens * a.channels * 8, [&](int64_t item) {
    const int64_t request = item / tiles, first = item % tiles * kTile;
    const int64_t count = a.channels - first < kTile ? a.channels - first : kTile;
    const int64_t begin = a.request_starts[request], end = a.request_starts[request + 1];
    const int64_t start = a.token_starts[begin];
    const T* x = static_cast<const T*>(a.x) + start * a.x_stride + first;
    T* out = static_cast<T*>(a.out) + start * a.channels + first;
    float past[kMaxSteps * kTile];
    read_past<S>(a, a.sources[request], first, count, past);
    const int64_t tokens = a.token_starts[end] - start;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
        Vec sum = a.bias ? load(a.bias + first + i, lanes) : zero();
        for (int64_t k = 0; k < a.kernel; ++k) {
          const int64_t row = t - steps + k;
          const Vec v = row < 0 ? load(past + (row + steps) * kTile + i, lanes)
                                : load(x + row * a.x_stride + i, lanes);
          sum = fma(load(a.weight + k * a.channels + first + i, lanes), v, sum);
        }
        store(out + t * a.channels + i, a.silu ? silu(sum) : sum, lanes);
      }
    }
    for (int64_t segment = begin; segment < end; ++segment) {
      const int64_t last = a.token_starts[segment + 1] - start;
      S* state = static_cast<S*>(a.state) + a.targets[segment] * a.state_block_stride +
                 first * a.state_channel_stride;
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t row = last - steps + s;
        float values[kTile];
        if (row < 0) {
          memcpy(values, past + (row + steps) * kTile, sizeof(values));
        } else {
          widen(x + row * a.x_stride, values, count);
        }
        S* to = state + s * a.state_step_stride;
        if (a.state_channel_stride == 1) {
          narrow(values, to, count);
        } else {
          for (int64_t i = 0; i < count; ++i) {
            to[i * a.state_channel_stride] = from_float<S>(values[i]);
          }
        }
      }
    }
  });
}

// ---- Mamba 1 ---------------------------------------------------------------------------------

// The lanes are channels: a state is states[n * kLanes + lane] here.
template <typename T, typename S>
void scan_lanes(const ScanArgs& a, int64_t request, int64_t first, int lanes) {
  const int64_t size = a.state_size;
  float states[kMaxStates * kLanes], rates[kMaxStates * kLanes];
  const int64_t source = a.sources[request];
  const S* from = static_cast<const S*>(a.state) + source * a.state_block_stride + first * size;
  for (int64_t n = 0; n < size; ++n) {
    for (int i = 0; i < kLanes; ++i) {
      const bool known = source >= 0 && i < lanes;
      states[n * kLanes + i] = known ? to_float(from[i * size + n]) : 0.0f;
      rates[n * kLanes + i] = i < lanes ? a.a[(first + i) * size + n] : 0.0f;
    }
  }
  const Vec skip = load(a.d + first, lanes);
  const Vec offset = a.dt_bias ? load(a.dt_bias + first, lanes) : zero();
  const int64_t begin = a.request_starts[request], end = a.request_starts[request + 1];
  float b[kMaxStates], c[kMaxStates];
  for (int64_t segment = begin; segment < end; ++segment) {
    for (int64_t t = a.token_starts[segment]; t < a.token_starts[segment + 1]; ++t) {
      const Vec x = load(static_cast<const T*>(a.x) + t * a.x_stride + first, lanes);
      const Vec raw = load(static_cast<const T*>(a.dt) + t * a.dt_stride + first, lanes);
      const Vec dt = softplus(add(raw, offset));
      const Vec input = mul(dt, x);
      widen(static_cast<const T*>(a.b) + t * a.b_stride, b, size);
      widen(static_cast<const T*>(a.c) + t * a.c_stride, c, size);
      Vec sum = mul(skip, x);
      for (int64_t n = 0; n < size; ++n) {
        const Vec decay = exp(mul(dt, load(rates + n * kLanes)));
        const Vec h = fma(load(states + n * kLanes), decay, mul(input, set1(b[n])));
        store(states + n * kLanes, h);
        sum = fma(h, set1(c[n]), sum);
      }
      if (a.z) {
        sum = mul(sum, silu(load(static_cast<const T*>(a.z) + t * a.z_stride + first, lanes)));
      }
      store(static_cast<T*>(a.out) + t * a.channels + first, sum, lanes);
    }
    S* to = static_cast<S*>(a.state) + a.targets[segment] * a.state_block_stride + first * size;
    for (int i = 0; i < lanes; ++i) {
      for (int64_t n = 0; n < size; ++n) to[i * size + n] = from_float<S>(states[n * kLanes + i]);
    }
  }
}

// One token of `count` <= kTile channels. The lanes are numbers of a channel's state, which is read
// and written where it lies.
template <typename T, typename S>
void scan_one(const ScanArgs& a, int64_t request, int64_t first, int64_t count) {
  const int64_t size = a.state_size, begin = a.request_starts[request];
  const int64_t t = a.token_starts[begin], source = a.sources[request];
  float steps[kTile], inputs[kTile], sums[kTile];
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    const Vec x = load(static_cast<const T*>(a.x) + t * a.x_stride + first + i, lanes);
    const Vec raw = load(static_cast<const T*>(a.dt) + t * a.dt_stride + first + i, lanes);
    const Vec dt = softplus(a.dt_bias ? add(raw, load(a.dt_bias + first + i, lanes)) : raw);
    store(steps + i, dt, lanes);
    store(inputs + i, mul(dt, x), lanes);
    store(sums + i, mul(load(a.d + first + i, lanes), x), lanes);
  }
  float b[kMaxStates + kLanes] = {}, c[kMaxStates + kLanes] = {};
  widen(static_cast<const T*>(a.b) + t * a.b_stride, b, size);
  widen(static_cast<const T*>(a.c) + t * a.c_stride, c, size);
  const S* from = static_cast<const S*>(a.state) + source * a.state_block_stride + first * size;
  S* to = static_cast<S*>(a.state) + a.targets[begin] * a.state_block_stride + first * size;
  const float* rates = a.a + first * size;
  for (int64_t i = 0; i < count; ++i) {
    const Vec dt = set1(steps[i]), input = set1(inputs[i]);
    Vec sum = zero();
    for (int64_t n = 0; n < size; n += kLanes) {
      const int lanes = static_cast<int>(size - n < kLanes ? size - n : kLanes);
      const Vec before = source < 0 ? zero() : load(from + i * size + n, lanes);
      const Vec decay = exp(mul(dt, load(rates + i * size + n, lanes)));
      const Vec h = fma(before, decay, mul(input, load(b + n)));
      store(to + i * size + n, h, lanes);
      sum = fma(h, load(c + n), sum);
    }
    sums[i] += reduce_add(sum);
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    Vec sum = load(sums + i, lanes);
    if (a.z) {
      const T* z = static_cast<const T*>(a.z) + t * a.z_stride + first + i;
      sum = mul(sum, silu(load(z, lanes)));
    }
    store(static_cast<T*>(a.out) + t * a.channels + first + i, sum, lanes);
  }
}

template <typename T, typename S>
void scan_items(const ScanArgs& a) {
  const int64_t width = a.num_tokens == a.num_requests ? kTile : kLanes;
  const int64_t parts = (a.channels + width - 1) / width;
  const int64_t work = a.num_tokens * a.channels * a.state_size * 8;
  for_items(a.num_requests * parts, work, [&](int64_t item) {
    const int64_t request = item / parts, first = item % parts * width;
    const int64_t count = a.channels - first < width ? a.channels - first : width;
    const int64_t begin = a.request_starts[request], end = a.request_starts[request + 1];
    if (a.token_starts[end] - a.token_starts[begin] == 1) {
      scan_one<T, S>(a, request, first, count);
    } else {
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t lanes = count - i < kLanes ? count - i : kLanes;
        scan_lanes<T, S>(a, request, first + i, static_cast<int>(lanes));
      }
    }
  });
}

// ---- Mamba 2 ---------------------------------------------------------------------------------

// What all rows of a head share for a few tokens.
struct SsdRun {
  float decay[kRun], step[kRun];
  // kRun rows of `width`, a whole number of vectors: zeros after the state's own size.
  float *b, *c;
  int64_t width;
};

// Rows of a state go through `count` tokens in registers, kVecs vectors of it at a time.
template <int kVecs>
VLLM_INLINE void ssd_row_part(const SsdRun& run, const float* x, float* y, int64_t count,
                              float* row, int64_t at) {
  Vec h[kVecs];
  for (int v = 0; v < kVecs; ++v) h[v] = load(row + at + v * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    const Vec decay = set1(run.decay[t]), input = set1(x[t]);
    const float* b = run.b + t * run.width + at;
    const float* c = run.c + t * run.width + at;
    Vec sum = zero();
    for (int v = 0; v < kVecs; ++v) {
      h[v] = fma(h[v], decay, mul(input, load(b + v * kLanes)));
      sum = fma(h[v], load(c + v * kLanes), sum);
    }
    y[t] += reduce_add(sum);
  }
  for (int v = 0; v < kVecs; ++v) store(row + at + v * kLanes, h[v]);
}

VLLM_INLINE void ssd_row(const SsdRun& run, const float* x, float* y, int64_t count, float* row) {
  int64_t at = 0;
  for (; at + 8 * kLanes <= run.width; at += 8 * kLanes) {
    ssd_row_part<8>(run, x, y, count, row, at);
  }
  for (; at + 2 * kLanes <= run.width; at += 2 * kLanes) {
    ssd_row_part<2>(run, x, y, count, row, at);
  }
  if (at < run.width) ssd_row_part<1>(run, x, y, count, row, at);
}

template <typename T>
void ssd_prepare(const SsdArgs& a, int64_t head, int64_t group, int64_t first, int64_t count,
                 SsdRun& run) {
  for (int64_t t = 0; t < count; t += kLanes) {
    const int lanes = static_cast<int>(count - t < kLanes ? count - t : kLanes);
    float raw[kLanes] = {};
    for (int i = 0; i < lanes; ++i) {
      raw[i] = to_float(static_cast<const T*>(a.dt)[(first + t + i) * a.dt_stride + head]);
    }
    Vec dt = softplus(add(load(raw), set1(a.dt_bias[head])));
    dt = max(min(dt, set1(a.dt_max)), set1(a.dt_min));
    store(run.step + t, dt, lanes);
    store(run.decay + t, exp(mul(dt, set1(a.a[head]))), lanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    widen(static_cast<const T*>(a.b) + (first + t) * a.b_stride + group * a.state_size,
          run.b + t * run.width, a.state_size);
    widen(static_cast<const T*>(a.c) + (first + t) * a.c_stride + group * a.state_size,
          run.c + t * run.width, a.state_size);
  }
}

// One token of rows of a head: the state is read and written where it lies.
template <typename T, typename S>
void ssd_one(const SsdArgs& a, int64_t request, int64_t head, int64_t first_row, int64_t rows) {
  const int64_t size = a.state_size, group = head / (a.num_heads / a.num_groups);
  SsdRun run;
  run.width = (size + kLanes - 1) / kLanes * kLanes;
  run.b = static_cast<float*>(thread_scratch(2 * sizeof(float) * static_cast<size_t>(run.width)));
  run.c = run.b + run.width;
  memset(run.b + run.width - kLanes, 0, sizeof(float) * kLanes);
  memset(run.c + run.width - kLanes, 0, sizeof(float) * kLanes);
  const int64_t begin = a.request_starts[request], t = a.token_starts[begin];
  const int64_t source = a.sources[request];
  ssd_prepare<T>(a, head, group, t, 1, run);
  const int64_t column = head * a.head_dim + first_row;
  const T* x = static_cast<const T*>(a.x) + t * a.x_stride + column;
  T* out = static_cast<T*>(a.out) + t * a.num_heads * a.head_dim + column;
  const S* from = static_cast<const S*>(a.state) + source * a.state_block_stride + column * size;
  S* to = static_cast<S*>(a.state) + a.targets[begin] * a.state_block_stride + column * size;
  const Vec decay = set1(run.decay[0]);
  for (int64_t p = 0; p < rows; ++p) {
    const float value = to_float(x[p]);
    const Vec input = set1(run.step[0] * value);
    Vec sum = zero();
    for (int64_t n = 0; n < size; n += kLanes) {
      const int lanes = static_cast<int>(size - n < kLanes ? size - n : kLanes);
      const Vec before = source < 0 ? zero() : load(from + p * size + n, lanes);
      const Vec h = fma(before, decay, mul(input, load(run.b + n)));
      store(to + p * size + n, h, lanes);
      sum = fma(h, load(run.c + n), sum);
    }
    out[p] = from_float<T>(a.d[head] * value + reduce_add(sum));
  }
}

// Rows [first_row, first_row + rows) of one head of one request.
template <typename T, typename S>
void ssd_rows(const SsdArgs& a, int64_t request, int64_t head, int64_t first_row, int64_t rows) {
  const int64_t size = a.state_size, group = head / (a.num_heads / a.num_groups);
  SsdRun run;
  run.width = (size + kLanes - 1) / kLanes * kLanes;
  const int64_t begin = a.request_starts[request], end = a.request_starts[request + 1];
  const int64_t tokens = a.token_starts[end] - a.token_starts[begin];
  if (tokens == 1) return ssd_one<T, S>(a, request, head, first_row, rows);
  const int64_t longest = tokens < kRun ? tokens : kRun;
  const int64_t inputs = 2 * longest * run.width, all = inputs + rows * run.width;
  float* scratch = static_cast<float*>(thread_scratch(sizeof(float) * static_cast<size_t>(all)));
  memset(scratch, 0, sizeof(float) * static_cast<size_t>(all));
  run.b = scratch;
  run.c = scratch + longest * run.width;
  float* states = scratch + inputs;
  const int64_t offset = (head * a.head_dim + first_row) * size;
  if (a.sources[request] >= 0) {
    const S* from = static_cast<const S*>(a.state) +
                    a.sources[request] * a.state_block_stride + offset;
    for (int64_t p = 0; p < rows; ++p) widen(from + p * size, states + p * run.width, size);
  }
  const int64_t column = head * a.head_dim + first_row;
  for (int64_t segment = begin; segment < end; ++segment) {
    const int64_t last = a.token_starts[segment + 1];
    for (int64_t t = a.token_starts[segment]; t < last; t += kRun) {
      const int64_t count = last - t < kRun ? last - t : kRun;
      ssd_prepare<T>(a, head, group, t, count, run);
      for (int64_t p = 0; p < rows; ++p) {
        const T* x = static_cast<const T*>(a.x) + t * a.x_stride + column + p;
        T* out = static_cast<T*>(a.out) + t * a.num_heads * a.head_dim + column + p;
        float input[kRun], y[kRun];
        for (int64_t i = 0; i < count; ++i) {
          const float value = to_float(x[i * a.x_stride]);
          input[i] = run.step[i] * value;
          y[i] = a.d[head] * value;
        }
        ssd_row(run, input, y, count, states + p * run.width);
        for (int64_t i = 0; i < count; ++i) {
          out[i * a.num_heads * a.head_dim] = from_float<T>(y[i]);
        }
      }
    }
    S* to = static_cast<S*>(a.state) + a.targets[segment] * a.state_block_stride + offset;
    for (int64_t p = 0; p < rows; ++p) narrow(states + p * run.width, to + p * size, size);
  }
}

template <typename T, typename S>
void ssd_items(const SsdArgs& a) {
  // Few heads are cut further, so that the threads share them evenly.
  const int64_t parts = a.num_requests * a.num_heads < 8 * num_threads() && a.head_dim >= 16 ? 4 : 1;
  const int64_t rows = (a.head_dim + parts - 1) / parts;
  const int64_t work = a.num_tokens * a.num_heads * a.head_dim * a.state_size;
  for_items(a.num_requests * a.num_heads * parts, work, [&](int64_t item) {
    const int64_t first = item % parts * rows, head = item / parts % a.num_heads;
    const int64_t left = a.head_dim - first;
    if (left > 0) {
      ssd_rows<T, S>(a, item / parts / a.num_heads, head, first, left < rows ? left : rows);
    }
  });
}

// ---- the norm --------------------------------------------------------------------------------

template <typename T>
void gated_norm_rows(const GatedNormArgs& a) {
  const int64_t size = a.size / a.num_groups;
  for_items(a.rows * a.num_groups, a.rows * a.size * 8, [&](int64_t item) {
    const int64_t row = item / a.num_groups, first = item % a.num_groups * size;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride + first;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
    T* out = static_cast<T*>(a.out) + row * a.size + first;
    float* values =
        static_cast<float*>(thread_scratch(sizeof(float) * static_cast<size_t>(size + kLanes)));
    Vec sum = zero();
    for (int64_t i = 0; i < size; i += kLanes) {
      const int lanes = static_cast<int>(size - i < kLanes ? size - i : kLanes);
      Vec v = load(x + i, lanes);
      if (!a.norm_before_gate) v = mul(v, silu(load(gate + i, lanes)));
      store(values + i, v, lanes);
      sum = fma(v, v, sum);
    }
    const float mean = reduce_add(sum) / static_cast<float>(size);
    const Vec factor = set1(1.0f / __builtin_sqrtf(mean + a.eps));
    for (int64_t i = 0; i < size; i += kLanes) {
      const int lanes = static_cast<int>(size - i < kLanes ? size - i : kLanes);
      Vec v = mul(mul(load(values + i, lanes), factor), load(a.weight + first + i, lanes));
      if (a.norm_before_gate) v = mul(v, silu(load(gate + i, lanes)));
      store(out + i, v, lanes);
    }
  });
}

// ---- dtypes ----------------------------------------------------------------------------------

#define VLLM_STATE_OP(name, Args, items)                                   \
  template <typename T>                                                    \
  void name##_of(const Args& a) {                                          \
    switch (a.state_dtype) {                                               \
      case kFloat32:                                                       \
        return items<T, float>(a);                                         \
      case kFloat16:                                                       \
        return items<T, f16>(a);                                           \
      default:                                                             \
        return items<T, bf16>(a);                                          \
    }                                                                      \
  }                                                                        \
  void name(const Args& a) {                                               \
    switch (a.dtype) {                                                     \
      case kFloat32:                                                       \
        return name##_of<float>(a);                                        \
      case kFloat16:                                                       \
        return name##_of<f16>(a);                                          \
      default:                                                             \
        return name##_of<bf16>(a);                                         \
    }                                                                      \
  }

VLLM_STATE_OP(causal_conv1d, ConvArgs, conv_items)
VLLM_STATE_OP(selective_scan, ScanArgs, scan_items)
VLLM_STATE_OP(ssd_scan, SsdArgs, ssd_items)
#undef VLLM_STATE_OP

void gated_rms_norm(const GatedNormArgs& a) {
  switch (a.dtype) {
    case kFloat32:
      return gated_norm_rows<float>(a);
    case kFloat16:
      return gated_norm_rows<f16>(a);
    default:
      return gated_norm_rows<bf16>(a);
  }
}

}  // namespace

void fill_state(Kernels& kernels) {
  kernels.causal_conv1d = causal_conv1d;
  kernels.selective_scan = selective_scan;
  kernels.ssd_scan = ssd_scan;
  kernels.gated_rms_norm = gated_rms_norm;
}

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
