// Attention over the paged cache (B, K, N, 2 * D): decode, prefill and any mix in one call.
//
// The rows of a request and KV head are its (token, query head of the group) pairs, token-major. A
// task takes up to kTaskRows of them over a range of keys: a tile of keys and one of values are
// brought into the order that the microkernel reads (from wherever their pages lie), then shared by
// all rows; softmax is online. Where there are few rows, as in decode, keys are split over tasks,
// and the last task of a row group merges the parts.
//
// bf16 with AVX512-BF16 multiplies bf16 pairs with float sums, probabilities rounded to bf16; all
// else is float throughout.
#include <atomic>

#include "microkernel.h"
#include "pool.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

constexpr int kTaskRows = 56;
constexpr int kTile = 64;        // keys at a time
constexpr int64_t kMinSplit = 128;  // keys of a part, at least
constexpr int64_t kMaxHead = 256;
constexpr float kLow = -__builtin_inff();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
float larger_of(float a, float b) { return a > b ? a : b; }

float exp1(float x) {
  float lanes[kLanes];
  store(lanes, exp(set1(x)));
  return x == kLow ? 0.0f : lanes[0];
}

// Rows [row0, row1) of a request over keys [key0, key1), for every KV head.
struct Piece {
  int32_t request;
  int32_t row0, row1;
  int32_t key0, key1;
  int32_t part, parts;  // which split of the keys
  int32_t first_piece;  // index of part 0
};

// Scratch of a task. A: what the microkernel reads as its left side.
template <typename A>
struct Buffers {
  static constexpr int64_t kQueryDistance = kMaxHead + 16;
  static constexpr int64_t kProbDistance = kTile + 16;
  A* query;     // [kTaskRows][kQueryDistance]
  A* probs;     // [kTileRows][kProbDistance]
  A* keys;      // [D / step][kTile][step]
  A* values;    // [kTile / step][padded D][step]
  float* scores;  // [kTileRows][kTile]
  float* sums;    // [kTaskRows][padded D]
  float* most;    // [kTaskRows]
  float* total;   // [kTaskRows]
};

template <typename A>
Buffers<A> buffers(int64_t padded) {
  using L = Buffers<A>;
  const size_t a = sizeof(A), f = sizeof(float);
  const size_t sizes[] = {kTaskRows * L::kQueryDistance * a,
                          kTileRows * L::kProbDistance * a,
                          static_cast<size_t>(padded) * kTile * a,
                          static_cast<size_t>(padded) * kTile * a,
                          kTileRows * kTile * f,
                          kTaskRows * static_cast<size_t>(padded) * f,
                          kTaskRows * f + 64,
                          kTaskRows * f + 64};
  size_t offsets[9] = {0};
  for (int i = 0; i < 8; ++i) offsets[i + 1] = offsets[i] + ((sizes[i] + 63) & ~size_t{63});
  char* base = static_cast<char*>(thread_scratch(offsets[8]));
  const auto at = [&](int i) { return base + offsets[i]; };
  return L{reinterpret_cast<A*>(at(0)),     reinterpret_cast<A*>(at(1)),
           reinterpret_cast<A*>(at(2)),     reinterpret_cast<A*>(at(3)),
           reinterpret_cast<float*>(at(4)), reinterpret_cast<float*>(at(5)),
           reinterpret_cast<float*>(at(6)), reinterpret_cast<float*>(at(7))};
}

// Where the tokens [first, first + count) of a request lie in the cache, for one KV head.
template <typename C>
void locate(const AttentionArgs& a, const int32_t* table, int64_t head, int64_t first, int count,
            const C* (&tokens)[kTile]) {
  const C* base = static_cast<const C*>(a.cache) + head * a.cache_head_stride;
  int64_t block = first / a.block_size, offset = first % a.block_size;
  for (int i = 0; i < count; ++block, offset = 0) {
    const C* page = base + table[block] * a.cache_block_stride;
    for (; i < count && offset < a.block_size; ++i, ++offset) {
      tokens[i] = page + offset * a.cache_token_stride;
    }
  }
}

// Both of these fetch the `coming` tile's lines while they put this one's in order: a few at a time,
// into L2, since prefetches in one go wait for each other (10 against 5 GB/s, one thread, D = 64).

