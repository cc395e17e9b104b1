// What the kernels of every instruction set agree on: element types, argument blocks, the table of
// entry points. Includes nothing heavy and defines no function with a body.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vllm_cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Values are shared with vllm/_extension.py.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Columns of a panel of packed weights; see gemm.cpp for the layout.
constexpr int kPanel = 32;

enum Epilogue : int { kNone = 0, kGateMul = 1, kFloatOut = 2, kGelu = 3 };

// Values are shared with vllm/_extension.py. kSwigluOai: (up + 1) * gate * sigmoid(alpha * gate),
// the gate at most `limit`, up within it on both sides. kClampedSilu: silu(gate) * up, so limited.
enum Gate : int { kSilu = 0, kGeluTanh = 1, kSwigluOai = 2, kClampedSilu = 3 };

// out (m, n) = x (m, k) @ w.T (+ bias). Strides in elements. With kGateMul, w has 2 * n rows, gate
// over up, n is a multiple of kPanel, and out = gate(x @ gate.T) * (x @ up.T). With kFloatOut, out
// is of floats, whatever the dtype of the others. With kGelu, out is the GELU of the sums.
struct GemmArgs {
  const void* x;
  int64_t x_stride;
  const void* w;
  const void* bias;
  void* out;
  int64_t out_stride;
  int64_t m, n, k;
  int dtype;
  int epilogue;
  int gate = kSilu;  // without numbers of its own
};

// Products of runs of rows with a weight each: counts[0] rows of x with weights[0], and so on; in
// sum m. All weights are alike; `bias` is (num_experts, n) or null. Otherwise as GemmArgs.
struct ExpertsArgs {
  const void* x;
  int64_t x_stride;
  const void* const* weights;
  const int64_t* counts;
  int64_t num_experts;
  const void* bias;
  void* out;
  int64_t out_stride;
  int64_t m, n, k;
  int dtype;
  int epilogue;
};

