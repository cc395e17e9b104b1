"""State layers find their blocks where the scheduler puts them, in every mode."""

import pytest
import torch

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mamba_attn import StateAttentionBackend
from vllm.v1.attention.ops.triton_state_blocks import StateBlocks
from vllm.v1.kv_cache_interface import MambaSpec

BLOCK = 8
TABLE = torch.arange(100, 140, dtype=torch.int32).view(4, 10)
STEP = [(0, 5), (5, 1), (8, 1), (3, 22)]
"""(tokens before, tokens of this step) of each request."""


def build(mode, step=STEP):
    spec = MambaSpec(
        block_size=BLOCK if mode != "none" else 80,
        shapes=((3, 4),),
        dtypes=("float32",),
        mamba_cache_mode=mode,
    )
    builder = StateAttentionBackend.get_builder_cls()(spec, ["layer"], None, torch.device("cpu"))
    before = torch.tensor([b for b, _ in step], dtype=torch.int32)
    sizes = torch.tensor([n for _, n in step], dtype=torch.int32)
    starts = torch.zeros(len(step) + 1, dtype=torch.int32)
    starts[1:] = sizes.cumsum(0)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=before + sizes,
        seq_lens_cpu=before + sizes,
        num_computed_tokens_cpu=before,
        num_reqs=len(step),
        num_actual_tokens=int(sizes.sum()),
        max_query_len=int(sizes.max()),
        max_seq_len=int((before + sizes).max()),
        block_table_tensor=TABLE[: len(step)],
        slot_mapping=torch.zeros(int(sizes.sum()), dtype=torch.int64),
    )
    return builder.build(0, common)


def test_one_block_holds_the_state_of_a_whole_request():
    metadata = build("none")
    assert list(metadata.segments.runs()) == [
        (-1, [(0, 5, 100)]),
        (110, [(5, 6, 110)]),
        (120, [(6, 7, 120)]),
        (130, [(7, 29, 130)]),
    ]
    assert metadata.has_initial_state.tolist() == [False, True, True, True]


def test_a_step_writes_where_its_last_token_lies():
    # After 8 tokens the state is in column 0, the next token's goes to column 1.
    assert list(build("align").segments.runs()) == [
        (-1, [(0, 5, 100)]),
        (110, [(5, 6, 110)]),
        (120, [(6, 7, 121)]),
        (130, [(7, 29, 133)]),
    ]


def test_states_at_the_ends_of_blocks_are_kept():
    assert list(build("all").segments.runs()) == [
        (-1, [(0, 5, 100)]),
        (110, [(5, 6, 110)]),
        (120, [(6, 7, 121)]),
        (130, [(7, 12, 130), (12, 20, 131), (20, 28, 132), (28, 29, 133)]),
    ]


@pytest.mark.parametrize("mode", ["none", "align", "all"])
def test_segments_cover_every_token_once_and_end_where_the_scheduler_looks(mode):
    metadata = build(mode)
    segments = metadata.segments
    tokens = []
    for r, (_, runs) in enumerate(segments.runs()):
        for start, end, _ in runs:
            assert start < end
            tokens += range(start, end)
        column = 0 if mode == "none" else (sum(STEP[r]) - 1) // BLOCK
        assert runs[-1][2] == TABLE[r, column]
    assert tokens == list(range(metadata.num_actual_tokens))


def test_steps_of_one_token_each_are_told():
    for mode in ("none", "align", "all"):
        assert build(mode, [(3, 1), (8, 1), (0, 1)]).segments.is_one_token_each
        assert not build(mode).segments.is_one_token_each


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        *((mode, (1, 1, 1, 1)) for mode in ("none", "align", "all")),
        *((mode, (5, 1, 1, 22)) for mode in ("none", "align")),
    ],
)
def test_a_device_finds_the_same_blocks(mode, sizes):
    step = [(before, size) for (before, _), size in zip(STEP, sizes, strict=True)]
    expected = build(mode, step).segments
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    starts = torch.zeros(6, dtype=torch.int32)
    starts[1:5] = torch.tensor(sizes).cumsum(0)
    starts[5] = starts[4] + 1
    # A fifth request that only fills a captured step up.
    lens = torch.tensor([before + size for before, size in step] + [0], dtype=torch.int32)
    table = torch.cat((TABLE, TABLE[:1]))
    blocks = StateBlocks(9, device)
    for _ in range(2):
        found = blocks.find(
            starts.to(device),
            lens.to(device),
            table.to(device),
            0 if mode == "none" else BLOCK,
            int(starts[5]),
        )
    assert found.sources.tolist() == [*expected.sources.tolist(), -1]
    assert found.targets.tolist() == [*expected.targets.tolist(), -1]
    assert found.request_starts.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.num_requests == 5
