// Products with packed weights, from one row (a stream of the weights) to thousands (a GEMM).
//
// A weight (n, k) is packed once, in panels of kPanel = 32 output columns:
//   float, fp16  [ceil(n / 32)][k][32]
//   bf16         [ceil(n / 32)][ceil(k / 2)][32][2]   (pairs along k, as dot products of pairs read)
// with zeros where n or k are filled up. A panel is one run of memory, and the panels that a thread
// takes follow each other, so one row of activations streams the weight as fast as memory allows;
// the same panels, read from cache again and again, are what a GEMM's inner loop wants.
#include "panels.h"

namespace vllm_cpu {
namespace VLLM_ISA {
namespace {

// Rows of activations packed at a time: bounds the scratch; weights are read again for each.
constexpr int64_t kMaxRowsAtOnce = 1024;
// Rows of all experts together that are one region's work; more, and an expert has enough alone.
constexpr int64_t kMaxExpertRows = 256;

// The product of a call whose output begins with row `start`.
template <typename T>
Product product_of(const GemmArgs& g, int64_t start) {
  char* out = static_cast<char*>(g.out);
  out += start * g.out_stride * static_cast<int64_t>(g.epilogue == kFloatOut ? 4 : sizeof(T));
  Product product = plain_product(g.w, g.bias, out, g.out_stride, g.n, g.k);
  product.gated = g.epilogue == kGateMul;
  product.gelu = g.epilogue == kGelu;
  product.gate = g.gate;
  return product;
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
    const Product product = product_of<T>(g, start);
    parallel_for(chunks * layout.groups, [&](int64_t item) {
      const int64_t chunk = item / layout.groups;
      const int64_t first = m * chunk / chunks, last = m * (chunk + 1) / chunks;
      const int64_t panel = item % layout.groups * layout.group;
      if (g.epilogue == kFloatOut) {
        multiply_group<Form, T, float>(product, layout, packed, m * S::kLda, first, last, panel);
      } else {
        multiply_group<Form, T, T>(product, layout, packed, m * S::kLda, first, last, panel);
      }
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
    multiply_group<Form, T, T>(product_of<T>(g, 0), layout, packed, e.m * S::kLda, now.first,
                               now.last, item % layout.groups * layout.group);
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