// Values are shared with vllm/_moe_op.py.
enum Scoring : int { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

// A mixture of gated experts and how tokens find theirs. Weights are packed, gate_up (2 * inner,
// hidden) and down (hidden, inner) of each expert, inner a multiple of kPanel; biases (num_experts,
// 2 * inner) and (num_experts, hidden) of the weights' dtype may be null, as may the correction of
// the choice, (num_experts,). Every field has eight bytes: Python packs them one after another.
struct MoeLayer {
  int64_t num_experts, top_k, scoring, renormalize, num_groups, topk_group;
  double scaling;
  const float* correction;
  int64_t hidden_size, inner_size, dtype, gate;
  double alpha, limit;
  const void* const* gate_up;
  const void* const* down;
  const void *gate_up_bias, *down_bias;
  int64_t weigh_input;
};

// Logits (num_tokens, num_experts) are of floats or of the layer's dtype. `chosen` (num_tokens,
// top_k), or null, are experts that were chosen already. Strides in elements.
struct MoeArgs {
  const MoeLayer* layer;
  const void* x;
  int64_t x_stride;
  const void* logits;
  int64_t logits_stride;
  int logits_dtype;
  const int64_t* chosen;
  void* out;
  int64_t out_stride;
  int64_t num_tokens;
};

struct PackArgs {
  const void* src;
  int64_t src_stride;
  void* packed;
  int64_t n, k;
  int dtype;
};

struct EmbeddingArgs {
  const int64_t* ids;
  int64_t num_ids;
  const void* packed;
  void* out;
  int64_t n, k;
  int dtype;
};

// What the bytes of a cache say; values are the codes of vllm/v1/attention/ops/kv_formats.py.
enum CacheFormat : int {
  kPlainCache = 0,
  kE4M3 = 1,
  kE5M2 = 2,
  kInt8PerHead = 3,
  kE4M3PerHead = 4,
  kInt4PerHead = 5,
  kNvfp4 = 6,
};

// A cache of single bytes, other than kPlainCache; its strides and offsets count bytes. Scales of
// kNvfp4 lie scale_offset behind the block's start, at strides of their own.
struct QuantisedCache {
  int format = kPlainCache;
  float k_scale = 1, v_scale = 1;  // of the layer; 1 for formats with a scale per head
  int64_t value_offset = 0;        // from a key to its value, and from its scales to theirs
  int64_t scale_offset = 0, scale_head_stride = 0, scale_token_stride = 0;
};

// Attention of R requests over the paged cache (B, K, N, C). Strides in elements. Of the content of
// a (head, token), the first head_size elements are its key; its value is value_size elements from
// value_offset on: behind the key as a rule, within it where both are one latent.
struct AttentionArgs {
  const void* query;
  int64_t query_token_stride, query_head_stride;
  void* out;
  int64_t out_token_stride, out_head_stride;
  const void* cache;
  int64_t cache_block_stride, cache_head_stride, cache_token_stride;
  const int32_t* query_start;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;
  const float* alibi_slopes;
  const float* sinks;
  int64_t num_requests, num_heads, num_kv_heads, head_size, block_size;
  int64_t value_offset, value_size;
  float scale, soft_cap;
  int64_t window;
  int causal;
  int query_dtype, cache_dtype;
  QuantisedCache quantised;  // value_offset above counts floats of a widened content then
};

// RoPE on query (in place) and key, and the store of key and value. `positions` null: no RoPE;
// `cache` null: key is rotated in place and nothing is stored. Strides in elements.
struct RopeStoreArgs {
  const int64_t* positions;
  const void* cos_sin;
  int64_t cos_sin_stride;
  int64_t rotary_dim;
  int is_neox;
  int cos_sin_dtype;
  void* query;
  int64_t query_token_stride, query_head_stride, num_heads;
  void* key;
  int64_t key_token_stride, key_head_stride;
  const void* value;
  int64_t value_token_stride, value_head_stride, num_kv_heads;
  void* cache;
  int64_t cache_block_stride, cache_head_stride, cache_token_stride;
  const int64_t* slots;
  int64_t num_slots;
  int64_t num_tokens, head_size, block_size;
  int dtype, cache_dtype;
  int64_t max_position;
  QuantisedCache quantised;
};

// RMSNorm of rows (outer, inner): strides in elements, the last dim is dense. With `residual`
// (rows of the same shape, stride residual_stride): residual += x first, and that is normed.
struct NormArgs {
  const void* x;
  void* out;
  void* residual;
  const void* weight;
  int64_t outer, inner, size;
  int64_t x_outer_stride, x_inner_stride;
  int64_t out_outer_stride, out_inner_stride;
  int64_t residual_stride;
  float eps;
  int dtype;
  bool float_weight = false;  // whatever the rows are
};

// Rows of gate beside up, `size` each -> gate(x) * up.
struct SiluMulArgs {
  const void* x;
  int64_t x_stride;
  void* out;
  int64_t rows, size;
  int dtype;
  int gate = kSilu;
  float alpha = 0, limit = 0;
};

// Layer norm of rows of x, or of x + residual: weight and bias (size,). Out is dense; strides in
// elements.
struct LayerNormArgs {
  const void* x;
  const void* residual;
  const void *weight, *bias;
  void* out;
  int64_t x_stride, residual_stride;
  int64_t rows, size;
  float eps;
  int dtype;
};

// Hyper-connections of `count` residual streams: streams (T, count, size) -> what a branch takes
// (T, size), its weights in the streams (T, count) and the streams' among each other (T, count,
// count), floats. `fn` (count * (2 + count), count * size), `base` (count * (2 + count),) and
// `scale` (3,) are floats.
struct StreamsArgs {
  const void* streams;
  int64_t token_stride, stream_stride;
  const float *fn, *base, *scale;
  void* branch;
  float *given, *mix;
  int64_t num_tokens, count, size, iterations;
  float eps, norm_eps;
  int dtype;
};

// The streams after a branch: out (T, count, size), stream n the sum over i of mix[i][n] * stream i
// and given[n] * branch.
struct JoinArgs {
  const void* branch;
  int64_t branch_stride;
  const void* streams;
  int64_t token_stride, stream_stride;
  const float *given, *mix;
  void* out;
  int64_t num_tokens, count, size;
  int dtype;
};

struct ArgmaxArgs {
  const void* x;
  int64_t x_stride;
  int64_t* out;
  int64_t rows, size;
  int dtype;
};

// What operators on states share. Request r has the segments [request_starts[r], r + 1), segment s
// the tokens [token_starts[s], s + 1); a request continues the state in block sources[r] (-1: zeros)
// and the state after segment s goes to block targets[s]. Strides in elements.
struct StateArgs {
  const int32_t* token_starts;
  const int32_t* request_starts;
  const int32_t* sources;
  const int32_t* targets;
  int64_t num_requests, num_tokens;
  void* state;
  int64_t state_block_stride;
  int dtype, state_dtype;
};

// Depthwise convolution: out (T, channels) dense, weight (kernel, channels) and bias in float.
struct ConvArgs : StateArgs {
  int64_t state_step_stride, state_channel_stride;
  const void* x;
  int64_t x_stride;
  void* out;
  const float* weight;
  const float* bias;
  int64_t channels, kernel;
  int silu;
};

// Mamba 1: x, dt, z (T, channels), b, c (T, state_size), a (channels, state_size), state (channels,
// state_size) of a block dense. `z` and `dt_bias` may be null.
struct ScanArgs : StateArgs {
  const void *x, *dt, *z, *b, *c;
  int64_t x_stride, dt_stride, z_stride, b_stride, c_stride;
  void* out;
  const float *a, *d, *dt_bias;
  int64_t channels, state_size;
};

// Mamba 2: x (T, num_heads * head_dim), dt (T, num_heads), b, c (T, num_groups * state_size), state
// (num_heads, head_dim, state_size) of a block dense.
struct SsdArgs : StateArgs {
  const void *x, *dt, *b, *c;
  int64_t x_stride, dt_stride, b_stride, c_stride;
  void* out;
  const float *a, *d, *dt_bias;
  float dt_min, dt_max;
  int64_t num_heads, head_dim, num_groups, state_size;
};

// RMSNorm by groups of x * silu(gate), or of x and then gated; rows of `size`, out is dense.
struct GatedNormArgs {
  const void* x;
  int64_t x_stride;
  const void* gate;
  int64_t gate_stride;
  const float* weight;
  void* out;
  int64_t rows, size, num_groups;
  float eps;
  int norm_before_gate;
  int dtype;
};

// A pre-norm decoder layer: what a model of the Llama family does between two residual sums.
// Weights are packed; norms and biases are plain; null means there is none. Every field has eight
// bytes: Python packs them one after another (vllm/_decoder_layer_op.py). With the last two norms a
// branch is normed before it is added, too.
struct DecoderLayer {
  int64_t hidden_size, inner_size, num_heads, num_kv_heads, head_size, dtype;
  double eps;
  const void *input_norm, *post_norm, *query_norm, *key_norm;
  const void *qkv, *qkv_bias, *output, *output_bias;
  const void *gate_up, *gate_up_bias, *down, *down_bias;
  const void* cos_sin;
  int64_t cos_sin_stride, rotary_dim, max_position, is_neox, cos_sin_dtype;
  const float *alibi_slopes, *sinks;
  double scale, soft_cap;
  int64_t window;
  void* cache;
  int64_t cache_block_stride, cache_head_stride, cache_token_stride, block_size, cache_dtype;
  int64_t format;
  double k_scale, v_scale;
  int64_t quantised_value_offset, scale_offset, scale_head_stride, scale_token_stride;
  const void *branch_norm, *mlp_branch_norm;
  int64_t gate, float_norms;
};

// What the layers of a step share. `hidden` (T, hidden_size) is the last branch's output if
// has_branch, and becomes the last layer's; `residual` is the stream that branches are added to.
struct DecoderStep {
  void* hidden;
  int has_branch;
  void* residual;
  int64_t num_tokens;
  const int64_t* positions;
  const int64_t* slots;
  int64_t num_slots;
  const int32_t *query_start, *seq_lens, *block_table;
  int64_t block_table_stride, num_requests;
  int causal;
};

// Gated delta rule and lightning attention over states (B, heads, Dv, Dk); formulas in
// linear_attention.cpp. Strides in elements, last dims are dense. Segments as StateSegments in
// vllm/_torch_state_ops.py.
struct LinearAttentionArgs {
  const void* query;
  int64_t query_token_stride, query_head_stride;
  const void* key;
  int64_t key_token_stride, key_head_stride;
  const void* value;
  int64_t value_token_stride, value_head_stride;
  const void* gate;  // (T, heads) or (T, heads, Dk), or null: a token's decay is exp(-rate), else
  int64_t gate_stride;
  const void* beta;  // (T, heads) before its sigmoid, or null: no delta rule
  int64_t beta_stride;
  const float* rates;   // (heads,)
  const float* biases;  // as a token's gates: exp(-rate * softplus(gate + bias)); null without
  void* out;            // (T, heads, Dv)
  int64_t out_token_stride;
  void* state;
  int64_t state_block_stride, state_head_stride;
  const int32_t *token_starts, *request_starts, *sources, *targets;
  int64_t num_tokens, num_requests, num_heads, num_key_heads, key_size, value_size;
  float scale;     // of queries
  bool normalize;  // queries and keys to length one
  bool channel_gates;  // a gate for each number of a key; there is beta then
  int dtype, state_dtype;
};

struct Kernels {
  const char* name;
  void (*gemm)(const GemmArgs&);
  void (*experts)(const ExpertsArgs&);
  void (*moe)(const MoeArgs&);
  void (*pack)(const PackArgs&);
  void (*unpack)(const PackArgs&);
  void (*embedding)(const EmbeddingArgs&);
  void (*attention)(const AttentionArgs&);
  void (*rope_store)(const RopeStoreArgs&);
  void (*rms_norm)(const NormArgs&);
  void (*silu_mul)(const SiluMulArgs&);
  void (*layer_norm)(const LayerNormArgs&);
  void (*streams)(const StreamsArgs&);
  void (*join_streams)(const JoinArgs&);
  void (*argmax)(const ArgmaxArgs&);
  void (*causal_conv1d)(const ConvArgs&);
  void (*selective_scan)(const ScanArgs&);
  void (*ssd_scan)(const SsdArgs&);
  void (*gated_rms_norm)(const GatedNormArgs&);
  void (*linear_attention)(const LinearAttentionArgs&);
};

// Bytes of a packed (n, k) weight.
size_t packed_bytes(int64_t n, int64_t k, int dtype);

// Scratch memory of the calling thread, 64-byte aligned, valid until its next request.
void* thread_scratch(size_t bytes);

// Scratch memory of a call, shared by its threads, 64-byte aligned; a buffer that is kept if one
// is free, else the call's own.
class SharedScratch {
 public:
  explicit SharedScratch(size_t bytes);
  ~SharedScratch();
  SharedScratch(const SharedScratch&) = delete;
  SharedScratch& operator=(const SharedScratch&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
  int slot_;
};

}  // namespace vllm_cpu
