// Attention whose memory is one matrix a head: gated delta rule, Kimi's with a gate for each number
// of a key, and lightning attention.
//
// The state S (Dv, Dk) of a head decays with every token, then takes up the token's value at its
// key; the query reads it:
//   S = exp(g) * S;  S += beta * (v - S k) k^T   (delta rule), or  S += v k^T;   out = S q
// A task is one head of one request, which it takes from the state that is read to the state that
// is written. One new token is computed where the state lies. For more, the state is turned so that
// values lie side by side, and a panel of it stays in the first cache for a run of tokens.
#include "pool.h"
#include "vec.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

constexpr int64_t kRun = 32;             // tokens whose keys and queries are prepared together
constexpr int kValues = 2 * kLanes;      // values of a panel
constexpr int kRows = 4;                 // rows of a state that are read together
constexpr float kNormEps = 1e-6f;
// Numbers of states below which a second thread does not pay (about 10 us of work).
constexpr int64_t kSerialNumbers = 32768;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

VLLM_INLINE float exp1(float x) {
  float lanes[kLanes];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

VLLM_INLINE float sigmoid1(float x) { return 1.0f / (1.0f + exp1(-x)); }

// log(1 + e^x); beyond 20 it is x to the last bit.
VLLM_INLINE float softplus1(float x) { return x > 20.0f ? x : __builtin_log1pf(exp1(x)); }

int64_t num_panels(const LinearAttentionArgs& a) { return (a.value_size + kValues - 1) / kValues; }

template <typename T>
VLLM_INLINE T* at(const void* base, int64_t offset) {
  return static_cast<T*>(const_cast<void*>(base)) + offset;
}

// What is left of the tokens of a run once decay, norms and scale are in them.
struct Token {
  float decay, beta;
  float dot;  // of key and query
};

struct Scratch {
  float* state;     // [Dv / kValues][Dk][kValues]
  float* keys;      // [kRun][Dk], as they are stored
  float* seen;      // [kRun][Dk], keys times decay: what they find in the state before it decays
  float* queries;   // [kRun][Dk], likewise
  float* decays;    // [1 + kRun][Dk], ones and then each token's, where they differ by number
  Token* tokens;    // [kRun]
};

struct Head {
  const LinearAttentionArgs& a;
  int64_t head;   // of values
  int64_t group;  // its head of keys and queries
  float rate;     // of decay
  float bias;
};

// Copies x to floats, brought to length one where asked, times `factor`.
template <typename T>
VLLM_INLINE void prepare_row(const T* x, float* to, int64_t size, bool normalize, float factor) {
  Vec sum = zero();
  for (int64_t i = 0; i < size; i += kLanes) {
    const int lanes = static_cast<int>(smaller(kLanes, size - i));
    const Vec v = load(x + i, lanes);
    sum = fma(v, v, sum);
    store(to + i, v, lanes);
  }
  if (normalize) factor /= __builtin_sqrtf(reduce_add(sum) + kNormEps);
  for (int64_t i = 0; i < size; i += kLanes) {
    const int lanes = static_cast<int>(smaller(kLanes, size - i));
    store(to + i, mul(load(to + i, lanes), set1(factor)), lanes);
  }
}

// exp(-rate * softplus(gate + bias)) of each number of a key.
template <typename T>
void prepare_decays(const Head& h, int64_t t, float* decays) {
  const LinearAttentionArgs& a = h.a;
  const T* gate = at<T>(a.gate, t * a.gate_stride + h.head * a.key_size);
  const float* bias = a.biases + h.head * a.key_size;
  for (int64_t i = 0; i < a.key_size; i += kLanes) {
    const int lanes = static_cast<int>(smaller(kLanes, a.key_size - i));
    float x[kLanes], y[kLanes];
    const Vec sum = add(load(gate + i, lanes), load(bias + i, lanes));
    store(x, sum);
    store(y, exp(sum));
    for (int l = 0; l < lanes; ++l) y[l] = x[l] > 20.0f ? x[l] : __builtin_log1pf(y[l]);
    store(decays + i, exp(mul(set1(-h.rate), load(y, lanes))), lanes);
  }
}

template <typename T>
Token prepare_token(const Head& h, const Scratch& s, int64_t t, int64_t row) {
  const LinearAttentionArgs& a = h.a;
  float *key = s.keys + row * a.key_size, *seen = s.seen + row * a.key_size;
  float *query = s.queries + row * a.key_size, *decays = s.decays + (1 + row) * a.key_size;
  Token token{1.0f, 1.0f, 0.0f};
  if (a.channel_gates) {
    prepare_decays<T>(h, t, decays);
  } else if (a.gate) {
    const float gate = to_float(*at<T>(a.gate, t * a.gate_stride + h.head));
    token.decay = exp1(-h.rate * softplus1(gate + h.bias));
  } else {
    token.decay = exp1(-h.rate);
  }
  if (a.beta) token.beta = sigmoid1(to_float(*at<T>(a.beta, t * a.beta_stride + h.head)));
  const bool normalize = a.normalize;
  const T* from_key = at<T>(a.key, t * a.key_token_stride + h.group * a.key_head_stride);
  const T* from_query = at<T>(a.query, t * a.query_token_stride + h.group * a.query_head_stride);
  prepare_row(from_key, key, a.key_size, normalize, 1.0f);
  prepare_row(from_query, query, a.key_size, normalize, a.scale);
  Vec dot = zero();
  const Vec decay = set1(token.decay);
  for (int64_t i = 0; i < a.key_size; i += kLanes) {
    const int lanes = static_cast<int>(smaller(kLanes, a.key_size - i));
    const Vec k = load(key + i, lanes), q = load(query + i, lanes);
    const Vec d = a.channel_gates ? load(decays + i, lanes) : decay;
    dot = fma(k, q, dot);
    store(seen + i, mul(k, d), lanes);
    store(query + i, mul(q, d), lanes);
  }
  token.dot = reduce_add(dot);
  return token;
}

// ---- one token -------------------------------------------------------------------------------

// N rows of the state, from `value` on: what the key and the query find there, then the update.
template <int N, typename T, typename S>
VLLM_INLINE void step_rows(const LinearAttentionArgs& a, const Token& token, const Scratch& s,
                           const S* from, S* to, const T* value, T* out) {
  const int64_t size = a.key_size;
  Vec found[N], read[N];
#pragma GCC unroll 4
  for (int r = 0; r < N; ++r) found[r] = read[r] = zero();
  for (int64_t i = 0; i < size; i += kLanes) {
    const int lanes = static_cast<int>(smaller(kLanes, size - i));
    const Vec k = load(s.seen + i, lanes), q = load(s.queries + i, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) {
      const Vec row = load(from + r * size + i, lanes);
      if (a.beta) found[r] = fma(row, k, found[r]);
      read[r] = fma(row, q, read[r]);
    }
  }
  Vec change[N];
#pragma GCC unroll 4
  for (int r = 0; r < N; ++r) {
    const float v = to_float(value[r]);
    const float delta = a.beta ? token.beta * (v - reduce_add(found[r])) : v;
    out[r] = from_float<T>(reduce_add(read[r]) + delta * token.dot);
    change[r] = set1(delta);
  }
  const Vec decay = set1(token.decay);
  for (int64_t i = 0; i < size; i += kLanes) {
    const int lanes = static_cast<int>(smaller(kLanes, size - i));
    const Vec k = load(s.keys + i, lanes);
    const Vec d = a.channel_gates ? load(s.decays + size + i, lanes) : decay;
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) {
      const Vec row = load(from + r * size + i, lanes);
      store(to + r * size + i, fma(row, d, mul(k, change[r])), lanes);
    }
  }
}