// Keys to [units][kTile], a unit being 32 bits: a float, or a pair of bf16 taken as it is. Columns
// of tokens that do not exist become zero.
template <typename A, typename C>
void pack_keys(const C* const (&tokens)[kTile], const C* const (&coming)[kTile], int count,
               int64_t head_size, A* to) {
  constexpr bool kPairs = sizeof(A) == 2;
  const int64_t units = kPairs ? head_size / 2 : head_size;
  float* out = reinterpret_cast<float*>(to);
  for (int t = 0; t < round_up(count, kTileCols); t += kLanes) {
    for (int64_t u = 0; u < units; u += kLanes) {
      const int lanes = static_cast<int>(smaller(kLanes, units - u));
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        prefetch_l2(reinterpret_cast<const float*>(coming[t + i]) + u);
        if (t + i >= count) {
          rows[i] = zero();
        } else if constexpr (kPairs) {
          rows[i] = load(reinterpret_cast<const float*>(tokens[t + i]) + u, lanes);
        } else {
          rows[i] = load(tokens[t + i] + u, lanes);
        }
      }
      transpose(rows);
      for (int i = 0; i < lanes; ++i) store(out + (u + i) * kTile + t, rows[i]);
    }
  }
}

template <typename A, typename C>
void pack_values(const C* const (&tokens)[kTile], const C* const (&coming)[kTile], int count,
                 int64_t head_size, int64_t padded, A* to) {
  if constexpr (sizeof(A) == 4) {
    for (int t = 0; t < count; ++t) {
      const C* from = tokens[t] + head_size;
      for (int64_t d = 0; d < padded; d += kLanes) {
        prefetch_l2(coming[t] + head_size + d);
        const int64_t lanes = larger(0, smaller(kLanes, head_size - d));
        store(to + t * padded + d, load(from + d, static_cast<int>(lanes)));
      }
    }
  } else {
#if defined(VLLM_DOT_BF16)
    alignas(64) static constexpr uint16_t kLowHalf[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLowHalf);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int t = 0; t < count; t += 2) {
      const C* even = tokens[t] + head_size;
      const C* odd = t + 1 < count ? tokens[t + 1] + head_size : nullptr;
      for (int64_t d = 0; d < padded; d += 32) {
        prefetch_l2(coming[t] + head_size + d);
        prefetch_l2(coming[t + 1] + head_size + d);
        const int64_t valid = larger(0, smaller(32, head_size - d));
        const __mmask32 mask = _bzhi_u32(0xffffffffu, static_cast<unsigned>(valid));
        const __m512i x = _mm512_maskz_loadu_epi16(mask, even + d);
        const __m512i y =
            odd ? _mm512_maskz_loadu_epi16(mask, odd + d) : _mm512_setzero_si512();
        A* out = to + (t / 2 * padded + d) * 2;
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(x, low, y));
        _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(x, high, y));
      }
    }
#endif
  }
}

// What the softmax of one row needs to know about a tile that starts at key `first`.
struct RowView {
  int low, high;    // columns that the row sees
  float slope;      // ALiBi
  float distance;   // key of column 0 minus the row's own position
};

VLLM_INLINE Vec outside_to(Vec x, int column, int low, int high, float other) {
  if (column < low) {
    x = first_lanes(set1(other), x, static_cast<int>(smaller(kLanes, low - column)));
  }
  if (column + kLanes > high) {
    x = first_lanes(x, set1(other), static_cast<int>(larger(0, high - column)));
  }
  return x;
}

// A row that sees every column of the tile, with nothing but a scale on its scores: those are
// scaled on the way into the exponential.
VLLM_INLINE bool is_plain(const AttentionArgs& a, const RowView& row, int columns) {
  return row.low <= 0 && row.high >= columns && row.slope == 0 && !(a.soft_cap > 0) && a.scale > 0;
}

// The largest score of a row; scores that are not plain are finished in place.
VLLM_INLINE float largest_score(const AttentionArgs& a, const RowView& row, int columns,
                                float* scores) {
  Vec best = set1(kLow);
  if (is_plain(a, row, columns)) {
    for (int c = 0; c < columns; c += kLanes) best = max(best, load(scores + c));
    return reduce_max(best) * a.scale;
  }
  const Vec scale = set1(a.soft_cap > 0 ? a.scale / a.soft_cap : a.scale);
  for (int c = 0; c < columns; c += kLanes) {
    Vec x = mul(load(scores + c), scale);
    if (a.soft_cap > 0) x = mul(tanh(x), set1(a.soft_cap));
    if (row.slope != 0) {
      const Vec distance = add(iota(), set1(row.distance + static_cast<float>(c)));
      x = fma(distance, set1(row.slope), x);
    }
    x = outside_to(x, c, row.low, row.high, kLow);
    store(scores + c, x);
    best = max(best, x);
  }
  return reduce_max(best);
}

