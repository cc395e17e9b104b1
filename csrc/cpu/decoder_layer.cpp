// Decoder layers in one call: the same kernels in the same order as the layers' modules run them,
// with the same roundings, without the interpreter's time in between (about 0.1 ms a layer, which
// at one token is a quarter of what reading the weights takes).
#include "decoder_layer.h"

#include "dispatch.h"

namespace vllm_cpu {
namespace {

size_t line(size_t bytes) { return (bytes + 63) & ~size_t{63}; }

class Layer {
 public:
  Layer(const DecoderLayer& layer, const DecoderStep& step)
      : a_(layer), s_(step), k_(kernels()), dtype_(static_cast<int>(layer.dtype)),
        item_(dtype_ == kFloat32 ? 4 : 2) {}

  void run(bool has_branch) const {
    const int64_t t = s_.num_tokens;
    const int64_t heads = a_.num_heads + 2 * a_.num_kv_heads;
    const size_t normed = bytes(t * a_.hidden_size), qkv = bytes(t * heads * a_.head_size);
    const size_t attended = bytes(t * a_.num_heads * a_.head_size);
    const size_t gated = bytes(t * a_.inner_size), wide = fuses() ? 0 : 2 * gated;
    const size_t second = qkv + attended > gated + wide ? qkv + attended : gated + wide;
    SharedScratch scratch(normed + second);
    char* const x = static_cast<char*>(scratch.get());
    char* const y = x + normed;

    norm(has_branch ? s_.hidden : nullptr, a_.input_norm, x);
    product(x, a_.hidden_size, a_.qkv, a_.qkv_bias, y, heads * a_.head_size, kNone);
    attend(y, y + qkv);
    product(y + qkv, a_.num_heads * a_.head_size, a_.output, a_.output_bias, s_.hidden,
            a_.hidden_size, kNone);
    norm_branch(a_.branch_norm);
    norm(s_.hidden, a_.post_norm, x);
    if (fuses()) {
      product(x, a_.hidden_size, a_.gate_up, nullptr, y, a_.inner_size, kGateMul);
    } else {
      product(x, a_.hidden_size, a_.gate_up, a_.gate_up_bias, y + gated, 2 * a_.inner_size, kNone);
      const int gate = static_cast<int>(a_.gate);
      k_.silu_mul({y + gated, 2 * a_.inner_size, y, t, a_.inner_size, dtype_, gate});
    }
    product(y, a_.inner_size, a_.down, a_.down_bias, s_.hidden, a_.hidden_size, kNone);
    norm_branch(a_.mlp_branch_norm);
  }

 private:
  size_t bytes(int64_t elements) const { return line(static_cast<size_t>(elements) * item_); }

  // Gate and up meet in the product's epilogue if they are whole panels.
  bool fuses() const { return a_.inner_size % kPanel == 0 && !a_.gate_up_bias; }

  void norm(void* branch, const void* weight, void* out) const {
    NormArgs n{};
    n.x = branch ? branch : s_.residual;
    n.out = out;
    n.residual = branch ? s_.residual : nullptr;
    n.weight = weight;
    n.outer = s_.num_tokens;
    n.inner = 1;
    n.size = n.x_outer_stride = n.out_outer_stride = n.residual_stride = a_.hidden_size;
    n.eps = static_cast<float>(a_.eps);
    n.dtype = dtype_;
    n.float_weight = a_.float_norms;
    k_.rms_norm(n);
  }

  // Of a branch before it is added, where there is one.
  void norm_branch(const void* weight) const {
    if (!weight) return;
    NormArgs n{};
    n.x = s_.hidden;
    n.out = s_.hidden;
    n.weight = weight;
    n.outer = s_.num_tokens;
    n.inner = 1;
    n.size = n.x_outer_stride = n.out_outer_stride = a_.hidden_size;
    n.eps = static_cast<float>(a_.eps);
    n.dtype = dtype_;
    n.float_weight = a_.float_norms;
    k_.rms_norm(n);
  }

  void head_norm(char* heads, int64_t count, int64_t stride, const void* weight) const {
    NormArgs n{};
    n.x = heads;
    n.out = heads;
    n.weight = weight;
    n.outer = s_.num_tokens;
    n.inner = count;
    n.size = n.x_inner_stride = n.out_inner_stride = a_.head_size;
    n.x_outer_stride = n.out_outer_stride = stride;
    n.eps = static_cast<float>(a_.eps);
    n.dtype = dtype_;
    n.float_weight = a_.float_norms;
    k_.rms_norm(n);
  }

