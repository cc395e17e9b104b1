"""One step of a backend over a library, on any device, against float64.

Unused slots and the output are NaN, blocks are shuffled, the cache is one layer's view of a pool
and the query a part of a wider row.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vllm import _torch_ops
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.ops.kv_formats import kv_format
from vllm.v1.kv_cache_interface import FullAttentionSpec

__all__ = ["Step"]

POOL_LAYERS = 3


@dataclass
class Step:
    """A step over one layer's cache; its tokens are stored by the impl.

    ``lengths`` holds (tokens in the cache, of these new) per request. ``widths`` are those of a
    key and a value. ``far`` puts the blocks behind so many others that nobody has. ``cleared``:
    earlier steps have cleared the tails of blocks that they began.
    """

    backend: type[AttentionBackend]
    lengths: tuple[tuple[int, int], ...]
    order: str = "LBHNC"
    kv_heads: int = 2
    widths: tuple[int, int] = (32, 32)
    cache_dtype: str = "auto"
    shared_pages: int = 0
    causal: bool = True
    options: dict[str, Any] | None = None
    page: int = 16
    group: int = 2
    dtype: torch.dtype = torch.float16
    device: str = "cpu"
    far: int = 0
    max_model_len: int = 512
    cleared: bool = True

    def __post_init__(self) -> None:
        self.heads = self.group * self.kv_heads
        width = self.widths[0]
        pages = [-(-n // self.page) for n, _ in self.lengths]
        self.cache = self._make_cache(sum(pages) + 2)
        free = (torch.randperm(sum(pages) + 1) + 1 + self.far).tolist()
        table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        for request, count in enumerate(pages):
            for page in range(count):
                shared = page < self.shared_pages and request > 0
                table[request, page] = table[0, page] if shared else free.pop()
        self.table = table.to(self.device)
        self._set_lengths(self.lengths)
        options = {"kv_cache_dtype": self.cache_dtype} | (self.options or {})
        self.impl = self.backend.get_impl_cls()(
            self.heads, width, width**-0.5, self.kv_heads, **options
        )
        self.layer = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=2.0)
        self.new = self._store()

    def _make_cache(self, blocks: int) -> torch.Tensor:
        sizes = {
            "B": blocks + self.far, "H": self.kv_heads, "N": self.page, "C": sum(self.widths),
            "L": POOL_LAYERS,
        }  # fmt: skip
        kept = torch.uint8 if kv_format(self.cache_dtype) else self.dtype
        axes = self.order.replace("L", "")
        pool = torch.empty([sizes[a] for a in self.order], dtype=kept, device=self.device)
        view = pool.select(self.order.index("L"), 1).permute([axes.index(a) for a in "BHNC"])
        view[self.far :] = 255 if kept == torch.uint8 else float("nan")
        return view

    def _set_lengths(self, lengths: tuple[tuple[int, int], ...]) -> None:
        self.lengths = lengths
        self.host_lens = torch.tensor([n for n, _ in lengths], dtype=torch.int32)
        self.counts = torch.tensor([n for _, n in lengths], dtype=torch.int32)
        self.host_starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        self.host_starts[1:] = self.counts.cumsum(0)
        self.lens, self.starts = self.host_lens.to(self.device), self.host_starts.to(self.device)
        wide = torch.randn(int(self.host_starts[-1]), self.heads + 2, self.widths[0])
        self.query = wide.to(self.device, self.dtype)[:, 1:-1]

    def _store(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Every request's tokens, those of this step last; returns this step's K and V."""
        new = []
        for request, (length, count) in enumerate(self.lengths):
            at = torch.arange(length)
            if request:
                at = at[min(self.shared_pages * self.page, length - count) :]
            row = self.table[request].cpu()
            slots = (row[at // self.page].long() * self.page + at % self.page).to(self.device)
            key, value = (
                torch.randn(len(at), self.kv_heads, width).to(self.device, self.dtype)
                for width in self.widths
            )
            fmt, scales = kv_format(self.cache_dtype), self.impl.side_scales(self.layer)
            old = len(at) - count
            _torch_ops.store_kv_cache(key[:old], value[:old], self.cache, slots[:old], fmt, scales)
            self.impl.do_kv_cache_update(
                self.layer, key[old:], value[old:], self.cache, slots[old:]
            )
            used = length % self.page
            if self.cleared and count == 1 and used > 1:
                self.cache[row[length // self.page], :, used:] = 0
            new.append((key[-count:], value[-count:]))
        keys, values = zip(*new, strict=True)
        return torch.cat(keys), torch.cat(values)

    def builder(self) -> Any:
        config: Any = SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=self.max_model_len, enforce_eager=False,
                get_num_attention_heads=lambda _: self.heads,
            ),
            parallel_config=None,
            cache_config=SimpleNamespace(dtype_of_layer=lambda *_: self.cache_dtype),
            scheduler_config=SimpleNamespace(max_num_seqs=max(8, len(self.lengths))),
        )  # fmt: skip
        spec = FullAttentionSpec(
            block_size=self.page, num_kv_heads=self.kv_heads, head_size=self.widths[0],
            head_size_v=self.widths[1], dtype=str(self.dtype).removeprefix("torch."),
            sliding_window=self.impl.sliding_window or None,
        )  # fmt: skip
        return self.backend.get_builder_cls()(spec, ["layer"], config, torch.device(self.device))

    def common(self) -> CommonAttentionMetadata:
        tokens = int(self.host_starts[-1])
        return CommonAttentionMetadata(
            query_start_loc=self.starts, query_start_loc_cpu=self.host_starts, seq_lens=self.lens,
            seq_lens_cpu=self.host_lens, num_computed_tokens_cpu=self.host_lens - self.counts,
            num_reqs=len(self.lengths), num_actual_tokens=tokens,
            max_query_len=int(self.counts.max()), max_seq_len=int(self.host_lens.max()),
            block_table_tensor=self.table,
            slot_mapping=torch.full((tokens,), -1, device=self.device), causal=self.causal,
        )  # fmt: skip

    def output(self) -> torch.Tensor:
        shape = (len(self.query), self.heads, self.widths[1])
        return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

    def run(self, metadata: Any = None) -> torch.Tensor:
        self.metadata = metadata or self.builder().build(
            self.shared_pages * self.page, self.common()
        )
        out = self.output()
        return self.impl.forward(self.layer, self.query, *self.new, self.cache, self.metadata, out)

    def exact(self, **features: Any) -> torch.Tensor:
        fmt = kv_format(self.cache_dtype)
        out = torch.zeros(
            len(self.query), self.heads, self.widths[1], dtype=torch.float64, device=self.device
        )
        # The pages that requests have, as blocks of a small cache.
        pages, table = self.table.flatten().unique(return_inverse=True)
        cache = self.cache[pages.long()]
        _torch_ops.paged_attention(
            self.query.double(), cache if fmt else cache.double().nan_to_num(), out, self.starts,
            self.lens, table.view(self.table.shape).int(), self.widths[0] ** -0.5,
            causal=self.causal, fmt=fmt, scales=self.impl.side_scales(self.layer), **features,
        )  # fmt: skip
        return out

    def error(self, **features: Any) -> float:
        """Relative to float64; NaN where an output was left as it was."""
        got, exact = self.run().double(), self.exact(**features)
        return float((got - exact).norm() / exact.norm())