// Scores of a row -> exp(score - most); returns their sum. Probabilities that are rounded to 16
// bits need no better exponential than one of 16 bits.
template <typename A>
VLLM_INLINE float exponentials(const AttentionArgs& a, const RowView& row, int columns,
                               const float* scores, float most, A* probs) {
  constexpr float kLog2E = 1.44269504088896341f;
  const bool plain = is_plain(a, row, columns);
  const float scale = plain ? a.scale : 1.0f;
  Vec sum = zero();
  for (int c = 0; c < columns; c += kLanes) {
    Vec p;
    if constexpr (sizeof(A) == 2) {
      p = exp2_16bit(fma(load(scores + c), set1(scale * kLog2E), set1(-most * kLog2E)));
    } else {
      p = exp(fma(load(scores + c), set1(scale), set1(-most)));
    }
    if (!plain) p = outside_to(p, c, row.low, row.high, 0.0f);
    store(probs + c, p);
    sum = add(sum, p);
  }
  return reduce_add(sum);
}

// Rows [first, first + MR) of the task against one tile of keys and values.
template <typename Form, int MR>
void tile_rows(const AttentionArgs& a, const Buffers<typename Form::A>& s, int first, int columns,
               int64_t padded, const RowView* views) {
  using A = typename Form::A;
  using L = Buffers<A>;
  constexpr int64_t kStep = Form::kStep;
  static_assert(MR <= kLanes, "one vector holds a number for each row");
  for (int c = 0; c < columns; c += kTileCols) {
    Vec acc[MR][2];
    for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = zero();
    multiply<Form, MR, L::kQueryDistance, false>(acc, s.query + first * L::kQueryDistance,
                                                 s.keys + c * kStep, kTile * kStep,
                                                 a.head_size / kStep, 0);
    for (int r = 0; r < MR; ++r) {
      store(s.scores + r * kTile + c, acc[r][0]);
      store(s.scores + r * kTile + c + kLanes, acc[r][1]);
    }
  }
  alignas(64) float most[kLanes], factors[kLanes];
  for (int r = 0; r < MR; ++r) {
    const float top = largest_score(a, views[first + r], columns, s.scores + r * kTile);
    most[r] = larger_of(s.most[first + r], top);
    factors[r] = s.most[first + r] - most[r];
  }
  // exp of the differences; -inf minus -inf is NaN, and stands for a row with nothing to rescale.
  store(factors, exp(load(factors)));
  int high = 0;
  for (int r = 0; r < MR; ++r) {
    const RowView& row = views[first + r];
    A* const probs = s.probs + r * L::kProbDistance;
    if (s.most[first + r] == kLow) factors[r] = 0;
    if (row.low >= row.high) {
      for (int c = 0; c < columns; c += kLanes) store(probs + c, zero());
    } else {
      const float sum = exponentials(a, row, columns, s.scores + r * kTile, most[r], probs);
      s.total[first + r] = s.total[first + r] * factors[r] + sum;
      if (row.high > high) high = row.high;
    }
    s.most[first + r] = most[r];
  }
  for (int64_t d = 0; d < padded; d += kTileCols) {
    Vec acc[MR][2];
    for (int r = 0; r < MR; ++r) {
      const float* sums = s.sums + (first + r) * padded + d;
      acc[r][0] = mul(load(sums), set1(factors[r]));
      acc[r][1] = mul(load(sums + kLanes), set1(factors[r]));
    }
    multiply<Form, MR, L::kProbDistance, false>(acc, s.probs, s.values + d * kStep,
                                                padded * kStep, ceil_div(high, kStep), 0);
    for (int r = 0; r < MR; ++r) {
      float* sums = s.sums + (first + r) * padded + d;
      store(sums, acc[r][0]);
      store(sums + kLanes, acc[r][1]);
    }
  }
}

template <typename A, typename T>
void pack_query(const AttentionArgs& a, int64_t token, int64_t head, A* to) {
  const T* from = static_cast<const T*>(a.query) + token * a.query_token_stride +
                  head * a.query_head_stride;
  for (int64_t d = 0; d < a.head_size; d += kLanes) {
    const int lanes = static_cast<int>(smaller(kLanes, a.head_size - d));
    store(to + d, load(from + d, lanes), lanes);
  }
}

