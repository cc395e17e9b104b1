// A mixture of experts in one call: choose experts, gather rows, multiply, sum.
//
// A token is copied to scratch once for each of its experts, sorted by expert, so that an expert's
// tokens are one run of rows. Two regions over the panels of all experts in use follow: gate and up,
// whose product is written as the packed rows of the next, then down. Threads meet twice however
// tokens are spread, and the weights of a step are one stream.
#include "panels.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

// (token, expert) pairs in scratch at a time, and their bytes; weights are read again for each.
constexpr int64_t kMaxPairs = 8192;
constexpr int64_t kMaxBytes = int64_t{128} << 20;
// Numbers below which a second thread does not pay.
constexpr int64_t kSerialNumbers = 32768;
// Keeps the sum of sigmoid scores that all vanish from dividing by zero.
constexpr float kTiny = 1e-20f;

// A block of rows, or of tokens, for each item; few are done by the calling thread.
template <typename Body>
void for_blocks(int64_t count, int64_t numbers_each, const Body& body) {
  if (count * numbers_each < kSerialNumbers) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  const int64_t block = 1 + 8192 / (numbers_each + 1);
  parallel_for(ceil_div(count, block), [&](int64_t item) {
    const int64_t last = smaller(count, (item + 1) * block);
    for (int64_t i = item * block; i < last; ++i) body(i);
  });
}

int64_t padded(int64_t count) { return ceil_div(count, kLanes) * kLanes; }

// Scores of one token's experts, `padded` floats.
template <typename T>
void read_scores(const MoeLayer& l, const T* logits, float* scores) {
  const auto each = [&](const auto& body) {
    for (int64_t i = 0; i < l.num_experts; i += kLanes) {
      body(i, static_cast<int>(smaller(kLanes, l.num_experts - i)));
    }
  };
  if (l.scoring == kSoftmax) {
    const Vec low = set1(-__builtin_inff());
    Vec most = low, total = zero();
    each([&](int64_t i, int lanes) {
      most = max(most, first_lanes(load(logits + i, lanes), low, lanes));
    });
    const Vec top = set1(reduce_max(most));
    each([&](int64_t i, int lanes) {
      const Vec e = first_lanes(exp(sub(load(logits + i, lanes), top)), zero(), lanes);
      store(scores + i, e);
      total = add(total, e);
    });
    const Vec sum = set1(reduce_add(total));
    each([&](int64_t i, int) { store(scores + i, div(load(scores + i), sum)); });
  } else if (l.scoring == kSigmoid) {
    each([&](int64_t i, int lanes) {
      const Vec e = exp(sub(zero(), load(logits + i, lanes)));
      store(scores + i, div(set1(1.0f), add(set1(1.0f), e)));
    });
  } else {
    each([&](int64_t i, int lanes) { store(scores + i, softplus(load(logits + i, lanes))); });
    for (int64_t i = 0; i < l.num_experts; ++i) scores[i] = __builtin_sqrtf(scores[i]);
  }
}

// The indices of the `k` largest of `count` values, best first, the first of equal ones. NaN is
// taken only where there is nothing else.
void largest(const float* values, int64_t count, int64_t k, float* best, int32_t* ids) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float v = values[i];
    if (found == k && !(v > best[k - 1])) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && v > best[at - 1]; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = v;
    ids[at] = static_cast<int32_t>(i);
  }
}

// Minus infinity for experts outside the best groups. A group is as good as its best expert, or as
// its two best together where the choice is corrected.
void keep_best_groups(const MoeLayer& l, float* choice, float* best, int32_t* ids) {
  const int64_t size = l.num_experts / l.num_groups;
  const int64_t counted = l.correction && size > 1 ? 2 : 1;
  float* ranks = best + padded(l.num_experts);
  for (int64_t g = 0; g < l.num_groups; ++g) {
    largest(choice + g * size, size, counted, best, ids);
    ranks[g] = counted == 2 ? best[0] + best[1] : best[0];
  }
  largest(ranks, l.num_groups, l.topk_group, best, ids);
  for (int64_t g = 0; g < l.num_groups; ++g) {
    bool kept = false;
    for (int64_t i = 0; i < l.topk_group; ++i) kept |= ids[i] == g;
    for (int64_t i = 0; i < size && !kept; ++i) choice[g * size + i] = -__builtin_inff();
  }
}

