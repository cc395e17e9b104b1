// One tile of keys and values against some rows of queries: the arithmetic of attention.cpp, which
// decides what meets what.
#pragma once

#include "microkernel.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

constexpr int kTaskRows = 56;
constexpr int kTile = 64;        // keys at a time
constexpr int64_t kMinSplit = 128;  // keys of a part, at least
constexpr int64_t kMaxHead = 576;  // of keys, and of values
constexpr int kDirectRows = 8;  // up to which keys and values are used where they lie
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

// A query head of a new token.
struct Row {
  int64_t token, head;
  int64_t position;  // in its request
  float slope;       // ALiBi
};

// Scratch of a task. A: what the microkernel reads as its left side.
template <typename A>
struct Buffers {
  static constexpr int64_t kQueryDistance = kMaxHead + 16;
  static constexpr int64_t kProbDistance = kTile + 16;
  A* query;     // [kTaskRows][kQueryDistance]
  A* probs;     // [kTileRows][kProbDistance]
  A* keys;      // [D / step][kTile][step]
  A* values;    // [kTile / step][padded Dv][step]
  float* scores;  // [kTileRows][kTile]
  float* sums;    // [kTaskRows][padded Dv]
  float* most;    // [kTaskRows]
  float* total;   // [kTaskRows]
  float* widened;  // a tile's contents, where the cache is of bytes
};

template <typename A>
Buffers<A> buffers(int64_t padded_keys, int64_t padded, int64_t widened) {
  using L = Buffers<A>;
  const size_t a = sizeof(A), f = sizeof(float);
  const size_t sizes[] = {kTaskRows * L::kQueryDistance * a,
                          kTileRows * L::kProbDistance * a,
                          static_cast<size_t>(padded_keys) * kTile * a,
                          static_cast<size_t>(padded) * kTile * a,
                          kTileRows * kTile * f,
                          kTaskRows * static_cast<size_t>(padded) * f,
                          kTaskRows * f + 64,
                          kTaskRows * f + 64,
                          static_cast<size_t>(widened) * f};
  size_t offsets[10] = {0};
  for (int i = 0; i < 9; ++i) offsets[i + 1] = offsets[i] + ((sizes[i] + 63) & ~size_t{63});
  char* base = static_cast<char*>(thread_scratch(offsets[9]));
  const auto at = [&](int i) { return base + offsets[i]; };
  return L{reinterpret_cast<A*>(at(0)),     reinterpret_cast<A*>(at(1)),
           reinterpret_cast<A*>(at(2)),     reinterpret_cast<A*>(at(3)),
           reinterpret_cast<float*>(at(4)), reinterpret_cast<float*>(at(5)),
           reinterpret_cast<float*>(at(6)), reinterpret_cast<float*>(at(7)),
           reinterpret_cast<float*>(at(8))};
}

// Where each token of a tile lies in the cache, for one KV head.
template <typename C>
using TokenPointers = const C* [kTile];

