// Attention over the paged cache (B, K, N, C): decode, prefill and any mix in one call.
//
// The rows of a request and KV head are its (token, query head of the group) pairs, token-major. A
// task takes up to kTaskRows of them over a range of keys: a tile of keys and one of values are
// brought into the order that the microkernel reads (from wherever their pages lie), then shared by
// all rows; softmax is online. Where there are few rows, as in decode, keys are split over tasks,
// and the last task of a row group merges the parts. A quantised cache's tile becomes floats first.
//
// bf16 with AVX512-BF16 multiplies bf16 pairs with float sums, probabilities rounded to bf16; all
// else is float throughout.
#include <atomic>

#include "attention_tile.h"
#include "kv_formats.h"
#include "pool.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

// Rows [row0, row1) of a request over keys [key0, key1), for every KV head.
struct Piece {
  int32_t request;
  int32_t row0, row1;
  int32_t key0, key1;
  int32_t part, parts;  // which split of the keys
  int32_t first_piece;  // index of part 0
};

class Call {
 public:
  explicit Call(const AttentionArgs& args)
      : a_(args), group_(args.num_heads / args.num_kv_heads),
        padded_(round_up(args.value_size, kTileCols)) {}

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
      if (a_.quantised.format != kPlainCache) return work<Plain<float>, uint8_t>(piece, head);
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
    constexpr bool kBytes = sizeof(C) == 1;
    const int64_t widened = kBytes ? kTile * (a_.head_size + a_.value_size) : 0;
    const Buffers<A> s = buffers<A>(round_up(a_.head_size, kTileCols), padded_, widened);
    Row rows[kTaskRows];
    const int count = rows_of_piece(p, kv_head, rows);
    for (int r = 0; r < count; ++r) {
      A* to = s.query + r * Buffers<A>::kQueryDistance;
      if constexpr (sizeof(A) == 2) {
        pack_query<A, A>(a_, rows[r], to);
      } else if (a_.query_dtype == kFloat32) {
        pack_query<A, float>(a_, rows[r], to);
      } else if (a_.query_dtype == kFloat16) {
        pack_query<A, f16>(a_, rows[r], to);
      } else {
        pack_query<A, bf16>(a_, rows[r], to);
      }
      s.most[r] = kLow;
      s.total[r] = 0;
    }
    memset(s.sums, 0, static_cast<size_t>(count * padded_) * sizeof(float));

