"""Decodes behind a shared prefix, against float64: on a GPU, else in the interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm import _torch_ops
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
)
from vllm.v1.attention.ops.triton_cascade import prefix_worth_sharing
from vllm.v1.kv_cache_interface import FullAttentionSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Step:
    """Decodes whose first ``shared`` tokens lie in the same blocks; NaN in all unused slots."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        shared: int,
        *,
        page: int = 16,
        kv_heads: int = 2,
        group: int = 2,
        size: int = 32,
        dtype: torch.dtype = torch.float32,
        order: str = "LBHNC",
    ) -> None:
        self.lengths, self.page, self.kv_heads, self.dtype = lengths, page, kv_heads, dtype
        self.heads, self.size, self.shared = kv_heads * group, size, shared
        pages = [-(-n // page) for n in lengths]
        sizes = {"B": sum(pages) + 2, "H": kv_heads, "N": page, "C": 2 * size, "L": 2}
        pool = torch.full([sizes[axis] for axis in order], float("nan"), dtype=dtype, device=DEVICE)
        axes = order.replace("L", "")
        self.cache = pool.select(order.index("L"), 1).permute([axes.index(a) for a in "BHNC"])
        free = (torch.randperm(sizes["B"] - 1) + 1).tolist()
        self.table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        for request, count in enumerate(pages):
            for at in range(count):
                common = at < shared // page and request > 0
                block = int(self.table[0, at]) if common else free.pop()
                self.table[request, at] = block
                used = min(page, lengths[request] - at * page)
                if not common:
                    content = torch.randn(kv_heads, used, 2 * size).to(DEVICE, dtype)
                    self.cache[block, :, :used] = content
        self.query = torch.randn(len(lengths), self.heads, size).to(DEVICE, dtype)

    def metadata(self, common_prefix_len: int, window: int | None = None) -> Any:
        count = len(self.lengths)
        config: Any = SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=4096, get_num_attention_heads=lambda _: self.heads
            ),
            parallel_config=None,
            cache_config=SimpleNamespace(dtype_of_layer=lambda *_: "auto"),
            scheduler_config=SimpleNamespace(max_num_seqs=16),
        )
        spec = FullAttentionSpec(
            block_size=self.page, num_kv_heads=self.kv_heads, head_size=self.size,
            dtype="float32", sliding_window=window,
        )  # fmt: skip
        device = torch.device(DEVICE)
        builder = TritonAttentionBackend.get_builder_cls()(spec, ["layer"], config, device)
        starts = torch.arange(count + 1, dtype=torch.int32)
        lens = torch.tensor(self.lengths, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(DEVICE), query_start_loc_cpu=starts,
            seq_lens=lens.to(DEVICE), seq_lens_cpu=lens, num_computed_tokens_cpu=lens - 1,
            num_reqs=count, num_actual_tokens=count, max_query_len=1,
            max_seq_len=max(self.lengths), block_table_tensor=self.table.to(DEVICE),
            slot_mapping=torch.full((count,), -1, device=DEVICE),
        )  # fmt: skip
        return builder.build(common_prefix_len, common)

    def error(self, metadata: TritonAttentionMetadata, **options: Any) -> float:
        impl = TritonAttentionImpl(
            self.heads, self.size, self.size**-0.5, self.kv_heads,
            **options,
        )  # fmt: skip
        layer = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
        out = torch.full_like(self.query, float("nan"))
        impl.forward(layer, self.query, None, None, self.cache, metadata, out)
        exact = torch.zeros(self.query.shape, dtype=torch.float64)
        options = {
            name: value.cpu() if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        _torch_ops.paged_attention(
            self.query.cpu().double(), self.cache.cpu().nan_to_num().double(), exact,
            torch.arange(len(self.lengths) + 1), torch.tensor(self.lengths), self.table,
            self.size**-0.5, **options,
        )  # fmt: skip
        return float((out.cpu().double() - exact).norm() / exact.norm())


LENGTHS = (300, 273, 257 + 64, 400, 290)


@pytest.fixture(autouse=True)
def _seed(seed: int) -> None:
    """Fresh inputs, and the seed in the output of a test that fails."""


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"order": "BHLNC", "page": 64, "group": 3}, {"logits_soft_cap": 5.0}),
        ({"dtype": torch.float16, "kv_heads": 1, "group": 16, "size": 48}, {}),
        ({"order": "LBNHC"}, {"sinks": True}),
    ],
    ids=["plain", "soft cap", "half", "sinks"],
)
def test_attention_equals_float64(shape: dict[str, Any], options: dict[str, Any]) -> None:
    step = Step(LENGTHS, 256, **shape)
    if options.get("sinks"):
        options = {"sinks": torch.randn(step.heads, device=DEVICE)}
    metadata = step.metadata(256)
    assert metadata.cascade is not None and metadata.cascade.prefix_len == 256
    assert step.error(metadata, **options) < TOLERANCE[step.dtype]


def test_a_request_that_only_fills_a_batch_up_changes_nothing() -> None:
    step = Step(LENGTHS, 256)
    metadata = step.metadata(256)
    metadata.cascade.rest_lens[2] = -256
    metadata.seq_lens[2] = 0
    out = torch.full_like(step.query, float("nan"))
    impl = TritonAttentionImpl(step.heads, step.size, step.size**-0.5, step.kv_heads)
    impl.forward(SimpleNamespace(), step.query, None, None, step.cache, metadata, out)
    # Planned before the length was taken away, its rest may be read; nothing of it is written.
    assert out[2].isnan().all() and not out[[0, 1, 3, 4]].isnan().any()


def test_where_it_does_not_pay_or_is_not_known_each_request_reads_for_itself() -> None:
    step = Step(LENGTHS, 256)
    assert step.metadata(0).cascade is None
    assert step.metadata(128).cascade is None
    assert step.metadata(256, window=64).cascade is None
    assert Step(LENGTHS[:2], 256).metadata(256).cascade is None
    # Biases by distance want positions from the start.
    slopes = torch.rand(step.heads, device=DEVICE)
    assert step.error(step.metadata(256), alibi_slopes=slopes) < TOLERANCE[torch.float32]


def test_a_prefix_is_whole_blocks_and_leaves_each_request_a_token() -> None:
    assert prefix_worth_sharing(1000, 8, 2000, 64) == 960
    assert prefix_worth_sharing(1024, 8, 1024, 64) == 960
    assert prefix_worth_sharing(1024, 8, 1025, 64) == 1024
    assert prefix_worth_sharing(255, 8, 2000, 16) == 0
    assert prefix_worth_sharing(1024, 3, 2000, 16) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_requests_on_a_gpu(dtype: torch.dtype) -> None:
    lengths = tuple(2048 + 37 * i for i in range(1, 33))
    step = Step(lengths, 2048, page=64, kv_heads=8, group=4, size=128, dtype=dtype, order="BHLNC")
    metadata = step.metadata(2048)
    assert metadata.cascade is not None
    assert step.error(metadata) < TOLERANCE[dtype]
