// Products of rows with panels of packed weights, which linear layers and experts share; gemm.cpp
// says how weights are packed and cut.
//
// Activations are copied to scratch with a fixed distance between rows, in blocks of k.
#pragma once

#include "gates.h"
#include "microkernel.h"
#include "pool.h"

namespace vllm_cpu {
namespace VLLM_ISA {

// One row of a block of activations in scratch: 1 KiB and a line, so that rows fall into
// different cache sets.
constexpr int64_t kRowBytes = 1088;
constexpr int64_t kRowUsed = 1024;
// Bytes of activations that a task sweeps over each panel: they stay in half of a 1 MiB L2.
constexpr int64_t kActivationBytes = 512 * 1024;
// How far ahead one row of activations fetches the weights.
constexpr int64_t kPrefetchBytes = 4096;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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

// What a task multiplies with, and where the result goes. A gated weight is gate over up, n rows each.
// Row r, column c of the result is at out + r * out_stride + c / out_width * out_block + c % out_width:
// an ordinary tensor, or rows packed for the next product.
struct Product {
  const void* w;
  const void* bias;
  void* out;
  int64_t out_stride, out_width, out_block;
  int64_t n, k;
  bool gated, gelu;
  int gate;
  float alpha, limit;
};

inline Product plain_product(const void* w, const void* bias, void* out, int64_t out_stride,
                             int64_t n, int64_t k) {
  return {w, bias, out, out_stride, kPanel, kPanel, n, k, false, false, kSilu, 0, 0};
}

// A tile of sums, with what comes after them, to the output.
template <typename T, typename Out>
void finish(const Product& p, int64_t row, int rows, int64_t panel, const float* tile,
            const float* up) {
  const int64_t column = panel * kPanel;
  const int columns = static_cast<int>(smaller(kPanel, p.n - column));
  const T* bias = static_cast<const T*>(p.bias);
  Out* out = static_cast<Out*>(p.out) + row * p.out_stride + column / p.out_width * p.out_block +
             column % p.out_width;
  if (!up) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; c += kLanes) {
        const int lanes = columns - c < kLanes ? columns - c : kLanes;
        Vec x = load(tile + r * kPanel + c);
        if (bias) x = add(x, load(bias + column + c, lanes));
        if (p.gelu) x = gelu(x);
        store(out + r * p.out_stride + c, x, lanes);
      }
    }
    return;
  }
  with_gate(p.gate, p.alpha, p.limit, [&](const auto& gate) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < kPanel; c += kLanes) {
        Vec x = load(tile + r * kPanel + c), y = load(up + r * kPanel + c);
        if (bias) {
          x = add(x, load(bias + column + c));
          y = add(y, load(bias + p.n + column + c));
        }
        store(out + r * p.out_stride + c, gate(x, y));
      }
    }
  });
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

// Rows [first, last) of scratch times one group of panels; row r of scratch is row r of the output.
template <typename Form, typename T, typename Out>
void multiply_group(const Product& g, const Layout<Form>& layout, const typename Form::A* packed,
                    int64_t block_distance, int64_t first, int64_t last, int64_t first_panel) {
  using S = Shape<Form>;
  using B = typename Form::B;
  const B* weight = static_cast<const B*>(g.w);
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
      if (g.gated) product(weight + (layout.panels + p) * layout.panel_size, up);
      finish<T, Out>(g, row, rows, p, tile, g.gated ? up : nullptr);
    }
  }
}

}  // namespace VLLM_ISA
}  // namespace vllm_cpu
