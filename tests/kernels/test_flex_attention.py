"""FLEX_ATTENTION: every token sees what its mask says, through the blocks of its request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm import _torch_ops
from vllm.errors import ConfigError
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flex_attention import (
    FlexAttentionBackend,
    FlexAttentionImpl,
    FlexAttentionMetadata,
)
from vllm.v1.attention.ops.triton_tails import clear_tails

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE, HEADS, KV_HEADS, D = 16, 4, 2, 32
LENGTHS = ((40, 20), (33, 1), (1, 1), (18, 18), (32, 3))


class Step:
    """A cache in the one layout, NaN in the slots that nobody has written.

    Not compiled, flex_attention multiplies the values of blocks that no one owns with 0: those
    hold NaN on a GPU only.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, shared: int = 0) -> None:
        self.pages = [-(-n // PAGE) for n, _ in LENGTHS]
        num_blocks = sum(self.pages) + 3
        self.raw = torch.zeros(num_blocks, PAGE, KV_HEADS, 2 * D, dtype=dtype, device=DEVICE)
        if DEVICE == "cuda":
            self.raw.fill_(float("nan"))
        self.cache = self.raw.transpose(1, 2)
        free = (torch.randperm(num_blocks - 1) + 1).tolist()
        self.table = torch.zeros(len(LENGTHS), max(self.pages), dtype=torch.int32)
        for request, (length, _) in enumerate(LENGTHS):
            for page in range(self.pages[request]):
                block = int(self.table[0, page]) if page < shared and request else free.pop()
                self.table[request, page] = block
                used = min(PAGE, length - page * PAGE)
                self.cache[block] = float("nan")
                content = torch.randn(KV_HEADS, used, 2 * D).to(DEVICE, dtype)
                self.cache[block, :, :used] = content
        counts = torch.tensor([n for _, n in LENGTHS]).int()
        self.lens = torch.tensor([n for n, _ in LENGTHS]).int()
        self.starts = torch.zeros(len(LENGTHS) + 1, dtype=torch.int32)
        self.starts[1:] = counts.cumsum(0)
        self.query = torch.randn(int(self.starts[-1]), HEADS, D).to(DEVICE, dtype)
        self.max_query_len = int(counts.max())

    def metadata(self, causal: bool = True) -> FlexAttentionMetadata:
        builder = FlexAttentionBackend.get_builder_cls()(None, ["layer"], None, DEVICE)
        common = CommonAttentionMetadata(
            query_start_loc=self.starts.to(DEVICE), query_start_loc_cpu=self.starts,
            seq_lens=self.lens.to(DEVICE), seq_lens_cpu=self.lens,
            num_computed_tokens_cpu=self.lens, num_reqs=len(LENGTHS),
            num_actual_tokens=int(self.starts[-1]), max_query_len=self.max_query_len,
            max_seq_len=int(self.lens.max()), block_table_tensor=self.table.to(DEVICE),
            slot_mapping=torch.full((int(self.starts[-1]),), -1), causal=causal,
        )  # fmt: skip
        return builder.build(0, common)

    def run(self, layer: Any = None, **options: Any) -> torch.Tensor:
        impl = FlexAttentionImpl(HEADS, D, D**-0.5, KV_HEADS, **options)
        # Blocks that are older than this step were cleared when they were begun.
        for request, (length, _) in enumerate(LENGTHS):
            if length % PAGE:
                self.cache[self.table[request, length // PAGE], :, length % PAGE :] = 0
        out = torch.full_like(self.query, float("nan"))
        return impl.forward(layer, self.query, None, None, self.cache, self.metadata(), out)

    def exact(self, **options: Any) -> torch.Tensor:
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        _torch_ops.paged_attention(
            self.query.cpu().double(), self.cache.cpu().nan_to_num().double(), out, self.starts,
            self.lens, self.table, D**-0.5, **options,
        )  # fmt: skip
        return out


@pytest.fixture(autouse=True)
def _seed(seed: int) -> None:
    """Fresh inputs, and the seed in the output of a test that fails."""


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, {}),
        ({"sliding_window": 9}, {"sliding_window": 9}),
        ({"logits_soft_cap": 5.0}, {"logits_soft_cap": 5.0}),
        ({"alibi_slopes": [0.5, 0.25, 0.1, 0.3]}, {"alibi_slopes": [0.5, 0.25, 0.1, 0.3]}),
    ],
    ids=["plain", "window", "soft cap", "alibi"],
)
def test_attention_equals_float64(options: dict, reference: dict, shared: int) -> None:
    step = Step(shared=shared)
    if "alibi_slopes" in reference:
        reference = {"alibi_slopes": torch.tensor(reference["alibi_slopes"])}
    torch.testing.assert_close(
        step.run(**options).cpu().double(), step.exact(**reference), atol=1e-4, rtol=1e-4
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_mask_of_ones_own() -> None:
    """The first 7 tokens see each other whole, as in a model of prefixes."""
    step = Step()

    def mask_mod(batch, head, query, key):
        return (key <= query) | (key < 7)

    got = step.run(SimpleNamespace(mask_mod=mask_mod))
    exact = step.exact()
    first = int(step.starts[3])
    whole = step.exact(causal=False)
    # Request 3 is a prompt of 18: its first tokens see 7, the others all before them.
    torch.testing.assert_close(
        got[first + 7 :].cpu().double(), exact[first + 7 :], atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(got[first].cpu().double(), exact[first], atol=1e-3)
    assert not torch.allclose(got[first].cpu().double(), whole[first], atol=1e-3)
    states = step.cache[step.table[3, 0], :, :7].cpu().double()
    key, value = (x.repeat_interleave(2, 0) for x in states.split(D, dim=-1))
    scores = torch.einsum("hd,hsd->hs", step.query[first].cpu().double(), key) * D**-0.5
    expected = torch.einsum("hs,hsd->hd", scores.softmax(-1), value)
    torch.testing.assert_close(got[first].cpu().double(), expected, atol=1e-4, rtol=1e-4)


def test_a_tile_visits_each_block_of_its_requests_once() -> None:
    step = Step(shared=1)
    metadata = step.metadata()
    counts, indices = metadata.visited(step.cache.shape[0], PAGE)
    assert counts.shape == (1,)
    visited = indices[0, : counts[0]].tolist()
    wanted = {
        int(block)
        for request in range(len(LENGTHS))
        for block in step.table[request, : step.pages[request]]
    }
    assert sorted(visited) == sorted(wanted)


def test_tails_are_cleared_but_for_decodes_in_a_block_begun_before() -> None:
    step = Step()
    before = step.cache.clone()
    clear_tails(step.cache, step.table.to(DEVICE), step.starts.to(DEVICE), step.lens.to(DEVICE))
    for request, (length, new) in enumerate(LENGTHS):
        block, used = int(step.table[request, (length - 1) // PAGE]), length % PAGE
        if used and (used <= new or new > 1):
            assert (step.cache[block, :, used:] == 0).all()
            step.cache[block, :, used:] = float("nan")
    assert torch.equal(step.cache.nan_to_num(9.0), before.nan_to_num(9.0))


def test_blocks_at_other_distances_are_refused() -> None:
    step = Step()
    pool = torch.zeros(9, 2, PAGE, KV_HEADS, 2 * D, device=DEVICE)
    step.cache = pool[:, 0].transpose(1, 2)
    with pytest.raises(ConfigError, match="equal distances"):
        FlexAttentionImpl(HEADS, D, 1.0, KV_HEADS)._one_sequence(step.cache)


def test_what_it_declines() -> None:
    wanted = {"head_size": 64, "dtype": torch.float32}
    assert FlexAttentionBackend.validate_configuration(**wanted) == []
    check = FlexAttentionBackend.validate_configuration
    assert check(**wanted, has_sink=True) == ["attention sinks not supported"]
    assert "kv cache dtype fp8" in check(**wanted, kv_cache_dtype="fp8")[0]
    assert [layout.name for layout in FlexAttentionBackend.supported_kv_cache_layouts()] == [
        "LBNHC"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_a_gpu(dtype: torch.dtype) -> None:
    step = Step(dtype)
    got, exact = step.run().cpu().double(), step.exact()
    assert (got - exact).norm() / exact.norm() < 2e-2