template <typename T, typename S>
void one_token(const Head& h, const Scratch& s, int64_t t, const S* from, S* to) {
  const LinearAttentionArgs& a = h.a;
  const Token token = prepare_token<T>(h, s, t, 0);
  const T* value = at<T>(a.value, t * a.value_token_stride + h.head * a.value_head_stride);
  T* out = at<T>(a.out, t * a.out_token_stride + h.head * a.value_size);
  int64_t v = 0;
  for (; v + kRows <= a.value_size; v += kRows) {
    step_rows<kRows>(a, token, s, from + v * a.key_size, to + v * a.key_size, value + v, out + v);
  }
  for (; v < a.value_size; ++v) {
    step_rows<1>(a, token, s, from + v * a.key_size, to + v * a.key_size, value + v, out + v);
  }
}

// ---- many tokens -----------------------------------------------------------------------------

// Turns the state's rows, one for each value, to panels with a row for each number of a key.
template <typename S>
void load_state(const LinearAttentionArgs& a, const S* from, float* panels) {
  for (int64_t v = 0; v < num_panels(a) * kValues; v += kLanes) {
    float* panel = panels + v / kValues * a.key_size * kValues + v % kValues;
    for (int64_t k = 0; k < a.key_size; k += kLanes) {
      const int lanes = static_cast<int>(smaller(kLanes, a.key_size - k));
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = v + i < a.value_size ? load(from + (v + i) * a.key_size + k, lanes) : zero();
      }
      transpose(rows);
      for (int i = 0; i < lanes; ++i) store(panel + (k + i) * kValues, rows[i]);
    }
  }
}

