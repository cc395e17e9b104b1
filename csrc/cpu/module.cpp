// The Python module vllm._C: entry points that take addresses, sizes and strides as whole numbers.
//
// Nothing of torch's is included, so one build works with every torch; the operators of vllm/_*.py
// check dtypes and shapes before they pass addresses. Uses Python's limited API only.
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>
#include <vector>

#include "decoder_layer.h"
#include "dispatch.h"
#include "moves.h"
#include "pool.h"
#include "sha256.h"

namespace {

using namespace vllm_cpu;

// Reads the arguments of a call one after another; after a mistake, `ok` is false and a Python
// exception is set.
class Reader {
 public:
  Reader(PyObject* const* args, Py_ssize_t count, Py_ssize_t expected)
      : args_(args), ok_(count == expected) {
    if (!ok_) PyErr_Format(PyExc_TypeError, "%zd arguments expected, %zd given", expected, count);
  }

  int64_t number() {
    if (!ok_) return 0;
    const long long value = PyLong_AsLongLong(args_[next_++]);
    if (value == -1 && PyErr_Occurred()) ok_ = false;
    return value;
  }

  template <typename T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<intptr_t>(number()));
  }

  float real() {
    if (!ok_) return 0;
    const double value = PyFloat_AsDouble(args_[next_++]);
    if (value == -1.0 && PyErr_Occurred()) ok_ = false;
    return static_cast<float>(value);
  }

  // A bytes object, which lives as long as the call.
  const void* bytes(int64_t& size) {
    if (!ok_) return nullptr;
    char* data = nullptr;
    Py_ssize_t length = 0;
    if (PyBytes_AsStringAndSize(args_[next_++], &data, &length) != 0) ok_ = false;
    size = length;
    return data;
  }

  PyObject* object() { return ok_ ? args_[next_++] : nullptr; }

  bool ok() const { return ok_; }

 private:
  PyObject* const* args_;
  Py_ssize_t next_ = 0;
  bool ok_;
};