    const int32_t* table = a_.block_table + p.request * a_.block_table_stride;
    TokenPointers<C> buffers[2];
    TokenPointers<C>*tokens = &buffers[0], *coming = &buffers[1];
    int here = static_cast<int>(smaller(kTile, p.key1 - p.key0));
    locate(a_, table, kv_head, p.key0, here, *tokens);
    for (int64_t key = p.key0; key < p.key1; key += kTile) {
      const int next = static_cast<int>(smaller(kTile, p.key1 - key - here));
      locate(a_, table, kv_head, key + here, next, *coming);
      for (int t = next; t < kTile; ++t) (*coming)[t] = (*tokens)[0];
      RowView views[kTaskRows];
      for (int r = 0; r < count; ++r) views[r] = view(rows[r], key, here);
      if constexpr (kBytes) {
        TokenPointers<float> floats;
        widen(table, kv_head, key, here, *tokens, s.widened, floats);
        attend_tile<Form>(s, floats, floats, here, count, views);
      } else {
        attend_tile<Form>(s, *tokens, *coming, here, count, views);
      }
      TokenPointers<C>* const done = tokens;
      tokens = coming;
      coming = done;
      here = next;
    }
    if (p.parts == 1) {
      for (int r = 0; r < count; ++r) {
        finish_row(a_, rows[r], s.sums + r * padded_, s.most[r], s.total[r]);
      }
    } else {
      hand_in(p, kv_head, s.sums, s.most, s.total);
    }
  }

  // Keys and values of `count` tokens from `first` on as floats, one content after another.
  void widen(const int32_t* table, int64_t head, int64_t first, int count,
             const TokenPointers<uint8_t>& tokens, float* to, TokenPointers<float>& floats) const {
    const QuantisedCache& q = a_.quantised;
    const int64_t width = a_.head_size + a_.value_size;
    for (int t = 0; t < kTile; ++t) {
      floats[t] = to + (t < count ? t : 0) * width;
      if (t >= count) continue;
      const uint8_t* scales = nullptr;
      if (q.format == kNvfp4) {
        const int64_t token = first + t;
        scales = static_cast<const uint8_t*>(a_.cache) +
                 table[token / a_.block_size] * a_.cache_block_stride + q.scale_offset +
                 head * q.scale_head_stride + token % a_.block_size * q.scale_token_stride;
      }
      float* const content = to + t * width;
      widen_side(q.format, tokens[t], scales, a_.head_size, q.k_scale, content);
      if (scales) scales += q.value_offset;
      widen_side(q.format, tokens[t] + q.value_offset, scales, a_.value_size, q.v_scale,
                 content + a_.value_offset);
    }
  }

  // `here` keys and values against `count` rows.
  template <typename Form, typename C>
  void attend_tile(const Buffers<typename Form::A>& s, const TokenPointers<C>& tokens,
                   const TokenPointers<C>& coming, int here, int count,
                   const RowView* views) const {
    using A = typename Form::A;
#if defined(VLLM_DOT_BF16)
    if constexpr (sizeof(A) == 2) {
      if (count <= kDirectRows) {
        const DirectTile tile{tokens, coming, here};
        const int columns = static_cast<int>(round_up(views[count - 1].high, kTileCols));
        with_rows<kDirectRows>(count, [&](auto n) {
          tile_rows<decltype(n)::value>(a_, s, tile, 0, columns, padded_, views);
        });
        return;
      }
    }
#endif
    pack_keys<A>(tokens, coming, here, a_.head_size, s.keys);
    pack_values<A>(tokens, coming, here, a_, padded_, s.values);
    const PackedTile<Form> tile{s.keys, s.values};
    const int groups = static_cast<int>(ceil_div(count, Form::kRows));
    for (int g = 0; g < groups; ++g) {
      const int first = count * g / groups, last = count * (g + 1) / groups;
      // A row sees no less far than the one before it.
      if (views[last - 1].high <= 0) continue;
      const int columns = static_cast<int>(round_up(views[last - 1].high, kTileCols));
      with_rows<Form::kRows>(last - first, [&](auto n) {
        tile_rows<decltype(n)::value>(a_, s, tile, first, columns, padded_, views);
      });
    }
  }

  int rows_of_piece(const Piece& p, int64_t kv_head, Row* rows) const {
    const int64_t before = a_.seq_lens[p.request] - tokens_of(p.request);
    int64_t token = p.row0 / group_, member = p.row0 % group_;
    for (int r = 0; r < p.row1 - p.row0; ++r) {
      const int64_t head = kv_head * group_ + member;
      rows[r] = {a_.query_start[p.request] + token, head, before + token,
                 a_.alibi_slopes ? a_.alibi_slopes[head] : 0.0f};
      if (++member == group_) {
        member = 0;
        ++token;
      }
    }
    return p.row1 - p.row0;
  }

  RowView view(const Row& row, int64_t key, int count) const {
    const int64_t see_to = a_.causal ? row.position + 1
                           : a_.window > 0 ? row.position + a_.window : key + count;
    const int64_t see_from = a_.window > 0 ? row.position - a_.window + 1 : 0;
    RowView v;
    v.low = static_cast<int>(larger(see_from - key, 0));
    v.high = static_cast<int>(larger(0, smaller(count, see_to - key)));
    v.slope = row.slope;
    v.distance = static_cast<float>(key - row.position);
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

    Row info[kTaskRows];
    rows_of_piece(p, kv_head, info);
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
      finish_row(a_, info[r], merged, now, all);
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
