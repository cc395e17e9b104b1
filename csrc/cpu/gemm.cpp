// Products with packed weights, from one row (a stream of the weights) to thousands (a GEMM).
//
// A weight (n, k) is packed once, in panels of kPanel = 32 output columns:
//   float, fp16  [ceil(n / 32)][k][32]
//   bf16         [ceil(n / 32)][ceil(k / 2)][32][2]   (pairs along k, as dot products of pairs read)
// with zeros where n or k are filled up. A panel is one run of memory, and the panels that a thread
// takes follow each other, so one row of activations streams the weight as fast as memory allows;
// the same panels, read from cache again and again, are what a GEMM's inner loop wants.
//
// Activations are copied to scratch with a fixed distance between rows, in blocks of k.
#include "microkernel.h"
#include "pool.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

// One row of a block of activations in scratch: 1 KiB and a line, so that rows fall into
// different cache sets.
constexpr int64_t kRowBytes = 1088;
constexpr int64_t kRowUsed = 1024;
// Rows of activations packed at a time: bounds the scratch; weights are read again for each.
constexpr int64_t kMaxRowsAtOnce = 1024;
// Bytes of activations that a task sweeps over each panel: they stay in half of a 1 MiB L2.
constexpr int64_t kActivationBytes = 512 * 1024;
// Rows of all experts together that are one region's work; more, and an expert has enough alone.
constexpr int64_t kMaxExpertRows = 256;
// How far ahead one row of activations fetches the weights.
constexpr int64_t kPrefetchBytes = 4096;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename Form>
struct Shape {
  using A = typename Form::A;
  using B = typename Form::B;
  static constexpr int64_t kBlock = kRowUsed / static_cast<int64_t>(sizeof(A));  // of k
  static constexpr int64_t kLda = kRowBytes / static_cast<int64_t>(sizeof(A));
  // Elements of B from one step of k to the next.
  static constexpr int64_t kLdb = static_cast<int64_t>(kPanel) * Form::kStep;
};

// `count` values of a row to scratch, zeros up to a whole step of k.
template <typename A, typename T>
void pack_row(A* to, const T* from, int64_t count, int64_t step) {
  if constexpr (sizeof(A) == 2) {
    memcpy(to, from, static_cast<size_t>(count) * 2);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)),
                         static_cast<int>(count - i));
  }
  if (count % step) memset(to + count, 0, sizeof(A));
}

// One panel times `rows` rows of scratch -> tile (rows x 32 floats).
template <typename Form, int MR, bool kPrefetch>
void panel_product(const typename Form::A* a, int64_t block_distance, const typename Form::B* panel,
                   int64_t k, float* tile, int64_t ahead) {
  using S = Shape<Form>;
  for (int column = 0; column < kPanel; column += kTileCols) {
    Vec acc[MR][2];
    for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = zero();
    const typename Form::B* b = panel + column * Form::kStep;
    const typename Form::A* block = a;
    for (int64_t first = 0; first < k; first += S::kBlock) {
      const int64_t steps = ceil_div(smaller(S::kBlock, k - first), Form::kStep);
      multiply<Form, MR, S::kLda, kPrefetch>(acc, block, b, S::kLdb, steps, ahead);
      b += steps * S::kLdb;
      block += block_distance;
    }
    for (int r = 0; r < MR; ++r) {
      store(tile + r * kPanel + column, acc[r][0]);
      store(tile + r * kPanel + column + kLanes, acc[r][1]);
    }
  }
}

// A tile of sums, with what comes after them, to the output: of T, or of float with kFloatOut.
template <typename T, typename Out>
void finish(const GemmArgs& g, int64_t row, int rows, int64_t panel, const float* tile,
            const float* up) {
  const int64_t column = panel * kPanel;
  const int columns = static_cast<int>(smaller(kPanel, g.n - column));
  const T* bias = static_cast<const T*>(g.bias);
  for (int r = 0; r < rows; ++r) {
    Out* out = static_cast<Out*>(g.out) + (row + r) * g.out_stride + column;
    for (int c = 0; c < columns; c += kLanes) {
      const int lanes = columns - c < kLanes ? columns - c : kLanes;
      Vec x = load(tile + r * kPanel + c);
      if (bias) x = add(x, load(bias + column + c, lanes));
      if (up) x = mul(silu(x), load(up + r * kPanel + c));
      store(out + c, x, lanes);
    }
  }
}

// Where the activations of a call lie in scratch, and how a weight is cut into panels.
template <typename Form>
struct Layout {
  using S = Shape<Form>;
  explicit Layout(int64_t n, int64_t k)
      : blocks(ceil_div(k, S::kBlock)),
        panels(ceil_div(n, kPanel)),
        panel_size(ceil_div(k, Form::kStep) * S::kLdb),
        panel_bytes(panel_size * static_cast<int64_t>(sizeof(typename Form::B))),
        group(larger(1, 16384 / panel_bytes)),
        groups(ceil_div(panels, group)) {}
  int64_t blocks;      // of k, in a row of activations
  int64_t panels;
  int64_t panel_size;  // elements
  int64_t panel_bytes;
  int64_t group;       // panels that a task takes
  int64_t groups;
};