template <typename T>
void write_row(T* to, const float* from, float factor, int64_t size) {
  for (int64_t d = 0; d < size; d += kLanes) {
    store(to + d, mul(load(from + d), set1(factor)), static_cast<int>(smaller(kLanes, size - d)));
  }
}

// Divides a row's sums by its softmax total, with the sink's share, and writes it out.
void finish_row(const AttentionArgs& a, int64_t token, int64_t head, const float* sums, float most,
                float total) {
  float factor = 1.0f;
  if (a.sinks) {
    const float now = larger_of(most, a.sinks[head]);
    factor = most == kLow ? 0.0f : exp1(most - now);
    total = total * factor + exp1(a.sinks[head] - now);
  }
  factor = total > 0 || total != total ? factor / total : 0.0f;
  const int64_t at = token * a.out_token_stride + head * a.out_head_stride;
  switch (a.query_dtype) {
    case kFloat32:
      return write_row(static_cast<float*>(a.out) + at, sums, factor, a.head_size);
    case kFloat16:
      return write_row(static_cast<f16*>(a.out) + at, sums, factor, a.head_size);
    default:
      return write_row(static_cast<bf16*>(a.out) + at, sums, factor, a.head_size);
  }
}

class Call {
 public:
  explicit Call(const AttentionArgs& args)
      : a_(args), group_(args.num_heads / args.num_kv_heads),
        padded_(round_up(args.head_size, kTileCols)) {}

  void run() {
    int64_t capacity = 0;
    for (int64_t r = 0; r < a_.num_requests; ++r) {
      capacity += ceil_div(rows_of(r), kTaskRows);
    }
    const int64_t limit = capacity + 8 * num_threads() + 1;
    SharedScratch memory(static_cast<size_t>(limit) * sizeof(Piece));
    Piece* pieces = static_cast<Piece*>(memory.get());
    const int64_t count = plan(pieces, limit);
    pieces_ = pieces;
    int64_t split_pieces = 0;
    for (int64_t i = 0; i < count; ++i) split_pieces += pieces[i].parts > 1;
    if (split_pieces == 0) return dispatch(count);
    // Per piece and head: maximum and total of each row, then its sums; and a count of parts done.
    part_size_ = kTaskRows * (2 + padded_);
    const int64_t parts = count * a_.num_kv_heads;
    const size_t counters = static_cast<size_t>(round_up(parts * 4, 64));
    SharedScratch shared(counters + static_cast<size_t>(parts * part_size_) * sizeof(float));
    done_ = static_cast<std::atomic<int32_t>*>(shared.get());
    for (int64_t i = 0; i < parts; ++i) done_[i].store(0, std::memory_order_relaxed);
    partial_ = reinterpret_cast<float*>(static_cast<char*>(shared.get()) + counters);
    dispatch(count);
  }

 private:
  int64_t tokens_of(int64_t r) const { return a_.query_start[r + 1] - a_.query_start[r]; }
  int64_t rows_of(int64_t r) const { return tokens_of(r) * group_; }

  // Cuts the batch into pieces; keys are split only where that lets more threads work.
  int64_t plan(Piece* pieces, int64_t limit) const {
    int64_t count = 0;
    double total = 0;
    for (int64_t r = 0; r < a_.num_requests; ++r) {
      const int64_t rows = rows_of(r);
      const int64_t tiles = ceil_div(rows, kTaskRows);
      for (int64_t t = 0; t < tiles; ++t) {
        Piece& p = pieces[count];
        p.request = static_cast<int32_t>(r);
        p.row0 = static_cast<int32_t>(rows * t / tiles);
        p.row1 = static_cast<int32_t>(rows * (t + 1) / tiles);
        set_keys(p);
        p.part = 0;
        p.parts = 1;
        p.first_piece = static_cast<int32_t>(count);
        total += cost(p);
        ++count;
      }
    }
    const int threads = num_threads();
    if (threads == 1) return count;
    const double target = total / (4.0 * threads / static_cast<double>(a_.num_kv_heads));
    const int64_t whole = count;
    int64_t left = limit - count;
    for (int64_t i = 0; i < whole; ++i) {
      const Piece base = pieces[i];
      const int64_t keys = base.key1 - base.key0;
      int64_t parts = static_cast<int64_t>(cost(base) / target + 0.999);
      parts = smaller(smaller(parts, keys / kMinSplit), left + 1);
      if (parts <= 1) continue;
      // Part 0 takes the place of the whole; the others follow at the end, one after another.
      const int64_t extra = count;
      for (int64_t part = 0; part < parts; ++part) {
        Piece& p = part == 0 ? pieces[i] : pieces[extra + part - 1];
        p = base;
        p.key0 = base.key0 + static_cast<int32_t>(keys * part / parts);
        p.key1 = base.key0 + static_cast<int32_t>(keys * (part + 1) / parts);
        p.part = static_cast<int32_t>(part);
        p.parts = static_cast<int32_t>(parts);
        p.first_piece = static_cast<int32_t>(part == 0 ? extra : i);
      }
      count += parts - 1;
      left -= parts - 1;
    }
    return count;
  }

