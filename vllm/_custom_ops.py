"""Every operator that has a kernel of ours, each with a PyTorch form of the same meaning.

On the CPU the compiled extension ``vllm._C`` is used where it was built and knows the dtype; else
PyTorch does the work, which is said once. On a GPU ``_cuda_ops`` has the kernels. This module is
where callers find the operators; the modules that it takes them from, one for a family, check
dtypes, shapes and strides before an address is handed to C++. None of them may know layers,
caches' owners or models.
"""

from __future__ import annotations

from vllm._attention_ops import (
    MAX_HEAD_SIZE,
    cache_arguments,
    paged_attention,
    rope_and_store,
    rotary_embedding,
    store_kv_cache,
    store_latent,
)
from vllm._elementwise_ops import (
    argmax,
    fused_add_rms_norm,
    gelu_tanh_and_mul,
    layer_norm,
    rms_norm,
    silu_and_mul,
    swiglu_oai_and_mul,
)
from vllm._extension import (
    DTYPE_CODES,
    has_extension,
    isa,
    set_isa,
    set_num_threads,
    supported_isas,
)
from vllm._matmul_ops import (
    PackedExperts,
    PackedWeight,
    embedding,
    embedding_part,
    experts_gate_up_silu,
    experts_linear,
    gate_up_gelu_tanh,
    gate_up_silu,
    linear,
    linear_gelu,
    linear_into,
    logits,
    pack_experts,
    pack_weight,
)

__all__ = [
    "DTYPE_CODES",
    "MAX_HEAD_SIZE",
    "PackedExperts",
    "PackedWeight",
    "argmax",
    "cache_arguments",
    "embedding",
    "embedding_part",
    "experts_gate_up_silu",
    "experts_linear",
    "fused_add_rms_norm",
    "gate_up_gelu_tanh",
    "gate_up_silu",
    "gelu_tanh_and_mul",
    "has_extension",
    "isa",
    "layer_norm",
    "linear",
    "linear_gelu",
    "linear_into",
    "logits",
    "pack_experts",
    "pack_weight",
    "paged_attention",
    "rms_norm",
    "rope_and_store",
    "rotary_embedding",
    "set_isa",
    "set_num_threads",
    "silu_and_mul",
    "store_kv_cache",
    "store_latent",
    "supported_isas",
    "swiglu_oai_and_mul",
]