// Runs `kernel` on `args` without the interpreter's lock.
template <typename Args>
PyObject* run(const Reader& reader, void (*kernel)(const Args&), const Args& args) {
  if (!reader.ok()) return nullptr;
  bool out_of_memory = false;
  Py_BEGIN_ALLOW_THREADS
  try {
    kernel(args);
  } catch (const std::bad_alloc&) {
    out_of_memory = true;
  }
  Py_END_ALLOW_THREADS
  if (out_of_memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// False, with an exception set, if a position has no row in the table of cosines and sines.
bool positions_fit(const Reader& r, const int64_t* positions, int64_t count, int64_t limit) {
  for (int64_t i = 0; r.ok() && positions && i < count; ++i) {
    if (positions[i] < 0 || positions[i] >= limit) {
      PyErr_Format(PyExc_IndexError, "position %lld is not below %lld",
                   static_cast<long long>(positions[i]), static_cast<long long>(limit));
      return false;
    }
  }
  return true;
}

QuantisedCache quantised_cache(Reader& r) {
  QuantisedCache q;
  q.format = static_cast<int>(r.number());
  q.k_scale = r.real();
  q.v_scale = r.real();
  q.value_offset = r.number();
  q.scale_offset = r.number();
  q.scale_head_stride = r.number();
  q.scale_token_stride = r.number();
  return q;
}

#define ENTRY(name) PyObject* name(PyObject*, PyObject* const* argv, Py_ssize_t argc)

ENTRY(gemm) {
  Reader r(argv, argc, 12);
  GemmArgs a;
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.w = r.pointer<void>();
  a.bias = r.pointer<void>();
  a.out = r.pointer<void>();
  a.out_stride = r.number();
  a.m = r.number();
  a.n = r.number();
  a.k = r.number();
  a.dtype = static_cast<int>(r.number());
  a.epilogue = static_cast<int>(r.number());
  a.gate = static_cast<int>(r.number());
  return run(r, kernels().gemm, a);
}

ENTRY(experts) {
  Reader r(argv, argc, 13);
  ExpertsArgs a;
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.weights = r.pointer<const void*>();
  a.counts = r.pointer<int64_t>();
  a.num_experts = r.number();
  a.bias = r.pointer<void>();
  a.out = r.pointer<void>();
  a.out_stride = r.number();
  a.m = r.number();
  a.n = r.number();
  a.k = r.number();
  a.dtype = static_cast<int>(r.number());
  a.epilogue = static_cast<int>(r.number());
  if (!r.ok()) return nullptr;
  int64_t rows = 0;
  bool negative = false;
  for (int64_t i = 0; i < a.num_experts; ++i) {
    negative |= a.counts[i] < 0;
    rows += a.counts[i];
  }
  if (negative || rows != a.m) {
    PyErr_Format(PyExc_ValueError, "the experts' rows are %lld in sum, not %lld",
                 static_cast<long long>(rows), static_cast<long long>(a.m));
    return nullptr;
  }
  return run(r, kernels().experts, a);
}

// False, with an exception set, if one of `count` experts is not there.
bool experts_exist(const int64_t* experts, int64_t count, int64_t num_experts) {
  for (int64_t i = 0; experts && i < count; ++i) {
    if (experts[i] < 0 || experts[i] >= num_experts) {
      PyErr_Format(PyExc_IndexError, "expert %lld is not below %lld",
                   static_cast<long long>(experts[i]), static_cast<long long>(num_experts));
      return false;
    }
  }
  return true;
}

ENTRY(moe) {
  Reader r(argv, argc, 10);
  MoeArgs a;
  int64_t bytes = 0;
  a.layer = static_cast<const MoeLayer*>(r.bytes(bytes));
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.logits = r.pointer<void>();
  a.logits_stride = r.number();
  a.logits_dtype = static_cast<int>(r.number());
  a.chosen = r.pointer<int64_t>();
  a.out = r.pointer<void>();
  a.out_stride = r.number();
  a.num_tokens = r.number();
  if (!r.ok()) return nullptr;
  if (bytes != static_cast<int64_t>(sizeof(MoeLayer))) {
    return PyErr_Format(PyExc_ValueError, "experts take %zu bytes", sizeof(MoeLayer));
  }
  const int64_t pairs = a.num_tokens * a.layer->top_k;
  if (!experts_exist(a.chosen, pairs, a.layer->num_experts)) return nullptr;
  return run(r, kernels().moe, a);
}

PyObject* move_weight(PyObject* const* argv, Py_ssize_t argc, void (*kernel)(const PackArgs&)) {
  Reader r(argv, argc, 6);
  PackArgs a;
  a.src = r.pointer<void>();
  a.src_stride = r.number();
  a.packed = r.pointer<void>();
  a.n = r.number();
  a.k = r.number();
  a.dtype = static_cast<int>(r.number());
  return run(r, kernel, a);
}

ENTRY(pack) { return move_weight(argv, argc, kernels().pack); }
ENTRY(unpack) { return move_weight(argv, argc, kernels().unpack); }

ENTRY(embedding) {
  Reader r(argv, argc, 7);
  EmbeddingArgs a;
  a.ids = r.pointer<int64_t>();
  a.num_ids = r.number();
  a.packed = r.pointer<void>();
  a.out = r.pointer<void>();
  a.n = r.number();
  a.k = r.number();
  a.dtype = static_cast<int>(r.number());
  for (int64_t i = 0; r.ok() && i < a.num_ids; ++i) {
    if (a.ids[i] < 0 || a.ids[i] >= a.n) {
      return PyErr_Format(PyExc_IndexError, "token id %lld is not below %lld",
                          static_cast<long long>(a.ids[i]), static_cast<long long>(a.n));
    }
  }
  return run(r, kernels().embedding, a);
}

ENTRY(attention) {
  Reader r(argv, argc, 36);
  AttentionArgs a;
  a.query = r.pointer<void>();
  a.query_token_stride = r.number();
  a.query_head_stride = r.number();
  a.out = r.pointer<void>();
  a.out_token_stride = r.number();
  a.out_head_stride = r.number();
  a.cache = r.pointer<void>();
  a.cache_block_stride = r.number();
  a.cache_head_stride = r.number();
  a.cache_token_stride = r.number();
  a.query_start = r.pointer<int32_t>();
  a.seq_lens = r.pointer<int32_t>();
  a.block_table = r.pointer<int32_t>();
  a.block_table_stride = r.number();
  a.alibi_slopes = r.pointer<float>();
  a.sinks = r.pointer<float>();
  a.num_requests = r.number();
  a.num_heads = r.number();
  a.num_kv_heads = r.number();
  a.head_size = r.number();
  a.block_size = r.number();
  a.value_offset = r.number();
  a.value_size = r.number();
  a.scale = r.real();
  a.soft_cap = r.real();
  a.window = r.number();
  a.causal = static_cast<int>(r.number());
  a.query_dtype = static_cast<int>(r.number());
  a.cache_dtype = static_cast<int>(r.number());
  a.quantised = quantised_cache(r);
  return run(r, kernels().attention, a);
}

ENTRY(rope_store) {
  Reader r(argv, argc, 36);
  RopeStoreArgs a;
  a.positions = r.pointer<int64_t>();
  a.cos_sin = r.pointer<void>();
  a.cos_sin_stride = r.number();
  a.rotary_dim = r.number();
  a.is_neox = static_cast<int>(r.number());
  a.cos_sin_dtype = static_cast<int>(r.number());
  a.query = r.pointer<void>();
  a.query_token_stride = r.number();
  a.query_head_stride = r.number();
  a.num_heads = r.number();
  a.key = r.pointer<void>();
  a.key_token_stride = r.number();
  a.key_head_stride = r.number();
  a.value = r.pointer<void>();
  a.value_token_stride = r.number();
  a.value_head_stride = r.number();
  a.num_kv_heads = r.number();
  a.cache = r.pointer<void>();
  a.cache_block_stride = r.number();
  a.cache_head_stride = r.number();
  a.cache_token_stride = r.number();
  a.slots = r.pointer<int64_t>();
  a.num_slots = r.number();
  a.num_tokens = r.number();
  a.head_size = r.number();
  a.block_size = r.number();
  a.dtype = static_cast<int>(r.number());
  a.cache_dtype = static_cast<int>(r.number());
  a.max_position = r.number();
  a.quantised = quantised_cache(r);
  if (!positions_fit(r, a.positions, a.num_tokens, a.max_position)) return nullptr;
  return run(r, kernels().rope_store, a);
}

struct Layers {
  const DecoderLayer* layers;
  int64_t count;
  DecoderStep step;
};

ENTRY(decoder_layers) {
  Reader r(argv, argc, 14);
  Layers a;
  int64_t bytes = 0;
  a.layers = static_cast<const DecoderLayer*>(r.bytes(bytes));
  a.count = bytes / static_cast<int64_t>(sizeof(DecoderLayer));
  a.step.hidden = r.pointer<void>();
  a.step.has_branch = static_cast<int>(r.number());
  a.step.residual = r.pointer<void>();
  a.step.num_tokens = r.number();
  a.step.positions = r.pointer<int64_t>();
  a.step.slots = r.pointer<int64_t>();
  a.step.num_slots = r.number();
  a.step.query_start = r.pointer<int32_t>();
  a.step.seq_lens = r.pointer<int32_t>();
  a.step.block_table = r.pointer<int32_t>();
  a.step.block_table_stride = r.number();
  a.step.num_requests = r.number();
  a.step.causal = static_cast<int>(r.number());
  if (r.ok() && bytes % static_cast<int64_t>(sizeof(DecoderLayer)) != 0) {
    return PyErr_Format(PyExc_ValueError, "a layer takes %zu bytes", sizeof(DecoderLayer));
  }
  for (int64_t i = 0; r.ok() && i < a.count; ++i) {
    // Layers share one table as a rule: positions are looked through once for each.
    const bool seen = i > 0 && a.layers[i].max_position == a.layers[i - 1].max_position;
    if (!seen && !positions_fit(r, a.step.positions, a.step.num_tokens, a.layers[i].max_position)) {
      return nullptr;
    }
  }
  return run<Layers>(
      r, [](const Layers& l) { vllm_cpu::decoder_layers(l.layers, l.count, l.step); }, a);
}

PyObject* norm(PyObject* const* argv, Py_ssize_t argc, bool float_weight) {
  Reader r(argv, argc, 14);
  NormArgs a;
  a.float_weight = float_weight;
  a.x = r.pointer<void>();
  a.out = r.pointer<void>();
  a.residual = r.pointer<void>();
  a.weight = r.pointer<void>();
  a.outer = r.number();
  a.inner = r.number();
  a.size = r.number();
  a.x_outer_stride = r.number();
  a.x_inner_stride = r.number();
  a.out_outer_stride = r.number();
  a.out_inner_stride = r.number();
  a.residual_stride = r.number();
  a.eps = r.real();
  a.dtype = static_cast<int>(r.number());
  return run(r, kernels().rms_norm, a);
}

ENTRY(rms_norm) { return norm(argv, argc, false); }
ENTRY(rms_norm_float_weight) { return norm(argv, argc, true); }

ENTRY(silu_mul) {
  Reader r(argv, argc, 6);
  SiluMulArgs a;
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.out = r.pointer<void>();
  a.rows = r.number();
  a.size = r.number();
  a.dtype = static_cast<int>(r.number());
  return run(r, kernels().silu_mul, a);
}

ENTRY(gated_mul) {
  Reader r(argv, argc, 9);
  SiluMulArgs a;
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.out = r.pointer<void>();
  a.rows = r.number();
  a.size = r.number();
  a.dtype = static_cast<int>(r.number());
  a.gate = static_cast<int>(r.number());
  a.alpha = r.real();
  a.limit = r.real();
  return run(r, kernels().silu_mul, a);
}

ENTRY(layer_norm) {
  Reader r(argv, argc, 11);
  LayerNormArgs a;
  a.x = r.pointer<void>();
  a.residual = r.pointer<void>();
  a.weight = r.pointer<void>();
  a.bias = r.pointer<void>();
  a.out = r.pointer<void>();
  a.x_stride = r.number();
  a.residual_stride = r.number();
  a.rows = r.number();
  a.size = r.number();
  a.eps = r.real();
  a.dtype = static_cast<int>(r.number());
  return run(r, kernels().layer_norm, a);
}

ENTRY(streams) {
  Reader r(argv, argc, 16);
  StreamsArgs a;
  a.streams = r.pointer<void>();
  a.token_stride = r.number();
  a.stream_stride = r.number();
  a.fn = r.pointer<float>();
  a.base = r.pointer<float>();
  a.scale = r.pointer<float>();
  a.branch = r.pointer<void>();
  a.given = r.pointer<float>();
  a.mix = r.pointer<float>();
  a.num_tokens = r.number();
  a.count = r.number();
  a.size = r.number();
  a.iterations = r.number();
  a.eps = r.real();
  a.norm_eps = r.real();
  a.dtype = static_cast<int>(r.number());
  return run(r, kernels().streams, a);
}

ENTRY(join_streams) {
  Reader r(argv, argc, 12);
  JoinArgs a;
  a.branch = r.pointer<void>();
  a.branch_stride = r.number();
  a.streams = r.pointer<void>();
  a.token_stride = r.number();
  a.stream_stride = r.number();
  a.given = r.pointer<float>();
  a.mix = r.pointer<float>();
  a.out = r.pointer<void>();
  a.num_tokens = r.number();
  a.count = r.number();
  a.size = r.number();
  a.dtype = static_cast<int>(r.number());
  return run(r, kernels().join_streams, a);
}

ENTRY(argmax) {
  Reader r(argv, argc, 6);
  ArgmaxArgs a;
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.out = r.pointer<int64_t>();
  a.rows = r.number();
  a.size = r.number();
  a.dtype = static_cast<int>(r.number());
  return run(r, kernels().argmax, a);
}

ENTRY(move_pieces) {
  Reader r(argv, argc, 8);
  MoveArgs a;
  a.source = r.pointer<char>();
  a.target = r.pointer<char>();
  a.source_starts = r.pointer<int64_t>();
  a.target_starts = r.pointer<int64_t>();
  a.units = r.number();
  a.pieces = r.pointer<Piece>();
  a.num_pieces = r.number();
  a.streams = r.number() != 0;
  return run(r, vllm_cpu::move_pieces, a);
}

ENTRY(linear_attention) {
  Reader r(argv, argc, 35);
  LinearAttentionArgs a;
  a.query = r.pointer<void>();
  a.query_token_stride = r.number();
  a.query_head_stride = r.number();
  a.key = r.pointer<void>();
  a.key_token_stride = r.number();
  a.key_head_stride = r.number();
  a.value = r.pointer<void>();
  a.value_token_stride = r.number();
  a.value_head_stride = r.number();
  a.gate = r.pointer<void>();
  a.gate_stride = r.number();
  a.beta = r.pointer<void>();
  a.beta_stride = r.number();
  a.rates = r.pointer<float>();
  a.biases = r.pointer<float>();
  a.out = r.pointer<void>();
  a.out_token_stride = r.number();
  a.state = r.pointer<void>();
  a.state_block_stride = r.number();
  a.state_head_stride = r.number();
  a.token_starts = r.pointer<int32_t>();
  a.request_starts = r.pointer<int32_t>();
  a.sources = r.pointer<int32_t>();
  a.targets = r.pointer<int32_t>();
  a.num_tokens = r.number();
  a.num_requests = r.number();
  a.num_heads = r.number();
  a.num_key_heads = r.number();
  a.key_size = r.number();
  a.value_size = r.number();
  a.scale = r.real();
  a.normalize = r.number() != 0;
  a.channel_gates = r.number() != 0;
  a.dtype = static_cast<int>(r.number());
  a.state_dtype = static_cast<int>(r.number());
  return run(r, kernels().linear_attention, a);
}

// The arguments that operators on states begin with: 10 of them.
void read_state(Reader& r, StateArgs& a) {
  a.token_starts = r.pointer<int32_t>();
  a.request_starts = r.pointer<int32_t>();
  a.sources = r.pointer<int32_t>();
  a.targets = r.pointer<int32_t>();
  a.num_requests = r.number();
  a.num_tokens = r.number();
  a.state = r.pointer<void>();
  a.state_block_stride = r.number();
  a.dtype = static_cast<int>(r.number());
  a.state_dtype = static_cast<int>(r.number());
}

ENTRY(causal_conv1d) {
  Reader r(argv, argc, 20);
  ConvArgs a;
  read_state(r, a);
  a.state_step_stride = r.number();
  a.state_channel_stride = r.number();
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.out = r.pointer<void>();
  a.weight = r.pointer<float>();
  a.bias = r.pointer<float>();
  a.channels = r.number();
  a.kernel = r.number();
  a.silu = static_cast<int>(r.number());
  return run(r, kernels().causal_conv1d, a);
}

ENTRY(selective_scan) {
  Reader r(argv, argc, 26);
  ScanArgs a;
  read_state(r, a);
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.dt = r.pointer<void>();
  a.dt_stride = r.number();
  a.z = r.pointer<void>();
  a.z_stride = r.number();
  a.b = r.pointer<void>();
  a.b_stride = r.number();
  a.c = r.pointer<void>();
  a.c_stride = r.number();
  a.out = r.pointer<void>();
  a.a = r.pointer<float>();
  a.d = r.pointer<float>();
  a.dt_bias = r.pointer<float>();
  a.channels = r.number();
  a.state_size = r.number();
  return run(r, kernels().selective_scan, a);
}

ENTRY(ssd_scan) {
  Reader r(argv, argc, 28);
  SsdArgs a;
  read_state(r, a);
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.dt = r.pointer<void>();
  a.dt_stride = r.number();
  a.b = r.pointer<void>();
  a.b_stride = r.number();
  a.c = r.pointer<void>();
  a.c_stride = r.number();
  a.out = r.pointer<void>();
  a.a = r.pointer<float>();
  a.d = r.pointer<float>();
  a.dt_bias = r.pointer<float>();
  a.dt_min = r.real();
  a.dt_max = r.real();
  a.num_heads = r.number();
  a.head_dim = r.number();
  a.num_groups = r.number();
  a.state_size = r.number();
  return run(r, kernels().ssd_scan, a);
}

ENTRY(gated_rms_norm) {
  Reader r(argv, argc, 12);
  GatedNormArgs a;
  a.x = r.pointer<void>();
  a.x_stride = r.number();
  a.gate = r.pointer<void>();
  a.gate_stride = r.number();
  a.weight = r.pointer<float>();
  a.out = r.pointer<void>();
  a.rows = r.number();
  a.size = r.number();
  a.num_groups = r.number();
  a.eps = r.real();
  a.norm_before_gate = static_cast<int>(r.number());
  a.dtype = static_cast<int>(r.number());
  return run(r, kernels().gated_rms_norm, a);
}

ENTRY(packed_size) {
  Reader r(argv, argc, 3);
  const int64_t n = r.number();
  const int64_t k = r.number();
  const int dtype = static_cast<int>(r.number());
  if (!r.ok()) return nullptr;
  return PyLong_FromSize_t(packed_bytes(n, k, dtype));
}

// set_threads(count, core, core, ...)
ENTRY(set_threads) {
  constexpr int kMost = 1024;
  int cores[kMost];
  if (argc < 1 || argc > kMost) {
    PyErr_SetString(PyExc_TypeError, "a count and at most 1023 cores expected");
    return nullptr;
  }
  Reader r(argv, argc, argc);
  const int count = static_cast<int>(r.number());
  const int num_cores = static_cast<int>(argc - 1);
  for (int i = 0; i < num_cores; ++i) cores[i] = static_cast<int>(r.number());
  if (!r.ok()) return nullptr;
  set_num_threads(count, cores, num_cores);
  Py_RETURN_NONE;
}

ENTRY(get_threads) {
  (void)argv;
  (void)argc;
  return PyLong_FromLong(num_threads());
}

ENTRY(set_spin) {
  Reader r(argv, argc, 1);
  const int64_t microseconds = r.number();
  if (!r.ok()) return nullptr;
  set_spin_us(microseconds);
  Py_RETURN_NONE;
}

// The items of a list as 32-bit words; false with an exception set where one of them is none.
bool read_words(PyObject* list, std::vector<uint32_t>& words) {
  for (size_t i = 0; i < words.size(); ++i) {
    const unsigned long value = PyLong_AsUnsignedLong(PyList_GetItem(list, i));
    if (value == static_cast<unsigned long>(-1) && PyErr_Occurred()) return false;
    if (value > UINT32_MAX) {
      PyErr_Format(PyExc_OverflowError, "%lu needs more than 32 bits", value);
      return false;
    }
    words[i] = static_cast<uint32_t>(value);
  }
  return true;
}

// sha256_chain(parent, [token id, ...], tokens of a block) -> [digest of each block]
ENTRY(sha256_chain) {
  Reader r(argv, argc, 3);
  int64_t parent_size = 0;
  const auto* parent = static_cast<const uint8_t*>(r.bytes(parent_size));
  PyObject* tokens = r.object();
  const int64_t block_size = r.number();
  if (!r.ok()) return nullptr;
  const Py_ssize_t num_tokens = PyList_Check(tokens) ? PyList_Size(tokens) : -1;
  if (parent_size != kDigestBytes || num_tokens < 0 || block_size <= 0 || !has_sha256()) {
    PyErr_SetString(PyExc_ValueError, "32 bytes, a list and a positive number expected");
    return nullptr;
  }
  const int64_t count = num_tokens / block_size;
  std::vector<uint32_t> words;
  std::vector<uint8_t> digests;
  try {
    words.resize(count * block_size);
    digests.resize(count * kDigestBytes);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  if (!read_words(tokens, words)) return nullptr;
  bool out_of_memory = false;
  Py_BEGIN_ALLOW_THREADS
  try {
    vllm_cpu::sha256_chain(parent, words.data(), block_size, count, digests.data());
  } catch (const std::bad_alloc&) {
    out_of_memory = true;
  }
  Py_END_ALLOW_THREADS
  if (out_of_memory) return PyErr_NoMemory();
  PyObject* list = PyList_New(count);
  for (int64_t i = 0; list && i < count; ++i) {
    const auto* digest = reinterpret_cast<const char*>(digests.data() + i * kDigestBytes);
    PyObject* bytes = PyBytes_FromStringAndSize(digest, kDigestBytes);
    if (!bytes || PyList_SetItem(list, i, bytes) != 0) {
      Py_DECREF(list);
      return nullptr;
    }
  }
  return list;
}

PyObject* sha256_available(PyObject*, PyObject*) { return PyBool_FromLong(has_sha256()); }

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(kernels().name); }

PyObject* isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(num_isas());
  for (int i = 0; list && i < num_isas(); ++i) {
    PyList_SetItem(list, i, PyUnicode_FromString(isa_name(i)));
  }
  return list;
}

PyObject* set_isa(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (!text) return nullptr;
  if (!use_isa(text)) {
    return PyErr_Format(PyExc_ValueError, "this processor has no kernels called %s", text);
  }
  Py_RETURN_NONE;
}

// Python stores every kind of function as one type; the way over void(*)() says that it is meant.
#define FAST(name) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, nullptr}

PyMethodDef methods[] = {
    FAST(gemm),
    FAST(experts),
    FAST(moe),
    FAST(pack),
    FAST(unpack),
    FAST(embedding),
    FAST(attention),
    FAST(decoder_layers),
    FAST(rope_store),
    FAST(rms_norm),
    FAST(rms_norm_float_weight),
    FAST(silu_mul),
    FAST(gated_mul),
    FAST(layer_norm),
    FAST(streams),
    FAST(join_streams),
    FAST(argmax),
    FAST(move_pieces),
    FAST(linear_attention),
    FAST(causal_conv1d),
    FAST(selective_scan),
    FAST(ssd_scan),
    FAST(gated_rms_norm),
    FAST(packed_size),
    FAST(set_threads),
    FAST(get_threads),
    FAST(set_spin),
    FAST(sha256_chain),
    {"has_sha256", sha256_available, METH_NOARGS, nullptr},
    {"isa", isa, METH_NOARGS, nullptr},
    {"isas", isas, METH_NOARGS, nullptr},
    {"set_isa", set_isa, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "vllm._C", nullptr, -1, methods,
                          nullptr,               nullptr,   nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
