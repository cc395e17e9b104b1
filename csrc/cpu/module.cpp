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

  // The next arguments, each as the type of its field asks: an address, a whole number, a real one.
  template <typename... Fields>
  void read(Fields&... fields) {
    (read_one(fields), ...);
  }

  int64_t number() {
    if (!ok_) return 0;
    const long long value = PyLong_AsLongLong(args_[next_++]);
    if (value == -1 && PyErr_Occurred()) ok_ = false;
    return value;
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
  template <typename T>
  void read_one(T*& field) {
    field = reinterpret_cast<T*>(static_cast<intptr_t>(number()));
  }

  void read_one(int64_t& field) { field = number(); }
  void read_one(int& field) { field = static_cast<int>(number()); }
  void read_one(bool& field) { field = number() != 0; }

  void read_one(float& field) {
    field = 0;
    if (!ok_) return;
    const double value = PyFloat_AsDouble(args_[next_++]);
    if (value == -1.0 && PyErr_Occurred()) ok_ = false;
    field = static_cast<float>(value);
  }

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
  r.read(q.format, q.k_scale, q.v_scale, q.value_offset, q.scale_offset, q.scale_head_stride,
         q.scale_token_stride);
  return q;
}

#define ENTRY(name) PyObject* name(PyObject*, PyObject* const* argv, Py_ssize_t argc)

ENTRY(gemm) {
  Reader r(argv, argc, 12);
  GemmArgs a;
  r.read(a.x, a.x_stride, a.w, a.bias, a.out, a.out_stride, a.m, a.n, a.k, a.dtype, a.epilogue,
         a.gate);
  return run(r, kernels().gemm, a);
}

ENTRY(experts) {
  Reader r(argv, argc, 13);
  ExpertsArgs a;
  r.read(a.x, a.x_stride, a.weights, a.counts, a.num_experts, a.bias, a.out, a.out_stride, a.m, a.n,
         a.k, a.dtype, a.epilogue);
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
  r.read(a.x, a.x_stride, a.logits, a.logits_stride, a.logits_dtype, a.chosen, a.out, a.out_stride,
         a.num_tokens);
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
  r.read(a.src, a.src_stride, a.packed, a.n, a.k, a.dtype);
  return run(r, kernel, a);
}

ENTRY(pack) { return move_weight(argv, argc, kernels().pack); }
ENTRY(unpack) { return move_weight(argv, argc, kernels().unpack); }

ENTRY(embedding) {
  Reader r(argv, argc, 7);
  EmbeddingArgs a;
  r.read(a.ids, a.num_ids, a.packed, a.out, a.n, a.k, a.dtype);
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
  r.read(a.query, a.query_token_stride, a.query_head_stride, a.out, a.out_token_stride,
         a.out_head_stride, a.cache, a.cache_block_stride, a.cache_head_stride,
         a.cache_token_stride, a.query_start, a.seq_lens, a.block_table, a.block_table_stride,
         a.alibi_slopes, a.sinks, a.num_requests, a.num_heads, a.num_kv_heads, a.head_size,
         a.block_size, a.value_offset, a.value_size, a.scale, a.soft_cap, a.window, a.causal,
         a.query_dtype, a.cache_dtype);
  a.quantised = quantised_cache(r);
  return run(r, kernels().attention, a);
}

ENTRY(rope_store) {
  Reader r(argv, argc, 36);
  RopeStoreArgs a;
  r.read(a.positions, a.cos_sin, a.cos_sin_stride, a.rotary_dim, a.is_neox, a.cos_sin_dtype,
         a.query, a.query_token_stride, a.query_head_stride, a.num_heads, a.key, a.key_token_stride,
         a.key_head_stride, a.value, a.value_token_stride, a.value_head_stride, a.num_kv_heads,
         a.cache, a.cache_block_stride, a.cache_head_stride, a.cache_token_stride, a.slots,
         a.num_slots, a.num_tokens, a.head_size, a.block_size, a.dtype, a.cache_dtype,
         a.max_position);
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
  r.read(a.step.hidden, a.step.has_branch, a.step.residual, a.step.num_tokens, a.step.positions,
         a.step.slots, a.step.num_slots, a.step.query_start, a.step.seq_lens, a.step.block_table,
         a.step.block_table_stride, a.step.num_requests, a.step.causal);
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
  r.read(a.x, a.out, a.residual, a.weight, a.outer, a.inner, a.size, a.x_outer_stride,
         a.x_inner_stride, a.out_outer_stride, a.out_inner_stride, a.residual_stride, a.eps,
         a.dtype);
  return run(r, kernels().rms_norm, a);
}

ENTRY(rms_norm) { return norm(argv, argc, false); }
ENTRY(rms_norm_float_weight) { return norm(argv, argc, true); }