// Rows [start, start + m) of x to scratch, `m * kLda` elements from one block of k to the next.
template <typename Form, typename T>
void pack_rows(const T* x, int64_t x_stride, int64_t start, int64_t m, int64_t k, int64_t blocks,
               typename Form::A* packed) {
  using S = Shape<Form>;
  const auto pack = [&](int64_t row) {
    for (int64_t b = 0; b < blocks; ++b) {
      pack_row(packed + (b * m + row) * S::kLda, x + (start + row) * x_stride + b * S::kBlock,
               smaller(S::kBlock, k - b * S::kBlock), Form::kStep);
    }
  };
  if (m * k < 16384) {
    for (int64_t row = 0; row < m; ++row) pack(row);
  } else {
    parallel_for(m, pack);
  }
}

// Rows [first, last) of scratch times one group of panels. Row `first` of scratch is row
// `start + first` of the output.
template <typename Form, typename T>
void multiply_group(const GemmArgs& g, const Layout<Form>& layout, const typename Form::A* packed,
                    int64_t block_distance, int64_t start, int64_t first, int64_t last,
                    int64_t first_panel) {
  using S = Shape<Form>;
  using B = typename Form::B;
  const B* weight = static_cast<const B*>(g.w);
  const bool gated = g.epilogue == kSiluMul;
  const int64_t tiles = ceil_div(last - first, Form::kRows);
  alignas(64) float tile[kTileRows * kPanel], up[kTileRows * kPanel];
  for (int64_t p = first_panel; p < smaller(layout.panels, first_panel + layout.group); ++p) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = first + (last - first) * t / tiles;
      const int rows = static_cast<int>(first + (last - first) * (t + 1) / tiles - row);
      const typename Form::A* a = packed + row * S::kLda;
      // The last tile has the panel in cache already and fetches the next one.
      const bool fetch = t + 1 == tiles;
      const int64_t ahead = tiles == 1 ? kPrefetchBytes : layout.panel_bytes;
      const auto product = [&](const B* panel, float* to) {
        with_rows<Form::kRows>(rows, [&](auto n) {
          constexpr int kN = decltype(n)::value;
          if (fetch) {
            panel_product<Form, kN, true>(a, block_distance, panel, g.k, to, ahead);
          } else {
            panel_product<Form, kN, false>(a, block_distance, panel, g.k, to, 0);
          }
        });
      };
      product(weight + p * layout.panel_size, tile);
      if (gated) product(weight + (layout.panels + p) * layout.panel_size, up);
      if (g.epilogue == kFloatOut) {
        finish<T, float>(g, start + row, rows, p, tile, nullptr);
      } else {
        finish<T, T>(g, start + row, rows, p, tile, gated ? up : nullptr);
      }
    }
  }
}

template <typename Form, typename T>
void run(const GemmArgs& g) {
  using S = Shape<Form>;
  using A = typename Form::A;
  const Layout<Form> layout(g.n, g.k);
  const int64_t at_once = smaller(g.m, kMaxRowsAtOnce);
  SharedScratch scratch(static_cast<size_t>(at_once * layout.blocks * kRowBytes));
  A* packed = static_cast<A*>(scratch.get());

  for (int64_t start = 0; start < g.m; start += at_once) {
    const int64_t m = smaller(at_once, g.m - start);
    pack_rows<Form>(static_cast<const T*>(g.x), g.x_stride, start, m, g.k, layout.blocks, packed);
    // Split the rows evenly: into chunks that stay in L2, each into tiles of nearly equal height.
    const int64_t chunk_limit = larger(Form::kRows, kActivationBytes / (layout.blocks * kRowBytes));
    const int64_t chunks = ceil_div(m, chunk_limit);
    parallel_for(chunks * layout.groups, [&](int64_t item) {
      const int64_t chunk = item / layout.groups;
      multiply_group<Form, T>(g, layout, packed, m * S::kLda, start, m * chunk / chunks,
                              m * (chunk + 1) / chunks, item % layout.groups * layout.group);
    });
  }
}