template <typename C>
void locate(const AttentionArgs& a, const int32_t* table, int64_t head, int64_t first, int count,
            TokenPointers<C>& tokens) {
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
void pack_keys(const TokenPointers<C>& tokens, const TokenPointers<C>& coming, int count,
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

#if defined(VLLM_DOT_BF16)
// Columns [d, d + 32) of the values of two tokens, interleaved; `odd` may be null, for zeros.
VLLM_INLINE void interleave(const bf16* even, const bf16* odd, int64_t d, int64_t size,
                            __m512i& low, __m512i& high) {
  alignas(64) static constexpr uint16_t kLowHalf[32] = {
      0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i order = _mm512_load_si512(kLowHalf);
  const int64_t valid = larger(0, smaller(32, size - d));
  const __mmask32 mask = _bzhi_u32(0xffffffffu, static_cast<unsigned>(valid));
  const __m512i x = _mm512_maskz_loadu_epi16(mask, even + d);
  const __m512i y = odd ? _mm512_maskz_loadu_epi16(mask, odd + d) : _mm512_setzero_si512();
  low = _mm512_permutex2var_epi16(x, order, y);
  high = _mm512_permutex2var_epi16(x, _mm512_add_epi16(order, _mm512_set1_epi16(16)), y);
}
#endif

template <typename A, typename C>
void pack_values(const TokenPointers<C>& tokens, const TokenPointers<C>& coming, int count,
                 const AttentionArgs& a, int64_t padded, A* to) {
  const int64_t offset = a.value_offset, size = a.value_size;
  if constexpr (sizeof(A) == 4) {
    for (int t = 0; t < count; ++t) {
      const C* from = tokens[t] + offset;
      for (int64_t d = 0; d < padded; d += kLanes) {
        prefetch_l2(coming[t] + offset + d);
        const int64_t lanes = larger(0, smaller(kLanes, size - d));
        store(to + t * padded + d, load(from + d, static_cast<int>(lanes)));
      }
    }
  } else {
#if defined(VLLM_DOT_BF16)
    for (int t = 0; t < count; t += 2) {
      const C* even = tokens[t] + offset;
      const C* odd = t + 1 < count ? tokens[t + 1] + offset : nullptr;
      for (int64_t d = 0; d < padded; d += 32) {
        prefetch_l2(coming[t] + offset + d);
        prefetch_l2(coming[t + 1] + offset + d);
        __m512i low, high;
        interleave(even, odd, d, size, low, high);
        A* out = to + (t / 2 * padded + d) * 2;
        _mm512_storeu_si512(out, low);
        _mm512_storeu_si512(out + 32, high);
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

// A tile of keys and values brought into order, for many rows.
template <typename Form>
struct PackedTile {
  const typename Form::A *keys, *values;

  template <int MR>
  void scores(const AttentionArgs& a, const typename Form::A* query, int columns,
              float* out) const {
    for (int c = 0; c < columns; c += kTileCols) {
      Vec acc[MR][2];
      for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = zero();
      multiply<Form, MR, Buffers<typename Form::A>::kQueryDistance, false>(
          acc, query, keys + c * Form::kStep, kTile * Form::kStep, a.head_size / Form::kStep, 0);
      for (int r = 0; r < MR; ++r) {
        store(out + r * kTile + c, acc[r][0]);
        store(out + r * kTile + c + kLanes, acc[r][1]);
      }
    }
  }

  template <int MR>
  void add_values(Vec (&acc)[MR][2], const AttentionArgs&, const typename Form::A* probs, int64_t d,
                  int64_t padded, int count) const {
    multiply<Form, MR, Buffers<typename Form::A>::kProbDistance, false>(
        acc, probs, values + d * Form::kStep, padded * Form::kStep, ceil_div(count, Form::kStep), 0);
  }
};

#if defined(VLLM_DOT_BF16)
// A tile of keys and values where it lies in the cache, for rows so few that they all pass at once:
// what is brought into order is used from the registers (a third less time than through memory).
struct DirectTile {
  const TokenPointers<bf16>& tokens;
  const TokenPointers<bf16>& coming;
  int count;

  template <int MR>
  void scores(const AttentionArgs& a, const bf16* query, int columns, float* out) const {
    constexpr int64_t kLda = Buffers<bf16>::kQueryDistance;
    const int64_t units = a.head_size / 2;
    for (int t = 0; t < columns; t += kLanes) {
      Vec acc[MR];
      for (int r = 0; r < MR; ++r) acc[r] = zero();
      for (int64_t u = 0; u < units; u += kLanes) {
        const int lanes = static_cast<int>(smaller(kLanes, units - u));
        Vec rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          prefetch_l2(coming[t + i] + 2 * u);
          rows[i] = t + i < count
                        ? load(reinterpret_cast<const float*>(tokens[t + i]) + u, lanes)
                        : zero();
        }
        transpose(rows);
        const auto dots = [&](int i) {
          for (int r = 0; r < MR; ++r) {
            int32_t pair;
            memcpy(&pair, query + r * kLda + 2 * (u + i), 4);
            acc[r] = _mm512_dpbf16_ps(acc[r], (__m512bh)_mm512_set1_epi32(pair),
                                      (__m512bh)rows[i]);
          }
        };
        if (lanes == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) dots(i);
        } else {
          for (int i = 0; i < lanes; ++i) dots(i);
        }
      }
      for (int r = 0; r < MR; ++r) store(out + r * kTile + t, acc[r]);
    }
  }

  template <int MR>
  void add_values(Vec (&acc)[MR][2], const AttentionArgs& a, const bf16* probs, int64_t d, int64_t,
                  int high) const {
    for (int t = 0; t < high; t += 2) {
      prefetch_l2(coming[t] + a.value_offset + d);
      prefetch_l2(coming[t + 1] + a.value_offset + d);
      const bf16* odd = t + 1 < count ? tokens[t + 1] + a.value_offset : nullptr;
      __m512i low, upper;
      interleave(tokens[t] + a.value_offset, odd, d, a.value_size, low, upper);
      for (int r = 0; r < MR; ++r) {
        int32_t pair;
        memcpy(&pair, probs + r * Buffers<bf16>::kProbDistance + t, 4);
        const __m512bh p = (__m512bh)_mm512_set1_epi32(pair);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], p, (__m512bh)low);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], p, (__m512bh)upper);
      }
    }
  }
};
#endif

// Rows [first, first + MR) of the task against one tile of keys and values.
template <int MR, typename A, typename Tile>
void tile_rows(const AttentionArgs& a, const Buffers<A>& s, const Tile& tile, int first,
               int columns, int64_t padded, const RowView* views) {
  using L = Buffers<A>;
  static_assert(MR <= kLanes, "one vector holds a number for each row");
  tile.template scores<MR>(a, s.query + first * L::kQueryDistance, columns, s.scores);
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
    tile.add_values(acc, a, s.probs, d, padded, high);
    for (int r = 0; r < MR; ++r) {
      float* sums = s.sums + (first + r) * padded + d;
      store(sums, acc[r][0]);
      store(sums + kLanes, acc[r][1]);
    }
  }
}

template <typename A, typename T>
void pack_query(const AttentionArgs& a, const Row& row, A* to) {
  const T* from = static_cast<const T*>(a.query) + row.token * a.query_token_stride +
                  row.head * a.query_head_stride;
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
void finish_row(const AttentionArgs& a, const Row& row, const float* sums, float most,
                float total) {
  float factor = 1.0f;
  if (a.sinks) {
    const float now = larger_of(most, a.sinks[row.head]);
    factor = most == kLow ? 0.0f : exp1(most - now);
    total = total * factor + exp1(a.sinks[row.head] - now);
  }
  factor = total > 0 || total != total ? factor / total : 0.0f;
  const int64_t at = row.token * a.out_token_stride + row.head * a.out_head_stride;
  switch (a.query_dtype) {
    case kFloat32:
      return write_row(static_cast<float*>(a.out) + at, sums, factor, a.value_size);
    case kFloat16:
      return write_row(static_cast<f16*>(a.out) + at, sums, factor, a.value_size);
    default:
      return write_row(static_cast<bf16*>(a.out) + at, sums, factor, a.value_size);
  }
}

}  // namespace
}  // namespace VLLM_ISA
}  // namespace vllm_cpu