ENTRY(silu_mul) {
  Reader r(argv, argc, 6);
  SiluMulArgs a;
  r.read(a.x, a.x_stride, a.out, a.rows, a.size, a.dtype);
  return run(r, kernels().silu_mul, a);
}

ENTRY(gated_mul) {
  Reader r(argv, argc, 9);
  SiluMulArgs a;
  r.read(a.x, a.x_stride, a.out, a.rows, a.size, a.dtype, a.gate, a.alpha, a.limit);
  return run(r, kernels().silu_mul, a);
}

ENTRY(layer_norm) {
  Reader r(argv, argc, 11);
  LayerNormArgs a;
  r.read(a.x, a.residual, a.weight, a.bias, a.out, a.x_stride, a.residual_stride, a.rows, a.size,
         a.eps, a.dtype);
  return run(r, kernels().layer_norm, a);
}

ENTRY(streams) {
  Reader r(argv, argc, 16);
  StreamsArgs a;
  r.read(a.streams, a.token_stride, a.stream_stride, a.fn, a.base, a.scale, a.branch, a.given,
         a.mix, a.num_tokens, a.count, a.size, a.iterations, a.eps, a.norm_eps, a.dtype);
  return run(r, kernels().streams, a);
}

ENTRY(join_streams) {
  Reader r(argv, argc, 12);
  JoinArgs a;
  r.read(a.branch, a.branch_stride, a.streams, a.token_stride, a.stream_stride, a.given, a.mix,
         a.out, a.num_tokens, a.count, a.size, a.dtype);
  return run(r, kernels().join_streams, a);
}

ENTRY(argmax) {
  Reader r(argv, argc, 6);
  ArgmaxArgs a;
  r.read(a.x, a.x_stride, a.out, a.rows, a.size, a.dtype);
  return run(r, kernels().argmax, a);
}

ENTRY(move_pieces) {
  Reader r(argv, argc, 8);
  MoveArgs a;
  r.read(a.source, a.target, a.source_starts, a.target_starts, a.units, a.pieces, a.num_pieces,
         a.streams);
  return run(r, vllm_cpu::move_pieces, a);
}

ENTRY(linear_attention) {
  Reader r(argv, argc, 35);
  LinearAttentionArgs a;
  r.read(a.query, a.query_token_stride, a.query_head_stride, a.key, a.key_token_stride,
         a.key_head_stride, a.value, a.value_token_stride, a.value_head_stride, a.gate,
         a.gate_stride, a.beta, a.beta_stride, a.rates, a.biases, a.out, a.out_token_stride,
         a.state, a.state_block_stride, a.state_head_stride, a.token_starts, a.request_starts,
         a.sources, a.targets, a.num_tokens, a.num_requests, a.num_heads, a.num_key_heads,
         a.key_size, a.value_size, a.scale, a.normalize, a.channel_gates, a.dtype, a.state_dtype);
  return run(r, kernels().linear_attention, a);
}

// The arguments that operators on states begin with: 10 of them.
void read_state(Reader& r, StateArgs& a) {
  r.read(a.token_starts, a.request_starts, a.sources, a.targets, a.num_requests, a.num_tokens,
         a.state, a.state_block_stride, a.dtype, a.state_dtype);
}

ENTRY(causal_conv1d) {
  Reader r(argv, argc, 20);
  ConvArgs a;
  read_state(r, a);
  r.read(a.state_step_stride, a.state_channel_stride, a.x, a.x_stride, a.out, a.weight, a.bias,
         a.channels, a.kernel, a.silu);
  return run(r, kernels().causal_conv1d, a);
}

ENTRY(selective_scan) {
  Reader r(argv, argc, 26);
  ScanArgs a;
  read_state(r, a);
  r.read(a.x, a.x_stride, a.dt, a.dt_stride, a.z, a.z_stride, a.b, a.b_stride, a.c, a.c_stride,
         a.out, a.a, a.d, a.dt_bias, a.channels, a.state_size);
  return run(r, kernels().selective_scan, a);
}

ENTRY(ssd_scan) {
  Reader r(argv, argc, 28);
  SsdArgs a;
  read_state(r, a);
  r.read(a.x, a.x_stride, a.dt, a.dt_stride, a.b, a.b_stride, a.c, a.c_stride, a.out, a.a, a.d,
         a.dt_bias, a.dt_min, a.dt_max, a.num_heads, a.head_dim, a.num_groups, a.state_size);
  return run(r, kernels().ssd_scan, a);
}

ENTRY(gated_rms_norm) {
  Reader r(argv, argc, 12);
  GatedNormArgs a;
  r.read(a.x, a.x_stride, a.gate, a.gate_stride, a.weight, a.out, a.rows, a.size, a.num_groups,
         a.eps, a.norm_before_gate, a.dtype);
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
