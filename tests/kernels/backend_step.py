"""A step of ``attention_case`` through a backend's own classes: store, metadata, forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.kernels.attention_case import Step, store
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, resolve_backend
from vllm.v1.kv_cache.declare import kv_cache_storage, turboquant_slot_bytes
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    TQFullAttentionSpec,
)

__all__ = ["backend_named", "prepare", "run_backend", "spec_of"]

# They multiply what lies behind a request's last token, in its last page, by zero.
_READ_WHOLE_PAGES = ("FLEX_ATTENTION", "FLASH_ATTN", "FLASH_ATTN_DIFFKV")


def backend_named(name: str) -> type[AttentionBackend]:
    return resolve_backend(AttentionBackendEnum.from_name(name))


def spec_of(
    cache_dtype: str,
    dtype: torch.dtype,
    *,
    page: int,
    kv_heads: int,
    head_size: int,
    head_size_v: int = 0,
    window: int = 0,
) -> AttentionSpec:
    """What a layer of the engine would declare.

    Raises:
        ConfigError: the format does not fit the heads.
    """
    stored, quant = kv_cache_storage(cache_dtype, dtype)
    common: dict[str, Any] = {
        "block_size": page, "num_kv_heads": kv_heads, "head_size": head_size,
        "head_size_v": head_size_v or None, "dtype": stored, "kv_quant_mode": quant,
    }  # fmt: skip
    if quant.is_turboquant:
        slot = turboquant_slot_bytes(cache_dtype, head_size)
        if not window:
            return TQFullAttentionSpec(**common, tq_slot_size=slot)
        common["state_content_bytes"] = slot
    if window:
        return SlidingWindowSpec(**common, sliding_window=window)
    return FullAttentionSpec(**common)


def _metadata(step: Step, backend: type[AttentionBackend]) -> Any:
    case = step.case
    lens = step.seq_lens.cpu()
    counts = torch.tensor([new for _, new in case.lengths], dtype=torch.int32)
    starts = step.starts.cpu()
    common = CommonAttentionMetadata(
        query_start_loc=step.starts, query_start_loc_cpu=starts, seq_lens=step.seq_lens,
        seq_lens_cpu=lens, num_computed_tokens_cpu=lens - counts, num_reqs=len(lens),
        num_actual_tokens=int(starts[-1]), max_query_len=int(counts.max()),
        max_seq_len=int(lens.max()), block_table_tensor=step.table,
        slot_mapping=torch.cat([s[-n:] for s, n in zip(step.slots, counts, strict=True)]),
    )  # fmt: skip
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=1024, get_num_attention_heads=lambda _: case.heads
        ),
        parallel_config=None,
        cache_config=SimpleNamespace(dtype_of_layer=lambda *_: case.cache_dtype),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
    )
    spec = spec_of(
        case.cache_dtype, case.dtype, page=case.page, kv_heads=case.kv_heads,
        head_size=case.head_size, head_size_v=case.head_size_v, window=case.window,
    )  # fmt: skip
    builder = backend.get_builder_cls()(spec, ["layer"], config, step.cache.device)
    everybody = all(length > case.shared for length, _ in case.lengths)
    return builder.build(case.shared if everybody else 0, common)


def _clear_as_the_engine_has(step: Step) -> None:
    """What earlier steps cleared for backends that read whole pages; the rest stays poison."""
    page = step.case.page
    for (length, new), slots in zip(step.case.lengths, step.slots, strict=True):
        old = length - new
        if old % page and (old - 1) // page == (length - 1) // page:
            step.cache[slots[-1] // page, :, length % page :] = 0


def prepare(step: Step, name: str) -> None:
    """Before anything is stored: not compiled, flex_attention multiplies all that a mask hides by
    zero, so there is no poison for it.
    """
    if name == "FLEX_ATTENTION" and not step.cache.is_cuda:
        step.cache.zero_()


def run_backend(step: Step, name: str, by_reference: bool) -> torch.Tensor:
    """Store all tokens, then attend; what the backend wrote into an output of NaN.

    Args:
        by_reference: the plain reference stores.
    """
    case, backend = step.case, backend_named(name)
    impl = backend.get_impl_cls()(
        case.heads, case.head_size, case.head_size**-0.5, case.kv_heads, step.slopes,
        case.window or None, case.cache_dtype, case.soft_cap or None,
        sinks=step.sinks,
    )  # fmt: skip
    layer: Any = SimpleNamespace(
        layer_name="layer", _k_scale_float=step.scales.k, _v_scale_float=step.scales.v
    )
    if by_reference:
        store(step, "TORCH_REF")
    else:
        for key, value, slots in zip(step.keys, step.values, step.slots, strict=True):
            impl.do_kv_cache_update(layer, key, value, step.cache, slots)
    if name in _READ_WHOLE_PAGES:
        _clear_as_the_engine_has(step)
    new = [count for _, count in case.lengths]
    key, value = (
        torch.cat([x[-n:] for x, n in zip(side, new, strict=True)])
        for side in (step.keys, step.values)
    )
    shape = (*step.query.shape[:2], case.width_v)
    # Inside a wider row, as a layer's output is.
    wide = torch.full((shape[0], shape[1] + 1, shape[2]), float("nan"), dtype=case.dtype)
    out = wide.to(step.query.device)[:, :-1]
    impl.forward(layer, step.query, key, value, step.cache, _metadata(step, backend), out)
    return out