  static double cost(const Piece& p) {
    // Bringing a key and its value into order costs about as much as eight rows do.
    return static_cast<double>(p.key1 - p.key0) * (p.row1 - p.row0 + 8);
  }

  void set_keys(Piece& p) const {
    const int64_t length = a_.seq_lens[p.request];
    const int64_t before = length - tokens_of(p.request);
    const int64_t first = before + p.row0 / group_, last = before + (p.row1 - 1) / group_;
    int64_t begin = 0, end = a_.causal ? last + 1 : length;
    if (a_.window > 0) {
      begin = larger(0, first - a_.window + 1);
      end = smaller(end, last + a_.window);
    }
    p.key0 = static_cast<int32_t>(begin);
    p.key1 = static_cast<int32_t>(larger(begin, end));
  }

  void dispatch(int64_t count) {
    const auto item = [&](int64_t i) {
      const Piece& piece = pieces_[i / a_.num_kv_heads];
      const int64_t head = i % a_.num_kv_heads;
#if defined(VLLM_DOT_BF16)
      if (a_.query_dtype == kBFloat16 && a_.cache_dtype == kBFloat16) {
        return work<Dots, bf16>(piece, head);
      }
#endif
      switch (a_.cache_dtype) {
        case kFloat32:
          return work<Plain<float>, float>(piece, head);
        case kFloat16:
          return work<Plain<float>, f16>(piece, head);
        default:
          return work<Plain<float>, bf16>(piece, head);
      }
    };
    parallel_for(count * a_.num_kv_heads, item);
  }

  template <typename Form, typename C>
  void work(const Piece& p, int64_t kv_head) const {
    using A = typename Form::A;
    using L = Buffers<A>;
    const Buffers<A> s = buffers<A>(padded_);
    const int rows = p.row1 - p.row0;
    const int64_t start = a_.query_start[p.request];
    const int64_t before = a_.seq_lens[p.request] - tokens_of(p.request);
    for (int r = 0; r < rows; ++r) {
      const int64_t token = start + (p.row0 + r) / group_;
      const int64_t head = kv_head * group_ + (p.row0 + r) % group_;
      A* to = s.query + r * L::kQueryDistance;
      if constexpr (sizeof(A) == 2) {
        pack_query<A, A>(a_, token, head, to);
      } else if (a_.query_dtype == kFloat32) {
        pack_query<A, float>(a_, token, head, to);
      } else if (a_.query_dtype == kFloat16) {
        pack_query<A, f16>(a_, token, head, to);
      } else {
        pack_query<A, bf16>(a_, token, head, to);
      }
      s.most[r] = kLow;
      s.total[r] = 0;
    }
    memset(s.sums, 0, static_cast<size_t>(rows * padded_) * sizeof(float));

    const int32_t* table = a_.block_table + p.request * a_.block_table_stride;
    const C *tokens[kTile], *coming[kTile];
    RowView views[kTaskRows];
    const int tiles = static_cast<int>(ceil_div(rows, Form::kRows));
    for (int64_t key = p.key0; key < p.key1; key += kTile) {
      const int count = static_cast<int>(smaller(kTile, p.key1 - key));
      locate(a_, table, kv_head, key, count, tokens);
      const int next = static_cast<int>(smaller(kTile, p.key1 - key - count));
      locate(a_, table, kv_head, key + count, next, coming);
      for (int t = next; t < kTile; ++t) coming[t] = tokens[0];
      pack_keys<A>(tokens, coming, count, a_.head_size, s.keys);
      pack_values<A>(tokens, coming, count, a_.head_size, padded_, s.values);
      for (int r = 0; r < rows; ++r) views[r] = view(p, r, kv_head, before, key, count);
      for (int t = 0; t < tiles; ++t) {
        const int first = rows * t / tiles, last = rows * (t + 1) / tiles;
        // A row sees no less far than the one before it.
        if (views[last - 1].high <= 0) continue;
        const int columns = static_cast<int>(round_up(views[last - 1].high, kTileCols));
        with_rows<Form::kRows>(last - first, [&](auto n) {
          tile_rows<Form, decltype(n)::value>(a_, s, first, columns, padded_, views);
        });
      }
    }
    if (p.parts == 1) {
      for (int r = 0; r < rows; ++r) {
        finish_row(a_, start + (p.row0 + r) / group_, kv_head * group_ + (p.row0 + r) % group_,
                   s.sums + r * padded_, s.most[r], s.total[r]);
      }
    } else {
      hand_in(p, kv_head, s.sums, s.most, s.total);
    }
  }