template <typename S>
void store_state(const LinearAttentionArgs& a, const float* panels, S* to) {
  for (int64_t v = 0; v < a.value_size; v += kLanes) {
    const float* panel = panels + v / kValues * a.key_size * kValues + v % kValues;
    for (int64_t k = 0; k < a.key_size; k += kLanes) {
      const int lanes = static_cast<int>(smaller(kLanes, a.key_size - k));
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = i < lanes ? load(panel + (k + i) * kValues) : zero();
      }
      transpose(rows);
      for (int i = 0; i < kLanes && v + i < a.value_size; ++i) {
        store(to + (v + i) * a.key_size + k, rows[i], lanes);
      }
    }
  }
}

// A panel through a run of tokens. The change of one token and what the next one finds are made in
// one passage over the panel.
template <bool kDelta, bool kChannels, typename T>
void run_panel(const Head& h, const Scratch& s, int64_t first, int64_t count, int64_t panel) {
  const LinearAttentionArgs& a = h.a;
  const int64_t size = a.key_size;
  float* state = s.state + panel * size * kValues;
  const int64_t v = panel * kValues;
  const int low = static_cast<int>(smaller(kLanes, a.value_size - v));
  const int high = static_cast<int>(smaller(kLanes, a.value_size - v - low));
  Vec change0 = zero(), change1 = zero();
  Vec decay = set1(1.0f);
  const float* key = s.keys;
  for (int64_t t = 0; t < count; ++t) {
    const float* seen = s.seen + t * size;
    const float* query = s.queries + t * size;
    Vec found0 = zero(), found1 = zero(), read0 = zero(), read1 = zero();
    for (int64_t k = 0; k < size; ++k) {
      float* row = state + k * kValues;
      const Vec x = set1(key[k]);
      if (kChannels) decay = set1(s.decays[t * size + k]);
      const Vec s0 = fma(load(row), decay, mul(x, change0));
      const Vec s1 = fma(load(row + kLanes), decay, mul(x, change1));
      store(row, s0);
      store(row + kLanes, s1);
      if (kDelta) {
        const Vec y = set1(seen[k]);
        found0 = fma(s0, y, found0);
        found1 = fma(s1, y, found1);
      }
      const Vec q = set1(query[k]);
      read0 = fma(s0, q, read0);
      read1 = fma(s1, q, read1);
    }
    const Token& token = s.tokens[t];
    const int64_t place = first + t;
    const T* value = at<T>(a.value, place * a.value_token_stride + h.head * a.value_head_stride) + v;
    change0 = load(value, low);
    change1 = high ? load(value + kLanes, high) : zero();
    if (kDelta) {
      change0 = mul(set1(token.beta), sub(change0, found0));
      change1 = mul(set1(token.beta), sub(change1, found1));
    }
    T* out = at<T>(a.out, place * a.out_token_stride + h.head * a.value_size) + v;
    const Vec dot = set1(token.dot);
    store(out, fma(change0, dot, read0), low);
    if (high) store(out + kLanes, fma(change1, dot, read1), high);
    if (!kChannels) decay = set1(token.decay);
    key = s.keys + t * size;
  }
  for (int64_t k = 0; k < size; ++k) {
    float* row = state + k * kValues;
    const Vec x = set1(key[k]);
    if (kChannels) decay = set1(s.decays[count * size + k]);
    store(row, fma(load(row), decay, mul(x, change0)));
    store(row + kLanes, fma(load(row + kLanes), decay, mul(x, change1)));
  }
}