  void product(const void* x, int64_t k, const void* w, const void* bias, void* out, int64_t n,
               int epilogue) const {
    k_.gemm({x, k, w, bias, out, n, s_.num_tokens, n, k, dtype_, epilogue,
             static_cast<int>(a_.gate)});
  }

  void attend(char* qkv, void* out) const {
    const int64_t d = a_.head_size;
    const int64_t stride = (a_.num_heads + 2 * a_.num_kv_heads) * d;
    char* const key = qkv + static_cast<size_t>(a_.num_heads * d) * item_;
    char* const value = key + static_cast<size_t>(a_.num_kv_heads * d) * item_;
    if (a_.query_norm) head_norm(qkv, a_.num_heads, stride, a_.query_norm);
    if (a_.key_norm) head_norm(key, a_.num_kv_heads, stride, a_.key_norm);

    RopeStoreArgs r{};
    r.positions = s_.positions;
    r.cos_sin = a_.cos_sin;
    r.cos_sin_stride = a_.cos_sin_stride;
    r.rotary_dim = a_.rotary_dim;
    r.is_neox = static_cast<int>(a_.is_neox);
    r.cos_sin_dtype = static_cast<int>(a_.cos_sin_dtype);
    r.query = qkv;
    r.key = key;
    r.value = value;
    r.query_token_stride = r.key_token_stride = r.value_token_stride = stride;
    r.query_head_stride = r.key_head_stride = r.value_head_stride = d;
    r.num_heads = a_.num_heads;
    r.num_kv_heads = a_.num_kv_heads;
    r.cache = a_.cache;
    r.cache_block_stride = a_.cache_block_stride;
    r.cache_head_stride = a_.cache_head_stride;
    r.cache_token_stride = a_.cache_token_stride;
    r.slots = s_.slots;
    r.num_slots = s_.num_slots;
    r.num_tokens = s_.num_tokens;
    r.head_size = d;
    r.block_size = a_.block_size;
    r.dtype = dtype_;
    r.cache_dtype = static_cast<int>(a_.cache_dtype);
    r.max_position = a_.max_position;
    r.quantised = quantised();
    k_.rope_store(r);

    AttentionArgs at{};
    at.query = qkv;
    at.query_token_stride = stride;
    at.query_head_stride = at.out_head_stride = d;
    at.out = out;
    at.out_token_stride = a_.num_heads * d;
    at.cache = a_.cache;
    at.cache_block_stride = a_.cache_block_stride;
    at.cache_head_stride = a_.cache_head_stride;
    at.cache_token_stride = a_.cache_token_stride;
    at.query_start = s_.query_start;
    at.seq_lens = s_.seq_lens;
    at.block_table = s_.block_table;
    at.block_table_stride = s_.block_table_stride;
    at.alibi_slopes = a_.alibi_slopes;
    at.sinks = a_.sinks;
    at.num_requests = s_.num_requests;
    at.num_heads = a_.num_heads;
    at.num_kv_heads = a_.num_kv_heads;
    at.head_size = at.value_offset = at.value_size = d;
    at.block_size = a_.block_size;
    at.scale = static_cast<float>(a_.scale);
    at.soft_cap = static_cast<float>(a_.soft_cap);
    at.window = a_.window;
    at.causal = s_.causal;
    at.query_dtype = dtype_;
    at.cache_dtype = static_cast<int>(a_.cache_dtype);
    at.quantised = r.quantised;
    k_.attention(at);
  }

  QuantisedCache quantised() const {
    QuantisedCache q;
    q.format = static_cast<int>(a_.format);
    q.k_scale = static_cast<float>(a_.k_scale);
    q.v_scale = static_cast<float>(a_.v_scale);
    q.value_offset = a_.quantised_value_offset;
    q.scale_offset = a_.scale_offset;
    q.scale_head_stride = a_.scale_head_stride;
    q.scale_token_stride = a_.scale_token_stride;
    return q;
  }

  const DecoderLayer& a_;
  const DecoderStep& s_;
  const Kernels& k_;
  const int dtype_;
  const size_t item_;
};

}  // namespace

void decoder_layers(const DecoderLayer* layers, int64_t count, const DecoderStep& step) {
  for (int64_t i = 0; i < count; ++i) Layer(layers[i], step).run(i > 0 || step.has_branch);
}

}  // namespace vllm_cpu