  RowView view(const Piece& p, int r, int64_t kv_head, int64_t before, int64_t key,
               int count) const {
    const int64_t position = before + (p.row0 + r) / group_;
    const int64_t see_to = a_.causal ? position + 1
                           : a_.window > 0 ? position + a_.window : key + count;
    const int64_t see_from = a_.window > 0 ? position - a_.window + 1 : 0;
    RowView v;
    v.low = static_cast<int>(larger(see_from - key, 0));
    v.high = static_cast<int>(larger(0, smaller(count, see_to - key)));
    v.slope = a_.alibi_slopes ? a_.alibi_slopes[kv_head * group_ + (p.row0 + r) % group_] : 0.0f;
    v.distance = static_cast<float>(key - position);
    return v;
  }

  float* part_of(int64_t piece, int64_t kv_head) const {
    return partial_ + (piece * a_.num_kv_heads + kv_head) * part_size_;
  }

  // Keeps this part's result; the last of the parts merges them all.
  void hand_in(const Piece& p, int64_t kv_head, const float* sums, const float* most,
               const float* total) const {
    const int rows = p.row1 - p.row0;
    const int64_t self = &p - pieces_;
    float* mine = part_of(self, kv_head);
    memcpy(mine, most, rows * sizeof(float));
    memcpy(mine + kTaskRows, total, rows * sizeof(float));
    memcpy(mine + 2 * kTaskRows, sums, static_cast<size_t>(rows * padded_) * sizeof(float));
    // Part 0 points at the first of the others, the others at part 0.
    const int64_t head_piece = p.part == 0 ? self : p.first_piece;
    const int64_t others = p.part == 0 ? p.first_piece : pieces_[p.first_piece].first_piece;
    std::atomic<int32_t>& done = done_[head_piece * a_.num_kv_heads + kv_head];
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < p.parts) return;

    const int64_t start = a_.query_start[p.request];
    alignas(64) float merged[kMaxHead + 64];
    for (int r = 0; r < rows; ++r) {
      float now = kLow;
      for (int i = 0; i < p.parts; ++i) {
        now = larger_of(now, part_of(i == 0 ? head_piece : others + i - 1, kv_head)[r]);
      }
      float all = 0;
      for (int64_t d = 0; d < padded_; d += kLanes) store(merged + d, zero());
      for (int i = 0; i < p.parts; ++i) {
        const float* part = part_of(i == 0 ? head_piece : others + i - 1, kv_head);
        if (part[r] == kLow) continue;
        const float factor = exp1(part[r] - now);
        all += part[kTaskRows + r] * factor;
        const float* row = part + 2 * kTaskRows + r * padded_;
        for (int64_t d = 0; d < padded_; d += kLanes) {
          store(merged + d, fma(load(row + d), set1(factor), load(merged + d)));
        }
      }
      finish_row(a_, start + (p.row0 + r) / group_, kv_head * group_ + (p.row0 + r) % group_,
                 merged, now, all);
    }
  }

  const AttentionArgs& a_;
  const int64_t group_;
  const int64_t padded_;
  const Piece* pieces_ = nullptr;
  int64_t part_size_ = 0;
  float* partial_ = nullptr;
  std::atomic<int32_t>* done_ = nullptr;
};

void attention(const AttentionArgs& a) { Call(a).run(); }

}  // namespace

void fill_attention(Kernels& kernels) { kernels.attention = attention; }

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