template <typename T>
void many_tokens(const Head& h, const Scratch& s, int64_t first, int64_t last) {
  const LinearAttentionArgs& a = h.a;
  const int64_t panels = num_panels(a);
  for (int64_t t = first; t < last; t += kRun) {
    const int64_t count = smaller(kRun, last - t);
    for (int64_t i = 0; i < count; ++i) s.tokens[i] = prepare_token<T>(h, s, t + i, i);
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (a.channel_gates) {
        run_panel<true, true, T>(h, s, t, count, panel);
      } else if (a.beta) {
        run_panel<true, false, T>(h, s, t, count, panel);
      } else {
        run_panel<false, false, T>(h, s, t, count, panel);
      }
    }
  }
}

Scratch scratch_of(const LinearAttentionArgs& a) {
  const int64_t state = num_panels(a) * a.key_size * kValues, run = kRun * a.key_size;
  const int64_t floats = state + 4 * run + a.key_size;
  Scratch s;
  s.state = static_cast<float*>(thread_scratch(floats * sizeof(float) + kRun * sizeof(Token)));
  s.keys = s.state + state;
  s.seen = s.keys + run;
  s.queries = s.seen + run;
  s.decays = s.queries + run;
  s.tokens = reinterpret_cast<Token*>(s.decays + run + a.key_size);
  for (int64_t i = 0; i < a.key_size; ++i) s.decays[i] = 1.0f;
  return s;
}

template <typename T, typename S>
void run_head(const LinearAttentionArgs& a, int64_t request, int64_t head) {
  Head h{a, head, head / (a.num_heads / a.num_key_heads), a.rates[head],
         a.biases && !a.channel_gates ? a.biases[head] : 0.0f};
  const Scratch s = scratch_of(a);
  const int64_t begin = a.request_starts[request], end = a.request_starts[request + 1];
  const int64_t source = a.sources[request];
  const auto state = [&](int64_t block) {
    return at<S>(a.state, block * a.state_block_stride + head * a.state_head_stride);
  };
  if (end - begin == 1 && a.token_starts[end] - a.token_starts[begin] == 1) {
    S* to = state(a.targets[begin]);
    if (source < 0) memset(to, 0, a.value_size * a.key_size * sizeof(S));
    one_token<T, S>(h, s, a.token_starts[begin], source < 0 ? to : state(source), to);
    return;
  }
  if (source < 0) {
    memset(s.state, 0, num_panels(a) * a.key_size * kValues * sizeof(float));
  } else {
    load_state(a, state(source), s.state);
  }
  for (int64_t i = begin; i < end; ++i) {
    many_tokens<T>(h, s, a.token_starts[i], a.token_starts[i + 1]);
    store_state(a, s.state, state(a.targets[i]));
  }
}

template <typename T, typename S>
void run_tasks(const LinearAttentionArgs& a) {
  const int64_t tasks = a.num_requests * a.num_heads;
  const auto body = [&](int64_t task) {
    run_head<T, S>(a, task / a.num_heads, task % a.num_heads);
  };
  if (a.num_tokens * a.num_heads * a.key_size * a.value_size < kSerialNumbers) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  parallel_for(tasks, body);
}

template <typename T>
void with_state_of(const LinearAttentionArgs& a) {
  switch (a.state_dtype) {
    case kFloat32:
      return run_tasks<T, float>(a);
    case kFloat16:
      return run_tasks<T, f16>(a);
    default:
      return run_tasks<T, bf16>(a);
  }
}

void linear_attention(const LinearAttentionArgs& a) {
  switch (a.dtype) {
    case kFloat32:
      return with_state_of<float>(a);
    case kFloat16:
      return with_state_of<f16>(a);
    default:
      return with_state_of<bf16>(a);
  }
}

}  // namespace

void fill_linear_attention(Kernels& kernels) { kernels.linear_attention = linear_attention; }

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