template <typename T>
void route(const MoeArgs& m, int64_t token, int32_t* ids, float* weights) {
  const MoeLayer& l = *m.layer;
  const int64_t width = padded(l.num_experts);
  float* scores = static_cast<float*>(thread_scratch(5 * sizeof(float) * width));
  float* choice = scores + width;
  float* best = choice + width;
  int32_t* candidates = reinterpret_cast<int32_t*>(best + 2 * width);
  read_scores(l, static_cast<const T*>(m.logits) + token * m.logits_stride, scores);
  if (m.chosen) {
    for (int64_t i = 0; i < l.top_k; ++i) {
      ids[i] = static_cast<int32_t>(m.chosen[token * l.top_k + i]);
    }
  } else {
    for (int64_t i = 0; i < l.num_experts; ++i) {
      choice[i] = l.correction ? scores[i] + l.correction[i] : scores[i];
    }
    if (l.topk_group < l.num_groups) keep_best_groups(l, choice, best, candidates);
    largest(choice, l.num_experts, l.top_k, best, candidates);
    memcpy(ids, candidates, sizeof(int32_t) * static_cast<size_t>(l.top_k));
  }
  float sum = kTiny;
  for (int64_t i = 0; i < l.top_k; ++i) sum += scores[ids[i]];
  const float divisor = l.renormalize ? sum : 1.0f;
  for (int64_t i = 0; i < l.top_k; ++i) {
    weights[i] = scores[ids[i]] / divisor * static_cast<float>(l.scaling);
  }
}

void route_any(const MoeArgs& m, int64_t token, int32_t* ids, float* weights) {
  switch (m.logits_dtype) {
    case kFloat32:
      return route<float>(m, token, ids, weights);
    case kFloat16:
      return route<f16>(m, token, ids, weights);
    default:
      return route<bf16>(m, token, ids, weights);
  }
}

struct Run {
  int64_t expert, first, last;
};

// What a call keeps in scratch for `pairs` pairs, each part on lines of its own.
template <typename Form, typename T>
struct Parts {
  Parts(const MoeLayer& l, int64_t pairs, int64_t blocks, int64_t inner_blocks)
      : max_runs(smaller(l.num_experts, pairs) + pairs / kRunRows) {
    packed = take(pairs * blocks * kRowBytes);
    inner = take(pairs * inner_blocks * kRowBytes);
    rows = take(pairs * l.hidden_size * static_cast<int64_t>(sizeof(T)));
    ids = take(pairs * 4);
    weights = take(pairs * 4);
    places = take(pairs * 4);
    order = take(pairs * 4);
    ends = take(l.num_experts * 8);
    runs = take(max_runs * static_cast<int64_t>(sizeof(Run)));
  }

  // Rows of a run: activations of that many stay in L2 while panels go by.
  static constexpr int64_t kRunRows = 256;
  int64_t max_runs, bytes = 0;
  int64_t packed, inner, rows, ids, weights, places, order, ends, runs;

 private:
  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 63) / 64 * 64;
    return at;
  }
};

// Sorts pairs by expert: places[pair] is its row, order[row] its pair. Returns how many runs there
// are; an expert of many rows has several.
int64_t sort_pairs(const MoeLayer& l, int64_t pairs, int64_t run_rows, const int32_t* ids,
                   int32_t* places, int32_t* order, int64_t* ends, Run* runs) {
  memset(ends, 0, sizeof(int64_t) * static_cast<size_t>(l.num_experts));
  for (int64_t p = 0; p < pairs; ++p) ++ends[ids[p]];
  int64_t used = 0, row = 0;
  for (int64_t e = 0; e < l.num_experts; ++e) {
    const int64_t first = row, count = ends[e], cuts = ceil_div(count, run_rows);
    for (int64_t i = 0; i < cuts; ++i) {
      runs[used++] = {e, first + count * i / cuts, first + count * (i + 1) / cuts};
    }
    ends[e] = first;
    row += count;
  }
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t at = ends[ids[p]]++;
    places[p] = static_cast<int32_t>(at);
    order[at] = static_cast<int32_t>(p);
  }
  return used;
}

template <typename Form, typename T>
class Moe {
  using S = Shape<Form>;
  using A = typename Form::A;

 public:
  explicit Moe(const MoeArgs& args)
      : m_(args), l_(*args.layer), up_(l_.inner_size, l_.hidden_size),
        down_(l_.hidden_size, l_.inner_size) {}

  void run() const {
    const int64_t each = l_.top_k * ((up_.blocks + down_.blocks) * kRowBytes +
                                     l_.hidden_size * static_cast<int64_t>(sizeof(T)));
    const int64_t limit = larger(1, smaller(kMaxPairs / l_.top_k, kMaxBytes / each));
    const int64_t chunks = ceil_div(m_.num_tokens, limit);
    if (chunks == 0) return;
    const int64_t most = ceil_div(m_.num_tokens, chunks) * l_.top_k;
    const Parts<Form, T> parts(l_, most, up_.blocks, down_.blocks);
    SharedScratch scratch(static_cast<size_t>(parts.bytes));
    for (int64_t c = 0; c < chunks; ++c) {
      some(m_.num_tokens * c / chunks, m_.num_tokens * (c + 1) / chunks, parts,
           static_cast<char*>(scratch.get()));
    }
  }