// Few rows for each of many weights: one region over the panels of all of them, so that threads
// meet once and the weights are one stream.
template <typename Form, typename T>
void run_experts(const ExpertsArgs& e) {
  using S = Shape<Form>;
  using A = typename Form::A;
  const Layout<Form> layout(e.n, e.k);
  GemmArgs shared{};
  shared.x = e.x;
  shared.x_stride = e.x_stride;
  shared.out = e.out;
  shared.out_stride = e.out_stride;
  shared.n = e.n;
  shared.k = e.k;
  shared.dtype = e.dtype;
  shared.epilogue = e.epilogue;
  struct Run {
    int64_t expert, first, last;
  };
  // Experts in use are at most the rows.
  Run runs[kMaxExpertRows];
  int64_t used = 0;
  const bool many = e.m > kMaxExpertRows;
  for (int64_t i = 0, row = 0; i < e.num_experts; row += e.counts[i++]) {
    if (e.counts[i] == 0) continue;
    const Run now{i, row, row + e.counts[i]};
    if (!many) {
      runs[used++] = now;
      continue;
    }
    GemmArgs g = shared;
    g.w = e.weights[i];
    g.bias = e.bias ? static_cast<const T*>(e.bias) + i * e.n : nullptr;
    g.x = static_cast<const T*>(e.x) + row * e.x_stride;
    g.out = static_cast<T*>(e.out) + row * e.out_stride;
    g.m = e.counts[i];
    run<Form, T>(g);
  }
  if (used == 0) return;
  SharedScratch scratch(static_cast<size_t>(e.m * layout.blocks * kRowBytes));
  A* packed = static_cast<A*>(scratch.get());
  pack_rows<Form>(static_cast<const T*>(e.x), e.x_stride, 0, e.m, e.k, layout.blocks, packed);
  parallel_for(used * layout.groups, [&](int64_t item) {
    const Run& now = runs[item / layout.groups];
    GemmArgs g = shared;
    g.w = e.weights[now.expert];
    g.bias = e.bias ? static_cast<const T*>(e.bias) + now.expert * e.n : nullptr;
    multiply_group<Form, T>(g, layout, packed, e.m * S::kLda, 0, now.first, now.last,
                            item % layout.groups * layout.group);
  });
}

void experts(const ExpertsArgs& e) {
  switch (e.dtype) {
    case kFloat32:
      return run_experts<Plain<float>, float>(e);
    case kFloat16:
      return run_experts<Plain<f16>, f16>(e);
    default:
#if defined(VLLM_DOT_BF16)
      return run_experts<Dots, bf16>(e);
#else
      return run_experts<Pairs, bf16>(e);
#endif
  }
}

void gemm(const GemmArgs& g) {
  switch (g.dtype) {
    case kFloat32:
      return run<Plain<float>, float>(g);
    case kFloat16:
      return run<Plain<f16>, f16>(g);
    default:
#if defined(VLLM_DOT_BF16)
      return run<Dots, bf16>(g);
#else
      return run<Pairs, bf16>(g);
#endif
  }
}

// Visits element (row, column) of panel `panel` as (index in the panel, row, column).
template <typename T, int kStep>
void pack_panels(const PackArgs& a, bool packing) {
  const int64_t steps = ceil_div(a.k, kStep);
  const int64_t panel_size = steps * kStep * kPanel;
  parallel_for(ceil_div(a.n, kPanel), [&](int64_t panel) {
    T* to = static_cast<T*>(a.packed) + panel * panel_size;
    const int64_t first = panel * kPanel;
    const int64_t rows = smaller(kPanel, a.n - first);
    // 64 columns at a time: the panel's lines being written stay in L1.
    for (int64_t k0 = 0; k0 < steps * kStep; k0 += 64) {
      const int64_t k1 = smaller(steps * kStep, k0 + 64);
      for (int64_t row = 0; row < kPanel; ++row) {
        T* from = static_cast<T*>(const_cast<void*>(a.src)) + (first + row) * a.src_stride;
        for (int64_t k = k0; k < k1; ++k) {
          T& cell = to[(k / kStep * kPanel + row) * kStep + k % kStep];
          const bool inside = row < rows && k < a.k;
          if (packing) {
            cell = inside ? from[k] : T{};
          } else if (inside) {
            from[k] = cell;
          }
        }
      }
    }
  });
}

void move_panels(const PackArgs& a, bool packing) {
  switch (a.dtype) {
    case kFloat32:
      return pack_panels<uint32_t, 1>(a, packing);
    case kFloat16:
      return pack_panels<uint16_t, 1>(a, packing);
    default:
      return pack_panels<uint16_t, 2>(a, packing);
  }
}

void pack(const PackArgs& a) { move_panels(a, true); }
void unpack(const PackArgs& a) { move_panels(a, false); }

template <typename T, int kStep>
void rows_of_panels(const EmbeddingArgs& e) {
  const int64_t steps = ceil_div(e.k, kStep);
  const auto read = [&](int64_t i) {
    const int64_t id = e.ids[i];
    const T* from = static_cast<const T*>(e.packed) + id / kPanel * steps * kStep * kPanel +
                    id % kPanel * kStep;
    T* to = static_cast<T*>(e.out) + i * e.k;
    for (int64_t k = 0; k < e.k; ++k) to[k] = from[k / kStep * kStep * kPanel + k % kStep];
  };
  if (e.num_ids * e.k < 16384) {
    for (int64_t i = 0; i < e.num_ids; ++i) read(i);
  } else {
    parallel_for(e.num_ids, read);
  }
}

void embedding(const EmbeddingArgs& e) {
  switch (e.dtype) {
    case kFloat32:
      return rows_of_panels<uint32_t, 1>(e);
    case kFloat16:
      return rows_of_panels<uint16_t, 1>(e);
    default:
      return rows_of_panels<uint16_t, 2>(e);
  }
}

}  // namespace

void fill_gemm(Kernels& kernels) {
  kernels.gemm = gemm;
  kernels.experts = experts;
  kernels.pack = pack;
  kernels.unpack = unpack;
  kernels.embedding = embedding;
}

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