 private:
  // Tokens [start, end).
  void some(int64_t start, int64_t end, const Parts<Form, T>& parts, char* base) const {
    const int64_t pairs = (end - start) * l_.top_k;
    int32_t* const ids = reinterpret_cast<int32_t*>(base + parts.ids);
    int32_t* const places = reinterpret_cast<int32_t*>(base + parts.places);
    int32_t* const order = reinterpret_cast<int32_t*>(base + parts.order);
    float* const weights = reinterpret_cast<float*>(base + parts.weights);
    const Run* const runs = reinterpret_cast<Run*>(base + parts.runs);
    A* const packed = reinterpret_cast<A*>(base + parts.packed);
    A* const inner = reinterpret_cast<A*>(base + parts.inner);
    T* const rows = reinterpret_cast<T*>(base + parts.rows);

    for_blocks(end - start, l_.num_experts * 4, [&](int64_t i) {
      route_any(m_, start + i, ids + i * l_.top_k, weights + i * l_.top_k);
    });
    const int64_t used =
        sort_pairs(l_, pairs, parts.kRunRows, ids, places, order,
                   reinterpret_cast<int64_t*>(base + parts.ends), const_cast<Run*>(runs));
    for_blocks(pairs, l_.hidden_size, [&](int64_t row) {
      const int64_t pair = order[row];
      gather(start + pair / l_.top_k, weights[pair], packed + row * S::kLda, pairs * S::kLda);
    });
    parallel_for(used * up_.groups, [&](int64_t item) {
      const Run& now = runs[item / up_.groups];
      Product p = plain_product(l_.gate_up[now.expert], bias(l_.gate_up_bias, now.expert, 2 * l_.inner_size),
                                inner, S::kLda, l_.inner_size, l_.hidden_size);
      p.out_width = S::kBlock;
      p.out_block = pairs * S::kLda;
      p.gated = true;
      p.gate = static_cast<int>(l_.gate);
      p.alpha = static_cast<float>(l_.alpha);
      p.limit = static_cast<float>(l_.limit);
      multiply_group<Form, T, A>(p, up_, packed, pairs * S::kLda, now.first, now.last,
                                 item % up_.groups * up_.group);
    });
    parallel_for(used * down_.groups, [&](int64_t item) {
      const Run& now = runs[item / down_.groups];
      const Product p =
          plain_product(l_.down[now.expert], bias(l_.down_bias, now.expert, l_.hidden_size), rows,
                        l_.hidden_size, l_.hidden_size, l_.inner_size);
      multiply_group<Form, T, T>(p, down_, inner, pairs * S::kLda, now.first, now.last,
                                 item % down_.groups * down_.group);
    });
    for_blocks(end - start, l_.hidden_size * l_.top_k, [&](int64_t i) {
      sum(places + i * l_.top_k, weights + i * l_.top_k, rows,
          static_cast<T*>(m_.out) + (start + i) * m_.out_stride);
    });
  }

  static const void* bias(const void* all, int64_t expert, int64_t size) {
    return all ? static_cast<const T*>(all) + expert * size : nullptr;
  }

  // A token's row to scratch, times its weight where that belongs to the input.
  void gather(int64_t token, float weight, A* to, int64_t block_distance) const {
    const T* x = static_cast<const T*>(m_.x) + token * m_.x_stride;
    for (int64_t b = 0; b < up_.blocks; ++b) {
      const int64_t first = b * S::kBlock, count = smaller(S::kBlock, l_.hidden_size - first);
      A* block = to + b * block_distance;
      if (!l_.weigh_input) {
        pack_row(block, x + first, count, Form::kStep);
        continue;
      }
      // Rounded as the product of two tensors is.
      T weighed[S::kBlock];
      for (int64_t i = 0; i < count; i += kLanes) {
        const int lanes = static_cast<int>(smaller(kLanes, count - i));
        store(weighed + i, mul(load(x + first + i, lanes), set1(weight)), lanes);
      }
      pack_row(block, weighed, count, Form::kStep);
    }
  }

  // The sum over a token's experts, in the order of its choice.
  void sum(const int32_t* places, const float* weights, const T* rows, T* out) const {
    const int64_t size = l_.hidden_size;
    for (int64_t i = 0; i < size; i += kLanes) {
      const int lanes = static_cast<int>(smaller(kLanes, size - i));
      Vec total = zero();
      for (int64_t j = 0; j < l_.top_k; ++j) {
        const float weight = l_.weigh_input ? 1.0f : weights[j];
        total = fma(set1(weight), load(rows + places[j] * size + i, lanes), total);
      }
      store(out + i, total, lanes);
    }
  }

  const MoeArgs& m_;
  const MoeLayer& l_;
  const Layout<Form> up_, down_;
};

void moe(const MoeArgs& m) {
  switch (m.layer->dtype) {
    case kFloat32:
      return Moe<Plain<float>, float>(m).run();
    case kFloat16:
      return Moe<Plain<f16>, f16>(m).run();
    default:
#if defined(VLLM_DOT_BF16)
      return Moe<Dots, bf16>(m).run();
#else
      return Moe<Pairs, bf16>(m).run();
#endif
  }
}

}  // namespace

void fill_moe(Kernels& kernels) { kernels.moe = moe; }

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
